"""What `virtbus react` and `virtbus fleet --write` tell of themselves: log lines and metrics.

A registry of their own: an agent's metrics at zero would read as an agent that sees nothing.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from prometheus_client import CollectorRegistry, Counter, Gauge

from virtbus.fleet import Blame, FleetView
from virtbus.integrations.base import Verb
from virtbus.integrations.holds import Finding
from virtbus.telemetry import METRICS, Metrics, TelemetryEvent


class Result(StrEnum):
    """What became of an action."""

    DONE = "done"
    WOULD = "would"  # a dry run
    REPLACED = "replaced"  # by a newer one
    LEFT_ALONE = "left alone"  # somebody else holds the host, or undid what we did
    MISSING = "no target"  # the control plane does not know the host
    REFUSED = "refused"
    FAILED = "failed"  # and is tried again


class FleetMetrics:
    """The verdict on the fleet as numbers; no host or storage system is a label."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Every series begins at 0."""
        self._hosts = Gauge(
            "virtbus_fleet_hosts", "Hosts, by what is known of them", ["state"], registry=registry
        )
        self._trouble = Gauge(
            "virtbus_fleet_hosts_in_trouble", "Hosts with open incidents, by whose fault it is", ["blame"],
            registry=registry,
        )  # fmt: skip
        self._backends = Gauge(
            "virtbus_fleet_storage_in_trouble", "Storage systems in trouble, by whose fault it is", ["blame"],
            registry=registry,
        )  # fmt: skip
        self._incidents = Gauge("virtbus_fleet_incidents", "Open incidents of the fleet", registry=registry)
        self._ourselves = Gauge(
            "virtbus_fleet_suspect_ourselves", "1 while most agents are silent at once", registry=registry
        )
        self._states: set[str] = {"observing", "blind", "silent"}

    def show(self, view: FleetView) -> None:
        """Take over one view."""
        states = Tally(host.state for host in view.hosts)
        self._states |= states.keys()
        for state in self._states:
            self._hosts.labels(state).set(states[state])
        hosts = Tally(host.blame for host in view.hosts if host.incidents)
        backends = Tally(one.blame for one in view.backends)
        for blame in Blame:
            self._trouble.labels(blame.value).set(hosts[blame])
            self._backends.labels(blame.value).set(backends[blame])
        self._incidents.set(view.incidents)
        self._ourselves.set(view.suspect_ourselves)


class ReactMetrics:
    """All metrics of a process that reacts or writes the fleet's file; names are a contract with alerts."""

    def __init__(self) -> None:
        """Without an integration there are no series of actions yet: see `begin`."""
        self.registry = r = CollectorRegistry()
        for shared in (
            METRICS.dead_letters, METRICS.warnings, METRICS.build_info, METRICS.retries,
            METRICS.certificate_end, METRICS.log_failures,
        ):  # fmt: skip
            r.register(shared)
        self.fleet = FleetMetrics(r)
        self.actions = Counter(
            "virtbus_react_actions", "Actions, by what became of them", ["integration", "verb", "result"],
            registry=r,
        )  # fmt: skip
        self.findings = Counter(
            "virtbus_react_findings",
            "Holds that a look at the control plane corrected",
            ["integration", "finding"],
            registry=r,
        )  # fmt: skip
        one = ["integration"]
        self.waiting = Gauge(
            "virtbus_react_actions_waiting", "Actions that are stored and not done", one, registry=r
        )
        self.holds = Gauge(
            "virtbus_react_holds", "Hosts that are held, by why", ["integration", "reason"], registry=r
        )
        self.releasing = Gauge(
            "virtbus_react_releases_waiting", "Hosts that are well and whose release has not succeeded", one,
            registry=r,
        )  # fmt: skip
        self.withheld = Gauge(
            "virtbus_react_withheld",
            "Hosts that the limit (max_share) keeps from being held",
            one,
            registry=r,
        )
        self.heard = Gauge(
            "virtbus_react_heartbeat_age_seconds", "Since the last heartbeat of any agent", one, registry=r
        )
        self.looked = Gauge(
            "virtbus_react_look_age_seconds",
            "Since the control plane was last read successfully",
            one,
            registry=r,
        )

    def begin(self, integration: str, heard_age: Callable[[], float], look_age: Callable[[], float]) -> None:
        """Series of an integration, at zero: a rate over a series that begins at 1 misses the first."""
        for verb in Verb:
            for result in Result:
                self.actions.labels(integration, verb.value, result.value)
        for finding in Finding:
            self.findings.labels(integration, finding.value)
        for why in ("poison", "disbelieved", "failed"):
            METRICS.dead_letters.labels(why)
        for gauge in (self.waiting, self.releasing, self.withheld):
            gauge.labels(integration)
        self.show_holds(integration, ())
        self.heard.labels(integration).set_function(heard_age)
        self.looked.labels(integration).set_function(look_age)

    def show_holds(self, integration: str, whys: Iterable[str]) -> None:
        """The reasons of what is held now: each begins with whose fault it is."""
        known = {blame.value for blame in Blame}
        reasons = Tally(word if (word := why.partition(":")[0]) in known else "other" for why in whys)
        for reason in (*sorted(known), "other"):
            self.holds.labels(integration, reason).set(reasons[reason])


REACT = ReactMetrics()


@dataclass(frozen=True, slots=True)
class Audited(TelemetryEvent):
    """One action of an integration and what became of it: the audit line."""

    MESSAGE: ClassVar[str] = "action"
    integration: str
    verb: str
    target: str
    outcome: str  # a Result
    why: str
    result: str | None
    attempts: int
    key: str

    def measure(self, metrics: Metrics) -> None:
        """Count it."""
        REACT.actions.labels(self.integration, self.verb, self.outcome).inc()


