"""The intake: from the queue to the spool, a transaction per batch; the agent's durability point.

Each batch is drained, applied to the incidents, and committed with their states. Then the spool learns up to
when everything was seen: there the next gap begins.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial

from virtbus.agent.identity import Speaker
from virtbus.agent.incidents import Incidents
from virtbus.agent.queue import IntakeQueue, aggregate, callbacks_in
from virtbus.agent.tap import Taps
from virtbus.errors import SpoolFull, VirtbusError
from virtbus.model import Event, Gap, Host, IoError, IoErrorResolved, Now, Stamp, to_datetime
from virtbus.observations import (
    HostKnown,
    Observation,
    SourceGone,
    SourceLost,
    SourceReady,
    SourceSeen,
    StoodStill,
    Surveyed,
)
from virtbus.retry import Backoff
from virtbus.seen import MARGIN_SECONDS, Blind, Moment, Sight, moment_of
from virtbus.sources import Source
from virtbus.spool import Spool
from virtbus.telemetry import METRICS, SpoolUnwritable, SpoolWritable, Trouble, emit
from virtbus.words import GapReason, Origin, Phase

SOURCE_GRACE_SECONDS = 5.0  # how long the first event of a start waits for the first snapshot
ALIVE_SECONDS = 5.0  # the longest wait for a batch: the spool hears at least so often what was seen through
# In a storm: the wait after a batch that was only counted, so that many errors share one disk sync. What is
# not one of the same errors again ends it.
GATHER_SECONDS = 0.1
HANGING_SECONDS = 10.0  # a write that takes longer is not merely slow
UNREAD_SECONDS = 10.0  # between two gap events about callbacks that nobody could read


class Writer:
    """Writes for the intake: each batch in one transaction, then up to when everything was seen.

    Any thread may ask for its `troubles`.
    """

    def __init__(
        self,
        spool: Spool,
        incidents: Incidents,
        speaker: Speaker,
        taps: Taps,
        clock: Callable[[], Now],
        stop: threading.Event,
        abort: threading.Event,
    ) -> None:
        """`stop` and `abort` bound how long a broken disk is waited for."""
        self._spool, self._incidents, self._speaker, self._taps = spool, incidents, speaker, taps
        self._clock, self._stop, self._abort = clock, stop, abort
        self.error: str | None = None  # why the last write failed
        self.busy_since: float | None = None  # monotonic; since when a write has been under way
        self._sign_refused: Now | None = None
        self._pending: list[Event] = []
        self._pending_states: dict[str, bytes | None] = {}

    @property
    def holds(self) -> bool:
        """Whether there is something that could not be committed."""
        return bool(self._pending or self._pending_states)

    def commit(self, events: list[Event]) -> None:
        """One transaction with the events and the incident states; tries for ever, folding meanwhile.

        The batch that failed is kept as it is; what comes after it stays in the queue, which folds: so
        memory is bounded, and counts are exact but for what it counts as dropped. When the disk is back a gap
        event says how long it was.
        """
        self._pending += events
        self._pending_states.update(self._incidents.changes())
        if not self._pending and not self._pending_states and not self._spool.stats().unnamed:
            return  # what is lost and unnamed is named by the spool itself, with any commit
        backoff = Backoff("commit", ceiling=2.0)
        failed: Now | None = None
        begun = self._clock()
        self.busy_since = begun.monotonic
        while True:
            batch = self._pending if failed is None else self._overdue(begun, failed)
            try:
                stamps = self._spool.commit(batch, self._pending_states)
            except SpoolFull as error:
                failed = failed or self._clock()
                self.error = str(error)
                emit(SpoolUnwritable(str(self._spool.path), error))
                waited = self._clock().monotonic - begun.monotonic
                if self._abort.is_set() or (self._stop.is_set() and waited > 2.0):
                    return  # ending with a broken disk: this batch lies inside the next start's gap
                backoff.wait(self._abort, error)
                continue
            if failed is not None:
                self._writable_again(failed)
            self._pending, self._pending_states = [], {}
            self.error = self.busy_since = None
            self._committed(batch, stamps)
            return

    def _overdue(self, begun: Now, failed: Now) -> list[Event]:
        """What waits since `begun`, and the gap of the disk that refused, in the wall clock as it is now."""
        now = self._clock()
        step = timedelta(microseconds=(Moment.of(begun).wall(now) - begun.wall_ns) // 1000)
        gap = self._speaker.gap(
            GapReason.SPOOL_UNWRITABLE,
            f"the spool could not be written for {now.monotonic - failed.monotonic:.0f} s; "
            "errors were counted in memory",
            started_at=to_datetime(Moment.of(failed).wall(now)),
            ended_at=to_datetime(now.wall_ns),
        )
        return [*(_moved(event, step) if isinstance(event, Gap) else event for event in self._pending), gap]

    def _committed(self, events: Sequence[Event], stamps: Sequence[Stamp]) -> None:
        for event in events:
            if isinstance(event, IoError):
                METRICS.events.labels("io_error", event.origin.value, event.incident.phase.value).inc()
                METRICS.occurrences.labels(event.origin.value).inc(event.occurrences.count)
            elif isinstance(event, IoErrorResolved):
                METRICS.events.labels("resolved", "", Phase.RESOLVED.value).inc()
            elif isinstance(event, Gap):
                METRICS.events.labels("gap", "", "").inc()
                METRICS.gaps.labels(event.reason).inc()
        if self._taps.active:
            for event, stamp in zip(events, stamps, strict=False):
                self._taps.offer("incident", event, stamp)

    def sign_of_life(self, through: Moment) -> None:
        """Store up to when everything was seen; this also detects a bad disk on an idle host."""
        begun = self._clock()
        self.busy_since = begun.monotonic
        taken = self._spool.alive(through)
        self.busy_since = None
        since = self._sign_refused
        if not taken:
            self._sign_refused = since or begun
            self.error = str(self._spool.refusal)
            emit(SpoolUnwritable(str(self._spool.path), self.error))
        elif since is not None:
            self._sign_refused = self.error = None
            self._writable_again(since)

    def _writable_again(self, failed: Now) -> None:
        seconds = self._clock().monotonic - failed.monotonic
        emit(SpoolWritable(str(self._spool.path), round(seconds, 1)))

    def troubles(self) -> list[str]:
        """Why nothing can be kept now, a line each."""
        reasons = [] if self.error is None else [f"spool: {self.error}"]
        now = self._clock().monotonic
        seconds = now - (self.busy_since or now)
        if seconds > HANGING_SECONDS:
            reasons.append(f"spool: a write has been hanging for {seconds:.0f} s")
        return reasons


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
        self._unread_at = started.monotonic  # when lost callbacks may be reported again
        self._unreadable: tuple[str, ...] = ()

    def restore(self) -> None:
        """Go on from the open incidents of an earlier run."""
        # An incident whose state can't be read has lost its pending count: the first events say so.
        self._unreadable = self._incidents.restore(self._spool.states(), self.started)

    def run(self) -> None:
        """Take in until the stop, or `abort`; what is committed by then may be published."""
        try:
            self._open_epoch()
            while not (self._stop.is_set() and self.queue.is_told) and not self._abort.is_set():
                counted = self._once(self._timeout())
                self.queue.gather(counted, min(GATHER_SECONDS, self._timeout()))
            if self.stopped is not None and self.queue.is_told:
                # From here on nobody looks. What an abort left in the queue was not seen.
                self.sight.drained(self.stopped)
                self._spool.alive(self.seen_through())
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
        first: SourceReady | Surveyed | None = None
        whole = False
        now = self._clock()
        deadline = now.monotonic + SOURCE_GRACE_SECONDS
        while not whole and not self._stop.is_set() and now.monotonic < deadline:
            for item in self.queue.drain(max(0.0, min(0.5, deadline - now.monotonic))):
                if isinstance(item, SourceReady | Surveyed) and not whole:
                    first, whole = item, isinstance(item, Surveyed) or item.whole
                held.append(item)
            now = self._clock()
        # Until the source is up nothing is observed: from now on that is a gap of its own.
        unreached = Blind(
            Moment.of(now), "libvirt was not reachable at the agent's start", GapReason.SOURCE_LOST
        )
        if first is None:
            self.sight.unreached = unreached
        else:
            hosts = [item.host for item in held if isinstance(item, HostKnown)]
            self._speaker.begin_on([first.host, *hosts][-1])
        events = self._events_of(self._taken(held), now)
        if first is not None:
            # A further connection that comes up later was not seen since this one did.
            why = "a further connection came up later than the first"
            self.sight.unreached = unreached._replace(since=moment_of(first, now), why=why)
        opening = self._spool.opening
        known = opening.last_alive_ns is not None and opening.placed
        since = to_datetime(self.sight.since.wall(now)) if known else None
        until = to_datetime(now.wall_ns if first is None else moment_of(first, now).wall(now))
        gap = partial(self._speaker.gap, started_at=since, ended_at=until)
        missing = () if opening.damage else opening.missing
        down = gap(GapReason.AGENT_DOWN, previous=opening.previous, missing=missing, found=_found(events))
        gaps: list[Event] = [down]
        if opening.damage:
            gaps.append(gap(GapReason.SPOOL_DAMAGED, opening.damage, missing=opening.missing))
        if self._unreadable:
            gaps.append(gap(GapReason.SPOOL_DAMAGED, "; ".join(self._unreadable)[:1000]))
        if self._speaker.previous_id is not None:
            was = f"this is another machine (a cloned disk?); before: {self._speaker.previous_id}"
            gaps.append(gap(GapReason.IDENTITY_CHANGED, was))
        self.writer.commit(gaps + events)
        self.writer.sign_of_life(self.seen_through())
        self.opened.set()

    def _once(self, timeout: float) -> Sequence[Observation]:
        """One batch: drain, apply, commit → what was only counted, if nothing in it was news."""
        before = self._clock()
        observations = self._taken(self.queue.drain(timeout))
        now = self._clock()
        if self.queue.emptied:
            self.sight.drained(before)
        events = self._events_of(observations, now)
        events += self._incidents.tick(now, self._source.describe)
        events += self._missed(now)
        if self._speaker.unidentified is not None:
            events += self._copied(self._speaker.unidentified, now)
        self.writer.commit(events)
        self.writer.sign_of_life(self.seen_through())
        return () if events else observations

    # ---- what a batch becomes

    def _gap(
        self,
        reason: GapReason,
        why: str,
        since: Moment,
        until_ns: int,
        now: Now,
        *,
        errors: int = 0,
        found: int = 0,
    ) -> Event:
        started_at, ended_at = to_datetime(since.wall(now)), to_datetime(until_ns)
        return self._speaker.gap(
            reason, why, started_at=started_at, ended_at=ended_at, missing_occurrences=errors, found=found
        )

    def _taken(self, drained: list[Observation]) -> list[Observation]:
        """What was drained, equal errors as one."""
        if self._taps.active:
            for item in drained:
                self._taps.offer("raw", item)
        observations = aggregate(drained) if self._fold else drained
        METRICS.callbacks.inc(sum(map(callbacks_in, observations)))
        return observations

    def _events_of(self, observations: list[Observation], now: Now) -> list[Event]:
        """What a batch becomes, in its order; keeps track of whether the source observes."""
        events: list[Event] = []
        for item in observations:
            if isinstance(item, SourceGone):
                blind = self.sight.gone(item)
                if blind is not None:
                    # Guests whose end it did not report may have had errors until then.
                    events.append(self._gap(blind.reason, blind.why, blind.since, item.at_ns, now))
                continue
            if isinstance(item, StoodStill):
                since = Moment.of(item.since, MARGIN_SECONDS)
                events.append(self._gap(GapReason.AGENT_STANDSTILL, item.why, since, item.at_ns, now))
                continue
            if isinstance(item, Surveyed):
                self.sight.surveyed(item)
            ended: Blind | None = None
            if isinstance(item, SourceReady | SourceLost | SourceSeen):
                ended = self.sight.take(item, now)
                if isinstance(item, SourceSeen):
                    continue
            if isinstance(item, HostKnown | Surveyed | SourceReady):
                known = self._speaker.host if isinstance(item, Surveyed) else None
                self._speaker.is_on(known or item.host)
            found = self._apply(item, now)
            if ended is not None and isinstance(item, SourceReady):  # before what was found in it
                count = _found(found)
                until_ns = moment_of(item, now).wall(now)
                gap = self._gap(ended.reason, ended.why, ended.since, until_ns, now, found=count)
                found.insert(0, gap)
            events += found
            if isinstance(item, HostKnown | Surveyed | SourceReady) and self.opened.is_set():
                events += self._copied(item.host, now)
        return events

    def _apply(self, item: Observation, now: Now) -> list[Event]:
        """One observation's events. A bug in here costs that observation (named in a gap), not the agent."""
        try:
            return self._incidents.apply(item, now, self._source.describe)
        except Exception as error:  # noqa: BLE001 - one poisoned observation must not stop the others
            emit(Trouble("incidents", error))
            METRICS.dropped.inc(callbacks_in(item) or 1)
            why = f"an observation could not be handled: {type(error).__name__}"
            return [self._dropped(why, callbacks_in(item), now)]

    def _dropped(self, why: str, errors: int, now: Now) -> Event:
        return self._gap(
            GapReason.OBSERVATIONS_DROPPED, why, self.sight.through, now.wall_ns, now, errors=errors
        )

    def _copied(self, host: Host, now: Now) -> list[Event]:
        """Libvirt came late and says that our id is another host's: reported, and the agent exits."""
        error = self._speaker.is_anothers(host)
        if error is None:
            return []
        self._fail(error)
        return [self._speaker.gap(GapReason.IDENTITY_CHANGED, str(error), ended_at=to_datetime(now.wall_ns))]

    def _missed(self, now: Now) -> list[Event]:
        """What the queue could not keep, and callbacks that nobody could read: each a gap."""
        events: list[Event] = []
        errors, others = self.queue.take_dropped()
        if errors or others:
            METRICS.dropped.inc(errors + others)
            why = f"the disk was too slow to keep {errors} errors and {others} other observations"
            events.append(self._dropped(why, errors, now))
        if now.monotonic >= self._unread_at or self._stop.is_set():
            unread, why = self.queue.take_unread()
            if unread:
                self._unread_at = now.monotonic + UNREAD_SECONDS
                METRICS.dropped.inc(unread)
                events.append(self._dropped(f"{why} ({unread} times)", unread, now))
        return events

    def seen_through(self) -> Moment:
        """Up to when everything that every connection reported is on the disk.

        Not further than before while a batch could not be committed, or a lost callback waits to be reported.
        """
        if not (self.writer.holds or self.queue.unread):
            self.sight.committed()
        return self.sight.through


def _moved(gap: Gap, step: timedelta) -> Gap:
    """A gap that was not reported yet, after the wall clock was set by `step`."""
    started_at = None if gap.started_at is None else gap.started_at + step
    return replace(gap, started_at=started_at, ended_at=gap.ended_at + step)


def _found(events: Sequence[Event]) -> int:
    return sum(1 for event in events if isinstance(event, IoError) and event.origin is Origin.RECONCILE)
