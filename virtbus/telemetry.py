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
from functools import partial
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
        self.registry = CollectorRegistry()
        gauge, counter = partial(Gauge, registry=self.registry), partial(Counter, registry=self.registry)
        self.spool_oldest_unpublished_seconds = gauge(
            "virtbus_spool_oldest_unpublished_seconds",
            "Age of the oldest event that no broker has confirmed (0 when there is none)",
        )
        self.spool_events = gauge("virtbus_spool_events", "Events in the spool, by state", ["state"])
        self.spool_bytes = gauge("virtbus_spool_bytes", "Bytes of the events in the spool")
        self.spool_max_bytes = gauge("virtbus_spool_max_bytes", "Configured limit of the spool")
        self.spool_writable = gauge("virtbus_spool_writable", "1 while the spool takes what is written to it")
        self.callbacks = counter("virtbus_callbacks", "I/O-error callbacks from libvirt")
        self.events = counter("virtbus_events", "Events committed to the spool", ["type", "origin", "phase"])
        self.occurrences = counter(
            "virtbus_occurrences", "Errors counted in committed events, by origin", ["origin"]
        )
        self.folded = counter(
            "virtbus_folded_callbacks", "Callbacks folded into counters because the queue was long"
        )
        self.outcomes = counter("virtbus_publish_outcomes", "Outcomes of publishing", ["outcome"])
        self.confirm_seconds = Histogram(
            "virtbus_confirm_seconds",
            "From handing an event to the broker's client to its confirmation",
            buckets=_CONFIRM_BUCKETS,
            registry=self.registry,
        )
        self.bus_connected = gauge("virtbus_bus_connected", "1 while connected to the broker")
        self.bus_blocked = gauge("virtbus_bus_blocked", "1 while the broker blocks publishers")
        self.bus_reconnects = counter("virtbus_bus_reconnects", "Connections made to the broker")
        self.retries = counter("virtbus_retries", "Waits before another attempt, by stage", ["stage"])
        self.source_connected = gauge(
            "virtbus_source_connected", "1 while libvirt is connected, with callbacks registered, and answers"
        )
        self.source_absent = gauge(
            "virtbus_source_absent", "1 on a host that never had libvirt, where libvirt.optional allows that"
        )
        self.source_reconnects = counter("virtbus_source_reconnects", "Connections made to libvirt")
        self.lookups = counter("virtbus_lookups", "Look-ups of domain descriptions, by result", ["result"])
        self.incidents_open = gauge(
            "virtbus_incidents_open",
            "Open incidents; origin live, or replay: a drill or a recording",
            ["origin"],
        )
        self.gaps = counter("virtbus_gaps", "Gap events committed, by reason", ["reason"])
        self.dropped = counter(
            "virtbus_dropped", "Events or observations that were given up; each is in a gap event"
        )
        self.dead_letters = counter(
            "virtbus_dead_letters", "Events kept aside because nobody can take them", ["why"]
        )
        self.insecure_transport = gauge(
            "virtbus_insecure_transport", "1 when the broker is reached in plaintext beyond loopback"
        )
        self.certificate_end = gauge(
            "virtbus_certificate_end_time_seconds",
            "Unix time at which a certificate ends: client (ours), ca (the last that we trust), broker",
            ["certificate"],
        )
        self.warnings = counter(
            "virtbus_warnings", "Warnings and errors, also those that the log left out", ["event"]
        )
        self.log_failures = counter("virtbus_log_failures", "Log lines that could not be written")
        self.build_info = gauge("virtbus_build_info", "Constant 1 with the version", ["version"])
        self.started_seconds = gauge("virtbus_start_time_seconds", "Unix time of the agent's start")
        # A rate over a series that begins at 1 misses the first: closed sets of labels begin at 0.
        for outcome in ("confirmed", "deferred", "unroutable", "nacked", "refused"):
            self.outcomes.labels(outcome)
        for why in ("refused", "invalid", "damaged"):
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

    The first line of its docstring is the message, `level` the line's level; a repeat of the same class, and
    of the same fields `by`, within `every` seconds is counted and not logged. `sets` gives gauges a value, or
    that of a field; `counts` names the counters that go up, "counter" or "counter:label,label", a label being
    a field, or "=word".
    """

    MESSAGE: ClassVar[str] = ""
    LEVEL: ClassVar[str] = "info"
    _every: ClassVar[float] = 0.0
    _by: ClassVar[Sequence[str]] = ()
    _sets: ClassVar[Mapping[str, float | str]] = {}
    _counts: ClassVar[Sequence[str]] = ()

    def __init_subclass__(
        cls,
        *,
        level: str = "info",
        every: float = 0.0,
        by: str = "",
        sets: Mapping[str, float | str] = MappingProxyType({}),
        counts: Sequence[str] = (),
    ) -> None:
        """Make it a frozen dataclass with what its one line says."""
        super().__init_subclass__()
        cls.MESSAGE = (cls.__doc__ or cls.__name__).partition("\n")[0]
        cls.LEVEL, cls._every, cls._sets, cls._counts = level, every, sets, counts
        cls._by = tuple(filter(None, by.split(",")))
        if level in ("warning", "error"):  # most happen once in a long while, and a rate must see that
            METRICS.warnings.labels(cls.__name__)
        dataclass(frozen=True)(cls)

    def measure(self, metrics: Any) -> None:
        """Move the metrics that belong to this event."""
        for name, value in self._sets.items():
            getattr(metrics, name).set(getattr(self, value) if isinstance(value, str) else value)
        for counted in self._counts:
            name, _, labels = counted.partition(":")
            values = [
                one[1:] if one.startswith("=") else getattr(self, one) for one in labels.split(",") if one
            ]
            counter: Counter = getattr(metrics, name)
            (counter.labels(*values) if values else counter).inc()


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
    if event._every:
        key = (type(event), *(getattr(event, name) for name in event._by))
        left_out = _limiter.admit(key, event._every, time.monotonic())
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


class AgentStarted(TelemetryEvent):
    """agent started"""

    version: str
    agent_id: str
    epoch: str
    started_unix: float

    def measure(self, metrics: Metrics) -> None:
        """Set build info and start time."""
        metrics.build_info.labels(self.version).set(1)
        metrics.started_seconds.set(self.started_unix)


class AgentStopped(TelemetryEvent):
    """agent stopped"""

    left_in_spool: int


class SourceRegistered(TelemetryEvent, counts=("source_reconnects",)):
    """libvirt connected, callbacks registered"""

    uri: str
    libvirt_version: str | None
    domains: int


class SourceCutOff(TelemetryEvent, level="warning", every=30):
    """cut off from libvirt; reconnecting"""

    uri: str
    error: Exception | str


class BusConnected(TelemetryEvent, sets={"bus_connected": 1}, counts=("bus_reconnects",)):
    """broker connected"""

    bus: str


class BusLost(TelemetryEvent, level="warning", every=30, sets={"bus_connected": 0}):
    """broker connection lost; events stay in the spool"""

    bus: str
    error: Exception | str


class DeadLetterWaits(TelemetryEvent, level="error", every=30, by="queue"):
    """a dead letter can't be stored now; trying again, other messages continue"""

    queue: str  # or topic
    position: str
    waiting: int
    error: Exception | str


