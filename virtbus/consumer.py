"""The SDK for schedulers: typed, validated, deduplicated events from any bus; no libvirt needed.

    with Consumer("amqps://scheduler@broker//", group="scheduler", dedupe=Path("seen.db")) as consumer:
        for delivery in consumer:
            act_on(delivery.event)
            delivery.ack()

Guarantees:
1. effect first, ack after: a message is acknowledged only after its verdict, so a crash repeats the
   events in flight and loses none;
2. with a `dedupe` file an event that was acknowledged is not handed out again, also after a restart: when
   `ack` returns its mark is on disk (with `group_commit` at a later call, and always before the broker's
   acknowledgement);
3. in the order of each partition key (the domain); `retry` holds the key back until it succeeds;
4. what is not an event goes to the dead letters with the reason, never round in a loop, and costs nothing
   but itself; what a newer agent or somebody else sends is handed over (unknown minor versions typed, unknown
   majors and types raw).

It logs through Python's `logging` under `virtbus`, and prints nothing. One process and one thread at a time
use a Consumer (the second is refused): after a fork the child makes its own.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from virtbus import envelope
from virtbus.bus import Bus, BusOptions, DeferredMemory, Subscription, bus_name, checked_group, open_bus
from virtbus.errors import (
    BusDenied,
    BusUnavailable,
    ConfigError,
    ConsumerClosed,
    DedupeUnavailable,
    GroupTakenOver,
    SchemaError,
)
from virtbus.marks import Mark, Marks
from virtbus.model import Event, Message
from virtbus.retry import Backoff
from virtbus.sequences import MissingEvents, SequenceCheck
from virtbus.telemetry import BusCutOff, ConsumerRefused, NoVerdicts, PoisonMessage, emit

__all__ = ["Consumer", "Delivery", "MissingEvents"]

P = ParamSpec("P")
T = TypeVar("T")

DEDUPE_ROWS = 1_000_000
FLUSH_ROWS = 64  # verdicts a dedupe transaction, with `group_commit`
FLUSH_SECONDS = 0.05
MAX_ATTEMPTS = 100  # a storm of kills counts deliveries of good events too: some 20 in 200 kills
REORDER_SECONDS = 60.0
_IDLE_SECONDS = 1.0
_SILENT_SECONDS = 600.0  # without a verdict while nothing more may be handed out
_YEAR = 366 * 86400.0
_RETRIED = 10_000  # events remembered that had `retry` as their verdict


@dataclass(slots=True)
class Delivery:
    """One event and what is to become of it: end it with exactly one of `ack`, `retry`, `dead_letter`.

    Each of them raises ConfigError for a second verdict, an argument that can't be used, in a process that is
    not the consumer's, or while another thread uses it, and ConsumerClosed after its `close`; the delivery is
    then as it was. Nothing that a broker does is raised: over a lost connection the event comes again.
    """

    event: Event | None  # None: a type or major version that this release does not know; see `data`
    attributes: Mapping[str, str]  # the CloudEvents attributes
    data: Mapping[str, Any]  # empty where a foreign event has no JSON object; see `body`
    body: bytes
    publisher: str | None  # who sent it as the broker proved (AMQP user-id), or None
    redelivered: bool
    attempts: int | None  # how often the broker has delivered it, this time too; None where it does not say
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

        With a dedupe file its mark is on disk on return (with `group_commit` at a later call, and always
        before the broker's acknowledgement).

        Raises DedupeUnavailable when the mark can't be written now. The verdict stands: it is written, and
        the acknowledgement sent, by the next call of the consumer that finds the file usable.
        """
        self._consumer._settle(self)

    def retry(self, after: float) -> None:
        """Deliver it again after about `after` seconds (0 to a year), and nothing of its key before.

        It waits in this process. A crash, or another member taking over, delivers it at once.
        """
        if not isinstance(after, int | float) or isinstance(after, bool):
            raise ConfigError(f"retry(after={after!r}): take a number of seconds")
        if not 0 <= after <= _YEAR:  # NaN fails too
            raise ConfigError(f"retry(after={min(after, 1e300):g}): take 0 to {_YEAR:.0f} seconds")
        self._consumer._retry(self, float(after))

    def dead_letter(self, reason: str) -> None:
        """Dead-letter it with the reason (its first 1,024 bytes): see `virtbus dead`.

        It is not marked as seen: what carries the same id later is handed out. Where the dead letters take
        nothing now it is tried again in the background, while other events go on.
        """
        if not isinstance(reason, str):
            raise ConfigError(f"dead_letter(reason={reason!r}): take a text")
        try:
            reason.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"dead_letter(reason={reason!r}): it holds half a character") from error
        self._consumer._dead_letter(self, reason)


