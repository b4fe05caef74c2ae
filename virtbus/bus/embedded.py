"""The embedded bus: one host, no server, many processes, consumer groups; at least once over SIGKILL.

A kombu virtual transport of our own over one SQLite file (see `embedded_log` for what that guarantees),
and the `Bus` over it. It is for a try-out, for tests and for single hosts. URLs: `embedded:` (the file
`bus.db` in the state folder), `embedded:///absolute/file` (a folder: `bus.db` in it), both with an
optional `?max_bytes=N` (default 64 MiB).

What differs from a broker with a server:

- An event is `Confirmed` when it is on disk, whether or not anybody is bound: the log keeps it. A group
  begins with the oldest event in the log when it is first named; `consume(None)` sees what comes later.
- The log is bounded. What every group has settled gives way to new events; what nobody has read never
  does: publishing is then `Deferred`, and the error names who has not read. To drop it on purpose, stop
  the users of the file and delete it.
- A message is leased: when its consumer is killed somebody gets it again within about a second; when the
  consumer hangs with all its threads (or lives in another container), within `LEASE_SECONDS`.
- There is no proven user: whoever may open the file (mode 0600) may publish.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from uuid import uuid4

import kombu

from virtbus import envelope
from virtbus.bus import REASON_HEADER, BusOptions, DeadLetter, Feed, Memory, checked_group
from virtbus.bus.embedded_log import DEFAULT_MAX_BYTES, SMALLEST_MAX_BYTES, Log, LogFull, LogState, look, peek
from virtbus.bus.embedded_transport import KEY, Channel, connect, payload_of
from virtbus.errors import BusDenied, BusUnavailable, ConfigError, RecordRefused
from virtbus.model import Binding, Check, Confirmed, Deferred, Message, Outcome, Record, Refused
from virtbus.retry import Backoff
from virtbus.telemetry import BusConnected, BusLost, Trouble, emit

FILE_NAME = "bus.db"
_RECONNECT_CEILING_SECONDS = 1.0
_ALL = 1 << 31  # dead letters at a look

# ------------------------------------------------------------------------------------------ the bus


class EmbeddedBus:
    """The `Bus` over the embedded log; see this module's docstring for what differs from a broker."""

    def __init__(self, url: str, *, options: BusOptions) -> None:
        """Read the URL; opens nothing. Raises ConfigError that says what in the URL can't be used."""
        self.path, self.max_bytes = _read_url(url, options)
        self._options = options
        self._name = f"embedded://{self.path}"
        self._connection: kombu.Connection | None = None
        self._producer: kombu.Producer | None = None
        self._closed = threading.Event()

    def publish(self, feed: Feed) -> Iterator[tuple[Record, Outcome]]:
        """One transaction a window; see `Bus.publish`. A full log or disk is `Deferred` and ends the call."""
        producer = self._connected()
        while records := feed.take(self._options.window, frozenset()):
            outcomes = self._publish_window(producer, records)
            yield from zip(records, outcomes, strict=True)
            if any(isinstance(outcome, Deferred) for outcome in outcomes):
                return

    def _publish_window(self, producer: kombu.Producer, records: Sequence[Record]) -> list[Outcome]:
        """An outcome for each record, in their order."""
        outcomes: list[Outcome | None] = [self._too_large(record) for record in records]
        good = [index for index, outcome in enumerate(outcomes) if outcome is None]
        try:
            self._commit(producer, [records[index] for index in good])
            return [outcome or Confirmed() for outcome in outcomes]
        except (LogFull, RecordRefused):
            # None was stored. One by one: what fits goes in, and what does not is named.
            full: LogFull | None = None
            for index in good:
                try:
                    if full is None:
                        self._commit(producer, [records[index]])
                    outcomes[index] = Confirmed() if full is None else Deferred(full)
                except LogFull as error:
                    full, outcomes[index] = error, Deferred(error)
                except RecordRefused as error:
                    outcomes[index] = Refused(error)
                except (BusUnavailable, BusDenied) as error:
                    return self._lost(outcomes, error)
            return [outcome or Confirmed() for outcome in outcomes]
        except (BusUnavailable, BusDenied) as error:
            return self._lost(outcomes, error)

    def _lost(self, outcomes: Sequence[Outcome | None], error: BusUnavailable | BusDenied) -> list[Outcome]:
        self._drop_connection()
        if not self._closed.is_set():
            emit(BusLost(self._name, error))
        return [outcome or Deferred(error) for outcome in outcomes]

    def _too_large(self, record: Record) -> Refused | None:
        most = self._options.max_record_bytes
        if len(record.body) <= most:
            return None
        return Refused(RecordRefused(f"record of {len(record.body)} bytes: bus.max_record_bytes is {most}"))

    def _commit(self, producer: kombu.Producer, records: Sequence[Record]) -> None:
        channel: Channel = producer.channel
        channel.tx_select()
        for record in records:
            wire = envelope.to_amqp(record.attributes, record.body, structured=self._options.structured)
            producer.publish(
                wire.body,
                routing_key=envelope.routing_key(record.attributes),
                content_type=wire.content_type,
                content_encoding="binary",
                headers=dict(wire.headers),
                message_id=record.id,
                retry=False,
                **{KEY: record.key},
            )
        channel.tx_commit()

    def _connected(self) -> kombu.Producer:
        if self._closed.is_set():
            raise BusUnavailable(f"embedded bus {self.path}: closed")
        if self._producer is None:
            self._connection = connect(self.path, self.max_bytes)
            exchange = kombu.Exchange(self._options.exchange, type="topic", durable=True)
            self._producer = kombu.Producer(self._connection.channel(), exchange=exchange, auto_declare=False)
            emit(BusConnected(self._name))
        return self._producer

    def _drop_connection(self) -> None:
        connection, self._connection, self._producer = self._connection, None, None
        if connection is not None:
            connection.release()

    def tick(self) -> None:
        """Nothing to serve: there is no peer."""

    def consume(
        self, group: str | None, *, prefetch: int = 100, exclusive: bool = False, memory: Memory | None = None
    ) -> EmbeddedSubscription:
        """Subscribe; see `Bus.consume`. A new group begins with the oldest event that the log still has.

        It takes effect at once when the file can be used, else when `receive` can use it.
        """
        if self._closed.is_set():
            raise BusUnavailable(f"embedded bus {self.path}: closed")
        subscription = EmbeddedSubscription(
            self.path, self.max_bytes, self._options.exchange, checked_group(group), prefetch, exclusive
        )
        with contextlib.suppress(BusUnavailable, BusDenied):  # receive() tries again, and raises
            subscription.connect()
        return subscription

    def dead_letters(self, group: str) -> EmbeddedDeadLetters:
        """See virtbus.bus.Bus."""
        return EmbeddedDeadLetters(self.path, self.max_bytes, f"virtbus.{checked_group(group)}")

    def probe(self) -> Sequence[Check]:
        """Whether the file can be made or used, is whole, and has room; changes nothing."""
        found = _nearest_folder(self.path.parent)
        if not os.access(self.path, os.F_OK):
            if not found.is_dir():
                away = BusUnavailable(f"embedded bus {self.path}: can't be made: {found} is no folder")
                return [_failed(away, "choose another folder")]
            if os.access(found, os.W_OK | os.X_OK):
                return [Check("bus", "ok", f"{self._name}: no file yet; the first use makes it")]
            refused = BusDenied(f"embedded bus {self.path}: {found} is not writable")
            return [_failed(refused, "choose another folder")]
        try:
            state = look(self.path)
        except (BusUnavailable, BusDenied) as error:
            return [_failed(error, "see the message; the bus URL is bus.url")]
        if not os.access(self.path, os.W_OK) or not os.access(self.path.parent, os.W_OK):
            denied = BusDenied(f"embedded bus {self.path}: it or its folder is not writable")
            return [_failed(denied, "run as the user who owns them")]
        return [
            Check("bus", "ok", f"{self._name}: whole", details={"messages": state.messages}),
            self._room(state),
        ]

    def _room(self, state: LogState) -> Check:
        details: Mapping[str, object] = {queue.name: queue.waiting for queue in state.queues}
        summary = f"{state.bytes} of {self.max_bytes} bytes used"
        behind = max(state.queues, key=lambda queue: queue.waiting, default=None)
        if state.bytes < 0.9 * self.max_bytes or (behind is not None and behind.waiting == 0):
            return Check("bus room", "ok", summary, details=details)
        who = f"consume group {behind.name.removeprefix('virtbus.')}" if behind else "start a consumer"
        return Check("bus room", "warning", f"{summary}; full means deferred", remedy=who, details=details)

    def close(self) -> None:
        """Let go of the publisher's connection; idempotent. Subscriptions are closed by their owners."""
        self._closed.set()
        self._drop_connection()


