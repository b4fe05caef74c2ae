"""Typed internal events: one object gives the log line and the metric, so the two can't disagree.

`emit(SomethingHappened(...))` writes one structured line and counts. WARN means nothing was lost; ERROR
means data was lost or a person is needed. Repeats of one warning are limited and counted, never silent.
The registry is ours alone (no process-wide default), bounded in labels: no domain, alias or id is a label.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any, ClassVar, TextIO

from prometheus_client import CollectorRegistry, Counter, Gauge, Metric
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from virtbus.log import LEVELS, Log
from virtbus.words import Origin, Phase

_CONFIRM_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Durations(Collector):
    """A histogram that takes many observations at once.

    prometheus_client's own takes two locks an observation: 0.7 µs, on the path that drains a backlog.
    """

    def __init__(
        self, name: str, documentation: str, *, buckets: Sequence[float], registry: CollectorRegistry
    ) -> None:
        """`buckets` are upper bounds in seconds, ascending, without infinity."""
        self._name, self._documentation = name, documentation
        self._bounds = [*map(float, buckets), math.inf]
        self._names = [*map(str, self._bounds[:-1]), "+Inf"]
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0
        self._lock = threading.Lock()
        registry.register(self)

    def observe_all(self, seconds: Iterable[float]) -> None:
        """Count each of them."""
        bounds, counts = self._bounds, self._counts
        with self._lock:
            for each in seconds:
                counts[bisect_left(bounds, each)] += 1
                self._sum += each

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client's Collector."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        through = accumulate(counts)
        buckets = [(bound, n) for bound, n in zip(self._names, through, strict=True)]
        yield HistogramMetricFamily(self._name, self._documentation, buckets=buckets, sum_value=total)


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
        self.confirm_seconds = Durations(
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
        self.source_reconnects = Counter(
            "virtbus_source_reconnects", "Connections made to libvirt", registry=r
        )
        self.lookups = Counter(
            "virtbus_lookups", "Look-ups of domain descriptions, by result", ["result"], registry=r
        )
        self.incidents_open = Gauge("virtbus_incidents_open", "Open incidents", registry=r)
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
        self.warnings = Counter(
            "virtbus_warnings", "Warnings and errors, also those that the log left out", ["event"], registry=r
        )
        self.log_failures = Counter("virtbus_log_failures", "Log lines that could not be written", registry=r)
        self.build_info = Gauge("virtbus_build_info", "Constant 1 with the version", ["version"], registry=r)
        self.started_seconds = Gauge(
            "virtbus_start_time_seconds", "Unix time of the agent's start", registry=r
        )
        # A rate over a series that begins at 1 misses the first: closed sets of labels begin at 0.
        for outcome in ("confirmed", "deferred", "unroutable", "refused"):
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


@dataclass(frozen=True, slots=True)
class TelemetryEvent:
    """Base of typed internal events. Fields become the line's keys; `measure` moves the metrics."""

    LEVEL: ClassVar[str] = "info"
    MESSAGE: ClassVar[str] = ""
    # A repeat of the same class and `limit_key()` within this many seconds is counted, not logged.
    LIMIT_SECONDS: ClassVar[float] = 0.0

    def measure(self, metrics: Metrics) -> None:
        """Move the metrics that belong to this event; the default moves none."""

    def limit_key(self) -> object:
        """What makes two events repeats of each other."""
        return None


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
_log: Log | None = None  # None: a library in somebody's program, which logs as that program wants
_logger = logging.getLogger("virtbus")
_logger.addHandler(logging.NullHandler())


def _to_logging(level: str, message: str, values: Mapping[str, object]) -> None:
    """A line through the standard library, with its values as text and in `record.virtbus`."""
    number = LEVELS[level]
    if _logger.isEnabledFor(number):
        told = " ".join(f"{name}={value}" for name, value in values.items())
        _logger.log(number, "%s", f"{message} {told}".rstrip(), extra={"virtbus": dict(values)})


