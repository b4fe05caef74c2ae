"""The agent: three threads with a queue and a database between them.

    source thread     libvirt's callbacks → Intake queue (folds when long)
    intake thread     queue → incidents → ONE spool transaction        <== the durability point
    publisher thread  spool → bus → outcomes → spool

A slow disk costs latency, never memory: while a commit hangs or fails, errors fold into counters. A slow
or absent broker costs nothing but spool space. The main thread only waits for signals.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial

from virtbus import __version__, envelope
from virtbus.agent.control import Drill
from virtbus.agent.incidents import Incidents
from virtbus.agent.publisher import Publisher
from virtbus.agent.queue import IntakeQueue, aggregate, callbacks_in
from virtbus.agent.tap import Taps
from virtbus.bus import Bus
from virtbus.errors import AgentBroken, RestartNeeded, SpoolFull, VirtbusError
from virtbus.model import (
    Backlog,
    Burst,
    Clock,
    DomainGone,
    Event,
    Gap,
    Heartbeat,
    Host,
    HostKnown,
    IoError,
    IoErrorResolved,
    Now,
    Observation,
    OpenIncidents,
    PreviousRun,
    RawIoError,
    Record,
    SequenceRange,
    SourceGone,
    SourceHealth,
    SourceLost,
    SourceReady,
    SourceSeen,
    Stamp,
    Surveyed,
    to_datetime,
)
from virtbus.retry import Backoff
from virtbus.seen import STANDSTILL_SECONDS, Blind, Moment, SeenThrough, earliest, stalled_words
from virtbus.sources import Source
from virtbus.spool import Spool
from virtbus.telemetry import (
    METRICS,
    AgentStarted,
    AgentStopped,
    DrillAsked,
    SpoolUnwritable,
    SpoolWritable,
    ThreadDied,
    Trouble,
    emit,
)
from virtbus.words import GapReason, Origin, Phase, ResolutionCause, SourceState

SOURCE_GRACE_SECONDS = 5.0  # how long the first event of a start waits for the first snapshot
ALIVE_SECONDS = 5.0  # between two signs of life in the spool (the promise is 10 s)
# How long a storm is let gather after errors that were only counted: so, many share one sync of the disk, and
# news among them waits no longer than this.
GATHER_SECONDS = 0.02
UNREAD_SECONDS = 10.0  # between two gap events about callbacks that nobody could read


@dataclass(frozen=True, slots=True)
class AgentOptions:
    """What the agent needs beside its parts; times in seconds."""

    drain_seconds: float = 10.0
    heartbeat_seconds: float = 60.0
    fold: bool = True


class Agent:
    """Wires source, incidents, spool and bus; owns the threads."""

    def __init__(
        self,
        *,
        source: Source,
        bus: Bus,
        spool: Spool,
        incidents: Incidents,
        agent_id: str,
        options: AgentOptions = AgentOptions(),
        previous_agent_id: str | None = None,
        clock: Callable[[], Now] | None = None,
        taps: Taps | None = None,
        bus_name: str = "bus",
        identify: Callable[[Host], str | None] = lambda host: None,
    ) -> None:
        """`identify` takes the host that libvirt names → a new agent id when the present one is another's."""
        self.source, self.bus, self.spool, self.incidents = source, bus, spool, incidents
        self.agent_id = agent_id
        self.options = options
        self.taps = taps or Taps()
        self.queue = IntakeQueue()
        self._clock = clock or Clock()
        self._previous_agent_id = previous_agent_id
        self._identify = identify
        self._bus_name = bus_name
        self._stop = threading.Event()  # stop observing
        self._abort = threading.Event()  # stop at once
        self._stopped: Now | None = None  # when observing ended
        self._first_commit = threading.Event()
        self._threads: dict[str, threading.Thread] = {}
        self._failure: VirtbusError | None = None
        started = self._clock()
        self._started = started
        since_ns = spool.opening.last_alive_ns
        self._since = Moment.of(started) if since_ns is None else Moment.stamped(since_ns, started)
        self._seen: dict[str, SeenThrough] = {}  # by connection
        self._opened: Now | None = None  # when the epoch was: what came up before is in its first gap
        self._surveyed = False  # a source of many connections has looked at all that were there
        self._unreached: Blind | None = None  # what the first snapshot of a connection will end
        self._unread_at = started.monotonic  # when lost callbacks may be told again
        self._source_since_ns = started.wall_ns
        self._intake_busy_since: float | None = None
        self._commit_error: str | None = None
        self._sign_refused: Now | None = None
        self._pending: list[Event] = []
        self._pending_states: dict[str, bytes | None] = {}
        self._unreadable: tuple[str, ...] = ()
        self.host: Host | None = None
        self.publisher = Publisher(
            spool=spool,
            bus=bus,
            taps=self.taps,
            heartbeat=lambda: self._heartbeat(),  # noqa: PLW0108 - looked up late: tests replace it
            heartbeat_seconds=lambda: self.options.heartbeat_seconds,
            drain_seconds=lambda: self.options.drain_seconds,
            abort=self._abort,
            bus_name=bus_name,
        )

    # ---- life

    def start(self) -> None:
        """Restore the open incidents and start the threads."""
        emit(
            AgentStarted(__version__, self.agent_id, self.spool.epoch, round(self._started.wall_ns / 1e9, 3))
        )
        self._bind_gauges()
        # An incident whose state can't be read has lost its pending count: the first events tell.
        self._unreadable = self.incidents.restore(self.spool.states(), self._started)
        for name, target in (
            ("source", self._observe),
            ("intake", self._take_in),
            ("publisher", self._publish),
        ):
            thread = threading.Thread(
                target=self._work, args=(name, target), name=f"virtbus-{name}", daemon=True
            )
            self._threads[name] = thread
            thread.start()

    def stop(self) -> None:
        """Stop observing, commit what was seen, publish up to the drain deadline. Returns at once."""
        self._stopped = self._stopped or self._clock()
        self._stop.set()
        # Not the spool: a signal handler may not wait for its lock, and the intake wakes it in the end.
        self.queue.wake()

    def abort(self) -> None:
        """Stop at once; what is committed stays in the spool."""
        self._abort.set()
        self.stop()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for `stop` or for a failure that ends the agent; True when it is over."""
        return self._stop.wait(timeout)

    def join(self) -> None:
        """Wait for the threads to end (bounded by the drain deadline), then close the parts.

        Raises the error that ended the agent, if one did (SourceDenied).
        """
        deadline = time.monotonic() + self.options.drain_seconds + 5.0
        for name in ("source", "intake", "publisher"):
            thread = self._threads.get(name)
            # libvirt may be frozen inside a call; the source's thread must not hold up the drain.
            limit = 2.0 if name == "source" else max(0.1, deadline - time.monotonic())
            while thread is not None and thread.is_alive() and limit > 0:
                if self._abort.is_set():
                    limit = min(limit, 1.0)  # long enough to leave the spool in order
                thread.join(0.1)
                limit -= 0.1
        self.bus.close()
        publisher = self._threads.get("publisher")
        if publisher is not None:
            publisher.join(2.0)  # closing the bus ends what it was waiting for
        left = self.spool.stats().pending
        self.spool.close()
        emit(AgentStopped(left_in_spool=left))
        if self._failure is not None:
            raise self._failure

    def fail(self, error: VirtbusError) -> None:
        """End the agent with this error: `join` raises it."""
        self._failure = self._failure or error
        self.stop()

    def _work(self, name: str, target: Callable[[], None]) -> None:
        """A thread's work. What ends it otherwise than by `stop` ends the agent, with its reason."""
        try:
            target()
        except VirtbusError as error:
            self.fail(error)
        except BaseException as error:  # noqa: BLE001 - whatever it is, nobody would do this thread's work
            emit(ThreadDied(name, f"{type(error).__name__}: {error}"))
            self.fail(AgentBroken(f"the agent's {name} thread ended: {type(error).__name__}: {error}"))

    # ---- source thread

    def _observe(self) -> None:
        """Observe until the stop. A source that breaks is begun again, and its absence is a gap."""
        backoff = Backoff("source")
        while not self._stop.is_set():
            why: Exception | str = "the source ended"
            try:
                self.source.run(self.queue.put, self._stop)
            except VirtbusError:
                raise
            except Exception as error:  # noqa: BLE001 - a bug of a source must not blind us for good
                emit(Trouble("source thread", error))
                why = error
            if not self._stop.is_set():
                for connection in list(self._seen):
                    lost = SourceLost(self._clock().wall_ns, f"the source ended: {why}", connection)
                    self.queue.put(lost)
                backoff.wait(self._stop, why)

    # ---- intake thread

    def _take_in(self) -> None:
        try:
            self._open_epoch()
            while not (self._stop.is_set() and len(self.queue) == 0) and not self._abort.is_set():
                if self._intake_once(self._intake_timeout()):
                    self._stop.wait(GATHER_SECONDS)
            if self._stopped is not None and len(self.queue) == 0:
                # From here on nobody looks. What an abort left in the queue was not seen.
                self._saw(self._stopped)
                self.spool.alive(self._seen_through().wall(self._clock()))
        finally:
            self.publisher.draining.set()
            self._first_commit.set()  # whatever happened, the backlog may go out
            self.spool.wake()

    def _intake_timeout(self) -> float:
        if self._stop.is_set():
            return 0.0
        due = self.incidents.next_due()
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
        opening = self.spool.opening
        if ready is None:
            # Until the source is up nothing is observed: from now on that is a gap of its own.
            self._unreached = Blind(
                Moment.of(now), "libvirt was not reachable at the agent's start", GapReason.SOURCE_LOST
            )
        else:
            self._previous_agent_id = self._changed_identity(ready.host) or self._previous_agent_id
        events = self._events_of(held, now)
        self._opened = now
        ended_at = to_datetime(ready.at_ns if ready else now.wall_ns)
        since = None if opening.last_alive_ns is None else to_datetime(self._since.wall(now))
        gap = partial(self._gap, started_at=since, ended_at=ended_at)
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
        if self._previous_agent_id is not None:
            was = f"this is another machine (a cloned disk?); before: {self._previous_agent_id}"
            gaps.append(gap(GapReason.IDENTITY_CHANGED, was))
        self._commit(gaps + events)
        self._sign_of_life(now)
        self._first_commit.set()

    def _changed_identity(self, host: Host) -> str | None:
        """Go on under an id of our own where ours is another host's → the old one, else None."""
        try:
            new = self._identify(host)
        except SpoolFull as error:
            emit(Trouble("agent-id", error))
            return None
        if new is None:
            return None
        old, self.agent_id = self.agent_id, new
        self.spool.agent_id = new
        return old

    def _gap(
        self,
        reason: GapReason,
        detail: str | None = None,
        *,
        ended_at: datetime,
        started_at: datetime | None = None,
        previous: PreviousRun | None = None,
        missing: tuple[SequenceRange, ...] = (),
        missing_occurrences: int = 0,
        found: int = 0,
    ) -> Gap:
        return Gap(
            host=self.host,
            agent_id=self.agent_id,
            reason=reason,
            detail=detail,
            started_at=None if started_at is None else min(started_at, ended_at),
            ended_at=ended_at,
            previous=previous,
            missing=missing,
            missing_events=sum(item.last - item.first + 1 for item in missing),
            missing_occurrences=missing_occurrences,
            found=found,
        )

    def _prepared(self, observations: list[Observation]) -> list[Observation]:
        METRICS.callbacks.inc(sum(callbacks_in(item) for item in observations))
        if self.taps.active:
            for item in observations:
                self.taps.offer("raw", item)
        return aggregate(observations) if self.options.fold else observations

    def _apply(self, item: Observation, now: Now) -> list[Event]:
        """One observation's events. A bug in here costs that observation (named in a gap), not the agent."""
        try:
            return self.incidents.apply(item, now, self.source.describe)
        except Exception as error:  # noqa: BLE001 - one poisoned observation must not stop the others
            emit(Trouble("incidents", error))
            METRICS.dropped.inc(callbacks_in(item) or 1)
            at = to_datetime(now.wall_ns)
            return [
                self._gap(
                    GapReason.OBSERVATIONS_DROPPED,
                    f"an observation could not be handled: {type(error).__name__}",
                    started_at=at,
                    ended_at=at,
                    missing_occurrences=callbacks_in(item),
                )
            ]

    def _intake_once(self, timeout: float) -> bool:
        """One batch: drain, apply, commit. Whether there were errors in it, and they were only counted."""
        before = self._clock()
        observations = self.queue.drain(timeout)
        now = self._clock()
        self._saw(before)
        events = self._stalled(before, now, timeout)
        events += self._events_of(observations, now)
        events += self.incidents.tick(now, self.source.describe)
        events += self._missed(now)
        self._commit(events)
        self._sign_of_life(now)
        return not events and any(isinstance(item, RawIoError | Burst) for item in observations)

    # ---- seen through

    def _saw(self, before: Now) -> None:
        for seen in self._seen.values():
            seen.drained(before)

    def _seen_through(self) -> Moment:
        """Up to when everything that every connection told is on the disk, now that the last batch is."""
        for seen in self._seen.values():
            seen.committed()
        return self._seen_by_now()

    def _seen_by_now(self) -> Moment:
        return earliest(*(seen.moment for seen in self._seen.values())) if self._seen else self._since

    def _stalled(self, before: Now, now: Now, timeout: float) -> list[Event]:
        """A wait took far longer than asked for: this process stood still (stopped, suspended, swapped out).

        A source that proves what it saw notices by itself and reconnects; for any other one this is told.
        """
        stood = now.boot - before.boot - timeout
        if stood < STANDSTILL_SECONDS:
            return []
        return [
            self._gap(
                GapReason.AGENT_STANDSTILL,
                stalled_words(stood),
                started_at=to_datetime(seen.moment.wall(now)),
                ended_at=to_datetime(now.wall_ns),
            )
            for seen in self._seen.values()
            if seen.connected and not seen.proves
        ]

    def _missed(self, now: Now) -> list[Event]:
        """What the queue could not keep, and callbacks that nobody could read: each a gap."""
        gap = partial(
            self._gap,
            GapReason.OBSERVATIONS_DROPPED,
            started_at=to_datetime(self._seen_by_now().wall(now)),
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

    def _sign_of_life(self, now: Now) -> None:
        """Tell the spool up to when all is seen; thus a bad disk shows on an idle host too."""
        self._intake_busy_since = time.monotonic()
        taken = self.spool.alive(self._seen_through().wall(now))
        self._intake_busy_since = None
        since = self._sign_refused
        if not taken:
            self._sign_refused = since or now
            self._commit_error = str(self.spool.refusal)
            emit(SpoolUnwritable(str(self.spool.path), self._commit_error))
        elif since is not None:
            self._sign_refused = self._commit_error = None
            emit(SpoolWritable(str(self.spool.path), round(now.monotonic - since.monotonic, 1)))

    def _events_of(self, observations: list[Observation], now: Now) -> list[Event]:
        """What a batch becomes, in its order; keeps track of whether the source observes."""
        events: list[Event] = []
        for item in self._prepared(observations):
            if isinstance(item, HostKnown):
                self.host = self.spool.host = item.host
            if isinstance(item, SourceGone):
                events += self._ended(item, now)
                continue
            if isinstance(item, Surveyed):
                self._surveyed = True
                self.host = self.spool.host = self.host or item.host
            if isinstance(item, SourceReady | SourceLost | SourceSeen):
                seen = self._seen.get(item.connection)
                if seen is None:
                    seen = self._seen[item.connection] = self._first_seen(item, now)
                blind = seen.take(item, now)
                if isinstance(item, SourceSeen):
                    continue
                self._source_since_ns = item.at_ns
                if isinstance(item, SourceReady):
                    events += self._came_back(item, blind, now)
                    continue
            events += self._apply(item, now)
        return events

    def _first_seen(self, item: SourceReady | SourceLost | SourceSeen, now: Now) -> SeenThrough:
        """A connection that is new. One of many may have come later than the agent, with its guest."""
        if self._opened is None or not isinstance(item, SourceReady) or item.whole:
            return SeenThrough(self._since, self._unreached)
        since = Moment.of(self._opened)
        if item.appeared_ns is not None and item.appeared_ns > since.wall(now):
            since = Moment.stamped(min(item.appeared_ns, item.at_ns), now)
        why = f"{item.connection} was not reached before"
        return SeenThrough(since, Blind(since, why, GapReason.SOURCE_LOST) if item.domains else None)

    def _ended(self, gone: SourceGone, now: Now) -> list[Event]:
        """A connection ended for good. Guests whose end it did not tell may have had errors until then."""
        seen = self._seen.pop(gone.connection, None)
        if seen is None or not gone.domains:
            return []
        blind = seen.blind or Blind(seen.moment, "", GapReason.SOURCE_LOST)
        return [
            self._gap(
                blind.reason,
                f"{gone.connection} ended: {blind.why or 'its socket is gone'}",
                started_at=to_datetime(blind.since.wall(now)),
                ended_at=to_datetime(gone.at_ns),
            )
        ]

    def _came_back(self, ready: SourceReady, blind: Blind | None, now: Now) -> list[Event]:
        """The source is up again: what was found, after the gap that says what may be missing."""
        self.host = ready.host
        self.incidents.host = self.spool.host = ready.host
        events = self._apply(ready, now)
        if self._first_commit.is_set():
            events += self._copied(ready.host, now)
        if blind is None:
            return events
        gap = self._gap(
            blind.reason,
            blind.why,
            started_at=to_datetime(blind.since.wall(now)),
            ended_at=to_datetime(ready.at_ns),
            found=_found(events),
        )
        return [gap, *events]

    def _copied(self, host: Host, now: Now) -> list[Event]:
        """Libvirt came late and says that our id is another host's: told, and begun again under a new one."""
        was = self._changed_identity(host)
        if was is None:
            return []
        new, self.agent_id = self.agent_id, was  # this run began under the old one and ends so
        self.spool.agent_id = was
        why = f"this is another machine (a copied state folder?); the agent starts again as {new}"
        self.fail(RestartNeeded(f"{why}; its id was {was}"))
        return [self._gap(GapReason.IDENTITY_CHANGED, why, ended_at=to_datetime(now.wall_ns))]

    @property
    def _source_state(self) -> SourceState:
        if not self._seen:
            return SourceState.CONNECTED if self._surveyed else SourceState.STARTING
        # Of many connections one that is away blinds to its own guest alone, and is told by a gap.
        each = [seen.connected for seen in list(self._seen.values())]
        connected = any(each) if self._surveyed else all(each)
        return SourceState.CONNECTED if connected else SourceState.DISCONNECTED

    def _commit(self, events: list[Event]) -> None:
        """One transaction with the events and the incident states; tries for ever, folding meanwhile.

        The batch that failed is kept as it is; what comes after it stays in the queue, which folds: so
        memory is bounded and no count is lost. When the disk is back a gap event says how long it was.
        """
        self._pending += events
        self._pending_states.update(self.incidents.changes())
        if not self._pending and not self._pending_states and not self.spool.stats().unnamed:
            return  # what is lost and unnamed is named by the spool itself, with any commit
        backoff = Backoff("commit", ceiling=2.0)
        failed: Now | None = None
        begun = self._intake_busy_since = time.monotonic()
        while True:
            batch = self._pending if failed is None else [*self._pending, self._unwritable_gap(failed)]
            try:
                stamps = self.spool.commit(batch, self._pending_states)
            except SpoolFull as error:
                failed = failed or self._clock()
                self._commit_error = str(error)
                emit(SpoolUnwritable(str(self.spool.path), error))
                if self._abort.is_set() or (self._stop.is_set() and time.monotonic() > begun + 2.0):
                    return  # ending with a broken disk: this batch lies inside the next start's gap
                backoff.wait(self._abort, error)
                continue
            if failed is not None:
                seconds = self._clock().monotonic - failed.monotonic
                emit(SpoolWritable(str(self.spool.path), round(seconds, 1)))
            self._pending, self._pending_states = [], {}
            self._commit_error = self._intake_busy_since = None
            self._committed(batch, stamps)
            return

    def _unwritable_gap(self, failed: Now) -> Gap:
        now = self._clock()
        return self._gap(
            GapReason.SPOOL_UNWRITABLE,
            f"the spool could not be written for {now.monotonic - failed.monotonic:.0f} s; "
            "errors were counted in memory",
            started_at=to_datetime(Moment.of(failed).wall(now)),
            ended_at=to_datetime(now.wall_ns),
        )

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
        if self.taps.active:
            for event, stamp in zip(events, stamps, strict=False):
                self.taps.offer("incident", event, stamp)

    # ---- publisher thread

    def _publish(self) -> None:
        self._first_commit.wait()
        self.publisher.run()

    # ---- what it is like

    def _heartbeat(self) -> Record:
        """A heartbeat as a record that is never spooled."""
        now = self._clock()
        stats = self.spool.stats()
        total = self.incidents.open_count
        event = Heartbeat(
            host=self.host,
            agent_id=self.agent_id,
            agent_version=__version__,
            epoch=self.spool.epoch,
            started_at=to_datetime(self._started.wall_ns),
            sent_at=to_datetime(now.wall_ns),
            interval_seconds=self.options.heartbeat_seconds,
            source=SourceHealth(self._source_state, to_datetime(self._source_since_ns)),
            backlog=Backlog(stats.pending, stats.bytes, stats.oldest_seconds),
            committed_sequence=stats.committed_sequence,
            confirmed_sequence=stats.confirmed_sequence,
            incidents=OpenIncidents(total, self.incidents.open_incidents(limit=100)),
        )
        stamp = Stamp(envelope.uuid7(now.wall_ns), self.agent_id, self.spool.epoch, None, now.wall_ns)
        return envelope.record(envelope.encode(event, stamp), stamp)

    def _bind_gauges(self) -> None:
        """Gauges that are read when they are scraped."""
        METRICS.spool_oldest_unpublished_seconds.set_function(
            lambda: self.spool.stats().oldest_seconds or 0.0
        )
        METRICS.spool_bytes.set_function(lambda: self.spool.stats().bytes)
        METRICS.spool_events.labels("pending").set_function(lambda: self.spool.stats().pending)
        METRICS.spool_events.labels("dead").set_function(lambda: self.spool.stats().dead)
        METRICS.incidents_open.labels("live").set_function(
            lambda: self.incidents.open_count - self.incidents.open_drills
        )
        METRICS.incidents_open.labels(Origin.REPLAY.value).set_function(lambda: self.incidents.open_drills)
        METRICS.spool_writable.set_function(lambda: 0.0 if self._spool_trouble() else 1.0)

    def dead_threads(self) -> list[str]:
        """Names of threads that ended although nobody asked them to: what /livez fails for."""
        if self._stop.is_set():
            return []
        return [name for name, thread in self._threads.items() if not thread.is_alive()]

    def not_ready(self) -> list[str]:
        """Why the agent does not observe or keep events now; empty when it does. The broker is no reason."""
        source = [] if self._source_state is SourceState.CONNECTED else [f"source is {self._source_state}"]
        now = self._clock()
        for seen in [] if self._surveyed else list(self._seen.values()):
            silent = seen.silent_for(now)
            if silent is not None:
                source.append(f"source: no answer on the connection of the events for {silent:.0f} s")
        return source + self._spool_trouble()

    def _spool_trouble(self) -> list[str]:
        reasons = []
        if self._commit_error is not None:
            reasons.append(f"spool: {self._commit_error}")
        busy = self._intake_busy_since
        if busy is not None and time.monotonic() - busy > 10.0:
            reasons.append(f"spool: a write has been hanging for {time.monotonic() - busy:.0f} s")
        return reasons

    def summary(self) -> str:
        """One line for a service manager."""
        stats = self.spool.stats()
        trouble = "; ".join([*self.not_ready(), *([] if self.publisher.error is None else ["broker away"])])
        return (
            f"{self._source_state}; {stats.pending} events wait; {self.incidents.open_count} incidents open"
            + (f"; {trouble}" if trouble else "")
        )

    def drill(self, asked: Drill) -> None:
        """Take an error that did not happen, or the end of one, for an alert drill; origin `replay`."""
        now = self._clock()
        emit(DrillAsked(asked.domain_name, asked.domain_uuid, asked.action, asked.count))
        if asked.resolve:
            self.queue.put(DomainGone(asked.domain_uuid, now.wall_ns, ResolutionCause.DOMAIN_STOPPED))
            return
        raw = RawIoError(
            domain_uuid=asked.domain_uuid,
            domain_name=asked.domain_name,
            domain_id=None,
            path="",
            alias=asked.alias,
            action_code=asked.action_code,
            reason=asked.reason,
            observed_at=now.wall_ns,
        )
        self.queue.put(
            Burst(raw, asked.count, now.wall_ns, now.wall_ns, Origin.REPLAY, message="alert drill")
        )

    def status(self) -> Mapping[str, object]:
        """A snapshot for `virtbus status`, as plain JSON data."""
        stats = self.spool.stats()
        return {
            "version": __version__,
            "agent_id": self.agent_id,
            "epoch": self.spool.epoch,
            "started_at": to_datetime(self._started.wall_ns).isoformat(),
            "host": self.host.name if self.host else None,
            "source": {
                "state": self._source_state,
                "since": to_datetime(self._source_since_ns).isoformat(),
                "queued": len(self.queue),
                "connections": {name: seen.connected for name, seen in list(self._seen.items())},
            },
            "bus": {"url": self._bus_name, "error": self.publisher.error},
            "spool": {
                "path": str(self.spool.path),
                "pending": stats.pending,
                "bytes": stats.bytes,
                "oldest_seconds": stats.oldest_seconds,
                "parked_keys": stats.parked_keys,
                "dead": stats.dead,
                "committed_sequence": stats.committed_sequence,
                "confirmed_sequence": stats.confirmed_sequence,
                "error": self._commit_error,
            },
            "incidents": {"open": self.incidents.open_count},
            "threads": {name: thread.is_alive() for name, thread in self._threads.items()},
            "not_ready": self.not_ready(),
        }


def _found(events: Sequence[Event]) -> int:
    return sum(1 for event in events if isinstance(event, IoError) and event.origin is Origin.RECONCILE)