class EmbeddedSubscription:
    """One consumer's stream of the embedded bus; see `Subscription`."""

    def __init__(
        self,
        path: Path,
        max_bytes: int,
        exchange: str,
        group: str | None,
        prefetch: int,
        exclusive: bool = False,
    ) -> None:
        self._path, self._max_bytes, self._prefetch = path, max_bytes, prefetch
        name = f"virtbus.anonymous.{uuid4().hex}" if group is None else f"virtbus.{group}"
        self._queue = kombu.Queue(
            name,
            kombu.Exchange(exchange, type="topic", durable=True),
            routing_key="#",
            exclusive=group is None,
            auto_delete=group is None,
        )
        self._lock_path = path.with_name(f"{path.name}.{name}.lock") if exclusive and group else None
        self._lock_file: int | None = None
        self._connection: kombu.Connection | None = None
        self._channel: Channel | None = None
        self._inbox: deque[Any] = deque()
        self._asides: list[tuple[float, Message, str, Backoff]] = []
        self._connections = count(1)
        self._backoff = Backoff("consume", ceiling=_RECONNECT_CEILING_SECONDS)
        self._generation = 0
        self._closed = False

    def connect(self) -> None:
        """Open the log and declare the queue, unless that is done. Raises BusUnavailable, BusDenied."""
        if self._connection is not None:
            return
        self._claim()
        connection = connect(self._path, self._max_bytes)
        try:
            channel = connection.channel()
            consumer = kombu.Consumer(channel, [self._queue], on_message=self._inbox.append)
            consumer.qos(prefetch_count=self._prefetch)
            consumer.consume()
        except BaseException:
            connection.release()
            raise
        self._connection, self._channel = connection, channel
        self._generation = next(self._connections)
        self._backoff.reset()

    def receive(self, timeout: float) -> Message | None:
        """The next message, or None after `timeout` seconds or once it is closed.

        While the file can't be used it is tried again until the time is up, and then BusUnavailable is
        raised; BusDenied is raised at once.
        """
        end = time.monotonic() + timeout
        while not self._closed:
            try:
                self.connect()
                self._again()
                assert self._connection is not None
                self._connection.drain_events(timeout=max(0.0, end - time.monotonic()))
                received = self._inbox.popleft()
                return _message(received._raw, handle=(self._generation, received.delivery_tag))
            except TimeoutError:
                return None
            except BusDenied:
                self._drop()
                raise
            except BusUnavailable as error:
                self._lost(error)
                left = end - time.monotonic()
                if left <= 0:
                    raise
                time.sleep(min(left, self._backoff.next_wait()))
        return None

    def ack(self, message: Message) -> None:
        """Settle it; over a lost connection it comes again."""
        if (channel := self._holder(message)) is not None:
            try:
                channel.basic_ack(_tag(message))
            except BusUnavailable as error:
                self._lost(error)

    def retry(self, message: Message, after: float) -> None:
        """Give it back; nothing of its key is handed out before it."""
        if (channel := self._holder(message)) is not None:
            try:
                channel.delay(_tag(message), after)
            except BusUnavailable as error:
                self._lost(error)

    def dead_letter(self, message: Message, reason: str) -> None:
        """Move it to `virtbus.<group>.dead`; what finds no room waits, still leased, and is tried again."""
        self._put_aside(message, reason, Backoff("dead_letter", hook=lambda _: None))

    def _put_aside(self, message: Message, reason: str, backoff: Backoff) -> None:
        if (channel := self._holder(message)) is None:
            return
        try:
            channel.dead_letter(_tag(message), reason)
        except LogFull as error:
            emit(Trouble(f"putting {message.position} aside; trying again, other messages go on", error))
            self._asides.append((time.monotonic() + backoff.next_wait(), message, reason, backoff))
        except BusUnavailable as error:
            self._lost(error)

    def _again(self) -> None:
        """Try again to put aside what found no room, each when it is due."""
        now = time.monotonic()
        due, self._asides = (
            [one for one in self._asides if one[0] <= now],
            [one for one in self._asides if one[0] > now],
        )
        for _, message, reason, backoff in due:
            self._put_aside(message, reason, backoff)

    def close(self) -> None:
        """Leave; idempotent."""
        self._closed = True
        self._drop()
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    def _claim(self) -> None:
        """An exclusive member holds a lock beside the log; the kernel lets go of it when we are killed."""
        if self._lock_path is None or self._lock_file is not None:
            return
        try:
            handle = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise BusUnavailable(f"embedded bus {self._path}: {self._lock_path}: {error.strerror}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            raise BusUnavailable(
                f"embedded bus {self._path}: another consumer of {self._queue.name} is active; standing by"
            ) from error
        self._lock_file = handle

    def _holder(self, message: Message) -> Channel | None:
        """The channel of a message, or None when its connection is gone: then it comes again."""
        handle = message.handle
        same = isinstance(handle, tuple) and handle[0] == self._generation
        return self._channel if same else None

    def _lost(self, error: BusUnavailable) -> None:
        if self._connection is not None:
            emit(BusLost(f"embedded://{self._path}", error))
        self._drop()

    def _drop(self) -> None:
        connection, self._connection, self._channel = self._connection, None, None
        self._generation = 0
        self._inbox.clear()
        self._asides.clear()
        if connection is not None:
            connection.release()