def emit(event: TelemetryEvent) -> None:
    """Write the line and move the metrics. Never raises.

    Until `configure` was called the line goes to Python's `logging`, under `virtbus`; nothing is written to
    standard error by itself.
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
    for item in fields(event):
        value = getattr(event, item.name)
        if value is not None:
            extra[item.name] = str(value) if isinstance(value, BaseException) else value
    try:
        if _log is None:
            _to_logging(event.LEVEL, event.MESSAGE, extra)
        else:
            _log.write(event.LEVEL, event.MESSAGE, extra)
    except (OSError, ValueError):
        # The log's disk is full, or nobody reads it: the metric tells, and the path goes on.
        METRICS.log_failures.inc()


def configure(*, level: str = "info", fmt: str = "auto", stream: TextIO | None = None) -> None:
    """Write a log of our own: level "debug" … "error", format "text", "json" or "auto"."""
    global _log
    _log = Log(level=level, fmt=fmt, stream=stream)


# ------------------------------------------------------------------------------------- the events


@dataclass(frozen=True, slots=True)
class AgentStarted(TelemetryEvent):
    """The agent's identity and epoch are known."""

    MESSAGE: ClassVar[str] = "agent started"
    version: str
    agent_id: str
    epoch: str
    started_unix: float

    def measure(self, metrics: Metrics) -> None:
        """Set build info and start time."""
        metrics.build_info.labels(self.version).set(1)
        metrics.started_seconds.set(self.started_unix)


@dataclass(frozen=True, slots=True)
class AgentStopped(TelemetryEvent):
    """The agent ends; what was not confirmed stays in the spool."""

    MESSAGE: ClassVar[str] = "agent stopped"
    left_in_spool: int


@dataclass(frozen=True, slots=True)
class SourceRegistered(TelemetryEvent):
    """Callbacks are registered and the first look is done."""

    MESSAGE: ClassVar[str] = "libvirt connected, callbacks registered"
    uri: str
    libvirt_version: str | None
    hypervisor_version: str | None
    domains: int

    def measure(self, metrics: Metrics) -> None:
        """The source is up."""
        metrics.source_connected.set(1)
        metrics.source_reconnects.inc()


@dataclass(frozen=True, slots=True)
class SourceCutOff(TelemetryEvent):
    """The source does not observe now."""

    LEVEL: ClassVar[str] = "warning"
    MESSAGE: ClassVar[str] = "cut off from libvirt; reconnecting"
    LIMIT_SECONDS: ClassVar[float] = 30.0
    uri: str
    error: Exception | str

    def measure(self, metrics: Metrics) -> None:
        """The source is down."""
        metrics.source_connected.set(0)


@dataclass(frozen=True, slots=True)
class BusConnected(TelemetryEvent):
    """A connection to the broker stands."""

    MESSAGE: ClassVar[str] = "broker connected"
    bus: str

    def measure(self, metrics: Metrics) -> None:
        """The bus is up."""
        metrics.bus_connected.set(1)
        metrics.bus_reconnects.inc()


@dataclass(frozen=True, slots=True)
class BusLost(TelemetryEvent):
    """The connection to the broker is gone or was thrown away."""

    LEVEL: ClassVar[str] = "warning"
    MESSAGE: ClassVar[str] = "broker connection lost; events stay in the spool"
    LIMIT_SECONDS: ClassVar[float] = 30.0
    bus: str
    error: Exception | str

    def measure(self, metrics: Metrics) -> None:
        """The bus is down."""
        metrics.bus_connected.set(0)


@dataclass(frozen=True, slots=True)
class DeadLetterWaits(TelemetryEvent):
    """A message could not be put aside now; it is kept unacknowledged and tried again."""

    LEVEL: ClassVar[str] = "error"
    MESSAGE: ClassVar[str] = "a dead letter can't be put aside now; trying again, other messages go on"
    LIMIT_SECONDS: ClassVar[float] = 30.0
    queue: str  # or topic
    position: str
    waiting: int
    error: Exception | str

    def limit_key(self) -> object:
        """A line a queue."""
        return self.queue