class _Grip:
    """What a Consumer holds on to, let go exactly once, and never by a forked child; and who uses it now."""

    def __init__(self, bus: Bus, seen: Marks) -> None:
        self.bus, self.seen = bus, seen
        self.subscription: Subscription | None = None
        self.pid = os.getpid()
        self.busy = threading.RLock()
        self.calls = 0  # of the thread that has `busy`: a signal's handler may call in the middle of another
        self.closing = False  # at the end of the outermost call
        self.gone = False

    def leave(self) -> None:
        """Leave the group; what the bus has to keep of it is known then."""
        subscription, self.subscription = self.subscription, None
        if subscription is not None:
            subscription.close()

    def let_go(self) -> None:
        self.gone = True
        if os.getpid() == self.pid:
            try:
                self.leave()
                self.bus.close()
            finally:
                self.seen.close()

    def check_usable(self) -> None:
        if os.getpid() != self.pid:
            theirs = f"this Consumer belongs to process {self.pid}, and this is {os.getpid()}"
            raise ConfigError(f"{theirs}: nothing of it survives a fork, make a Consumer in each process")
        if self.gone:
            raise ConsumerClosed("this Consumer was closed: make another one")


def _one_thread(method: Callable[Concatenate[Consumer, P], T]) -> Callable[Concatenate[Consumer, P], T]:
    """Two threads at once would acknowledge what is not on disk yet: the second one is refused."""

    @wraps(method)
    def alone(self: Consumer, /, *arguments: P.args, **named: P.kwargs) -> T:
        grip = self._grip
        grip.check_usable()
        if not grip.busy.acquire(blocking=False):
            raise ConfigError("another thread uses this Consumer now: one at a time, or a Consumer for each")
        grip.calls += 1
        try:
            return method(self, *arguments, **named)
        finally:
            grip.calls -= 1
            try:
                if grip.closing and not grip.calls:
                    self.close()
            finally:
                grip.busy.release()

    return alone