class EmbeddedDeadLetters:
    """See virtbus.bus.DeadLetters: it reads beside everybody, and takes only what gets a verdict."""

    def __init__(self, path: Path, max_bytes: int, queue: str) -> None:
        """`queue` is the group's."""
        self._path, self._max_bytes, self._queue = path, max_bytes, queue
        self._read = 0

    def __enter__(self) -> EmbeddedDeadLetters:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def count(self) -> int:
        """See virtbus.bus.DeadLetters."""
        return len(peek(self._path, f"{self._queue}.dead", _ALL))

    def read(self, limit: int | None = None) -> Iterator[DeadLetter]:
        """See virtbus.bus.DeadLetters."""
        leases = [one for one in peek(self._path, f"{self._queue}.dead", _ALL) if one.pos > self._read]
        for lease in leases[:limit]:
            self._read = lease.pos
            message = _message(payload_of(lease), handle=lease.pos)
            headers = {name: value for name, value in message.headers.items() if isinstance(value, str)}
            yield DeadLetter(
                position=f"{self._queue}.dead@{lease.pos}",
                id=headers.get("ce-id"),
                source=headers.get("ce-source"),
                type=headers.get("ce-type"),
                reason=headers.get(REASON_HEADER, ""),
                at=None,
                size_bytes=len(message.body),
                message=message,
            )

    def send_back(self, letter: DeadLetter) -> None:
        """See virtbus.bus.DeadLetters."""
        self._move(letter, self._queue)

    def drop(self, letter: DeadLetter) -> None:
        """See virtbus.bus.DeadLetters."""
        self._move(letter, None)

    def _move(self, letter: DeadLetter, into: str | None) -> None:
        with contextlib.closing(Log(self._path, max_bytes=self._max_bytes)) as log:
            pos = letter.message.handle
            assert isinstance(pos, int)
            if into is None:
                log.settle(f"{self._queue}.dead", pos)
            else:
                log.dead_letter(f"{self._queue}.dead", pos, into, {REASON_HEADER: None})

    def close(self) -> None:
        """Nothing is held."""