@dataclass(frozen=True, slots=True)
class DeadLetterStored(TelemetryEvent):
    """A message lies in the dead letters, confirmed by the broker."""

    LEVEL: ClassVar[str] = "warning"
    MESSAGE: ClassVar[str] = "put into the dead letters; see `virtbus dead list`"
    LIMIT_SECONDS: ClassVar[float] = 10.0
    queue: str
    position: str
    reason: str
    cut: str | None = None

    def measure(self, metrics: Metrics) -> None:
        """Count it."""
        metrics.dead_letters.labels("consumer").inc()


@dataclass(frozen=True, slots=True)
class BusCutOff(TelemetryEvent):
    """A consumer's connection to the broker is gone or was thrown away."""

    LEVEL: ClassVar[str] = "warning"
    MESSAGE: ClassVar[str] = "broker connection lost; what was not acknowledged is delivered again"
    LIMIT_SECONDS: ClassVar[float] = 30.0
    bus: str
    error: Exception | str

    def measure(self, metrics: Metrics) -> None:
        """The bus is down."""
        metrics.bus_connected.set(0)


@dataclass(frozen=True, slots=True)
class BusBlocked(TelemetryEvent):
    """The broker blocks or unblocks publishers (its memory or disk alarm)."""

    LEVEL: ClassVar[str] = "warning"
    MESSAGE: ClassVar[str] = "broker blocks publishers"
    LIMIT_SECONDS: ClassVar[float] = 30.0
    bus: str
    blocked: bool
    reason: str | None = None

    def measure(self, metrics: Metrics) -> None:
        """Show the state."""
        metrics.bus_blocked.set(1 if self.blocked else 0)

    def limit_key(self) -> object:
        """Blocked and unblocked are two lines."""
        return self.blocked


@dataclass(frozen=True, slots=True)
class RetryScheduled(TelemetryEvent):
    """Something failed and is tried again after a wait."""

    LEVEL: ClassVar[str] = "warning"
    MESSAGE: ClassVar[str] = "trying again"
    LIMIT_SECONDS: ClassVar[float] = 30.0
    stage: str
    attempt: int
    wait_seconds: float
    error: Exception | str

    def measure(self, metrics: Metrics) -> None:
        """Count the wait."""
        metrics.retries.labels(self.stage).inc()

    def limit_key(self) -> object:
        """A line a stage."""
        return self.stage


@dataclass(frozen=True, slots=True)
class EventUnroutable(TelemetryEvent):
    """The broker has no place for this event now (nobody is bound, a full queue); its key waits."""

    LEVEL: ClassVar[str] = "warning"
    MESSAGE: ClassVar[str] = "the broker has no place for this event; parked, will be tried again"
    LIMIT_SECONDS: ClassVar[float] = 30.0
    event_id: str
    key: str
    why: str


@dataclass(frozen=True, slots=True)
class EventDeadLettered(TelemetryEvent):
    """An event was set aside in the spool's dead letters."""

    LEVEL: ClassVar[str] = "error"
    MESSAGE: ClassVar[str] = "event set aside: see `virtbus spool list --dead`"
    event_id: str
    why: str  # "refused", "invalid" or "damaged"
    error: Exception | str

    def measure(self, metrics: Metrics) -> None:
        """Count it."""
        metrics.dead_letters.labels(self.why).inc()


@dataclass(frozen=True, slots=True)
class EventsGaveWay(TelemetryEvent):
    """The spool was full; the least important events were given up and named in a gap event."""

    LEVEL: ClassVar[str] = "error"
    MESSAGE: ClassVar[str] = "spool full: events gave way, named in a gap event"
    LIMIT_SECONDS: ClassVar[float] = 10.0
    count: int

    def measure(self, metrics: Metrics) -> None:
        """Count them."""
        metrics.dropped.inc(self.count)


