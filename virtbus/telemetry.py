"""Typed internal events: one object gives the log line and the metric, so the two can't disagree.

`emit(SomethingHappened(...))` writes one structured line and counts. WARN means nothing was lost; ERROR
means data was lost or a person is needed. Repeats of one warning are limited and counted, never silent.
The registry is ours alone (no process-wide default), bounded in labels: no domain, alias or id is a label.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, ClassVar, TextIO, dataclass_transform

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from virtbus import redaction
from virtbus.log import Handler, Line
from virtbus.words import Origin, Phase

_CONFIRM_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """All metrics of one process; names are a contract with dashboards and alerts."""

    def __init__(self) -> None:
        """Create every metric at zero, so that a first scrape has them all."""
        self.registry = r = CollectorRegistry()
        self.spool_oldest_unpublished_seconds = Gauge(
            "virtbus_spool_oldest_unpublished_seconds",
            "Age of the oldest event that no broker has confirmed (0 when there is none)",
            registry=r,
        )
        self.spool_events = Gauge(
            "virtbus_spool_events", "Events in the spool, by state", ["state"], registry=r
        )
        self.spool_bytes = Gauge("virtbus_spool_bytes", "Bytes of the events in the spool", registry=r)
        self.spool_max_bytes = Gauge("virtbus_spool_max_bytes", "Configured limit of the spool", registry=r)
        self.spool_writable = Gauge(
            "virtbus_spool_writable", "1 while the spool takes what is written to it", registry=r
        )
        self.callbacks = Counter("virtbus_callbacks", "I/O-error callbacks from libvirt", registry=r)
        self.events = Counter(
            "virtbus_events", "Events committed to the spool", ["type", "origin", "phase"], registry=r
        )
        self.occurrences = Counter(
            "virtbus_occurrences", "Errors counted in committed events, by origin", ["origin"], registry=r
        )
        self.folded = Counter(
            "virtbus_folded_callbacks",
            "Callbacks folded into counters because the queue was long",
            registry=r,
        )
        self.outcomes = Counter("virtbus_publish_outcomes", "Outcomes of publishing", ["outcome"], registry=r)
        self.confirm_seconds = Histogram(
            "virtbus_confirm_seconds",
            "From handing an event to the broker's client to its confirmation",
            buckets=_CONFIRM_BUCKETS,
            registry=r,
        )
        self.bus_connected = Gauge("virtbus_bus_connected", "1 while connected to the broker", registry=r)
        self.bus_blocked = Gauge("virtbus_bus_blocked", "1 while the broker blocks publishers", registry=r)
        self.bus_reconnects = Counter("virtbus_bus_reconnects", "Connections made to the broker", registry=r)
        self.retries = Counter(
            "virtbus_retries", "Waits before another attempt, by stage", ["stage"], registry=r
        )
        self.source_connected = Gauge(
            "virtbus_source_connected",
            "1 while libvirt is connected and callbacks are registered",
            registry=r,
        )
        self.source_absent = Gauge(
            "virtbus_source_absent",
            "1 on a host that never had libvirt, where libvirt.optional allows that",
            registry=r,
        )
        self.source_reconnects = Counter(
            "virtbus_source_reconnects", "Connections made to libvirt", registry=r
        )
        self.lookups = Counter(
            "virtbus_lookups", "Look-ups of domain descriptions, by result", ["result"], registry=r
        )
        self.incidents_open = Gauge(
            "virtbus_incidents_open",
            "Open incidents; origin live, or replay: a drill or a recording",
            ["origin"],
            registry=r,
        )
        self.gaps = Counter("virtbus_gaps", "Gap events committed, by reason", ["reason"], registry=r)
        self.dropped = Counter(
            "virtbus_dropped", "Events or observations that were given up; each is in a gap event", registry=r
        )
        self.dead_letters = Counter(
            "virtbus_dead_letters", "Events kept aside because nobody can take them", ["why"], registry=r
        )
        self.insecure_transport = Gauge(
            "virtbus_insecure_transport",
            "1 when the broker is reached in plaintext beyond loopback",
            registry=r,
        )
        self.certificate_end = Gauge(
            "virtbus_certificate_end_time_seconds",
            "Unix time at which a certificate ends: client (ours), ca (the last that we trust), broker",
            ["certificate"],
            registry=r,
        )
        self.warnings = Counter(
            "virtbus_warnings", "Warnings and errors, also those that the log left out", ["event"], registry=r
        )
        self.log_failures = Counter("virtbus_log_failures", "Log lines that could not be written", registry=r)
        self.build_info = Gauge("virtbus_build_info", "Constant 1 with the version", ["version"], registry=r)
        self.started_seconds = Gauge(
            "virtbus_start_time_seconds", "Unix time of the agent's start", registry=r
        )
        # A rate over a series that begins at 1 misses the first: closed sets of labels begin at 0.
        for outcome in ("confirmed", "deferred", "unroutable", "nacked", "refused"):
            self.outcomes.labels(outcome)
        for why in ("refused", "invalid", "damaged", "poison", "consumer"):
            self.dead_letters.labels(why)
        for result in ("found", "failed", "late"):
            self.lookups.labels(result)
        for origin in (Origin.EVENT, Origin.LIFECYCLE, Origin.RECONCILE, Origin.REPLAY):
            self.occurrences.labels(origin.value)
            for phase in (Phase.OPENED, Phase.UPDATED):
                self.events.labels("io_error", origin.value, phase.value)
        self.events.labels("resolved", "", Phase.RESOLVED.value)
        self.events.labels("gap", "", "")
        for stage in ("source", "libvirt", "commit", "publish"):
            self.retries.labels(stage)


METRICS = Metrics()


@dataclass_transform(frozen_default=True)
class TelemetryEvent:
    """Base of typed internal events, each declared in one line; its fields are the line's values.

    `message` and `level` are the line's; a repeat of the same class, and of the same field `by`, within
    `every` seconds is counted and not logged. `sets` gives gauges their values; `counts` names the counters
    that go up, "counter" or "counter:field" where the field is its label. Else `measure` moves metrics.
    """

    LEVEL: ClassVar[str] = "info"
    MESSAGE: ClassVar[str] = ""
    LIMIT_SECONDS: ClassVar[float] = 0.0
    _by: ClassVar[str | None] = None
    _sets: ClassVar[Mapping[str, float]] = {}
    _counts: ClassVar[Sequence[str]] = ()

    def __init_subclass__(
        cls,
        *,
        message: str | None = None,
        level: str = "info",
        every: float = 0.0,
        by: str | None = None,
        sets: Mapping[str, float] = MappingProxyType({}),
        counts: Sequence[str] = (),
    ) -> None:
        """Make it a frozen dataclass with what its one line says."""
        super().__init_subclass__()
        if message is not None:
            cls.MESSAGE, cls.LEVEL, cls.LIMIT_SECONDS = message, level, every
            cls._by, cls._sets, cls._counts = by, sets, counts
            dataclass(frozen=True)(cls)

    def measure(self, metrics: Metrics) -> None:
        """Move the metrics that belong to this event."""
        for name, value in self._sets.items():
            getattr(metrics, name).set(value)
        for told in self._counts:
            name, _, label = told.partition(":")
            counter: Counter = getattr(metrics, name)
            (counter.labels(getattr(self, label)) if label else counter).inc()

    def limit_key(self) -> object:
        """What makes two events repeats of each other."""
        return None if self._by is None else getattr(self, self._by)


class _Limiter:
    """Remembers when each kind of line was last written and how many were left out since. Bounded."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[object, tuple[float, int]] = {}

    def admit(self, key: object, seconds: float, now: float) -> int | None:
        """The number of lines left out since the last one, or None when this one is to be left out too."""
        with self._lock:
            last, left_out = self._seen.get(key, (None, 0))
            if last is not None and now - last < seconds:
                self._seen[key] = (last, left_out + 1)
                return None
            if len(self._seen) >= 1024:
                self._seen.clear()
            self._seen[key] = (now, 0)
            return left_out


