"""A model of a control plane and the integration that speaks to it; behind `virtbus.integrations.base`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from tests.sim.runtime import Scheduler
from virtbus.consumer import Delivery
from virtbus.fleet import HostHealth
from virtbus.integrations.base import (
    EVENT,
    HOLD,
    RELEASE,
    REPORT,
    Action,
    ActionRefused,
    Found,
    Hold,
    Integration,
    NotOurs,
    TargetMissing,
    TargetUnavailable,
)
from virtbus.model import IoError
from virtbus.words import Phase


@dataclass
class Node:
    """One host as the control plane knows it."""

    uid: str
    mark: Hold | None = None  # our annotation
    tainted: bool = False  # what it marks
    condition: Mapping[str, str] | None = None


@dataclass
class Plane:
    """What is true in the control plane, whoever is connected."""

    sched: Scheduler
    nodes: dict[str, Node] = field(default_factory=dict)
    up: bool = True
    slow: float = 0.0
    refuses: bool = False
    loses_answers: bool = False
    handed: Counter[str] = field(default_factory=Counter)  # events that were handed over, by key
    unanswered: Counter[str] = field(default_factory=Counter)  # of them, those whose answer was lost
    # When, which host, why, and beside which others although the limit is one.
    held: list[tuple[float, str, str, list[str]]] = field(default_factory=list)
    held_before: set[str] = field(default_factory=set)  # registered anew since, and not given back
    released: list[tuple[float, str, list[str]]] = field(
        default_factory=list
    )  # when, which host, who still stands
    standing: Callable[[str], list[str]] = lambda host: []  # the guests of a host that an error has paused

    def wipe(self, name: str) -> None:
        """Another controller overwrites the taint; the annotation stays."""
        self.nodes[name].tainted = False

    def take_back(self, name: str) -> None:
        """An operator removes both by hand."""
        self.nodes[name].mark, self.nodes[name].tainted = None, False

    def register_anew(self, name: str) -> None:
        """The node is deleted and comes again; whoever holds it holds it again, and that is no new hold."""
        if self.nodes[name].mark is not None:
            self.held_before.add(name)
        self.nodes[name] = Node(f"{self.nodes[name].uid}+")


class PlaneIntegration(Integration):
    """One reactor's connection to it; `reach` is where its process may be killed."""

    name = "plane"
    holds = True

    def __init__(self, plane: Plane, reach: Callable[[str], None], acting: Callable[[str], None]) -> None:
        self._plane, self._reach, self._acting = plane, reach, acting

    def wants(self, delivery: Delivery) -> Action | None:
        event = delivery.event
        if not isinstance(event, IoError) or event.incident.phase is not Phase.OPENED:
            return None
        return Action(f"{delivery.source} {delivery.id}", event.domain.uuid, EVENT, "", {})

    def condition(self, host: HostHealth) -> Mapping[str, str] | None:
        return {"status": "False" if host.incidents else "True", "message": ""}

    def execute(self, action: Action) -> str:
        plane, sched = self._plane, self._plane.sched
        sched.sleep(0.002 + plane.slow)
        if not plane.up:
            raise TargetUnavailable("connection refused")
        if plane.refuses:
            raise (
                TargetUnavailable("503 Service Unavailable")
                if action.verb == EVENT
                else ActionRefused("409 Conflict")
            )
        self._reach("before_effect")
        self._effect(action)
        self._reach("after_effect")
        if plane.loses_answers and sched.random.random() < 0.5:
            plane.unanswered[action.key] += 1
            raise TargetUnavailable("connection reset by peer")
        return "done"

    def _effect(self, action: Action) -> None:
        plane = self._plane
        if action.verb == EVENT:
            self._acting(action.key)
            plane.handed[action.key] += 1
            return
        name = str(action.body.get("target") or action.target)
        node = plane.nodes.get(name)
        if node is None:
            raise TargetMissing(f"no node is called {name}")
        if action.verb == REPORT:
            node.condition = dict(action.body)
        elif action.verb == HOLD:
            if node.tainted and node.mark is None:
                raise NotOurs("somebody else holds it")
            if node.mark is None:
                others = [other for other, one in plane.nodes.items() if one.mark is not None]
                if name not in plane.held_before:
                    plane.held.append((plane.sched.now, name, action.why, others))
                plane.held_before.discard(name)
                body = action.body
                node.mark = Hold(action.target, name, action.why, body["since"], body["times"], body["by"])
            node.tainted = True
        elif action.verb == RELEASE:
            plane.held_before.discard(name)
            if node.mark is None:
                raise NotOurs("not held by us any more")
            node.mark, node.tainted = None, False
            plane.released.append((plane.sched.now, name, plane.standing(name)))

    def look(self, hosts: Mapping[str, str | None], *, everything: bool) -> Found | None:
        plane = self._plane
        plane.sched.sleep(0.005 + plane.slow)
        if not plane.up or plane.refuses:
            raise TargetUnavailable("503 Service Unavailable")
        known = {host: name or host for host, name in hosts.items() if (name or host) in plane.nodes}
        seen = plane.nodes if everything else {name: plane.nodes[name] for name in known.values()}
        return Found(
            [replace(one.mark, uid=one.uid, intact=one.tainted) for one in seen.values() if one.mark],
            {host: plane.nodes[name].uid for host, name in known.items()},
            {
                host: None if (shown := plane.nodes[name].condition) is None else shown["status"]
                for host, name in known.items()
            },
        )