@dataclass(frozen=True, slots=True)
class SpoolUnwritable(TelemetryEvent):
    """A commit failed; counts are kept in memory."""

    LEVEL: ClassVar[str] = "error"
    MESSAGE: ClassVar[str] = "spool can't be written; counts are kept in memory"
    LIMIT_SECONDS: ClassVar[float] = 10.0
    path: str
    error: Exception | str


@dataclass(frozen=True, slots=True)
class SpoolStumbled(TelemetryEvent):
    """The disk refused what the publisher asked of the spool; nothing is lost, it asks again."""

    LEVEL: ClassVar[str] = "warning"
    MESSAGE: ClassVar[str] = "the spool's disk refused; tried again"
    LIMIT_SECONDS: ClassVar[float] = 30.0
    doing: str
    error: Exception | str

    def limit_key(self) -> object:
        """A line for reading, one for settling."""
        return self.doing


@dataclass(frozen=True, slots=True)
class SpoolWritable(TelemetryEvent):
    """Commits succeed again."""

    MESSAGE: ClassVar[str] = "spool is written again"
    path: str
    seconds: float


@dataclass(frozen=True, slots=True)
class SpoolSetAside(TelemetryEvent):
    """A damaged spool file was renamed and a new one begun."""

    LEVEL: ClassVar[str] = "error"
    MESSAGE: ClassVar[str] = "damaged spool set aside; what could be read was rescued"
    path: str
    set_aside: str
    rescued: int
    error: Exception | str


@dataclass(frozen=True, slots=True)
class InsecureTransport(TelemetryEvent):
    """The broker is reached in plaintext beyond loopback."""

    LEVEL: ClassVar[str] = "warning"
    MESSAGE: ClassVar[str] = (
        "PLAINTEXT to the broker: anyone on the path reads and forges events; use amqps:// or kafkas://"
    )
    bus: str

    def measure(self, metrics: Metrics) -> None:
        """Show it."""
        metrics.insecure_transport.set(1)


@dataclass(frozen=True, slots=True)
class Notice(TelemetryEvent):
    """A plain informational line with no metric of its own."""

    MESSAGE: ClassVar[str] = "notice"
    what: str


@dataclass(frozen=True, slots=True)
class Trouble(TelemetryEvent):
    """An unexpected error that was survived; a bug of ours when it names one of our own types."""

    LEVEL: ClassVar[str] = "error"
    MESSAGE: ClassVar[str] = "unexpected error; carrying on"
    LIMIT_SECONDS: ClassVar[float] = 5.0
    where: str
    error: Exception | str
    event_id: str | None = None

    def limit_key(self) -> object:
        """A line a place."""
        return self.where


@dataclass(frozen=True, slots=True)
class ThreadDied(TelemetryEvent):
    """A thread of the agent ended by an unexpected error: the agent ends with exit code 70."""

    LEVEL: ClassVar[str] = "error"
    MESSAGE: ClassVar[str] = "a thread ended by an unexpected error; the agent ends, start it again"
    thread: str
    error: str


@dataclass(frozen=True, slots=True)
class LookupFinished(TelemetryEvent):
    """A look-up of a domain ended, or outlived its deadline: result "found", "failed" or "late"."""

    LEVEL: ClassVar[str] = "debug"
    MESSAGE: ClassVar[str] = "domain looked up"
    result: str
    domain_uuid: str
    error: Exception | str | None = None

    def measure(self, metrics: Metrics) -> None:
        """Count it."""
        metrics.lookups.labels(self.result).inc()


@dataclass(frozen=True, slots=True)
class LookupsReplaced(TelemetryEvent):
    """Every place of the look-up connection hangs: a second connection takes over."""

    LEVEL: ClassVar[str] = "warning"
    MESSAGE: ClassVar[str] = "look-ups hang in libvirt; events go on, their connection is replaced"
    LIMIT_SECONDS: ClassVar[float] = 30.0
    hanging: int


