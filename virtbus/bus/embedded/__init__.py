"""The embedded bus: one host, no server, many processes, consumer groups; at least once over SIGKILL.

For a try-out, for tests, and as a single host's log: it is not a broker. URLs: `embedded:` (the file
`bus.db` in the state folder), `embedded:///absolute/file` (a folder: `bus.db` in it), both with an optional
`?max_bytes=N` (64 MiB). What differs from a broker with a server:

- An event is `Confirmed` when it is on disk, whether or not anybody reads: the log keeps it. A group begins
  with the oldest event in the log when it is first named; `consume(None)` sees what comes later.
- The log is bounded. What every group has settled is evicted for new events; what nobody has read never
  is: publishing is then `Deferred`, and the error names who has not read. To drop it on purpose, stop the
  users of the file and delete it.
- A message is leased: when its consumer is killed somebody gets it again within about a second; when the
  consumer hangs, after `LEASE_SECONDS` without a call.
- There is no proven user: whoever may open the file (mode 0600) may publish.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path

from virtbus import envelope
from virtbus.bus import REASON_HEADER, BusOptions, DeadLetter, Feed, Memory, checked_group
from virtbus.bus.embedded.log import (
    DEFAULT_MAX_BYTES,
    SMALLEST_MAX_BYTES,
    Log,
    LogState,
    Member,
    Stored,
    size_of,
)
from virtbus.bus.url import read_url
from virtbus.errors import BusDenied, BusUnavailable, ConfigError, RecordRefused
from virtbus.model import Binding, Check, Confirmed, Deferred, Message, Outcome, Record, Refused
from virtbus.retry import Backoff
from virtbus.telemetry import BusConnected, BusLost, Notice, emit

FILE_NAME = "bus.db"
LEASE_BLOCK = 64  # leased at once: fewer commits; a killed consumer's come back all the same
_RECONNECT_CEILING_SECONDS = 1.0
_CONFIRMED = Confirmed()


class EmbeddedBus:
    """The `Bus` over the embedded log; see this package's docstring for what differs from a broker."""

    def __init__(self, url: str, *, options: BusOptions) -> None:
        """Read the URL; opens nothing. Raises ConfigError that says what in the URL can't be used."""
        self.path, self.max_bytes = _read_url(url, options)
        self._options = options
        self._name = f"embedded://{self.path}"
        self._log: Log | None = None
        self._closed = threading.Event()

    def publish(self, feed: Feed) -> Iterator[tuple[Record, Outcome]]:
        """One transaction a window; see `Bus.publish`. A full log or disk is `Deferred` and ends the call."""
        log = self._connected()
        while records := feed.take(self._options.window, frozenset()):
            outcomes = self._publish_window(log, records)
            yield from outcomes
            if any(isinstance(outcome, Deferred) for _, outcome in outcomes):
                return

    def _publish_window(self, log: Log, records: Sequence[Record]) -> list[tuple[Record, Outcome]]:
        outcomes: list[tuple[Record, Outcome]] = []
        fitting: list[tuple[Record, Stored]] = []
        for record in records:
            message = self._encoded(record)
            size, most = size_of(message), min(self._options.max_record_bytes, self.max_bytes)
            if len(record.body) > self._options.max_record_bytes or size > self.max_bytes:
                outcomes.append(
                    (record, Refused(RecordRefused(f"{size} bytes: the bus takes at most {most}")))
                )
            else:
                fitting.append((record, message))
        stored = 0
        why: BusUnavailable | BusDenied | None
        try:
            stored, why = log.append([message for _, message in fitting])
        except (BusUnavailable, BusDenied) as error:
            why = error
            self._drop()
            if not self._closed.is_set():
                emit(BusLost(self._name, error))
        for number, (record, _) in enumerate(fitting):
            failed = None if number < stored else why
            outcomes.append((record, _CONFIRMED if failed is None else Deferred(failed)))
        return outcomes

    def _encoded(self, record: Record) -> Stored:
        wire = envelope.to_amqp(record.attributes, record.body, structured=self._options.structured)
        return Stored(0, record.key, wire.content_type, wire.headers, wire.body)

    def _connected(self) -> Log:
        if self._closed.is_set():
            raise BusUnavailable(f"embedded bus {self.path}: closed")
        if self._log is None:
            self._log = Log(self.path, max_bytes=self.max_bytes)
            emit(BusConnected(self._name))
        return self._log

    def _drop(self) -> None:
        log, self._log = self._log, None
        if log is not None:
            log.close()

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
            self.path, self.max_bytes, checked_group(group), prefetch, exclusive=exclusive
        )
        with suppress(BusUnavailable, BusDenied):  # receive() tries again, and raises
            subscription.join()
        return subscription

    def dead_letters(self, group: str) -> EmbeddedDeadLetters:
        """See virtbus.bus.Bus."""
        checked_group(group)
        return EmbeddedDeadLetters(Log(self.path, max_bytes=self.max_bytes), group)

    def probe(self) -> Sequence[Check]:
        """Whether the file can be made or used, is whole, and has room; makes no file."""
        try:
            if not os.access(self.path, os.F_OK):
                self._check_folder()
                return [Check("bus", "ok", f"{self._name}: no file yet; the first use makes it")]
            with closing(Log(self.path, max_bytes=self.max_bytes)) as log:
                state = log.state()
        except (BusUnavailable, BusDenied) as error:
            remedy = "see the message; the bus URL is bus.url"
            return [Check("bus", "failed", str(error), remedy=remedy, exit_code=error.exit_code)]
        return [
            Check("bus", "ok", f"{self._name}: whole", details={"messages": state.messages}),
            self._room(state),
        ]

    def _check_folder(self) -> None:
        """Raise what keeps the file from being made."""
        folder = self.path.parent
        # Not exists(): that raises where a folder above must not be entered.
        while not os.access(folder, os.F_OK) and folder != folder.parent:
            folder = folder.parent
        if not folder.is_dir():
            raise BusUnavailable(f"embedded bus {self.path}: can't be made: {folder} is not a folder")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise BusDenied(f"embedded bus {self.path}: {folder} is not writable; choose another folder")

    def _room(self, state: LogState) -> Check:
        summary = f"{state.bytes} of {self.max_bytes} bytes used"
        behind = max(state.waiting, key=lambda group: state.waiting[group], default=None)
        if state.bytes < 0.9 * self.max_bytes or (behind is not None and not state.waiting[behind]):
            return Check("bus room", "ok", summary, details=state.waiting)
        who = f"consume group {behind}" if behind else "start a consumer"
        return Check("bus room", "warning", f"{summary}; full means deferred", who, details=state.waiting)

    def close(self) -> None:
        """Let go of the publisher's file; idempotent. Subscriptions are closed by their owners."""
        self._closed.set()
        self._drop()