class Consumer:
    """Events from a bus, one `Delivery` after the other; reconnects for ever. Not thread-safe.

    Leave it with `close`, or by `with`; one that nobody holds any more leaves by itself.
    """

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
        group_commit: bool = False,
        check_gaps: bool = False,
        reorder_seconds: float = REORDER_SECONDS,
        patient: bool = True,
        give_up_when_denied: bool = False,
        exclusive: bool = False,
        max_attempts: int | None = MAX_ATTEMPTS,
        on_missing: Callable[[MissingEvents], None] = emit,
    ) -> None:
        """Subscribe to the bus at `url`.

        - `group`: its members share the events durably; without it, all events from now on.
        - `prefetch`: so many events at most are without a verdict.
        - `validate`: data of known types must fit its schema; else what can't be read is handed over raw.
        - `dedupe`: a SQLite file of at most `dedupe_rows` marks per group, for one process at a time; without
          it duplicates are recognised only while this object lives.
        - `group_commit`: acks share one write. Nothing is written between calls of this object: a call writes
          once 64 acks wait or one is 50 ms old, and a crash before it repeats up to 64 events.
        - `check_gaps`, for whoever reads everything alone: `on_missing` gets each hole in an agent's sequence
          that no gap event explains within `reorder_seconds`, over restarts where there is a dedupe file.
        - `on_missing` also gets, without `check_gaps`, what Kafka deleted. What it raises comes out of
          `receive` or `close`, and costs no event.
        - `patient`: a broker that is absent, or refuses us, is waited for; without it that is an error while
          it was never reached. `give_up_when_denied`: a refusal is one at any time.
        - `exclusive`: only one member of the group is active (see `Bus.consume`).
        - `max_attempts`: an event that comes more often without a verdict, because it kills its consumer say,
          is dead-lettered. None: never.

        Raises ConfigError for arguments, a URL or a dedupe file that can't be used.
        """
        checked_group(group)
        counts = {"prefetch": prefetch, "dedupe_rows": dedupe_rows, "max_attempts": max_attempts}
        for name, value in counts.items():
            if (value is not None or name != "max_attempts") and (type(value) is not int or value < 1):
                raise ConfigError(f"{name} = {value!r}: take a whole number of at least 1")
        if not isinstance(reorder_seconds, int | float) or not reorder_seconds >= 0:
            raise ConfigError(f"reorder_seconds = {reorder_seconds!r}: take a number of seconds, 0 or more")
        if not callable(on_missing):
            raise ConfigError(f"on_missing = {on_missing!r}: take a function of one MissingEvents")
        options = options if options is not None else BusOptions()
        bus = open_bus(url, options)
        scope = f"{bus_name(url, options)} {'group ' + group if group else 'without a group'}"
        self._grip = _Grip(bus, Marks(None if dedupe is None else Path(dedupe), scope, dedupe_rows))
        self._let_go = weakref.finalize(self, self._grip.let_go)
        self._seen = self._grip.seen
        self._group, self._prefetch, self._validate = group, prefetch, validate
        self._exclusive, self._max_attempts = exclusive, max_attempts
        self._memory = DeferredMemory(self._seen.notes(), on_missing)
        self._flush_rows = min(FLUSH_ROWS, prefetch) if group_commit and dedupe is not None else 1
        self._sequences = SequenceCheck(reorder_seconds, self._memory.missing, enabled=check_gaps)
        self._sequences.restore(self._seen.runs())
        self._in_flight: dict[Mark, list[Message]] = {}
        self._verdict_at, self._done_since = time.monotonic(), 0.0  # of the last; of the oldest in `_done`
        self._again: deque[Message] = deque()  # copies whose first one did not decide for them
        self._next: Delivery | None = None  # opened, not handed out yet
        self._retried: OrderedDict[Mark, None] = OrderedDict()
        self._done: dict[Mark, list[Message]] = {}
        self._stop = threading.Event()
        self._backoff, self._connected = Backoff("consume"), False
        self._patient, self._give_up_when_denied = patient, give_up_when_denied

    def __enter__(self) -> Consumer:
        self._grip.check_usable()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Delivery]:
        """Deliveries for ever, until `stop`."""
        self._grip.check_usable()
        while not self._stop.is_set():
            delivery = self.receive(_IDLE_SECONDS)
            if delivery is not None:
                yield delivery

    @_one_thread
    def receive(self, timeout: float) -> Delivery | None:
        """The next delivery, or None after `timeout` seconds or `stop`.

        Waits out a broker that is absent or refuses us. Raises GroupTakenOver when a newer exclusive member
        replaced this one, BusUnavailable and BusDenied as `patient` and `give_up_when_denied` ask,
        ConsumerClosed after `close`, ConfigError in a forked child or while another thread uses this one, and
        DedupeUnavailable when the dedupe file can't be used now: nothing was lost, call again when it can.
        """
        deadline = time.monotonic() + timeout
        while not self._stop.is_set():
            self._flush_if_due()
            left = max(0.0, deadline - time.monotonic())
            message = None
            try:
                if self._next is None:
                    left = min(left, FLUSH_SECONDS if self._done else _IDLE_SECONDS)  # to hear of `stop`
                    message = self._next_message(left)
                    self._next = None if message is None else self._opened(message)
                    self._backoff.reset()
            except (BusUnavailable, BusDenied) as error:
                self._lost(error, deadline)
            except BaseException as error:
                # A signal's handler raised, with a message half-way: it comes again, in its order.
                if self._group is not None and not isinstance(error, Exception):
                    self._grip.leave()
                raise
            self._sequences.tick(time.monotonic())
            self._memory.tell()  # with no event half-way: the author's function may raise
            if self._next is not None and not self._grip.closing:
                delivery, self._next = self._next, None
                return delivery
            if message is None and time.monotonic() >= deadline:
                break
        if len(self._in_flight) >= self._prefetch and time.monotonic() - self._verdict_at > _SILENT_SECONDS:
            emit(NoVerdicts(len(self._in_flight)))
        return None

    def stop(self) -> None:
        """End the iteration after the current delivery; may be called from another thread or a signal."""
        self._stop.set()

    def close(self) -> None:
        """Write the outstanding marks, send their acks, and leave. Idempotent.

        From another thread it ends a call that is under way first; from within one (a signal's handler, or
        `on_missing`) it takes effect at that call's end. Raises DedupeUnavailable, having left, when the
        marks can't be written: those events come again.
        """
        self._stop.set()
        grip = self._grip
        if grip.gone or os.getpid() != grip.pid:
            return
        with grip.busy:
            grip.closing = grip.calls > 0
            if grip.closing or grip.gone:
                return
            try:
                with suppress(BusUnavailable, BusDenied):  # marks are on disk: what comes again is recognised
                    self._flush()
                grip.leave()
                with suppress(DedupeUnavailable):  # how far the bus got with these acks: no more than useful
                    self._seen.write([], (), self._memory.fresh)
            finally:
                self._let_go()
            self._memory.tell()

    # ---- one message

    def _next_message(self, timeout: float) -> Message | None:
        if self._grip.subscription is None:
            self._grip.subscription = self._grip.bus.consume(
                self._group, prefetch=self._prefetch, exclusive=self._exclusive, memory=self._memory
            )
        if self._again:
            return self._again.popleft()
        message = self._grip.subscription.receive(timeout)
        self._connected = True
        return message

    def _opened(self, message: Message) -> Delivery | None:
        """A message's delivery, or None when it was a duplicate or is not an event."""
        subscription = self._grip.subscription
        assert subscription is not None
        try:
            opened = envelope.decode(message)
            event = envelope.to_event(opened, validate=self._validate)
        except SchemaError as error:
            emit(PoisonMessage(message.position, str(error)))
            subscription.dead_letter(message, str(error))
            return None
        attributes = opened.attributes
        mark = (attributes["source"], attributes["id"])
        if mark in self._in_flight:
            self._in_flight[mark].append(message)
            return None
        try:
            seen = mark in self._done or self._seen.has(mark)
        except DedupeUnavailable:
            subscription.retry(message, _IDLE_SECONDS)  # undecided: it is asked again
            raise
        self._sequences.saw(attributes, event, time.monotonic())
        if mark in self._done:
            self._done[mark].append(message)
            return None
        if seen:
            subscription.ack(message)
            return None
        attempts = message.attempts or 0
        # One that asked for a `retry` here had its verdicts.
        if self._max_attempts is not None and attempts > self._max_attempts and mark not in self._retried:
            told = f"delivered {attempts - 1} times without a verdict: it may have killed its consumer"
            subscription.dead_letter(message, told)
            return None
        self._sequences.handed_out(attributes)
        delivery = Delivery(
            event, attributes, opened.data, opened.body, message.user_id, message.redelivered,
            message.attempts, self, message,
        )  # fmt: skip
        self._in_flight[mark] = []  # last: nothing that comes between may leave it there alone
        return delivery

    def _closed_by(self, delivery: Delivery) -> list[Message]:
        """The messages that share the verdict: the one handed out and, last, its newest copy.

        Another's copy, or other content, is looked at again. Only the newest is sure to be the broker's.
        """
        if not delivery._open:
            raise ConfigError(f"event {delivery.id} has had its verdict; give each delivery exactly one")
        delivery._open, self._verdict_at = False, time.monotonic()
        first = delivery._message
        same: list[Message] = []
        for copy in self._in_flight.pop((delivery.source, delivery.id), []):
            alike = copy.body == first.body and copy.user_id == first.user_id
            (same if alike else self._again).append(copy)
        return [first, *same]

    @_one_thread
    def _settle(self, delivery: Delivery) -> None:
        copies = self._closed_by(delivery)
        mark = (delivery.source, delivery.id)
        self._retried.pop(mark, None)
        if not self._done:
            self._done_since = time.monotonic()
        self._done[mark] = copies
        self._flush_if_due()

    @_one_thread
    def _retry(self, delivery: Delivery, after: float) -> None:
        *older, newest = self._closed_by(delivery)
        self._retried[(delivery.source, delivery.id)] = None
        while len(self._retried) > _RETRIED:
            self._retried.popitem(last=False)
        if self._grip.subscription is not None:
            for copy in older:
                self._grip.subscription.ack(copy)
            self._grip.subscription.retry(newest, after)

    @_one_thread
    def _dead_letter(self, delivery: Delivery, reason: str) -> None:
        *older, newest = self._closed_by(delivery)
        self._retried.pop((delivery.source, delivery.id), None)
        if self._grip.subscription is not None:
            self._sequences.settled(delivery.source, delivery.id)
            with suppress(BusUnavailable, BusDenied):  # it comes again
                self._grip.subscription.dead_letter(newest, reason)
                for copy in older:
                    self._grip.subscription.ack(copy)

    # ---- marks before acks

    def _flush_if_due(self) -> None:
        if self._done and (
            len(self._done) >= self._flush_rows or time.monotonic() - self._done_since >= FLUSH_SECONDS
        ):
            with suppress(BusUnavailable, BusDenied):  # what comes again is recognised
                self._flush()

    def _flush(self) -> None:
        """Write the marks of what is done in one transaction, then send the acks."""
        fresh, marks = self._memory.fresh, list(self._done)
        for mark in marks:
            self._sequences.settled(*mark)
        self._seen.write(marks, self._sequences.changes(), fresh)
        fresh.clear()
        self._sequences.saved()
        done, self._done = self._done, {}
        if self._grip.subscription is not None:
            for messages in done.values():
                for message in messages:
                    self._grip.subscription.ack(message)

    def _lost(self, error: BusUnavailable | BusDenied, deadline: float) -> None:
        """The broker is away: what was unacknowledged comes again, to us or to another member."""
        left, first = deadline - time.monotonic(), not self._patient and not self._connected
        if first and (left <= _IDLE_SECONDS or isinstance(error, BusDenied)):
            raise error
        if isinstance(error, BusDenied):
            if self._give_up_when_denied or isinstance(error, GroupTakenOver):
                raise error
            emit(ConsumerRefused(error))
        elif not first:
            emit(BusCutOff("consumer", error))
        self._backoff.wait(self._stop, error, limit=max(0.0, left))