_limiter = _Limiter()
_logger = logging.getLogger("virtbus")
_logger.addHandler(logging.NullHandler())  # a library in somebody's program logs as that program wants


def emit(event: TelemetryEvent) -> None:
    """Write the line and move the metrics. Never raises.

    Lines go to Python's `logging` under `virtbus`, with the values in `record.virtbus`; only after
    `configure` does anything go to standard error by itself.
    """
    event.measure(METRICS)
    if event.LEVEL in ("warning", "error"):
        METRICS.warnings.labels(type(event).__name__).inc()
    extra: dict[str, Any] = {}
    if event.LIMIT_SECONDS:
        left_out = _limiter.admit((type(event), event.limit_key()), event.LIMIT_SECONDS, time.monotonic())
        if left_out is None:
            return
        if left_out:
            extra["left_out"] = left_out
    for item in fields(event):  # type: ignore[arg-type]
        value = getattr(event, item.name)
        if value is not None:
            extra[item.name] = redaction.text(value) if isinstance(value, str | BaseException) else value
    number = logging.getLevelNamesMapping()[event.LEVEL.upper()]
    if _logger.isEnabledFor(number):
        _logger.log(number, Line(event.MESSAGE, extra), extra={"virtbus": extra})


def configure(*, level: str = "info", fmt: str = "auto", stream: TextIO | None = None) -> None:
    """Write a log of our own: level "debug" … "error"; format "text", "json", or "auto" (by terminal)."""
    _logger.handlers = [Handler(stream, fmt, METRICS.log_failures.inc)]
    _logger.propagate = False
    _logger.setLevel(level.upper())