class EmbeddedSubscription:
    """One consumer's stream of the embedded bus; see `Subscription`."""

    def __init__(
        self, path: Path, max_bytes: int, group: str | None, prefetch: int, *, exclusive: bool
    ) -> None:
        self._path, self._max_bytes, self._group, self._prefetch = path, max_bytes, group, prefetch
        self._exclusive = exclusive and group is not None
        self._member: Member | None = None
        self._ready: deque[Stored] = deque()  # leased, and not handed out yet
        self._out: set[int] = set()  # handed out, without a verdict yet
        self._backoff = Backoff("consume", ceiling=_RECONNECT_CEILING_SECONDS)
        self._closed = False

    def join(self) -> Member:
        """Open the log and join the group, unless that is done. Raises BusUnavailable, BusDenied."""
        if self._member is None:
            log = Log(self._path, max_bytes=self._max_bytes)
            try:
                self._member = Member(log, self._group, exclusive=self._exclusive)
            except BaseException:
                log.close()
                raise
            self._backoff.reset()
        return self._member

    def receive(self, timeout: float) -> Message | None:
        """The next message, or None after `timeout` seconds or once it is closed.

        While the file can't be used it is tried again until the time is up, and then BusUnavailable is
        raised; BusDenied is raised at once.
        """
        end = time.monotonic() + timeout
        while not self._closed:
            try:
                member = self.join()
                room = min(LEASE_BLOCK, self._prefetch - len(self._out))
                if not self._ready and room > 0:
                    self._ready.extend(member.lease(room))
                if self._ready:
                    stored = self._ready.popleft()
                    self._out.add(stored.pos)
                    return _message(stored, handle=(member, stored.pos))
                if (left := end - time.monotonic()) <= 0:
                    return None
                member.wait(left)
            except BusDenied:
                self._drop()
                raise
            except BusUnavailable as error:
                self._lost(error)
                if (left := end - time.monotonic()) <= 0:
                    raise
                time.sleep(min(left, self._backoff.next_wait()))
        return None

    def ack(self, message: Message) -> None:
        """Settle it; over a lost connection it comes again."""
        if (member := self._holder(message)) is not None:
            try:
                member.settle(self._done(message))
            except BusUnavailable as error:
                self._lost(error)

    def retry(self, message: Message, after: float) -> None:
        """Give it back; nothing of its key is handed out before it."""
        if (member := self._holder(message)) is not None:
            later = [stored for stored in self._ready if stored.key == message.key]
            try:
                member.give_back([stored.pos for stored in later], seen=False)
                member.give_back([self._done(message)], after=after)
            except BusUnavailable as error:
                self._lost(error)
                return
            self._ready = deque(stored for stored in self._ready if stored.key != message.key)

    def dead_letter(self, message: Message, reason: str) -> None:
        """Put it aside, where it stands in the log; while the file can't be used it comes again."""
        if (member := self._holder(message)) is not None:
            cut = reason.encode(errors="replace")[:1024].decode(errors="ignore")
            try:
                if self._group is None:
                    emit(
                        Notice(f"message {message.position} dead-lettered, without a group to keep it: {cut}")
                    )
                    member.settle(self._done(message))
                else:
                    member.dead_letter(self._done(message), cut)
            except BusUnavailable as error:
                self._lost(error)

    def close(self) -> None:
        """Leave; idempotent."""
        self._closed = True
        self._drop()

    def _holder(self, message: Message) -> Member | None:
        """The member that holds a message, or None when that is gone: then the message comes again."""
        assert isinstance(message.handle, tuple)
        member = message.handle[0]
        return self._member if member is self._member else None

    def _done(self, message: Message) -> int:
        assert isinstance(message.handle, tuple)
        pos: int = message.handle[1]
        self._out.discard(pos)
        return pos

    def _lost(self, error: BusUnavailable) -> None:
        if self._member is not None:
            emit(BusLost(f"embedded://{self._path}", error))
        self._drop()

    def _drop(self) -> None:
        member, self._member = self._member, None
        self._ready.clear()
        self._out.clear()
        if member is not None:
            member.leave()


