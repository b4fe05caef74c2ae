"""What `virtbus react` and `virtbus fleet --write` report about themselves: log lines and metrics.

A registry of their own: an agent's metrics at zero would read as an agent that sees nothing.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable
from enum import StrEnum
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge

from virtbus.fleet import Blame, FleetView
from virtbus.integrations.base import Verb
from virtbus.integrations.holds import Finding
from virtbus.telemetry import METRICS, TelemetryEvent


class Result(StrEnum):
    """What became of an action."""

    DONE = "done"
    WOULD = "would"  # a dry run
    REPLACED = "replaced"  # by a newer one
    LEFT_ALONE = "left alone"  # somebody else holds the host, or undid what we did
    MISSING = "no target"  # the control plane does not know the host
    REFUSED = "refused"
    FAILED = "failed"  # and is tried again
    GIVEN_UP = "given up"  # an event, for newer ones: the control plane was away for too long


class ReactMetrics:
    """All metrics of a process that reacts or writes the fleet's file; names are a contract with alerts.

    No host or storage system is a label.
    """

    def __init__(self) -> None:
        """Without an integration there are no series of actions yet: see `begin`."""
        self.registry = CollectorRegistry()
        for shared in (
            METRICS.dead_letters, METRICS.warnings, METRICS.build_info, METRICS.retries,
            METRICS.certificate_end, METRICS.log_failures,
        ):  # fmt: skip
            self.registry.register(shared)
        gauge, counter = partial(Gauge, registry=self.registry), partial(Counter, registry=self.registry)
        one = ["integration"]  # each listens for itself, and may know another fleet
        self._hosts = gauge("virtbus_fleet_hosts", "Hosts, by what is known of them", [*one, "state"])
        self._trouble = gauge(
            "virtbus_fleet_hosts_in_trouble",
            "Hosts with open incidents, by whose fault it is",
            [*one, "blame"],
        )
        self._backends = gauge(
            "virtbus_fleet_storage_in_trouble",
            "Storage systems in trouble, by whose fault it is",
            [*one, "blame"],
        )
        self._incidents = gauge("virtbus_fleet_incidents", "Open incidents of the fleet", one)
        self._ourselves = gauge(
            "virtbus_fleet_suspect_ourselves", "1 while most agents are silent at once", one
        )
        self._states: set[str] = {"observing", "blind", "silent"}
        self.actions = counter(
            "virtbus_react_actions", "Actions, by what became of them", ["integration", "verb", "result"]
        )
        self.findings = counter(
            "virtbus_react_findings",
            "Holds that a look at the control plane corrected",
            ["integration", "finding"],
        )
        self.waiting = gauge("virtbus_react_actions_waiting", "Actions that are stored and not done", one)
        self.holds = gauge("virtbus_react_holds", "Hosts that are held, by why", ["integration", "reason"])
        self.releasing = gauge(
            "virtbus_react_releases_waiting", "Hosts that are well and whose release has not succeeded", one
        )
        self.withheld = gauge(
            "virtbus_react_withheld", "Hosts that the limit (max_share) keeps from being held", one
        )
        self.heard = gauge(
            "virtbus_react_heartbeat_age_seconds", "Since the last heartbeat of any agent", one
        )
        self.looked = gauge(
            "virtbus_react_look_age_seconds", "Since the control plane was last read successfully", one
        )

    def show_fleet(self, integration: str, view: FleetView) -> None:
        """Take over what an integration, or `fleet`, sees."""
        states = Tally(host.state for host in view.hosts)
        self._states |= states.keys()
        for state in self._states:
            self._hosts.labels(integration, state).set(states[state])
        hosts = Tally(host.blame for host in view.hosts if host.incidents)
        backends = Tally(one.blame for one in view.backends)
        for blame in Blame:
            self._trouble.labels(integration, blame.value).set(hosts[blame])
            self._backends.labels(integration, blame.value).set(backends[blame])
        self._incidents.labels(integration).set(view.incidents)
        self._ourselves.labels(integration).set(view.suspect_ourselves)

    def begin(self, integration: str, heard_age: Callable[[], float], look_age: Callable[[], float]) -> None:
        """Series of an integration, at zero: a rate over a series that begins at 1 misses the first."""
        for verb in Verb:
            for result in Result:
                self.actions.labels(integration, verb.value, result.value)
        for finding in Finding:
            self.findings.labels(integration, finding.value)
        METRICS.dead_letters.labels("consumer")
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


class _OfReact(TelemetryEvent):
    """Moves the metrics of `react`."""

    integration: str

    def measure(self, metrics: object) -> None:
        """See TelemetryEvent."""
        super().measure(REACT)


class Audited(_OfReact, counts=("actions:integration,verb,outcome",)):
    """action"""

    verb: str
    target: str
    outcome: str  # a Result
    why: str
    result: str | None
    attempts: int
    key: str


class ActionFailed(
    _OfReact, level="warning", every=10, by="target", counts=("actions:integration,verb,=failed",)
):
    """action failed and is retried"""

    verb: str
    target: str
    attempts: int
    wait_seconds: float
    key: str
    error: Exception


class ActionGivenUp(_OfReact, level="error", counts=("actions:integration,verb,=refused",)):
    """action refused and given up"""

    verb: str
    target: str
    why: str
    key: str
    error: Exception


class EventsGivenUp(_OfReact, level="error", every=60):
    """too many events wait for the control plane; the oldest are given up, so that heartbeats are heard"""

    events: int


class EventsLeft(_OfReact, level="warning"):
    """too many events wait to be handed over; no more are taken, the broker keeps them"""

    waiting: int


class EventsTaken(_OfReact):
    """events are taken from the broker again"""

    waiting: int


class ReleaseRefused(
    _OfReact, level="error", every=60, by="target", counts=("actions:integration,=release,=refused",)
):
    """a release is refused: the host stays held, the release is retried"""

    target: str
    why: str
    attempts: int
    wait_seconds: float
    error: Exception


class TargetAwaited(
    _OfReact, every=3600, by="integration,target", counts=("actions:integration,=report,=no target",)
):
    """the control plane does not know this host yet; its condition is shown when it does"""

    target: str
    error: Exception


class HoldFound(_OfReact, level="warning", counts=("findings:integration,finding",)):
    """the control plane shows another hold than we knew of"""

    finding: str  # a Finding
    host: str
    target: str | None
    why: str
    then: str  # what follows


class LookFailed(_OfReact, level="warning", every=30, by="integration"):
    """what is held can't be read from the control plane; retried"""

    wait_seconds: float
    error: Exception


class Withheld(_OfReact, level="error", every=60):
    """the limit of held hosts keeps more from being held (react.max_share)"""

    held: int
    hosts: str


class Disbelieved(TelemetryEvent, level="error", every=1, by="publisher,host"):
    """an event is not believed"""

    publisher: str | None
    host: str | None
    source: str
    id: str
    why: str


class EventPutAside(TelemetryEvent, level="error"):
    """an event can't be processed; dead-lettered"""

    integration: str
    source: str
    id: str
    error: Exception