# ------------------------------------------------------------------------------------- the events


class AgentStarted(TelemetryEvent, message="agent started"):
    """The agent's identity and epoch are known."""

    version: str
    agent_id: str
    epoch: str
    started_unix: float

    def measure(self, metrics: Metrics) -> None:
        """Set build info and start time."""
        metrics.build_info.labels(self.version).set(1)
        metrics.started_seconds.set(self.started_unix)


class AgentStopped(TelemetryEvent, message="agent stopped"):
    """The agent ends; what was not confirmed stays in the spool."""

    left_in_spool: int


class SourceRegistered(
    TelemetryEvent,
    message="libvirt connected, callbacks registered",
    sets={"source_connected": 1},
    counts=("source_reconnects",),
):
    """Callbacks are registered and the first look is done."""

    uri: str
    libvirt_version: str | None
    hypervisor_version: str | None
    domains: int


class SourceCutOff(
    TelemetryEvent,
    level="warning",
    message="cut off from libvirt; reconnecting",
    every=30,
    sets={"source_connected": 0},
):
    """The source does not observe now."""

    uri: str
    error: Exception | str


class BusConnected(
    TelemetryEvent, message="broker connected", sets={"bus_connected": 1}, counts=("bus_reconnects",)
):
    """A connection to the broker stands."""

    bus: str


class BusLost(
    TelemetryEvent,
    level="warning",
    message="broker connection lost; events stay in the spool",
    every=30,
    sets={"bus_connected": 0},
):
    """The connection to the broker is gone or was thrown away."""

    bus: str
    error: Exception | str


class DeadLetterWaits(
    TelemetryEvent,
    level="error",
    message="a dead letter can't be stored now; trying again, other messages continue",
    every=30,
    by="queue",
):
    """A message could not be put aside now; it is kept unacknowledged and tried again."""

    queue: str  # or topic
    position: str
    waiting: int
    error: Exception | str


class DeadLetterStored(
    TelemetryEvent,
    level="warning",
    message="put into the dead letters; see `virtbus dead list`",
    every=10,
):
    """A message lies in the dead letters, confirmed by the broker."""

    queue: str
    position: str
    reason: str
    cut: str | None = None

    def measure(self, metrics: Metrics) -> None:
        """Count it."""
        metrics.dead_letters.labels("consumer").inc()


class BusCutOff(
    TelemetryEvent,
    level="warning",
    message="broker connection lost; what was not acknowledged is delivered again",
    every=30,
    sets={"bus_connected": 0},
):
    """A consumer's connection to the broker is gone or was thrown away."""

    bus: str
    error: Exception | str


class BusBlocked(TelemetryEvent, level="warning", message="broker blocks publishers", every=30, by="blocked"):
    """The broker blocks or unblocks publishers (its memory or disk alarm)."""

    bus: str
    blocked: bool
    reason: str | None = None

    def measure(self, metrics: Metrics) -> None:
        """Show the state."""
        metrics.bus_blocked.set(1 if self.blocked else 0)


class RetryScheduled(
    TelemetryEvent, level="warning", message="trying again", every=30, by="stage", counts=("retries:stage",)
):
    """Something failed and is tried again after a wait."""

    stage: str
    attempt: int
    wait_seconds: float
    error: Exception | str


class EventParked(
    TelemetryEvent,
    level="warning",
    message="the broker does not take this event now; it waits, and with it the later ones of its domain",
    every=30,
):
    """No queue is bound for this event, or it was nacked (a full queue): its key waits."""

    event_id: str
    key: str
    why: str


class EventDeadLettered(
    TelemetryEvent,
    level="error",
    message="event set aside: see `virtbus spool list --dead`",
    counts=("dead_letters:why",),
):
    """An event was set aside in the spool's dead letters."""

    event_id: str
    why: str  # "refused", "invalid" or "damaged"
    error: Exception | str


class EventsGaveWay(
    TelemetryEvent, level="error", message="spool full: events dropped, named in a gap event", every=10
):
    """The spool was full; the least important events were given up and named in a gap event."""

    count: int

    def measure(self, metrics: Metrics) -> None:
        """Count them."""
        metrics.dropped.inc(self.count)


class SpoolUnwritable(
    TelemetryEvent, level="error", message="spool can't be written; counts are kept in memory", every=10
):
    """A commit failed; counts are kept in memory."""

    path: str
    error: Exception | str