@dataclass(frozen=True, slots=True)
class ActionFailed(TelemetryEvent):
    """An action did not succeed; it is tried again."""

    LEVEL: ClassVar[str] = "warning"
    MESSAGE: ClassVar[str] = "action failed and is tried again"
    LIMIT_SECONDS: ClassVar[float] = 10.0
    integration: str
    verb: str
    target: str
    attempts: int
    wait_seconds: float
    key: str
    error: Exception

    def measure(self, metrics: Metrics) -> None:
        """Count it."""
        REACT.actions.labels(self.integration, self.verb, Result.FAILED).inc()

    def limit_key(self) -> object:
        """A target at a time."""
        return self.target


@dataclass(frozen=True, slots=True)
class ActionGivenUp(TelemetryEvent):
    """An action was refused for good: somebody has to look."""

    LEVEL: ClassVar[str] = "error"
    MESSAGE: ClassVar[str] = "action refused and given up"
    integration: str
    verb: str
    target: str
    why: str
    key: str
    error: Exception

    def measure(self, metrics: Metrics) -> None:
        """Count it."""
        REACT.actions.labels(self.integration, self.verb, Result.REFUSED).inc()

    def limit_key(self) -> object:
        """Every one is told."""
        return self.key


@dataclass(frozen=True, slots=True)
class ReleaseRefused(TelemetryEvent):
    """The control plane refuses to give a host back: it stays held, and is tried again."""

    LEVEL: ClassVar[str] = "error"
    MESSAGE: ClassVar[str] = "a release is refused: the host stays held, the release is tried again"
    LIMIT_SECONDS: ClassVar[float] = 60.0
    integration: str
    target: str
    why: str
    attempts: int
    wait_seconds: float
    error: Exception

    def measure(self, metrics: Metrics) -> None:
        """Count it."""
        REACT.actions.labels(self.integration, Verb.RELEASE, Result.REFUSED).inc()

    def limit_key(self) -> object:
        """A host at a time."""
        return self.target


@dataclass(frozen=True, slots=True)
class TargetAwaited(TelemetryEvent):
    """The control plane does not know a host (yet): what there is to show of it waits."""

    MESSAGE: ClassVar[str] = (
        "the control plane does not know this host yet; its condition is shown when it does"
    )
    LIMIT_SECONDS: ClassVar[float] = 3600.0
    integration: str
    target: str
    error: Exception

    def measure(self, metrics: Metrics) -> None:
        """Count it."""
        REACT.actions.labels(self.integration, Verb.REPORT, Result.MISSING).inc()

    def limit_key(self) -> object:
        """A host at a time."""
        return (self.integration, self.target)


@dataclass(frozen=True, slots=True)
class HoldFound(TelemetryEvent):
    """A look at the control plane corrected what we believed to hold."""

    LEVEL: ClassVar[str] = "warning"
    MESSAGE: ClassVar[str] = "the control plane shows another hold than we knew of"
    integration: str
    finding: str  # a Finding
    host: str
    target: str | None
    why: str
    then: str  # what follows

    def measure(self, metrics: Metrics) -> None:
        """Count it."""
        REACT.findings.labels(self.integration, self.finding).inc()

    def limit_key(self) -> object:
        """A host at a time."""
        return (self.integration, self.host)


@dataclass(frozen=True, slots=True)
class LookFailed(TelemetryEvent):
    """The control plane can't be read: nothing new is held until it can."""

    LEVEL: ClassVar[str] = "warning"
    MESSAGE: ClassVar[str] = "what is held can't be read from the control plane; tried again"
    LIMIT_SECONDS: ClassVar[float] = 30.0
    integration: str
    wait_seconds: float
    error: Exception

    def limit_key(self) -> object:
        """An integration at a time."""
        return self.integration


@dataclass(frozen=True, slots=True)
class Withheld(TelemetryEvent):
    """Hosts that should be held, but the limit does not allow more."""

    LEVEL: ClassVar[str] = "error"
    MESSAGE: ClassVar[str] = "the limit of held hosts keeps more from being held (react.max_share)"
    LIMIT_SECONDS: ClassVar[float] = 60.0
    integration: str
    held: int
    hosts: str


@dataclass(frozen=True, slots=True)
class Disbelieved(TelemetryEvent):
    """An event that its publisher may not send."""

    LEVEL: ClassVar[str] = "error"
    MESSAGE: ClassVar[str] = "an event is not believed"
    LIMIT_SECONDS: ClassVar[float] = 1.0
    publisher: str | None
    host: str | None
    source: str
    id: str
    why: str

    def measure(self, metrics: Metrics) -> None:
        """Count it."""
        metrics.dead_letters.labels("disbelieved").inc()

    def limit_key(self) -> object:
        """A publisher at a time."""
        return (self.publisher, self.host)


@dataclass(frozen=True, slots=True)
class EventPutAside(TelemetryEvent):
    """An event that could not be judged: it goes to the dead letters, and the others go on."""

    LEVEL: ClassVar[str] = "error"
    MESSAGE: ClassVar[str] = "an event can't be worked on; put into the dead letters"
    integration: str
    source: str
    id: str
    error: Exception

    def measure(self, metrics: Metrics) -> None:
        """Count it."""
        metrics.dead_letters.labels("failed").inc()

    def limit_key(self) -> object:
        """A source at a time."""
        return self.source


for _kind in (
    ActionFailed,
    ActionGivenUp,
    ReleaseRefused,
    HoldFound,
    LookFailed,
    Withheld,
    Disbelieved,
    EventPutAside,
):
    METRICS.warnings.labels(_kind.__name__)
