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
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path

from virtbus import envelope
from virtbus.bus import REASON_HEADER, BusOptions, DeadLetter, DeadLetters, Feed, Memory, checked_group
from virtbus.bus.embedded.log import LOOK_AHEAD, Log, Member, Stored
from virtbus.bus.subscription import Item, LineSubscription
from virtbus.bus.url import read_url
from virtbus.errors import BusDenied, BusUnavailable, ConfigError, RecordRefused
from virtbus.model import Binding, Check, Confirmed, Deferred, Message, Outcome, Record, Refused
from virtbus.retry import Backoff
from virtbus.telemetry import BusConnected, BusLost, DeadLetterStored, emit

FILE_NAME = "bus.db"
_SMALLEST_MAX_BYTES = 64 * 1024
_LEASE_BLOCK = 64  # leased at once: fewer commits; a killed consumer's come back all the same
_RECONNECT_CEILING_SECONDS = 1.0


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
        self._check_open()
        if self._log is None:
            self._log = Log(self.path, max_bytes=self.max_bytes)
            emit(BusConnected(self._name))
        log, why = self._log, None
        while why is None and (records := feed.take(self._options.window, frozenset())):
            fitting: list[tuple[Record, Stored]] = []
            for record in records:
                wire = envelope.to_amqp(record.attributes, record.body, structured=self._options.structured)
                stored = Stored(0, record.key, wire.content_type, wire.headers, wire.body)
                if len(record.body) > self._options.max_record_bytes or stored.size > self.max_bytes:
                    most = min(self._options.max_record_bytes, self.max_bytes)
                    yield record, Refused(RecordRefused(f"{stored.size} bytes: the bus takes at most {most}"))
                else:
                    fitting.append((record, stored))
            count, why = self._append(log, [stored for _, stored in fitting])
            for record, _ in fitting[:count]:
                yield record, Confirmed()
            for record, _ in fitting[count:]:
                assert why is not None
                yield record, Deferred(why)

    def _append(self, log: Log, messages: list[Stored]) -> tuple[int, BusUnavailable | BusDenied | None]:
        """How many are stored, and why the others are not."""
        try:
            count, full = log.append(messages)
            return count, None if count == len(messages) else full
        except (BusUnavailable, BusDenied) as error:
            self._drop()
            if not self._closed.is_set():
                emit(BusLost(self._name, error))
            return 0, error

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise BusUnavailable(f"embedded bus {self.path}: closed")

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
        self._check_open()
        subscription = EmbeddedSubscription(self, checked_group(group), prefetch, exclusive=exclusive)
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
                used, messages, waiting = log.state()
        except (BusUnavailable, BusDenied) as error:
            remedy = "see the message; the bus URL is bus.url"
            return [Check("bus", "failed", str(error), remedy=remedy, exit_code=error.exit_code)]
        summary, behind = f"{used} of {self.max_bytes} bytes used", next(iter(waiting), None)
        room = Check("bus room", "ok", summary, details=waiting)
        if used >= 0.9 * self.max_bytes and (behind is None or waiting[behind]):
            remedy = f"consume group {behind}" if behind else "start a consumer"
            room = Check("bus room", "warning", f"{summary}; full means deferred", remedy, details=waiting)
        return [Check("bus", "ok", f"{self._name}: whole", details={"messages": messages}), room]

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

    def close(self) -> None:
        """Let go of the publisher's file; idempotent. Subscriptions are closed by their owners."""
        self._closed.set()
        self._drop()


class EmbeddedSubscription(LineSubscription):
    """One consumer's stream of the embedded bus; see `Subscription`."""

    def __init__(self, bus: EmbeddedBus, group: str | None, prefetch: int, *, exclusive: bool) -> None:
        super().__init__(group, prefetch)
        self._path, self._max_bytes, self._prefetch = bus.path, bus.max_bytes, prefetch
        self._exclusive = exclusive and group is not None
        self._member: Member | None = None
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
                member, line = self.join(), self._line
                if not line.ready:
                    room = min(_LEASE_BLOCK, self._prefetch - len(line.out))
                    for stored in member.lease(room if line.held < LOOK_AHEAD else 0):
                        item = Item(stored.key, stored.pos, member)
                        item.message = _message(stored, item)
                        line.arrived(item)
                message = line.next(time.monotonic())
                if message is not None:
                    return message
                if (now := time.monotonic()) >= end:
                    return None
                member.wait(min(end, line.due()) - now)
            except BusDenied:
                self._drop()
                raise
            except BusUnavailable as error:
                self._lost(error)
                if (left := end - time.monotonic()) <= 0:
                    raise
                time.sleep(min(left, self._backoff.next_wait()))
        return None

    def _done(self, item: Item) -> None:
        try:
            item.origin.settle(item.number)
        except BusUnavailable as error:
            self._lost(error)

    def _put_aside(self, item: Item, reason: str) -> None:
        """Where it stands in the log; while the file can't be used it comes again."""
        try:
            item.origin.dead_letter(item.number, reason)
            emit(DeadLetterStored(f"embedded://{self._path}", item.message.position, reason[:200]))
        except BusUnavailable as error:
            self._lost(error)

    def close(self) -> None:
        """Leave; idempotent."""
        self._closed = True
        self._drop()

    def _lost(self, error: BusUnavailable) -> None:
        if self._member is not None:
            emit(BusLost(f"embedded://{self._path}", error))
        self._drop()

    def _drop(self) -> None:
        member, self._member = self._member, None
        self._line.forget()
        if member is not None:
            member.leave()


class EmbeddedDeadLetters(DeadLetters):
    """See virtbus.bus.DeadLetters."""

    def __init__(self, log: Log, group: str) -> None:
        self._log, self._group, self._last = log, group, 0

    def close(self) -> None:
        """See virtbus.bus.DeadLetters."""
        self._log.close()

    def count(self) -> int:
        """See virtbus.bus.DeadLetters."""
        return len(self._log.dead_letters(self._group, 0, -1))

    def read(self, limit: int | None = None) -> Iterator[DeadLetter]:
        """See virtbus.bus.DeadLetters."""
        for stored in self._log.dead_letters(self._group, self._last, -1 if limit is None else limit):
            self._last = stored.pos
            yield DeadLetter.of(_message(stored, stored.pos), name=None, reason="", at=None)

    def send_back(self, letter: DeadLetter) -> None:
        """See virtbus.bus.DeadLetters."""
        self._log.settle_letter(self._group, int(letter.position), again=True)

    def drop(self, letter: DeadLetter) -> None:
        """See virtbus.bus.DeadLetters."""
        self._log.settle_letter(self._group, int(letter.position), again=False)


def _message(stored: Stored, handle: object) -> Message:
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
    text = parts.query.get("max_bytes", str(64 * 1024 * 1024))
    if not text.isascii() or not text.isdigit() or int(text) < _SMALLEST_MAX_BYTES:
        raise ConfigError(
            f"the bus URL's max_bytes is {text!r}: write a number, at least {_SMALLEST_MAX_BYTES}"
        )
    path = parts.path
    if not path:
        if options.state_dir is None:
            raise ConfigError(f"the bus URL embedded: needs a state folder: set --state-dir, or {example}")
        return Path(options.state_dir) / FILE_NAME, int(text)
    if not path.startswith("/"):
        raise ConfigError(f"the bus URL {url!r} names a relative file: {example}")
    # Not Path.is_dir(): that raises where it can't look, and whoever opens the file says why.
    inside = path.endswith("/") or os.path.isdir(path)  # noqa: PTH112
    return Path(path) / FILE_NAME if inside else Path(path), int(text)
