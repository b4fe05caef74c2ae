"""The SDK for schedulers: typed, validated, deduplicated events from any bus; no libvirt needed.

    for delivery in Consumer("amqps://scheduler@broker//", group="scheduler", dedupe=Path("seen.db")):
        act_on(delivery.event)
        delivery.ack()

Guarantees:
1. effect first, ack after: a message is acknowledged only after its verdict, so a crash repeats the
   events in flight and loses none;
2. with a `dedupe` file an event that was acknowledged is not handed out again, also after a restart:
   its mark is on disk before the ack leaves;
3. in the order of each partition key (the domain); `retry` holds the key back until it succeeds;
4. what is no event of ours goes to the dead letters with the reason, never round in a loop; what a newer
   agent sends is handed over (unknown minor versions typed, unknown majors and types raw).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

from virtbus import envelope, schema
from virtbus.bus import BusOptions, Subscription, bus_name, open_bus
from virtbus.errors import BusUnavailable, ConfigError, DedupeUnavailable, SchemaError
from virtbus.marks import Marks
from virtbus.model import Event, Message
from virtbus.retry import Backoff
from virtbus.sequences import MissingEvents, SequenceCheck
from virtbus.telemetry import BusLost, Metrics, TelemetryEvent, emit

__all__ = ["Consumer", "Delivery", "MissingEvents"]

DEDUPE_ROWS = 1_000_000
FLUSH_ROWS = 64  # verdicts a dedupe transaction
FLUSH_SECONDS = 0.05
REORDER_SECONDS = 60.0
_IDLE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class PoisonMessage(TelemetryEvent):
    """A message that is no event of ours was put aside."""

    LEVEL: ClassVar[str] = "warning"
    MESSAGE: ClassVar[str] = "not an event of ours; put into the dead letters"
    position: str
    reason: str

    def measure(self, metrics: Metrics) -> None:
        """Count it."""
        metrics.dead_letters.labels("poison").inc()

    def limit_key(self) -> object:
        """Every one is told."""
        return self.position


@dataclass(slots=True)
class Delivery:
    """One event and what is to become of it: end it with exactly one of `ack`, `retry`, `dead_letter`."""

    event: Event | None  # None: a type or major version that this release does not know; see `data`
    attributes: Mapping[str, str]  # the CloudEvents attributes
    data: Mapping[str, Any]
    body: bytes
    publisher: str | None  # who sent it as the broker proved (AMQP user-id), or None
    redelivered: bool
    _consumer: Consumer = field(repr=False)
    _message: Message = field(repr=False)
    _open: bool = field(default=True, repr=False)

    @property
    def id(self) -> str:
        """The event's id; with `source` its identity."""
        return self.attributes["id"]

    @property
    def source(self) -> str:
        """Which agent sent it."""
        return self.attributes["source"]

    @property
    def type(self) -> str:
        """The event's type."""
        return self.attributes["type"]

    @property
    def key(self) -> str | None:
        """The partition key, within which order holds."""
        return self.attributes.get("partitionkey")

    def ack(self) -> None:
        """The effect is done: do not deliver it again.

        Raises DedupeUnavailable when the marks can't be written now. The verdict stands: it is written,
        and the acknowledgement sent, by the next call of the consumer that finds the file usable.
        """
        self._consumer._settle(self)

    def retry(self, after: float) -> None:
        """Deliver it again after about `after` seconds, and nothing of its key before."""
        self._consumer._retry(self, after)

    def dead_letter(self, reason: str) -> None:
        """Put it aside with the reason; it counts as done."""
        self._consumer._dead_letter(self, reason)


