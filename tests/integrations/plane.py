"""A control plane in memory, and a reactor that is stepped by hand: every kill, wipe and outage at will.

The integration here has the contract of the real ones and nothing more; what they make of a real API server
is in with_kubernetes.py and test_openstack.py.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from virtbus.consumer import Delivery
from virtbus.fleet import Fleet, FleetRules
from virtbus.integrations.base import (
    HOLD,
    RELEASE,
    REPORT,
    Action,
    Found,
    Hold,
    Integration,
    NotOurs,
    TargetMissing,
    TargetUnavailable,
)
from virtbus.integrations.holds import short
from virtbus.integrations.policy import HoldPolicy, HoldRules
from virtbus.integrations.reactor import Reactor
from virtbus.integrations.store import ActionStore
from virtbus.model import Action as Kind
from virtbus.model import Now, OpenIncident, OpenIncidents, SourceHealth, to_datetime
from virtbus.telemetry import METRICS, TelemetryEvent
from virtbus.testing import a_device, a_heartbeat, a_host, a_record

RULES = HoldRules(when="any", min_guests=1, raise_seconds=30.0, clear_seconds=60.0, max_share=0.34)


class Killed(BaseException):
    """The process ends here, as by SIGKILL."""


@dataclass
class Target:
    """A node or a compute service."""

    uid: str = field(default_factory=lambda: str(uuid.uuid4()))
    mark: Hold | None = None
    effect: bool = False
    condition: Mapping[str, str] | None = None


class Plane(Integration):
    """Targets by name; `fails` may raise before an action or look has its effect, `after` afterwards."""

    name = "plane"
    holds = True

    def __init__(self, *targets: str) -> None:
        self.targets = {name: Target() for name in targets}
        self.done: list[tuple[str, str]] = []
        self.fails: Callable[[str, str], None] = lambda verb, target: None
        self.after: Callable[[str, str], None] = lambda verb, target: None

    def condition(self, host):
        return {"status": "False" if host.incidents else "True", "message": ""}

    def execute(self, action: Action) -> str:
        name = action.body.get("target") or self._named(action.target)
        self.fails(action.verb, name)
        target = self.targets.get(name)
        if target is None:
            raise TargetMissing(f"no target is called {name}")
        if action.verb == REPORT:
            target.condition = dict(action.body)
        elif action.verb == HOLD:
            if target.effect and target.mark is None:
                raise NotOurs("somebody else holds it")
            body = action.body
            mark = Hold(action.target, name, action.why, body["since"], body["times"], body["by"])
            target.mark, target.effect = target.mark or mark, True
        elif action.verb == RELEASE:
            if target.mark is None:
                raise NotOurs("not held by us any more")
            target.mark, target.effect = None, False
        self.done.append((action.verb, name))
        self.after(action.verb, name)
        return "done"

    def look(self, hosts, *, everything):
        self.fails("look", "")
        told = {host: name or self._named(host) for host, name in hosts.items()}
        known = {host: name for host, name in told.items() if name in self.targets}
        seen = self.targets if everything else {name: self.targets[name] for name in known.values()}
        return Found(
            [replace(one.mark, uid=one.uid, intact=one.effect) for one in seen.values() if one.mark],
            {host: self.targets[name].uid for host, name in known.items()},
            {host: (self.targets[name].condition or {}).get("status") for host, name in known.items()},
        )

    def _named(self, host: str) -> str:
        """By its name, or by its short one."""
        return host if host in self.targets else short(host)

    # ---- what others do

    def wipe(self, name: str) -> None:
        """Another controller overwrites the taints: the annotation stays."""
        self.targets[name].effect = False

    def take_back(self, name: str) -> None:
        """An operator removes both by hand."""
        self.targets[name].mark, self.targets[name].effect = None, False

    def register_anew(self, name: str) -> None:
        """The node is deleted and comes again."""
        self.targets[name] = Target()

    @property
    def held(self) -> set[str]:
        """The truth."""
        return {name for name, one in self.targets.items() if one.effect and one.mark is not None}


class Bus:
    """What the reactor takes for its consumer: deliveries in order, acknowledged or put aside."""

    def __init__(self) -> None:
        self.waiting: list[Any] = []
        self.acked: list[str] = []
        self.dead: list[tuple[str, str]] = []

    def receive(self, timeout: float) -> Delivery | None:
        if not self.waiting:
            return None
        event, record = self.waiting.pop(0)
        return Delivery(
            event=event, attributes=record.attributes, data={}, body=record.body, publisher=None,
            redelivered=False, attempts=1, _consumer=self, _message=record,  # type: ignore[arg-type]
        )  # fmt: skip

    def _settle(self, delivery: Delivery) -> None:
        self.acked.append(delivery.id)

    def _dead_letter(self, delivery: Delivery, reason: str) -> None:
        self.dead.append((delivery.id, reason))

    def stop(self) -> None:
        """Nothing runs."""


class World:
    """Hosts with agents, a control plane, and a reactor that may be killed and started again."""

    def __init__(
        self, folder: Path, hosts: Sequence[str], *, plane: Any = None, rules: HoldRules = RULES
    ) -> None:
        """`plane` is a real integration where it is not to be the one of this module."""
        self.folder, self.rules = folder, rules
        self.wall, self.monotonic = 1_800_000_000.0, 1000.0
        self.plane = Plane(*hosts) if plane is None else plane
        self.bus = Bus()
        self.told: list[Any] = []
        self.agents = {host: str(uuid.uuid4()) for host in hosts}
        self.bad: set[str] = set()
        self.silent: set[str] = set()
        self.sequence = 0
        self._beat_at = float("-inf")
        self.reactor: Reactor | None = None
        self.kills = 0

    def now(self) -> Now:
        return Now(round(self.wall * 1e9), self.monotonic)

    def tell(self, event: TelemetryEvent) -> None:
        event.measure(METRICS)
        self.told.append(event)

    def start(self) -> None:
        self.store = ActionStore(self.folder / "plane.db")
        self.reactor = Reactor(
            self.plane,
            consumer=self.bus,  # type: ignore[arg-type]
            store=self.store,
            fleet=Fleet(FleetRules(round_seconds=10.0)),
            policy=HoldPolicy(self.rules),
            by="test",
            clock=self.now,
            tell=self.tell,
        )
        self.reactor._worker.take_up()

    def kill(self, *, losing_state: bool = False) -> None:
        """As by SIGKILL: nothing more is written. The next `run` starts a new one."""
        self.store.close()
        self.reactor = None
        self.kills += 1
        if losing_state:
            for file in self.folder.glob("plane.db*"):
                file.unlink()

    def beat(self) -> None:
        """A heartbeat of every agent that is not silent."""
        moment = to_datetime(round(self.wall * 1e9))
        self.sequence += 1
        for host, agent in self.agents.items():
            if host in self.silent:
                continue
            items = () if host not in self.bad else (self._incident(host, moment),)
            event = a_heartbeat(
                host=a_host(name=host, uuid=None, boot_id=None), agent_id=agent, sent_at=moment,
                started_at=moment - timedelta(hours=1), interval_seconds=10.0,
                source=SourceHealth("connected", moment), committed_sequence=self.sequence,
                confirmed_sequence=self.sequence, incidents=OpenIncidents(len(items), items),
            )  # fmt: skip
            record = a_record(event, sequence=None, agent_id=agent, id=str(uuid.uuid4()))
            self.bus.waiting.append((event, record))

    def _incident(self, host: str, moment: Any) -> OpenIncident:
        domain = str(uuid.uuid5(uuid.NAMESPACE_DNS, host))
        times = (moment, moment, 1, 1)
        return OpenIncident(
            f"incident-{host}", domain, "guest", a_device(), Kind.PAUSE, "message", *times, True, False
        )

    def run(self, seconds: float) -> None:
        """Let time pass, a second a step; a kill on the way costs the process and nothing else."""
        for _ in range(round(seconds)):
            self.wall += 1.0
            self.monotonic += 1.0
            if self.monotonic - self._beat_at >= 10.0:
                self._beat_at = self.monotonic
                self.beat()
            try:
                self.turn()
            except Killed:
                self.kill()

    def turn(self) -> None:
        """All that is due at this moment."""
        if self.reactor is None:
            self.start()
        while self.bus.waiting:
            self.reactor.step(0.0)
        self.reactor.step(0.0)
        for _ in range(100):
            if not self.reactor._worker.step():
                return
        raise AssertionError("the worker never rests")

    @property
    def findings(self) -> list[str]:
        """What looks corrected."""
        return [str(one.finding) for one in self.told if hasattr(one, "finding")]

    @contextmanager
    def outage(self) -> Iterator[None]:
        """The control plane is away."""

        def fails(verb: str, target: str) -> None:
            raise TargetUnavailable("away")

        with mock.patch.object(self.plane, "fails", fails):
            yield


POINTS = [
    f"{place} {moment}"
    for place in ("decide", "tried", "hold", "release", "finish", "reconcile")
    for moment in ("before", "after")
]


def killing(world: World, where: str, patches: pytest.MonkeyPatch) -> list[str]:
    """Arm one kill at a point between decision, action and bookkeeping; the list tells when it struck."""
    struck: list[str] = []
    place, _, moment = where.partition(" ")
    owner: Any = world.plane if place in (HOLD, RELEASE) else ActionStore
    name = "execute" if place in (HOLD, RELEASE) else place
    real = getattr(owner, name)

    def strike(arguments: tuple[Any, ...]) -> None:
        if not struck and (name != "execute" or arguments[0].verb == place):
            struck.append(where)
            raise Killed

    def wrapped(*arguments: Any, **more: Any) -> Any:
        if moment == "before":
            strike(arguments)
        answer = real(*arguments, **more)
        strike(arguments)
        return answer

    patches.setattr(owner, name, wrapped)
    return struck


def story_of_a_kill(
    world: World,
    point: str,
    patches: pytest.MonkeyPatch,
    host: str,
    *,
    ends: str,
    losing_state: bool,
    held: Callable[[], set[str]],
) -> None:
    """One host falls ill, gets well, and falls ill again where it `ends` "bad"; on the way we are killed."""
    world.run(20)
    if point.startswith("release"):
        world.bad = {host}
        world.run(60)
        assert held() == {host}
    with patches.context() as armed:
        struck = killing(world, point, armed)
        real = world.kill
        armed.setattr(world, "kill", lambda: real(losing_state=losing_state))
        for bad in ({host}, set(), {host}) if ends == "bad" else ({host}, set()):
            world.bad = bad
            world.run(150)
        world.run(200)
    assert struck == [point], "the point was not passed"
    assert held() == ({host} if ends == "bad" else set())