class DeadLetterStored(TelemetryEvent, level="warning", every=10, counts=("dead_letters:=consumer",)):
    """put into the dead letters; see `virtbus dead list`"""

    queue: str
    position: str
    reason: str
    cut: str | None = None


class BusCutOff(TelemetryEvent, level="warning", every=30, sets={"bus_connected": 0}):
    """broker connection lost; what was not acknowledged is delivered again"""

    bus: str
    error: Exception | str


class BusBlocked(TelemetryEvent, level="warning", every=30, by="blocked", sets={"bus_blocked": "blocked"}):
    """broker blocks publishers"""

    bus: str
    blocked: bool
    reason: str | None = None


class RetryScheduled(TelemetryEvent, level="warning", every=30, by="stage", counts=("retries:stage",)):
    """trying again"""

    stage: str
    attempt: int
    wait_seconds: float
    error: Exception | str


class EventParked(TelemetryEvent, level="warning", every=30):
    """the broker does not take this event now; it waits, and with it the later ones of its domain"""

    event_id: str
    key: str
    why: str


class EventDeadLettered(TelemetryEvent, level="error", counts=("dead_letters:why",)):
    """event dead-lettered: see `virtbus spool list --dead`"""

    event_id: str
    why: str  # "refused", "invalid" or "damaged"
    error: Exception | str


