"""The agent: its threads, with a queue and a database between them.

    libvirt's thread  callbacks → queue (folds when long)
    source thread     connections and looks; what they find → queue
    intake thread     queue → incidents → ONE spool transaction        <== the durability point
    publisher thread  spool → bus → outcomes → spool

A slow disk costs latency, never memory: while a commit hangs or fails, errors fold into counters. A slow
or absent broker costs nothing but spool space. The main thread only waits for signals.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from virtbus import __version__, envelope
from virtbus.agent.control import Drill
from virtbus.agent.identity import Speaker
from virtbus.agent.incidents import Incidents
from virtbus.agent.intake import Intake
from virtbus.agent.publisher import Publisher
from virtbus.agent.queue import IntakeQueue
from virtbus.agent.tap import Taps
from virtbus.bus import Publishing
from virtbus.errors import AgentBroken, VirtbusError
from virtbus.model import (
    Backlog,
    Clock,
    Heartbeat,
    Host,
    Now,
    OpenIncidents,
    Record,
    SourceHealth,
    Stamp,
    to_datetime,
)
from virtbus.observations import Burst, DomainGone, RawIoError, SourceLost, StoodStill
from virtbus.retry import Backoff
from virtbus.seen import stalled_words
from virtbus.sources import Source
from virtbus.sources.crew import Pulse
from virtbus.spool import Spool
from virtbus.telemetry import METRICS, AgentStarted, AgentStopped, DrillAsked, ThreadDied, Trouble, emit
from virtbus.words import Origin, ResolutionCause


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
        bus: Publishing,
        spool: Spool,
        incidents: Incidents,
        agent_id: str,
        options: AgentOptions = AgentOptions(),
        previous_agent_id: str | None = None,
        clock: Callable[[], Now] | None = None,
        bus_name: str = "bus",
        identify: Callable[[Host], str | None] = lambda host: None,
        libvirt_absent: Callable[[], bool] = lambda: False,
    ) -> None:
        """`identify` takes the host that libvirt names → a new agent id when the present one is another's.

        While `libvirt_absent` (no libvirt on this host, and that is allowed) and no connection is known, not
        observing does not make it not ready. A reload may replace `options`.
        """
        self.source, self.bus, self.spool, self.incidents = source, bus, spool, incidents
        self.options = options
        self.taps = Taps()
        self.queue = IntakeQueue()
        self.speaker = Speaker(agent_id, spool, previous_id=previous_agent_id, identify=identify)
        self._clock = clock or Clock()
        self._bus_name = bus_name
        self._libvirt_absent = libvirt_absent
        self._stop = threading.Event()  # stop observing
        self._abort = threading.Event()  # stop at once
        self._threads: dict[str, threading.Thread] = {}
        self._failure: VirtbusError | None = None
        self._pulse: Pulse | None = None  # of the main thread
        self.intake = Intake(
            source=source,
            spool=spool,
            incidents=incidents,
            queue=self.queue,
            speaker=self.speaker,
            taps=self.taps,
            clock=self._clock,
            fold=options.fold,
            stop=self._stop,
            abort=self._abort,
            fail=self.fail,
        )
        self.publisher = Publisher(
            spool=spool,
            bus=bus,
            taps=self.taps,
            heartbeat=lambda: self.heartbeat(),  # noqa: PLW0108 - looked up late: tests replace it
            heartbeat_seconds=lambda: self.options.heartbeat_seconds,
            drain_seconds=lambda: self.options.drain_seconds,
            abort=self._abort,
            bus_name=bus_name,
            clock=lambda: self._clock().monotonic,
        )

    @property
    def agent_id(self) -> str:
        """The id that this run speaks under; the host's UUID may change it before the first event."""
        return self.speaker.agent_id

    # ---- life

    def start(self) -> None:
        """Restore the open incidents and start the threads."""
        started = round(self.intake.started.wall_ns / 1e9, 3)
        emit(AgentStarted(__version__, self.agent_id, self.spool.epoch, started))
        self._bind_gauges()
        self.intake.restore()
        for name, work in (
            ("source", self._observe),
            ("intake", self._take_in),
            ("publisher", self._publish),
        ):
            thread = threading.Thread(
                target=self._work, args=(name, work), name=f"virtbus-{name}", daemon=True
            )
            self._threads[name] = thread
            thread.start()

    def stop(self) -> None:
        """Stop observing, commit what was seen, publish up to the drain deadline. Returns at once."""
        self.intake.stopped = self.intake.stopped or self._clock()
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
        deadline = self._clock().monotonic + self.options.drain_seconds + 5.0
        for name, thread in self._threads.items():
            # libvirt may be frozen inside a call; the source's thread must not hold up the drain.
            limit = 2.0 if name == "source" else max(0.1, deadline - self._clock().monotonic)
            while thread.is_alive() and limit > 0:
                if self._abort.is_set():
                    limit = min(limit, 1.0)  # long enough to leave the spool in order
                thread.join(0.1)
                limit -= 0.1
        self.bus.close()
        if "publisher" in self._threads:
            self._threads["publisher"].join(2.0)  # closing the bus ends what it was waiting for
        left = self.spool.stats().pending
        self.spool.close()
        emit(AgentStopped(left_in_spool=left))
        if self._failure is not None:
            raise self._failure

    def beat(self, waited: float) -> None:
        """Called by the main thread after each wait of at most `waited` seconds: was that all?

        A source that proves what it saw notices a standstill of the process by itself. For any other one this
        thread does, which waits nowhere else.
        """
        now = self._clock()
        if self._pulse is None:
            self._pulse = Pulse(now)
        stood = self._pulse.beat(now, waited)
        if stood is not None and self.intake.sight.trusts:
            self.queue.put(StoodStill(now.wall_ns, stalled_words(stood), self._pulse.before))

    def fail(self, error: VirtbusError) -> None:
        """End the agent with this error: `join` raises it."""
        self._failure = self._failure or error
        self.stop()

    # ---- the threads

    def _work(self, name: str, work: Callable[[], None]) -> None:
        """A thread's work. What ends it otherwise than by `stop` ends the agent, with its reason."""
        try:
            work()
        except VirtbusError as error:
            self.fail(error)
        except BaseException as error:  # noqa: BLE001 - whatever it is, nobody would do this thread's work
            emit(ThreadDied(name, f"{type(error).__name__}: {error}"))
            self.fail(AgentBroken(f"the agent's {name} thread ended: {type(error).__name__}: {error}"))

    def _observe(self) -> None:
        """Observe until the stop. A source that breaks is started again, and its absence is a gap."""
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
                for connection in list(self.intake.sight.connections):
                    lost = SourceLost(self._clock().wall_ns, f"the source ended: {why}", connection)
                    self.queue.put(lost)
                backoff.wait(self._stop, why)

    def _take_in(self) -> None:
        try:
            self.intake.run()
        finally:
            self.publisher.draining.set()
            self.spool.wake()

    def _publish(self) -> None:
        self.intake.opened.wait()
        self.publisher.run()

    def drill(self, asked: Drill) -> None:
        """Take an error that did not happen, or the end of one, for an alert drill; origin `replay`."""
        at = self._clock().wall_ns
        uuid = asked.domain_uuid
        emit(DrillAsked(asked.domain_name, uuid, asked.action, asked.count))
        if asked.resolve:
            self.queue.put(DomainGone(uuid, at, ResolutionCause.DOMAIN_STOPPED))
            return
        raw = RawIoError(uuid, asked.domain_name, None, "", asked.alias, asked.action_code, asked.reason, at)
        self.queue.put(Burst(raw, asked.count, at, at, Origin.REPLAY, message="alert drill"))

    # ---- how it is; any thread

    def heartbeat(self) -> Record:
        """A heartbeat as a record that is never spooled."""
        now, stats = self._clock(), self.spool.stats()
        event = Heartbeat(
            host=self.speaker.host,
            agent_id=self.agent_id,
            agent_version=__version__,
            epoch=self.spool.epoch,
            started_at=to_datetime(self.intake.started.wall_ns),
            sent_at=to_datetime(now.wall_ns),
            interval_seconds=self.options.heartbeat_seconds,
            source=SourceHealth(self.intake.sight.state, to_datetime(self.intake.sight.changed_ns)),
            backlog=Backlog(stats.pending, stats.bytes, stats.oldest_seconds),
            committed_sequence=stats.committed_sequence,
            confirmed_sequence=stats.confirmed_sequence,
            incidents=OpenIncidents(self.incidents.open_count, self.incidents.open_incidents(limit=100)),
        )
        stamp = Stamp(envelope.uuid7(now.wall_ns), self.agent_id, self.spool.epoch, None, now.wall_ns)
        return envelope.record(envelope.encode(event, stamp), stamp)

    def _bind_gauges(self) -> None:
        """Gauges that are read when they are scraped."""
        stats, incidents = self.spool.stats, self.incidents
        METRICS.spool_oldest_unpublished_seconds.set_function(lambda: stats().oldest_seconds or 0.0)
        METRICS.spool_bytes.set_function(lambda: stats().bytes)
        METRICS.spool_events.labels("pending").set_function(lambda: stats().pending)
        METRICS.spool_events.labels("dead").set_function(lambda: stats().dead)
        live = METRICS.incidents_open.labels("live")
        live.set_function(lambda: incidents.open_count - incidents.open_drills)
        METRICS.incidents_open.labels(Origin.REPLAY.value).set_function(lambda: incidents.open_drills)
        METRICS.spool_writable.set_function(lambda: 0.0 if self.intake.writer.troubles() else 1.0)
        METRICS.source_connected.set_function(lambda: float(not self.not_observing()))
        METRICS.source_absent.set_function(lambda: float(self._has_no_libvirt()))

    def dead_threads(self) -> list[str]:
        """Names of threads that ended although nobody asked them to: what /livez fails for."""
        if self._stop.is_set():
            return []
        return [name for name, thread in self._threads.items() if not thread.is_alive()]

    def not_observing(self) -> list[str]:
        """Why libvirt is not observed now; empty when it is."""
        return self.intake.sight.troubles(self._clock())

    def not_ready(self) -> list[str]:
        """Why /readyz fails: the agent does not observe or keep events now; empty when it does.

        The broker is not a reason, nor is libvirt on a host that has none and need not have it.
        """
        if not self._threads:
            return ["the agent is starting"]  # the HTTP pages answer already, the gauges show nothing yet
        return ([] if self._has_no_libvirt() else self.not_observing()) + self.intake.writer.troubles()

    def _has_no_libvirt(self) -> bool:
        return not self.intake.sight.connections and self._libvirt_absent()

    def summary(self) -> str:
        """One line for a service manager."""
        troubles = self.not_ready() + ([] if self.publisher.error is None else ["broker away"])
        pending, incidents = self.spool.stats().pending, self.incidents.open_count
        source = "no libvirt on this host" if self._has_no_libvirt() else self.intake.sight.state
        line = f"{source}; {pending} events wait; {incidents} incidents open"
        return "; ".join([line, *troubles])

    def status(self) -> Mapping[str, object]:
        """A snapshot for `virtbus status`, as plain JSON data."""
        stats, sight = self.spool.stats(), self.intake.sight
        return {
            "version": __version__,
            "agent_id": self.agent_id,
            "epoch": self.spool.epoch,
            "started_at": to_datetime(self.intake.started.wall_ns).isoformat(),
            "host": self.speaker.host.name if self.speaker.host else None,
            "source": {
                "state": sight.state,
                "since": to_datetime(sight.changed_ns).isoformat(),
                "queued": len(self.queue),
                "connections": {name: seen.connected for name, seen in list(sight.connections.items())},
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
                "error": self.intake.writer.error,
            },
            "incidents": {"open": self.incidents.open_count},
            "threads": {name: thread.is_alive() for name, thread in self._threads.items()},
            "not_ready": self.not_ready(),
        }
