"""What the agent is like: its heartbeat, its readiness, and what it answers to whom asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from virtbus import __version__, envelope
from virtbus.agent.incidents import Incidents
from virtbus.agent.intake import Intake
from virtbus.agent.speaker import Speaker
from virtbus.model import Backlog, Heartbeat, Now, OpenIncidents, Record, SourceHealth, Stamp, to_datetime
from virtbus.spool import Spool
from virtbus.telemetry import METRICS
from virtbus.words import Origin


class Condition:
    """Reads the agent's parts from any thread, and changes none."""

    def __init__(
        self,
        *,
        spool: Spool,
        incidents: Incidents,
        intake: Intake,
        speaker: Speaker,
        clock: Callable[[], Now],
        heartbeat_seconds: Callable[[], float],
        bus_name: str,
    ) -> None:
        """`heartbeat_seconds` is asked each time: a reload may change it."""
        self._spool, self._incidents, self._intake, self._speaker = spool, incidents, intake, speaker
        self._clock, self._heartbeat_seconds, self._bus_name = clock, heartbeat_seconds, bus_name

    def heartbeat(self) -> Record:
        """A heartbeat as a record that is never spooled."""
        now = self._clock()
        stats = self._spool.stats()
        total = self._incidents.open_count
        event = Heartbeat(
            host=self._speaker.host,
            agent_id=self._speaker.agent_id,
            agent_version=__version__,
            epoch=self._spool.epoch,
            started_at=to_datetime(self._intake.started.wall_ns),
            sent_at=to_datetime(now.wall_ns),
            interval_seconds=self._heartbeat_seconds(),
            source=SourceHealth(self._intake.sight.state, to_datetime(self._intake.sight.changed_ns)),
            backlog=Backlog(stats.pending, stats.bytes, stats.oldest_seconds),
            committed_sequence=stats.committed_sequence,
            confirmed_sequence=stats.confirmed_sequence,
            incidents=OpenIncidents(total, self._incidents.open_incidents(limit=100)),
        )
        stamp = Stamp(
            envelope.uuid7(now.wall_ns), self._speaker.agent_id, self._spool.epoch, None, now.wall_ns
        )
        return envelope.record(envelope.encode(event, stamp), stamp)

    def bind_gauges(self) -> None:
        """Gauges that are read when they are scraped."""
        METRICS.spool_oldest_unpublished_seconds.set_function(
            lambda: self._spool.stats().oldest_seconds or 0.0
        )
        METRICS.spool_bytes.set_function(lambda: self._spool.stats().bytes)
        METRICS.spool_events.labels("pending").set_function(lambda: self._spool.stats().pending)
        METRICS.spool_events.labels("dead").set_function(lambda: self._spool.stats().dead)
        METRICS.incidents_open.labels("live").set_function(
            lambda: self._incidents.open_count - self._incidents.open_drills
        )
        METRICS.incidents_open.labels(Origin.REPLAY.value).set_function(lambda: self._incidents.open_drills)
        METRICS.spool_writable.set_function(lambda: 0.0 if self._intake.writer.troubles() else 1.0)

    def not_ready(self) -> list[str]:
        """Why the agent does not observe or keep events now; empty when it does. The broker is no reason."""
        return self._intake.sight.troubles(self._clock()) + self._intake.writer.troubles()

    def summary(self, bus_error: str | None) -> str:
        """One line for a service manager."""
        stats = self._spool.stats()
        trouble = "; ".join([*self.not_ready(), *([] if bus_error is None else ["broker away"])])
        return (
            f"{self._intake.sight.state}; {stats.pending} events wait; "
            f"{self._incidents.open_count} incidents open" + (f"; {trouble}" if trouble else "")
        )

    def status(self, bus_error: str | None, threads: Mapping[str, bool]) -> Mapping[str, object]:
        """A snapshot for `virtbus status`, as plain JSON data."""
        stats = self._spool.stats()
        return {
            "version": __version__,
            "agent_id": self._speaker.agent_id,
            "epoch": self._spool.epoch,
            "started_at": to_datetime(self._intake.started.wall_ns).isoformat(),
            "host": self._speaker.host.name if self._speaker.host else None,
            "source": {
                "state": self._intake.sight.state,
                "since": to_datetime(self._intake.sight.changed_ns).isoformat(),
                "queued": len(self._intake.queue),
                "connections": {
                    name: seen.connected for name, seen in list(self._intake.sight.connections.items())
                },
            },
            "bus": {"url": self._bus_name, "error": bus_error},
            "spool": {
                "path": str(self._spool.path),
                "pending": stats.pending,
                "bytes": stats.bytes,
                "oldest_seconds": stats.oldest_seconds,
                "parked_keys": stats.parked_keys,
                "dead": stats.dead,
                "committed_sequence": stats.committed_sequence,
                "confirmed_sequence": stats.confirmed_sequence,
                "error": self._intake.writer.error,
            },
            "incidents": {"open": self._incidents.open_count},
            "threads": dict(threads),
            "not_ready": self.not_ready(),
        }