@dataclass(frozen=True, slots=True)
class BlockJobFailed(TelemetryEvent):
    """A copy, commit or pull of a guest's disk failed, most often at its target; libvirt does not say why."""

    LEVEL: ClassVar[str] = "warning"
    MESSAGE: ClassVar[str] = "a block job of a disk failed; its guest runs on, look at the job's target"
    LIMIT_SECONDS: ClassVar[float] = 5.0
    domain: str
    disk: str


@dataclass(frozen=True, slots=True)
class LibvirtSaid(TelemetryEvent):
    """What libvirt's client library would have written to standard error."""

    LEVEL: ClassVar[str] = "debug"
    MESSAGE: ClassVar[str] = "libvirt"
    what: str


@dataclass(frozen=True, slots=True)
class EventUnsupported(TelemetryEvent):
    """The daemon does not know an event: what depends on it is found later, or by looking."""

    LEVEL: ClassVar[str] = "warning"
    MESSAGE: ClassVar[str] = "libvirt does not offer this event; going on without"
    name: str
    error: Exception | str


@dataclass(frozen=True, slots=True)
class CallbackUndecodable(TelemetryEvent):
    """A callback was lost because its text is not UTF-8; every domain is looked at instead."""

    LEVEL: ClassVar[str] = "warning"
    MESSAGE: ClassVar[str] = "a libvirt callback is not UTF-8 and was lost; looking at all domains"
    LIMIT_SECONDS: ClassVar[float] = 30.0
    error: Exception | str


@dataclass(frozen=True, slots=True)
class DomainUnreadable(TelemetryEvent):
    """A domain's XML was refused: its events go out without a description."""

    LEVEL: ClassVar[str] = "warning"
    MESSAGE: ClassVar[str] = "domain XML refused; its events go out without a description"
    LIMIT_SECONDS: ClassVar[float] = 60.0
    domain_uuid: str
    error: Exception | str

    def limit_key(self) -> object:
        """A line a domain."""
        return self.domain_uuid


@dataclass(frozen=True, slots=True)
class RunningAsRoot(TelemetryEvent):
    """The agent has more rights than it needs."""

    LEVEL: ClassVar[str] = "warning"
    MESSAGE: ClassVar[str] = (
        "running as root; a user of its own that may open libvirt's read-only socket is enough"
    )


@dataclass(frozen=True, slots=True)
class SecretExposed(TelemetryEvent):
    """Another user of this host can read a secret."""

    LEVEL: ClassVar[str] = "warning"
    MESSAGE: ClassVar[str] = "a secret is open to every user of this host"
    what: str


@dataclass(frozen=True, slots=True)
class ConfigReloaded(TelemetryEvent):
    """SIGHUP: the settings were read anew."""

    MESSAGE: ClassVar[str] = "settings read anew; passwords and certificates are, at each connection"
    applied: list[str]
    needs_restart: list[str]


@dataclass(frozen=True, slots=True)
class ConfigRefused(TelemetryEvent):
    """SIGHUP: the new settings can't be used."""

    LEVEL: ClassVar[str] = "error"
    MESSAGE: ClassVar[str] = "settings refused; going on with those in force"
    error: Exception | str


@dataclass(frozen=True, slots=True)
class DrillAsked(TelemetryEvent):
    """Somebody runs an alert drill over the control socket."""

    LEVEL: ClassVar[str] = "warning"
    MESSAGE: ClassVar[str] = "alert drill: an event of origin replay is made"
    domain_name: str
    domain_uuid: str
    action: str
    count: int


@dataclass(frozen=True, slots=True)
class PeerRefused(TelemetryEvent):
    """A user who is neither ours nor root connected to the control socket."""

    LEVEL: ClassVar[str] = "warning"
    MESSAGE: ClassVar[str] = "control socket: another user was refused"
    LIMIT_SECONDS: ClassVar[float] = 30.0
    uid: int


# The kinds are a closed set too: most happen once in a long while, and a rate must see that.
for _kind in TelemetryEvent.__subclasses__():
    if _kind.LEVEL in ("warning", "error"):
        METRICS.warnings.labels(_kind.__name__)
