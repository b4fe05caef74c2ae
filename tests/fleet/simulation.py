"""Random fleets over simulated days: what a reactor holds, and whether it is given back.

The fleet's verdict, the policy of holds and the rule for hosts that left are the real ones; hosts, storage,
clocks, the control plane and the deaths of the reactor are simulated, from one seed. The control plane keeps
what is held, as the real ones do; all else is lost when the reactor is killed, sometimes its store too.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from tests.fleet.machine import Machine, at_second, epoch_at, uuid_of
from virtbus.fleet import Blame, Fleet, FleetView
from virtbus.integrations.holds import HoldState, Row, orphaned
from virtbus.integrations.policy import HoldPolicy, HoldRules
from virtbus.integrations.reactor import LISTEN_SECONDS
from virtbus.model import DeviceSource, Event, Now, SourceHealth
from virtbus.testing import MOMENT
from virtbus.words import SourceState

HOUR, DAY = 3600.0, 86_400.0
STEP = 15.0
QUIET_AFTER = 2 * HOUR  # nothing new happens after a fault for so long: the reactor judges rarely then
SLACK = 3 * 60.0  # a hold that was due at the fault's end
SYSTEMS = tuple(
    DeviceSource("network", "rbd", f"vms/{n}", hosts=(f"10.{60 + n}.0.7:6789",)) for n in range(3)
)


@dataclass
class Found:
    """What went wrong in the fleets that were played, and how much there was of what was meant."""

    fleets: int = 0
    holds: int = 0
    faults: int = 0
    held_faults: int = 0  # of these, faults that led to a hold
    unheld: Counter[str] = field(default_factory=Counter)  # the others, by what last kept it from being held
    wrong: list[str] = field(default_factory=list)  # holds of hosts that were not at fault
    kept: list[str] = field(default_factory=list)  # holds that were never given back
    beyond: list[str] = field(default_factory=list)  # more than max_share at once

    def line(self) -> str:
        """One line for people."""
        unheld = ",".join(f"{why}:{count}" for why, count in self.unheld.most_common())
        return (
            f"fleets={self.fleets} faults={self.faults} held_faults={self.held_faults} unheld={unheld or 0} "
            f"holds={self.holds} wrong={len(self.wrong)} kept={len(self.kept)} "
            f"beyond_share={len(self.beyond)}"
        )


class Queue:
    """What the broker keeps for a reactor that is away."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Event, Mapping[str, str]]] = []

    def saw(self, event: Event, attributes: Mapping[str, str], _: Now) -> None:
        """Keep it."""
        self.waiting.append((event, attributes))


@dataclass
class Host:
    """A simulated host and what is true of it."""

    machine: Machine
    offset: float
    down_until: float = -1.0
    blind_until: float = -1.0
    at_fault: list[tuple[float, float]] = field(default_factory=list)
    counted: list[tuple[float, float]] = field(default_factory=list)
    unheld: dict[tuple[float, float], str] = field(default_factory=dict)  # why a fault is not held so far
    gone: bool = False

    def was_at_fault(self, at: float) -> bool:
        """Whether its own fault explains a hold that is decided now."""
        return any(begin <= at <= end + SLACK for begin, end in self.at_fault)