# ---------------------------------------------------------------------------------------- small parts


def _tag(message: Message) -> str:
    assert isinstance(message.handle, tuple)
    return str(message.handle[1])


def _message(payload: Mapping[str, Any], *, handle: object) -> Message:
    headers, properties = payload["headers"], payload["properties"]
    return Message(
        binding=Binding.AMQP,
        headers=headers,
        content_type=payload["content-type"],
        body=payload["body"],
        key=properties[KEY],
        redelivered=properties["delivery_info"]["redelivered"],
        user_id=None,
        position=properties["delivery_tag"],
        handle=handle,
    )


def _failed(error: BusUnavailable | BusDenied, remedy: str) -> Check:
    return Check("bus", "failed", str(error), remedy=remedy, exit_code=error.exit_code)


def _nearest_folder(folder: Path) -> Path:
    # Not exists(): that raises where a folder above must not be entered.
    while not os.access(folder, os.F_OK) and folder != folder.parent:
        folder = folder.parent
    return folder


def _read_url(url: str, options: BusOptions) -> tuple[Path, int]:
    """The file and the bound in bytes that an `embedded:` URL names."""
    parts = urlsplit(url)
    example = "write embedded: or embedded:///path/to/file"
    if parts.netloc or parts.fragment:
        raise ConfigError(f"the bus URL {url!r} names a host or fragment, and this bus has none: {example}")
    query = parse_qs(parts.query, keep_blank_values=True)
    if unknown := sorted(query.keys() - {"max_bytes"}):
        raise ConfigError(f"the bus URL {url!r} has an unknown option {unknown[0]!r}; known is max_bytes")
    text = query.get("max_bytes", [str(DEFAULT_MAX_BYTES)])[-1]
    if not text.isascii() or not text.isdigit() or int(text) < SMALLEST_MAX_BYTES:
        raise ConfigError(
            f"the bus URL's max_bytes is {text!r}: write a number, at least {SMALLEST_MAX_BYTES}"
        )
    path = unquote(parts.path)
    if not path:
        if options.state_dir is None:
            raise ConfigError(f"the bus URL embedded: needs a state folder: set --state-dir, or {example}")
        return Path(options.state_dir) / FILE_NAME, int(text)
    if not path.startswith("/"):
        raise ConfigError(f"the bus URL {url!r} names a relative file: {example}")
    chosen = Path(path)
    return chosen / FILE_NAME if path.endswith("/") or chosen.is_dir() else chosen, int(text)
