"""The intake: from the queue to the spool, a transaction a batch; the agent's durability point.

Each batch is drained, applied to the incidents, and committed with their states. Then the spool is told up to
when everything was seen: there the next gap begins.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

from virtbus.agent.incidents import Incidents
from virtbus.agent.queue import IntakeQueue, aggregate, callbacks_in
from virtbus.agent.sight import Sight
from virtbus.agent.speaker import Speaker
from virtbus.agent.tap import Taps
from virtbus.agent.writer import Writer
from virtbus.errors import VirtbusError
from virtbus.model import (
    Burst,
    Event,
    Host,
    HostKnown,
    IoError,
    Now,
    Observation,
    RawIoError,
    SourceGone,
    SourceLost,
    SourceReady,
    SourceSeen,
    Surveyed,
    to_datetime,
)
from virtbus.seen import Blind, Moment, stalled_words
from virtbus.sources import Source
from virtbus.spool import Spool
from virtbus.telemetry import METRICS, Trouble, emit
from virtbus.words import GapReason, Origin

SOURCE_GRACE_SECONDS = 5.0  # how long the first event of a start waits for the first snapshot
ALIVE_SECONDS = 5.0  # between two signs of life in the spool (the promise is 10 s)
# How long a storm is let gather after errors that were only counted: so, many share one sync of the disk, and
# news among them waits no longer than this.
GATHER_SECONDS = 0.02
UNREAD_SECONDS = 10.0  # between two gap events about callbacks that nobody could read


class Intake:
    """The intake thread's work."""

    def __init__(
        self,
        *,
        source: Source,
        spool: Spool,
        incidents: Incidents,
        queue: IntakeQueue,
        speaker: Speaker,
        taps: Taps,
        clock: Callable[[], Now],
        fold: bool,
        stop: threading.Event,
        abort: threading.Event,
        fail: Callable[[VirtbusError], None],
    ) -> None:
        """`stop`: take in what is queued, and end; `abort`: end at once; `fail` ends the agent."""
        self._source, self._spool, self._incidents, self.queue = source, spool, incidents, queue
        self._speaker, self._taps, self._clock, self._fold = speaker, taps, clock, fold
        self._stop, self._abort, self._fail = stop, abort, fail
        self.started = started = clock()
        since_ns = spool.opening.last_alive_ns
        self.sight = Sight(
            Moment.of(started) if since_ns is None else Moment.stamped(since_ns, started), started
        )
        self.writer = Writer(spool, incidents, speaker, taps, clock, stop, abort)
        self.opened = threading.Event()  # this run's first event is on the disk
        self.stopped: Now | None = None  # when observing ended
        self._unread_at = started.monotonic  # when lost callbacks may be told again
        self._unreadable: tuple[str, ...] = ()

    def restore(self) -> None:
        """Go on from the open incidents of an earlier run."""
        # An incident whose state can't be read has lost its pending count: the first events tell.
        self._unreadable = self._incidents.restore(self._spool.states(), self.started)

    def run(self) -> None:
        """Take in until the stop, or `abort`; what is committed by then may be published."""
        try:
            self._open_epoch()
            while not (self._stop.is_set() and len(self.queue) == 0) and not self._abort.is_set():
                if self._once(self._timeout()):
                    self._stop.wait(GATHER_SECONDS)
            if self.stopped is not None and len(self.queue) == 0:
                # From here on nobody looks. What an abort left in the queue was not seen.
                self.sight.drained(self.stopped)
                self._spool.alive(self.seen_through().wall(self._clock()))
        finally:
            self.opened.set()  # whatever happened, the backlog may go out

    def _timeout(self) -> float:
        if self._stop.is_set():
            return 0.0
        due = self._incidents.next_due()
        wait = ALIVE_SECONDS if due is None else min(ALIVE_SECONDS, due - self._clock().monotonic)
        return max(0.0, wait)

    def _open_epoch(self) -> None:
        """Commit this run's first event, the gap since the last one, with what was found in it."""
        held: list[Observation] = []
        ready: SourceReady | Surveyed | None = None
        whole = False
        before = self._clock()
        deadline = before.monotonic + SOURCE_GRACE_SECONDS
        while not whole and not self._stop.is_set() and before.monotonic < deadline:
            for item in self.queue.drain(max(0.0, min(0.5, deadline - before.monotonic))):
                if isinstance(item, SourceReady | Surveyed) and not whole:
                    ready, whole = item, isinstance(item, Surveyed) or item.whole
                held.append(item)
            before = self._clock()
        now = self._clock()
        opening = self._spool.opening
        if ready is None:
            # Until the source is up nothing is observed: from now on that is a gap of its own.
            self.sight.unreached = Blind(
                Moment.of(now), "libvirt was not reachable at the agent's start", GapReason.SOURCE_LOST
            )
        else:
            hosts = [item.host for item in held if isinstance(item, HostKnown)]
            self._speaker.begin_on([ready.host, *hosts][-1])
        events = self._events_of(held, now)
        if ready is not None:
            # A further connection that comes up later was not seen since this one did.
            why = "a further connection came up later than the first"
            self.sight.unreached = Blind(Moment.stamped(ready.at_ns, now), why, GapReason.SOURCE_LOST)
        ended_at = to_datetime(ready.at_ns if ready else now.wall_ns)
        since = None if opening.last_alive_ns is None else to_datetime(self.sight.since.wall(now))
        gap = partial(self._speaker.gap, started_at=since, ended_at=ended_at)
        gaps: list[Event] = [
            gap(
                GapReason.AGENT_DOWN,
                previous=opening.previous,
                missing=() if opening.damage else opening.missing,
                found=_found(events),
            )
        ]
        if opening.damage:
            gaps.append(gap(GapReason.SPOOL_DAMAGED, opening.damage, missing=opening.missing))
        if self._unreadable:
            gaps.append(gap(GapReason.SPOOL_DAMAGED, "; ".join(self._unreadable)[:1000]))
        if self._speaker.previous_id is not None:
            was = f"this is another machine (a cloned disk?); before: {self._speaker.previous_id}"
            gaps.append(gap(GapReason.IDENTITY_CHANGED, was))
        self.writer.commit(gaps + events)
        self.writer.sign_of_life(now, self.seen_through())
        self.opened.set()

    def _once(self, timeout: float) -> bool:
        """One batch: drain, apply, commit. Whether there were errors in it, and they were only counted."""
        before = self._clock()
        observations = self.queue.drain(timeout)
        now = self._clock()
        if self.queue.emptied:
            self.sight.drained(before)
        events = self._stalled(before, now, timeout)
        events += self._events_of(observations, now)
        events += self._incidents.tick(now, self._source.describe)
        events += self._missed(now)
        if self._speaker.unidentified is not None:
            events += self._copied(self._speaker.unidentified, now)
        self.writer.commit(events)
        self.writer.sign_of_life(now, self.seen_through())
        return not events and any(isinstance(item, RawIoError | Burst) for item in observations)

    # ---- what a batch becomes

    def _prepared(self, observations: list[Observation]) -> list[Observation]:
        METRICS.callbacks.inc(sum(callbacks_in(item) for item in observations))
        if self._taps.active:
            for item in observations:
                self._taps.offer("raw", item)
        return aggregate(observations) if self._fold else observations

    def _events_of(self, observations: list[Observation], now: Now) -> list[Event]:
        """What a batch becomes, in its order; keeps track of whether the source observes."""
        events: list[Event] = []
        for item in self._prepared(observations):
            if isinstance(item, HostKnown):
                self._speaker.is_on(item.host)
                if self.opened.is_set():
                    events += self._copied(item.host, now)
            if isinstance(item, SourceGone):
                events += self._ended(item, now)
                continue
            if isinstance(item, Surveyed):
                self.sight.surveyed(item)
                self._speaker.is_on(self._speaker.host or item.host)
                if self.opened.is_set():
                    events += self._copied(item.host, now)
            if isinstance(item, SourceReady | SourceLost | SourceSeen):
                blind = self.sight.take(item, now)
                if isinstance(item, SourceSeen):
                    continue
                if isinstance(item, SourceReady):
                    events += self._came_back(item, blind, now)
                    continue
            events += self._apply(item, now)
        return events

    def _apply(self, item: Observation, now: Now) -> list[Event]:
        """One observation's events. A bug in here costs that observation (named in a gap), not the agent."""
        try:
            return self._incidents.apply(item, now, self._source.describe)
        except Exception as error:  # noqa: BLE001 - one poisoned observation must not stop the others
            emit(Trouble("incidents", error))
            METRICS.dropped.inc(callbacks_in(item) or 1)
            return [
                self._speaker.gap(
                    GapReason.OBSERVATIONS_DROPPED,
                    f"an observation could not be handled: {type(error).__name__}",
                    started_at=to_datetime(self.sight.through.wall(now)),
                    ended_at=to_datetime(now.wall_ns),
                    missing_occurrences=callbacks_in(item),
                )
            ]

    def _came_back(self, ready: SourceReady, blind: Blind | None, now: Now) -> list[Event]:
        """The source is up again: what was found, after the gap that says what may be missing."""
        self._speaker.is_on(ready.host)
        self._incidents.host = ready.host
        events = self._apply(ready, now)
        if self.opened.is_set():
            events += self._copied(ready.host, now)
        if blind is None:
            return events
        gap = self._speaker.gap(
            blind.reason,
            blind.why,
            started_at=to_datetime(blind.since.wall(now)),
            ended_at=to_datetime(ready.at_ns),
            found=_found(events),
        )
        return [gap, *events]

    def _ended(self, gone: SourceGone, now: Now) -> list[Event]:
        """A connection ended for good. Guests whose end it did not tell may have had errors until then."""
        blind = self.sight.gone(gone)
        if blind is None:
            return []
        return [
            self._speaker.gap(
                blind.reason,
                blind.why,
                started_at=to_datetime(blind.since.wall(now)),
                ended_at=to_datetime(gone.at_ns),
            )
        ]

    def _copied(self, host: Host, now: Now) -> list[Event]:
        """Libvirt came late and says that our id is another host's: told, and begun again under a new one."""
        error = self._speaker.is_anothers(host)
        if error is None:
            return []
        self._fail(error)
        return [self._speaker.gap(GapReason.IDENTITY_CHANGED, str(error), ended_at=to_datetime(now.wall_ns))]

    def _stalled(self, before: Now, now: Now, timeout: float) -> list[Event]:
        """The process stood still (stopped, suspended, swapped out).

        A source that proves what it saw notices by itself and reconnects; for any other one this is told.
        """
        stood, blind = self.sight.blinded(before, now, timeout)
        return [
            self._speaker.gap(
                GapReason.AGENT_STANDSTILL,
                stalled_words(stood),
                started_at=to_datetime(since.wall(now)),
                ended_at=to_datetime(now.wall_ns),
            )
            for since in blind
        ]

    def _missed(self, now: Now) -> list[Event]:
        """What the queue could not keep, and callbacks that nobody could read: each a gap."""
        gap = partial(
            self._speaker.gap,
            GapReason.OBSERVATIONS_DROPPED,
            started_at=to_datetime(self.sight.through.wall(now)),
            ended_at=to_datetime(now.wall_ns),
        )
        events: list[Event] = []
        errors, others = self.queue.take_dropped()
        if errors or others:
            METRICS.dropped.inc(errors + others)
            why = f"the disk was too slow to keep {errors} errors and {others} other observations"
            events.append(gap(why, missing_occurrences=errors))
        if now.monotonic >= self._unread_at or self._stop.is_set():
            unread, why = self.queue.take_unread()
            if unread:
                self._unread_at = now.monotonic + UNREAD_SECONDS
                METRICS.dropped.inc(unread)
                events.append(gap(f"{why} ({unread} times)", missing_occurrences=unread))
        return events

    def seen_through(self) -> Moment:
        """Up to when everything that every connection told is on the disk.

        Not further than before while a batch could not be committed, or a lost callback waits to be told.
        """
        if not (self.writer.holds or self.queue.unread):
            self.sight.committed()
        return self.sight.through


def _found(events: Sequence[Event]) -> int:
    return sum(1 for event in events if isinstance(event, IoError) and event.origin is Origin.RECONCILE)