class EmbeddedDeadLetters:
    """See virtbus.bus.DeadLetters."""

    def __init__(self, log: Log, group: str) -> None:
        self._log, self._group, self._last = log, group, 0

    def __enter__(self) -> EmbeddedDeadLetters:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def count(self) -> int:
        """See virtbus.bus.DeadLetters."""
        return len(self._log.dead_letters(self._group, 0, -1))

    def read(self, limit: int | None = None) -> Iterator[DeadLetter]:
        """See virtbus.bus.DeadLetters."""
        for stored in self._log.dead_letters(self._group, self._last, -1 if limit is None else limit):
            self._last = stored.pos
            yield DeadLetter(
                position=str(stored.pos),
                id=stored.headers.get("ce-id"),
                source=stored.headers.get("ce-source"),
                type=stored.headers.get("ce-type"),
                reason=stored.reason or "",
                at=None,
                size_bytes=len(stored.body),
                message=_message(stored, handle=stored.pos),
            )

    def send_back(self, letter: DeadLetter) -> None:
        """See virtbus.bus.DeadLetters."""
        self._log.send_back(self._group, int(letter.position))

    def drop(self, letter: DeadLetter) -> None:
        """See virtbus.bus.DeadLetters."""
        self._log.drop(self._group, int(letter.position))

    def close(self) -> None:
        """Let go; idempotent."""
        self._log.close()


# ---------------------------------------------------------------------------------------- small parts


def _message(stored: Stored, *, handle: object) -> Message:
    return Message(
        binding=Binding.AMQP,
        headers={**stored.headers, **({} if stored.reason is None else {REASON_HEADER: stored.reason})},
        content_type=stored.content_type,
        body=stored.body,
        key=stored.key,
        redelivered=stored.attempts > 0,
        user_id=None,
        position=str(stored.pos),
        handle=handle,
        attempts=stored.attempts + 1,
    )


def _read_url(url: str, options: BusOptions) -> tuple[Path, int]:
    """The file and the bound in bytes that an `embedded:` URL names."""
    parts, example = read_url(url), "write embedded: or embedded:///path/to/file"
    if parts.hosts or parts.problems:
        raise ConfigError(f"the bus URL {url!r} names a host, and this bus has none: {example}")
    if unknown := sorted(parts.query.keys() - {"max_bytes"}):
        raise ConfigError(f"the bus URL {url!r} has an unknown option {unknown[0]!r}; known is max_bytes")
    text = parts.query.get("max_bytes", str(DEFAULT_MAX_BYTES))
    if not text.isascii() or not text.isdigit() or int(text) < SMALLEST_MAX_BYTES:
        raise ConfigError(
            f"the bus URL's max_bytes is {text!r}: write a number, at least {SMALLEST_MAX_BYTES}"
        )
    path = parts.path
    if not path:
        if options.state_dir is None:
            raise ConfigError(f"the bus URL embedded: needs a state folder: set --state-dir, or {example}")
        return Path(options.state_dir) / FILE_NAME, int(text)
    if not path.startswith("/"):
        raise ConfigError(f"the bus URL {url!r} names a relative file: {example}")
    chosen = Path(path)
    return chosen / FILE_NAME if path.endswith("/") or chosen.is_dir() else chosen, int(text)