class Consumer:
    """Events from a bus, one `Delivery` after the other; reconnects for ever. Not thread-safe."""

    def __init__(
        self,
        url: str,
        *,
        group: str | None = None,
        options: BusOptions | None = None,
        prefetch: int = 100,
        validate: bool = True,
        dedupe: Path | None = None,
        dedupe_rows: int = DEDUPE_ROWS,
        check_gaps: bool = False,
        reorder_seconds: float = REORDER_SECONDS,
        patient: bool = True,
        exclusive: bool = False,
        on_missing: Callable[[MissingEvents], None] = emit,
    ) -> None:
        """Subscribe to the bus at `url`.

        `group` shares the events durably with the other members; without it, all events from now on.
        `dedupe` is a SQLite file of at most `dedupe_rows` marks; without it duplicates are recognised
        only while this object lives. `check_gaps` is for whoever reads everything alone: `on_missing`
        is told of a hole in an agent's sequence that no gap event explains within `reorder_seconds`; with
        `dedupe` also of one that opened while no consumer ran. It is always told what Kafka no longer has.
        With `exclusive` only one member of the group is active (see `Bus.consume`).
        Without `patient` a broker that can't be reached at first is an error (BusUnavailable).

        Raises ConfigError for a bad URL or dedupe file.
        """
        if prefetch < 1:
            raise ConfigError(f"prefetch = {prefetch}: take at least 1")
        options = options or BusOptions()
        self._bus = open_bus(url, options)
        self._subscription: Subscription | None = None
        self._group, self._prefetch, self._validate = group, prefetch, validate
        self._exclusive = exclusive
        scope = f"{bus_name(url, options)} {'group ' + group if group else 'without a group'}"
        self._seen = Marks(dedupe, scope, dedupe_rows)
        self._memory = _Memory(self._seen.notes(), on_missing)
        self._sequences = SequenceCheck(reorder_seconds, on_missing) if check_gaps else None
        if self._sequences is not None:
            self._sequences.restore(self._seen.runs())
        self._in_flight: dict[tuple[str, str], list[Message]] = {}
        self._done: dict[tuple[str, str], list[Message]] = {}
        self._done_since = 0.0
        self._stop = threading.Event()
        self._backoff = Backoff("consume")
        self._patient, self._connected = patient, False

    def __enter__(self) -> Consumer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Delivery]:
        """Deliveries for ever, until `stop`."""
        while not self._stop.is_set():
            delivery = self.receive(_IDLE_SECONDS)
            if delivery is not None:
                yield delivery

    def receive(self, timeout: float) -> Delivery | None:
        """The next delivery, or None after `timeout` seconds.

        Waits out an absent broker. Raises BusDenied where waiting can't help, and DedupeUnavailable when
        the dedupe file can't be used now: nothing was lost, call again when it can.
        """
        deadline = time.monotonic() + timeout
        while not self._stop.is_set():
            self._flush_if_due()
            left = max(0.0, deadline - time.monotonic())
            try:
                if self._subscription is None:
                    self._subscription = self._bus.consume(
                        self._group, prefetch=self._prefetch, exclusive=self._exclusive, memory=self._memory
                    )
                message = self._subscription.receive(min(left, FLUSH_SECONDS) if self._done else left)
                self._connected = True
                delivery = None if message is None else self._open(message)
                self._backoff.reset()
            except BusUnavailable as error:
                self._lost(error)
                message = delivery = None
            if self._sequences is not None:
                self._sequences.tick(time.monotonic())
            if delivery is not None:
                return delivery
            if message is None and time.monotonic() >= deadline:
                break
        return None

    def stop(self) -> None:
        """End the iteration after the current delivery; may be called from another thread or a signal."""
        self._stop.set()

    def close(self) -> None:
        """Write the outstanding marks, send their acks, and leave.

        Raises DedupeUnavailable, having left, when the marks can't be written: those events come again.
        """
        self._stop.set()
        try:
            with suppress(BusUnavailable):  # the marks are on disk: what comes again is recognised
                self._flush()
        finally:
            if self._subscription is not None:
                self._subscription.close()
                self._subscription = None
            self._bus.close()
            with suppress(DedupeUnavailable):  # of the marks it was told; the rest is read again
                self._save([])
            self._seen.close()

    # ---- one message

    def _open(self, message: Message) -> Delivery | None:
        """A message's delivery, or None when it was a duplicate or no event of ours."""
        assert self._subscription is not None
        try:
            opened = envelope.decode(message)
            if self._validate:
                _check(opened)
            event = envelope.to_event(opened)
        except SchemaError as error:
            self._subscription.dead_letter(message, str(error))
            emit(PoisonMessage(message.position, str(error)))
            return None
        attributes = opened.attributes
        if self._sequences is not None:
            self._sequences.saw(attributes, event, time.monotonic())
        mark = (attributes["source"], attributes["id"])
        if mark in self._in_flight:
            # A second copy while the first is being handled shares its fate.
            self._in_flight[mark].append(message)
            return None
        try:
            seen = mark in self._done or self._seen.has(mark)
        except DedupeUnavailable:
            self._subscription.retry(message, _IDLE_SECONDS)  # undecided: it is asked again
            raise
        if seen:
            self._done.setdefault(mark, []).append(message)
            return None
        self._in_flight[mark] = []
        if self._sequences is not None:
            self._sequences.handed_out(attributes)
        return Delivery(
            event, attributes, opened.data, opened.body, message.user_id, message.redelivered, self, message
        )

    def _copies(self, delivery: Delivery) -> list[Message]:
        """All copies of the message that came; only the newest, the last, is sure to be the broker's."""
        if not delivery._open:
            raise ConfigError(f"event {delivery.id} has had its verdict; give each delivery exactly one")
        delivery._open = False
        return [delivery._message, *self._in_flight.pop((delivery.source, delivery.id), [])]

    def _settle(self, delivery: Delivery) -> None:
        copies = self._copies(delivery)
        if not self._done:
            self._done_since = time.monotonic()
        self._done[(delivery.source, delivery.id)] = copies
        self._flush_if_due()

    def _retry(self, delivery: Delivery, after: float) -> None:
        *older, newest = self._copies(delivery)
        if self._subscription is not None:
            for copy in older:
                self._subscription.ack(copy)
            self._subscription.retry(newest, after)

    def _dead_letter(self, delivery: Delivery, reason: str) -> None:
        *older, newest = self._copies(delivery)
        if self._subscription is not None:
            self._subscription.dead_letter(newest, reason)
            self._done[(delivery.source, delivery.id)] = older
            self._flush()

    # ---- marks before acks

    def _flush_if_due(self) -> None:
        if self._done and (
            len(self._done) >= min(FLUSH_ROWS, self._prefetch)
            or time.monotonic() - self._done_since >= FLUSH_SECONDS
        ):
            try:
                self._flush()
            except BusUnavailable as error:
                self._lost(error)

    def _flush(self) -> None:
        """Write the marks of what is done in one transaction, then send the acks."""
        if not self._done:
            return
        self._save(list(self._done))
        done, self._done = self._done, {}
        if self._subscription is not None:
            for messages in done.values():
                for message in messages:
                    self._subscription.ack(message)

    def _save(self, marks: list[tuple[str, str]]) -> None:
        """Put marks, the sequences' baseline and the bus's notes on disk, together."""
        sequences, memory = self._sequences, self._memory
        if sequences is not None:
            for mark in marks:
                sequences.settled(*mark)
        self._seen.write(marks, sequences.changes() if sequences is not None else (), memory.fresh)
        memory.fresh.clear()
        if sequences is not None:
            sequences.saved()

    def _lost(self, error: BusUnavailable) -> None:
        """The broker is away: what was unacknowledged comes again, to us or to another member."""
        if not self._patient and not self._connected:
            raise error
        emit(BusLost("consumer", error))
        self._backoff.wait(self._stop, error)


class _Memory:
    """See virtbus.bus.Memory."""

    def __init__(self, notes: dict[str, str], on_missing: Callable[[MissingEvents], None]) -> None:
        self._notes = notes
        self.fresh: dict[str, str] = {}  # not on disk yet
        self.missing = on_missing

    def recall(self, name: str) -> str | None:
        """See virtbus.bus.Memory."""
        return self._notes.get(name)

    def keep(self, name: str, value: str) -> None:
        """See virtbus.bus.Memory."""
        self._notes[name] = self.fresh[name] = value


def _check(opened: envelope.Envelope) -> None:
    """Validate data of a known type and major; raises SchemaError with the first problems."""
    named = opened.attributes.get("dataschema") or opened.attributes["type"]
    if not _known(named):
        return
    problems = schema.validate(named, opened.data)
    if problems:
        shown = "; ".join(f"{item.pointer or '/'}: {item.message}" for item in problems[:3])
        raise SchemaError(f"{named}: {shown}")


def _known(named: str) -> bool:
    try:
        schema.resolve(named)
    except SchemaError:
        return False
    return True