class SpoolStumbled(
    TelemetryEvent, level="warning", message="the spool's disk refused; tried again", every=30, by="doing"
):
    """The disk refused what the publisher asked of the spool; nothing is lost, it asks again."""

    doing: str
    error: Exception | str


class SpoolWritable(TelemetryEvent, message="spool is written again"):
    """Commits succeed again."""

    path: str
    seconds: float


class SpoolSetAside(
    TelemetryEvent, level="error", message="damaged spool set aside; what could be read was rescued"
):
    """A damaged spool file was renamed and a new one begun."""

    path: str
    set_aside: str
    rescued: int
    error: Exception | str


class InsecureTransport(
    TelemetryEvent,
    level="warning",
    message="PLAINTEXT to the broker: anyone on the path reads and forges events; use amqps:// or kafkas://",
    sets={"insecure_transport": 1},
):
    """The broker is reached in plaintext beyond loopback."""

    bus: str


class Notice(TelemetryEvent, message="notice"):
    """A plain informational line with no metric of its own."""

    what: str


class Trouble(TelemetryEvent, level="error", message="unexpected error; carrying on", every=5, by="where"):
    """An unexpected error that was survived; a bug of ours when it names one of our own types."""

    where: str
    error: Exception | str
    event_id: str | None = None


class ThreadDied(
    TelemetryEvent,
    level="error",
    message="a thread ended by an unexpected error; the agent ends, start it again",
):
    """A thread of the agent ended by an unexpected error: the agent ends with exit code 70."""

    thread: str
    error: str


class LookupFinished(TelemetryEvent, level="debug", message="domain looked up", counts=("lookups:result",)):
    """A look-up of a domain ended, or outlived its deadline: result "found", "failed" or "late"."""

    result: str
    domain_uuid: str
    error: Exception | str | None = None


class LookupsReplaced(
    TelemetryEvent,
    level="warning",
    message="look-ups hang in libvirt; events go on, their connection is replaced",
    every=30,
):
    """Every place of the look-up connection hangs: a second connection takes over."""

    hanging: int


class BlockJobFailed(
    TelemetryEvent,
    level="warning",
    message="a block job of a disk failed; its guest runs on, look at the job's target",
    every=5,
):
    """A copy, commit or pull of a guest's disk failed, most often at its target; libvirt does not say why."""

    domain: str
    disk: str


class LibvirtSaid(TelemetryEvent, level="debug", message="libvirt"):
    """What libvirt's client library would have written to standard error."""

    what: str


class EventUnsupported(
    TelemetryEvent, level="warning", message="libvirt does not offer this event; going on without"
):
    """The daemon does not know an event: what depends on it is found later, or by looking."""

    name: str
    error: Exception | str


class CallbackUndecodable(
    TelemetryEvent,
    level="warning",
    message="a libvirt callback is not UTF-8 and was lost; looking at all domains",
    every=30,
):
    """A callback was lost because its text is not UTF-8; every domain is looked at instead."""

    error: Exception | str


class DomainUnreadable(
    TelemetryEvent,
    level="warning",
    message="domain XML refused; its events go out without a description",
    every=60,
    by="domain_uuid",
):
    """A domain's XML was refused: its events go out without a description."""

    domain_uuid: str
    error: Exception | str


class RunningAsRoot(
    TelemetryEvent,
    level="warning",
    message="running as root; a user of its own that may open libvirt's read-only socket is enough",
):
    """The agent has more rights than it needs."""


class SecretExposed(TelemetryEvent, level="warning", message="a secret is open to every user of this host"):
    """Another user of this host can read a secret."""

    what: str


class ConfigReloaded(
    TelemetryEvent, message="settings reloaded; passwords and certificates are, at each connection"
):
    """SIGHUP: the settings were read anew."""

    applied: list[str]
    needs_restart: list[str]


class ConfigRefused(TelemetryEvent, level="error", message="settings refused; going on with those in force"):
    """SIGHUP: the new settings can't be used."""

    error: Exception | str


class DrillAsked(TelemetryEvent, level="warning", message="alert drill: an event of origin replay is made"):
    """Somebody runs an alert drill over the control socket."""

    domain_name: str
    domain_uuid: str
    action: str
    count: int


class PeerRefused(
    TelemetryEvent, level="warning", message="control socket: another user was refused", every=30
):
    """A user who is neither ours nor root connected to the control socket."""

    uid: int


# The kinds are a closed set too: most happen once in a long while, and a rate must see that.
for _kind in TelemetryEvent.__subclasses__():
    if _kind.LEVEL in ("warning", "error"):
        METRICS.warnings.labels(_kind.__name__)
