"""The publisher: from the spool to the bus until the bus has confirmed, and the heartbeat beside it."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet

from virtbus import redaction
from virtbus.agent.tap import Taps
from virtbus.bus import Publishing
from virtbus.errors import BusDenied, BusUnavailable, SpoolCorrupt, SpoolFull
from virtbus.model import Confirmed, Deferred, Outcome, Parked, Record, Refused
from virtbus.retry import Attempt, retrying, start_over
from virtbus.spool import Spool
from virtbus.telemetry import METRICS, BusLost, EventParked, SpoolUnwritable, Trouble, emit

_IDLE_SECONDS = 1.0  # with nothing to send: then the connection is looked after, and the file
_AT_ONCE = 128  # records read at a time: the first are on their way while the next are read


class Publisher:
    """The publisher thread's work, and the spool as a bus's feed.

    Guarantees:
    1. what was taken from the spool is settled, or given back to be sent again, whatever the bus raises;
    2. once `draining` is set it ends when nothing waits any more, or `drain_seconds()` later;
    3. once `abort` is set it ends at once; what is not confirmed stays in the spool.
    """

    def __init__(
        self,
        *,
        spool: Spool,
        bus: Publishing,
        taps: Taps,
        heartbeat: Callable[[], Record],
        heartbeat_seconds: Callable[[], float],
        drain_seconds: Callable[[], float],
        abort: threading.Event,
        bus_name: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """The two `…_seconds` are asked each time: a reload may change them."""
        self._spool, self._bus, self._taps, self._bus_name = spool, bus, taps, bus_name
        self._heartbeat, self._heartbeat_seconds = heartbeat, heartbeat_seconds
        self._drain_seconds = drain_seconds
        self._abort, self._clock = abort, clock
        self.draining = threading.Event()  # nothing more will be committed
        self._drain_end: float | None = None  # monotonic
        self._outcomes: list[tuple[Record, Outcome]] = []  # to be settled
        self._beat_every = -1.0
        self._next_beat = 0.0
        self.error: str | None = None  # what keeps us from the broker now

    def run(self) -> None:
        """Publish until the drain is over or `abort`. Raises SpoolCorrupt."""
        attempts = retrying("publish", sleep=self._sleep, stop=self._is_over, fatal=SpoolCorrupt)
        while not self._is_over():
            for attempt in attempts:
                if self._is_over():
                    return
                with attempt:
                    try:
                        self._once(attempt)
                    except Exception as error:
                        self._failed(error)
                        raise

    def _failed(self, error: Exception) -> None:
        self.error = redaction.text(error)
        if isinstance(error, SpoolFull):
            emit(SpoolUnwritable(str(self._spool.path), error))
        elif not isinstance(error, BusUnavailable | BusDenied | SpoolCorrupt):
            emit(Trouble("publisher thread", error))  # an unknown fault must not end publishing

    def _sleep(self, seconds: float) -> None:
        """Sleep between attempts; the start or the end of a drain cuts it short."""
        if self._drain_end is None:
            self.draining.wait(seconds)
        else:
            self._abort.wait(max(0.0, min(seconds, self._drain_end - self._clock())))

    def _is_over(self) -> bool:
        if self._abort.is_set():
            return True
        if not self.draining.is_set():
            return False
        if self._drain_end is None:
            self._drain_end = self._clock() + self._drain_seconds()
        return self._clock() >= self._drain_end or self._spool.stats().pending == 0

    def _once(self, attempt: Attempt) -> None:
        """Publish all that can be taken, or wait up to `_IDLE_SECONDS` for something.

        Raises what kept events from the broker.
        """
        wait = min(_IDLE_SECONDS, self.heartbeat_in())
        # While draining, a set `draining` must not end the wait at once: keys may be parked.
        asleep_until = self._abort if self._drain_end is not None else self.draining
        if wait > 0 and not self._spool.wait(wait, asleep_until):
            self._bus.tick()
            if self.heartbeat_in() > 0:
                return
        deferred: Exception | None = None
        try:
            for record, outcome in self._bus.publish(self):
                self._done(record, outcome)
                if isinstance(outcome, Confirmed):
                    if self.error is not None:
                        start_over(attempt)
                        self.error = None
                elif isinstance(outcome, Deferred):
                    deferred = outcome.error
                if self._abort.is_set() or (self.draining.is_set() and self._is_over()):
                    break
        except (BusUnavailable, BusDenied) as error:
            emit(BusLost(self._bus_name, error))
            raise
        finally:
            try:
                self._settle()
            finally:
                self._spool.give_back(BusUnavailable("publishing ended before the broker answered"))
        if deferred is not None:
            raise deferred

    # ---- the feed

    def heartbeat_in(self) -> float:
        """Seconds until the next heartbeat is due. An interval that a reload changed counts from now."""
        every, now = self._heartbeat_seconds(), self._clock()
        if every != self._beat_every:
            # A random phase: a thousand agents that start together must not beat together.
            self._beat_every = every
            self._next_beat = now + random.uniform(0, every)  # noqa: S311 - no secret
        return max(0.0, self._next_beat - now) if every else 3600.0

    def take(self, limit: int, busy: AbstractSet[str]) -> Sequence[Record]:
        """The spool's records for the bus, and the heartbeat when it is due; see virtbus.bus.Feed."""
        # What was sent and is not settled comes twice after a kill: it must fit into the bus's window.
        if len(self._outcomes) * 2 > limit:
            self._settle()
        limit -= len(self._outcomes)
        if self.heartbeat_in() <= 0:
            self._next_beat = self._clock() + self._beat_every
            beat = self._heartbeat()
            if beat.key not in busy:
                return [beat]
        limit = min(limit, _AT_ONCE)
        records = self._spool.take(limit, busy)
        if not records and self._outcomes:
            self._settle()  # frees the next record of each confirmed key
            records = self._spool.take(limit, busy)
        return records

    def _done(self, record: Record, outcome: Outcome) -> None:
        """Confirms are settled in groups, all else at once."""
        self._outcomes.append((record, outcome))
        if not record.row:
            return
        if isinstance(outcome, Parked):
            emit(EventParked(record.id, record.key, outcome.reason))
        if not isinstance(outcome, Confirmed):
            self._settle()  # the spool must know at once that this key waits
        if self._taps.active and isinstance(outcome, Confirmed | Refused):
            self._taps.offer("published", record)

    def _settle(self) -> None:
        """Count and settle what has come together."""
        if self._outcomes:
            outcomes, self._outcomes = self._outcomes, []
            for kind, count in Counter(type(outcome) for _, outcome in outcomes).items():
                METRICS.outcomes.labels(kind.__name__.lower()).inc(count)
            self._spool.settle(outcomes)