class Simulation:
    """One fleet for `days`, then a quiet end in which everything must be given back."""

    def __init__(self, seed: int, days: float = 2.0) -> None:
        self.random = random.Random(seed)
        self.seed, self.end = seed, days * DAY
        self.rules = HoldRules(max_share=self.random.choice((0.1, 0.2, 0.34)))
        self.held: dict[str, Row] = {}
        self.released_at: dict[str, float] = {}
        self.last: dict[str, int] = {}
        self.listening_since = 0.0
        self.fleet, self.policy = Fleet(), HoldPolicy(self.rules)
        self.queue: Queue | None = None  # while the reactor is away
        self.own: frozenset[str] = frozenset()  # in the reactor's store
        self.hosts = [self._host(number) for number in range(self.random.randint(5, 16))]
        self.plan: list[tuple[float, int, str, tuple[Host, ...], float]] = []
        self.found = Found(fleets=1)

    def _host(self, number: int) -> Host:
        skew = self.random.choice((0.0, 0.0, 0.0, self.random.uniform(-DAY, DAY), 365 * DAY))
        machine = Machine(self._bus(), number, skew=skew)
        machine.interval = self.random.choice((60.0, 60.0, 60.0, 60.0, 120.0))
        return Host(machine, self.random.uniform(0, 60))

    # ---- what happens

    def _schedule(self) -> None:
        at = 0.0
        what = [
            "host",
            "outage",
            "outage",
            "reactor",
            "away",
            "restart",
            "silence",
            "blind",
            "clock",
            "rename",
            "replace",
        ]
        while (at := at + self.random.expovariate(1 / HOUR)) < self.end:
            kind = self.random.choice(what)
            lasts = self.random.uniform(5 * 60, 3 * HOUR)
            some = [host for host in self.hosts if self.random.random() < 0.6]
            if kind == "outage" and len(some) < 3:
                continue
            hosts = tuple(some) if kind == "outage" else (self.random.choice(self.hosts),)
            self._add(at, kind, hosts, lasts)
            if kind == "outage" and self.random.random() < 0.5:  # the reactor starts in its midst
                self._add(at + self.random.uniform(0, lasts), "reactor", (), 0.0)

    def _add(self, at: float, kind: str, hosts: tuple[Host, ...], lasts: float) -> None:
        self.plan.append((at, len(self.plan), kind, hosts, lasts))

    def _happen(self, at: float, kind: str, hosts: tuple[Host, ...], lasts: float) -> None:
        getattr(self, f"_do_{kind}")(at, hosts, lasts)

    def _do_host(self, at: float, hosts: tuple[Host, ...], lasts: float) -> None:
        (host,) = hosts
        if not self._up(host, at) or host.machine.open:
            return
        self.found.faults += 1
        host.at_fault.append((at, at + lasts))
        host.unheld[host.at_fault[-1]] = "reactor_away"
        for guest, system in enumerate(SYSTEMS[: self.random.randint(2, 3)]):
            host.machine.fails(at, guest, system)
        self._add(at + lasts, "recover", (host,), 0.0)

    def _do_outage(self, at: float, hosts: tuple[Host, ...], lasts: float) -> None:
        system = self.random.choice(SYSTEMS)
        for host in hosts:
            self._add(at + self.random.uniform(0, 40), f"hit{SYSTEMS.index(system)}", (host,), lasts)

    def _hit(self, system: int, at: float, hosts: tuple[Host, ...], lasts: float) -> None:
        (host,) = hosts
        if host.gone or any(begin <= at <= end for begin, end in host.at_fault):
            return
        for guest in range(self.random.randint(1, 3)):
            if self._up(host, at):
                # Guests of their own for each system: an incident never changes what it is about.
                host.machine.fails(at, 10 * (system + 1) + guest, SYSTEMS[system])
        self._add(at + lasts, "recover", (host,), 0.0)

    def _do_hit0(self, at: float, hosts: tuple[Host, ...], lasts: float) -> None:
        self._hit(0, at, hosts, lasts)

    def _do_hit1(self, at: float, hosts: tuple[Host, ...], lasts: float) -> None:
        self._hit(1, at, hosts, lasts)

    def _do_hit2(self, at: float, hosts: tuple[Host, ...], lasts: float) -> None:
        self._hit(2, at, hosts, lasts)

    def _do_recover(self, at: float, hosts: tuple[Host, ...], _: float) -> None:
        (host,) = hosts
        if self._up(host, at):
            host.machine.recovers(at)
        elif not host.gone:
            self._add(max(host.down_until, at) + 1, "recover", hosts, 0.0)

    def _do_reactor(self, at: float, *_: object) -> None:
        """Killed, or failed over: only what the control plane holds is left."""
        self.fleet, self.policy = Fleet(), HoldPolicy(self.rules)
        self.fleet.witnessed = self.own
        self.listening_since = at
        if self.random.random() < 0.5:  # its store was lost as well: a mark tells no agent
            self.own = self.fleet.witnessed = frozenset()
            self.last.clear()
            self.released_at.clear()
            self.held = {name: replace(row, agent="", heard_at=at) for name, row in self.held.items()}
        for host in self.hosts:
            host.machine.fleet = self._bus()

    def _bus(self) -> Fleet:
        return self.fleet if self.queue is None else self.queue  # type: ignore[return-value]

    def _do_away(self, at: float, hosts: tuple[Host, ...], lasts: float) -> None:
        """The reactor is down for a while; the broker keeps what comes meanwhile."""
        self._do_reactor(at)
        if self.queue is None:
            self.queue = Queue()
            self._add(at + lasts, "back", (), 0.0)
        for host in self.hosts:
            host.machine.fleet = self._bus()

    def _do_back(self, at: float, *_: object) -> None:
        assert self.queue is not None
        queue, self.queue = self.queue, None
        self.listening_since = at
        for event, attributes in queue.waiting:
            self.fleet.saw(event, attributes, at_second(at))
        for host in self.hosts:
            host.machine.fleet = self.fleet

    def _do_restart(self, at: float, hosts: tuple[Host, ...], _: float) -> None:
        (host,) = hosts
        if self._up(host, at):
            host.machine.restarts(at, epoch_at(self.random.uniform(0, 100)), heard=self.random.random() < 0.8)

    def _do_silence(self, _: float, hosts: tuple[Host, ...], lasts: float) -> None:
        hosts[0].down_until = max(hosts[0].down_until, _ + lasts)

    def _do_blind(self, at: float, hosts: tuple[Host, ...], lasts: float) -> None:
        hosts[0].blind_until = at + lasts

    def _do_clock(self, at: float, hosts: tuple[Host, ...], _: float) -> None:
        hosts[0].machine.skew += self.random.uniform(-DAY, DAY)

    def _do_rename(self, at: float, hosts: tuple[Host, ...], _: float) -> None:
        (host,) = hosts
        if not self._up(host, at) or host.machine.open:
            return
        old = host.machine
        renamed = Machine(self._bus(), old.number, name=f"renamed-{int(at)}", skew=old.skew)
        renamed.epoch, renamed.sequence, renamed.agent = old.epoch, old.sequence, old.agent
        host.machine = renamed
        renamed.restarts(at, epoch_at(self.random.uniform(0, 100)))

    def _do_replace(self, at: float, hosts: tuple[Host, ...], lasts: float) -> None:
        """New hardware of the same name after a while; or (half of them) decommissioned for good."""
        (host,) = hosts
        host.gone = True
        alive = sum(not one.gone for one in self.hosts)
        if self.random.random() < 0.5 and alive > 4:
            return
        fresh = self._host(1000 + len(self.hosts))
        fresh.machine.host = Machine(self._bus(), 2000 + len(self.hosts), name=host.machine.host.name).host
        fresh.machine.agent = uuid_of(3000 + len(self.hosts))
        fresh.down_until = at + lasts
        self.hosts.append(fresh)

    def _up(self, host: Host, at: float) -> bool:
        return not host.gone and at >= host.down_until

    # ---- the play

    def run(self) -> Found:
        """Play it through."""
        self._schedule()
        at, judged, last_news = 0.0, -1e9, 0.0
        end = self.end + 2 * DAY
        while at < end:
            for _, _, kind, hosts, lasts in self._due(at):
                last_news = at
                self._happen(at, kind, hosts, lasts)
            for host in self.hosts:
                interval = host.machine.interval
                if self._up(host, at) and (at + host.offset) % interval < STEP:
                    if at < host.blind_until:
                        host.machine.beat(at, source=SourceHealth(SourceState.DISCONNECTED, MOMENT))
                    else:
                        host.machine.beat(at)
            if self.queue is None and at - judged >= (STEP if at - last_news < 900 else 60.0):
                judged = at
                self._judge(at)
            if at > self.end and at - last_news > QUIET_AFTER and not self.held:
                break
            at += STEP
        for one in self.hosts:
            self.found.unheld.update(why for fault, why in one.unheld.items() if fault not in one.counted)
        self.found.kept += [f"seed {self.seed}: {host} is held at the end" for host in self.held]
        return self.found

    def _due(self, at: float) -> Iterator[tuple[float, int, str, tuple[Host, ...], float]]:
        due = sorted(item for item in self.plan if item[0] <= at)
        self.plan = [item for item in self.plan if item[0] > at]
        yield from due

    def _judge(self, at: float) -> None:
        now = at_second(at)
        view = self.fleet.view(now)
        self.own = view.own
        for host in view.hosts:
            row = self.held.get(host.name)
            if row is not None and host.state != "silent" and (at - row.heard_at >= 60 or not row.agent):
                self.held[host.name] = replace(row, agent=host.agent_id, heard_at=at)
        held = {name: row.times for name, row in self.held.items()}
        for decision in self.policy.decide(view, held, now.monotonic):
            if decision.hold:
                self._hold(decision.host, at, decision.why, view)
            else:
                self._release(decision.host, at)
        self._why_unheld(view, at)
        names = {host.name for host in view.hosts}
        listened = at - self.listening_since >= LISTEN_SECONDS and not view.suspect_ourselves
        for row, _ in list(orphaned(self.held.values(), view, at, listened=listened)):
            self._release(row.host, at)
        live = [host for host in view.hosts if host.name in self.held]
        if len(live) > max(1, int(self.rules.max_share * len(names))) and len(self.held) > 1:
            self._beyond(at, len(names))

    def _why_unheld(self, view: FleetView, at: float) -> None:
        for one in self.hosts:
            if not one.at_fault or not one.at_fault[-1][0] <= at <= one.at_fault[-1][1]:
                continue
            name = one.machine.host.name
            host = view.host(name)
            if name in self.held:
                why = "held_before"
            elif host is None or host.state != "observing":
                why = "unknown" if host is None else host.state
            elif name in self.policy.withheld:
                why = "limit"
            elif host.early or not host.witnessed:
                why = "early" if host.early else "not_witnessed"
            elif not host.incidents:
                why = "recovered"
            else:
                why = host.blame.value if host.blame is not Blame.HOST else "not_for_long"
            one.unheld[one.at_fault[-1]] = why

    def _beyond(self, at: float, hosts: int) -> None:
        if self.added_at == at:  # a fleet may shrink below what is held; it may not be added to
            self.found.beyond.append(f"seed {self.seed}: {sorted(self.held)} of {hosts} hosts at {at:.0f}")

    added_at = -1.0

    def _hold(self, name: str, at: float, why: str, view: FleetView) -> None:
        self.found.holds += 1
        self.added_at = at
        times = self.policy.times(self.last.get(name, 0), self.released_at.get(name), at)
        self.last[name] = times
        host = view.host(name)
        assert host is not None
        self.held[name] = Row(
            name, HoldState.HELD, at, times, why, agent=host.agent_id, heard_at=at,
            released_at=self.released_at.get(name),
        )  # fmt: skip
        mine = [host for host in self.hosts if host.machine.host.name == name]
        for one in mine:
            if one.was_at_fault(at) and one.at_fault[-1] not in one.counted:
                one.counted.append(one.at_fault[-1])
                self.found.held_faults += 1
        if not any(one.was_at_fault(at) for one in mine):
            self.found.wrong.append(f"seed {self.seed}: {name} at {at:.0f}: {why}")

    def _release(self, name: str, at: float) -> None:
        del self.held[name]
        self.released_at[name] = at


def play(seeds: range, days: float = 2.0) -> Found:
    """Many fleets; what was found in all of them."""
    whole = Found()
    for seed in seeds:
        one = Simulation(seed, days).run()
        whole.fleets += one.fleets
        whole.holds += one.holds
        whole.faults += one.faults
        whole.held_faults += one.held_faults
        whole.unheld += one.unheld
        whole.wrong += one.wrong
        whole.kept += one.kept
        whole.beyond += one.beyond
    return whole