class EventsGaveWay(TelemetryEvent, level="error", every=10):
    """spool full, or events too old: dropped, and named in a gap event"""

    count: int

    def measure(self, metrics: Metrics) -> None:
        """Count them."""
        metrics.dropped.inc(self.count)


class SpoolUnwritable(TelemetryEvent, level="error", every=10):
    """spool can't be written; counts are kept in memory"""

    path: str
    error: Exception | str


class SpoolStumbled(TelemetryEvent, level="warning", every=30, by="doing"):
    """the spool's disk refused; tried again"""

    doing: str
    error: Exception | str


class SpoolWritable(TelemetryEvent):
    """spool is written again"""

    path: str
    seconds: float


class SpoolSetAside(TelemetryEvent, level="error"):
    """damaged spool moved away; what could be read was rescued"""

    path: str
    set_aside: str
    rescued: int
    error: Exception | str


class InsecureTransport(TelemetryEvent, level="warning", sets={"insecure_transport": 1}):
    """PLAINTEXT to the broker: anyone on the path reads and forges events; use amqps:// or kafkas://"""

    bus: str


class Notice(TelemetryEvent):
    """notice"""

    what: str


class Trouble(TelemetryEvent, level="error", every=5, by="where"):
    """unexpected error; carrying on"""

    where: str
    error: Exception | str
    event_id: str | None = None


class ThreadDied(TelemetryEvent, level="error"):
    """a thread ended by an unexpected error; the agent ends, start it again"""

    thread: str
    error: str


class PoisonMessage(TelemetryEvent, level="warning"):
    """not an event; goes to the dead letters"""

    position: str
    reason: str


class ConsumerRefused(TelemetryEvent, level="error", every=30):
    """the broker refuses this consumer; trying again"""

    error: Exception | str


class NoVerdicts(TelemetryEvent, level="warning", every=600):
    """no event has had its verdict (ack, retry, dead_letter) for minutes; `prefetch` allows no other one"""

    waiting: int


class LookupFinished(TelemetryEvent, level="debug", counts=("lookups:result",)):
    """domain looked up"""

    result: str
    domain_uuid: str
    error: Exception | str | None = None


class LookupsReplaced(TelemetryEvent, level="warning", every=30):
    """look-ups hang in libvirt; events go on, and others are asked beside them"""

    hanging: int


class BlockJobFailed(TelemetryEvent, level="warning", every=5):
    """a block job of a disk failed; its guest runs on, look at the job's target"""

    domain: str
    disk: str


class LibvirtSaid(TelemetryEvent, level="debug"):
    """libvirt"""

    what: str


class EventUnsupported(TelemetryEvent, level="warning"):
    """libvirt does not offer this event; going on without"""

    name: str
    error: Exception | str


class CallbackUndecodable(TelemetryEvent, level="warning", every=30):
    """a libvirt callback is not UTF-8 and was lost; looking at all domains"""

    error: Exception | str


class DomainUnreadable(TelemetryEvent, level="warning", every=60, by="domain_uuid"):
    """domain XML refused; its events go out without a description"""

    domain_uuid: str
    error: Exception | str


class RunningAsRoot(TelemetryEvent, level="warning"):
    """running as root; a user of its own that may open libvirt's read-only socket is enough"""


class SecretExposed(TelemetryEvent, level="warning"):
    """a secret is open to every user of this host"""

    what: str


class ConfigReloaded(TelemetryEvent):
    """settings reloaded; passwords and certificates are read at each connection"""

    applied: list[str]
    needs_restart: list[str]


class ConfigRefused(TelemetryEvent, level="error"):
    """settings refused; going on with those in force"""

    error: Exception | str


class DrillAsked(TelemetryEvent, level="warning"):
    """alert drill: an event of origin replay is made"""

    domain_name: str
    domain_uuid: str
    action: str
    count: int


class PeerRefused(TelemetryEvent, level="warning", every=30):
    """control socket: another user was refused"""

    uid: int
