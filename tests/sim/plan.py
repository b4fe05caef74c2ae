"""What goes wrong in one simulated cloud, and when: drawn from a seed before it is played, so it shrinks.

A plan is data. The same plan and seed are the same story; a plan with a fault less is another story in which
the remaining faults still happen at their times.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from functools import partial
from typing import Any

from virtbus.spool import faults as points


class Shape(StrEnum):
    """Which part of the system a plan leans on."""

    HOST = "host"  # one or two hosts whose disks fail all the time; nobody may be held
    FLEET = (
        "fleet"  # some hosts, storage they share, outages and hosts at fault; the reactor holds and releases
    )


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that happens at `at` (true seconds); `how` are the arguments of the world's method `what`."""

    at: float
    where: str  # a host's name, "broker", "consumer", "reactor", "plane"
    what: str
    how: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class HostPlan:
    """A host as it is at the beginning."""

    name: str
    release: str  # see hypervisor.RELEASES
    skew: float  # seconds, of its wall clock
    guests: int = 3
    sockets: bool = False  # each guest has a daemon of its own, as on a KubeVirt node


@dataclass(frozen=True, slots=True)
class Plan:
    """All of one story that is not the interleaving of threads."""

    seed: int
    shape: Shape
    broker: str  # "amqp" or "kafka"
    hosts: tuple[HostPlan, ...]
    faults: tuple[Fault, ...]
    faulty_seconds: float  # how long things go wrong
    quiet_seconds: float  # how long nothing does, before the books are closed
    group_commit: bool = False
    reactors: int = 1  # a second one stands by; none: only a consumer

    def without(self, faults: frozenset[int]) -> Plan:
        """The plan without some of its faults, by their number."""
        return replace(self, faults=tuple(f for number, f in enumerate(self.faults) if number not in faults))

    def text(self) -> str:
        """As JSON, a fault a line."""
        told = asdict(replace(self, faults=()))
        lines = ",\n  ".join(json.dumps(asdict(fault)) for fault in self.faults)
        return json.dumps(told)[:-1].replace('"faults": []', f'"faults": [\n  {lines}\n]') + "}\n"

    @classmethod
    def parse(cls, text: str) -> Plan:
        """What `text` wrote."""
        told = json.loads(text)
        hosts = tuple(HostPlan(**host) for host in told.pop("hosts"))
        faults = tuple(Fault(**fault) for fault in told.pop("faults"))
        return cls(**{**told, "shape": Shape(told["shape"])}, hosts=hosts, faults=faults)


RELEASE_NAMES = ("bookworm", "trixie", "forky")
SPOOL_POINTS = (
    "before_rescue", "during_open", "before_commit", "after_commit", "during_settle", "after_settle",
    "during_compaction",
)  # fmt: skip
CONSUMER_STEPS = ("effect", "marks", "ack", "acked")
REACTOR_STEPS = ("ack", "acked", "before_effect", "after_effect")
assert points.__doc__ is not None
assert all(point in points.__doc__ for point in SPOOL_POINTS)


HOST_SECONDS = (240.0, 600.0, 1200.0)
FLEET_SECONDS = (1000.0, 1800.0, 3600.0)


def draw(seed: int) -> Plan:
    """The plan of a seed."""
    dice = random.Random(f"plan {seed}")
    fleet = seed % 8 == 0
    count = dice.choice((4, 4, 4, 5)) if fleet else dice.choice((1, 1, 2))
    size = dice.choices((0, 1, 2), (70, 25, 5))[0]  # most are short and dense: they find as much in less time
    hosts = tuple(
        HostPlan(
            f"host-{number}",
            dice.choice(RELEASE_NAMES),
            dice.choice((0.0, 0.0, dice.uniform(-86400, 86400))),
            guests=2 if fleet else 3,
        )
        for number in range(1, count + 1)
    )
    broker = dice.choice(("amqp", "amqp", "kafka"))
    # A second member of an exclusive group stands by on RabbitMQ; on Kafka it takes over at once.
    most = 2 if broker == "amqp" else 1
    plan = Plan(
        seed=seed,
        shape=Shape.FLEET if fleet else Shape.HOST,
        broker=broker,
        hosts=hosts,
        faults=(),
        faulty_seconds=(FLEET_SECONDS if fleet else HOST_SECONDS)[size],
        quiet_seconds=500.0 if fleet else 200.0,
        group_commit=dice.random() < 0.3,
        reactors=dice.choice((1, most) if fleet else (0, 0, 1)),
    )
    if seed % 16 == 5:
        return _operated(_calm(plan))
    faults = tuple(sorted([*_faults(plan, dice), *_meetings(plan)], key=lambda fault: fault.at))
    return _operated(replace(plan, faults=faults) if seed % 8 != 4 else _nodes(plan, faults))


def _calm(plan: Plan) -> Plan:
    """The same hosts, on which nothing but meetings happens, one after another: no later error hides one."""
    dice = random.Random(f"calm {plan.seed}")
    plan = replace(plan, faulty_seconds=HOST_SECONDS[1])
    faults = []
    for host in plan.hosts:
        at = dice.uniform(20.0, 60.0)
        while at < plan.faulty_seconds - 80.0:
            met = dice.choice(CALM_MEETINGS)(dice, host.name, round(at, 3))
            faults += [fault for fault in met if fault.where != "reactor" or plan.reactors]
            at += dice.uniform(110.0, 150.0)
    return replace(plan, faults=tuple(sorted(faults, key=lambda fault: fault.at)))


def _operated(plan: Plan) -> Plan:
    """The same, and in some an operator pauses guests: now and then, and about when their disks fail."""
    dice = random.Random(f"operator {plan.seed}")
    if plan.shape is Shape.FLEET or dice.random() < 0.6:
        return plan
    pauses = []
    for host in plan.hosts:
        for _ in range(dice.choice((1, 3, 6))):
            at = dice.uniform(5.0, plan.faulty_seconds - 60.0)
            pauses.append(_pauses(dice, host.name, at, dice.randrange(host.guests)))
    for fault in plan.faults:
        if fault.what == "trouble" and dice.random() < 0.3:
            at = max(1.0, fault.at + dice.uniform(-1.0, 2.0))
            pauses.append(_pauses(dice, fault.where, at, fault.how["guest"]))
    return replace(plan, faults=tuple(sorted([*plan.faults, *pauses], key=lambda fault: fault.at)))


def _pauses(dice: random.Random, host: str, at: float, guest: int) -> Fault:
    how = {"guest": guest, "seconds": dice.choice((0.05, 0.5, 3.0, 20.0))}
    return Fault(round(at, 3), host, "operator_pauses", how)


def _nodes(plan: Plan, faults: tuple[Fault, ...]) -> Plan:
    """The same on KubeVirt nodes, with more guests; most of what happens is some few guests'."""
    dice = random.Random(f"nodes {plan.seed}")
    guests = dice.choice((3, 6, 12, 50))

    def whose() -> int:
        return dice.randrange(guests if dice.random() < 0.3 else min(guests, 6))

    return replace(
        plan,
        hosts=tuple(replace(host, guests=guests, sockets=True) for host in plan.hosts),
        faults=tuple(
            replace(one, how={**one.how, "guest": whose()}) if "guest" in one.how else one for one in faults
        ),
    )


def _faults(plan: Plan, dice: random.Random) -> Iterator[Fault]:
    end = plan.faulty_seconds - 60.0
    fleet = plan.shape is Shape.FLEET
    rare = 4.0 if fleet else 1.0  # a fleet's own faults are seen better where less else happens
    if plan.faulty_seconds == HOST_SECONDS[0]:
        rare = 0.6
    for host in plan.hosts:
        if not fleet:
            yield from _often(dice, host.name, end, 8.0, _trouble)
        for mean, draw_one in (
            (150.0, _kill),
            (150.0, _power),
            (200.0, _freeze),
            (150.0, _clock),
            (120.0, _libvirt),
            (120.0, _looks),
            (150.0, _guest),
            (300.0, _disk),
            (400.0, _terminate),
            (150.0, _unplug),
            (200.0, _snapshot),
            (150.0, _migrate),
            (200.0, _slow),
        ):
            others = [other.name for other in plan.hosts if other is not host]
            if draw_one is _migrate:
                if not others:
                    continue
                draw_one = partial(_migrate, others=others)
            if dice.random() < (0.25 if fleet else 0.5):  # each seed has faults of its own
                yield from _often(dice, host.name, end, mean * rare, draw_one)
    if fleet:
        if dice.random() < 0.6:
            yield from _often(dice, "storage", end - 240.0, 400.0, lambda r: _outage(r, plan))
        yield from _often(dice, "storage", end - 240.0, 200.0, lambda r: _host_fault(r, plan))
    if dice.random() < 0.6:
        yield from _often(dice, "broker", end, 90.0 * rare, _broker)
    if dice.random() < 0.5:
        yield from _often(dice, "consumer", end, 120.0 * rare, _kill_reader(CONSUMER_STEPS))
    if plan.reactors and dice.random() < 0.7:
        yield from _often(dice, "reactor", end, 200.0 * (1.5 if fleet else 1.0), _kill_reader(REACTOR_STEPS))
    if plan.reactors and dice.random() < 0.7:
        yield from _often(dice, "plane", end, 200.0, lambda r: _plane(r, plan))


def _meetings(plan: Plan) -> Iterator[Fault]:
    """Faults that meet: each alone is frequent, and together they would be rare."""
    dice = random.Random(f"meetings {plan.seed}")
    if plan.shape is Shape.FLEET or dice.random() < 0.5:
        return
    for _ in range(dice.choice((1, 2, 3))):
        host = dice.choice(plan.hosts).name
        meet = dice.choice(MEETINGS)
        for fault in meet(dice, host, round(dice.uniform(10.0, plan.faulty_seconds - 80.0), 3)):
            if fault.where != "reactor" or plan.reactors:
                yield fault


def _fails_once(dice: random.Random, host: str, at: float, *, pause: bool, stays: float = 4.0) -> Fault:
    how = {
        "guest": dice.randrange(3),
        "disk": dice.randrange(2),
        "pause": pause,
        "copying": False,
        "times": [[1, stays, 2.0]],
    }
    return Fault(round(at, 3), host, "trouble", how)


def _blinds(dice: random.Random, host: str, at: float) -> tuple[Fault, float]:
    """A time without sight, and how long it is."""
    seconds = dice.choice((5.0, 12.0, 40.0))
    what, how = dice.choice(
        (
            ("kill", {"after": seconds}),
            ("libvirt_restarts", {"seconds": seconds}),
            ("libvirt_dies", {"stalls": seconds - 1.0, "seconds": 1.0}),
            ("freeze", {"seconds": seconds + 5.0, "asleep": dice.random() < 0.4}),
        )
    )
    return Fault(at, host, what, how), seconds


def _blind_spot(dice: random.Random, host: str, at: float) -> Iterator[Fault]:
    """An error that nobody sees, of a disk that failed before, and looks fail when they could find it."""
    blind, seconds = _blinds(dice, host, at)
    yield blind
    error = _fails_once(dice, host, at + dice.uniform(1.5, seconds - 1.0), pause=dice.random() < 0.3)
    yield error
    if dice.random() < 0.6:
        how = {**error.how, "pause": False}
        yield replace(error, at=round(max(1.0, at - dice.uniform(8.0, 15.0)), 3), how=how)
        if dice.random() < 0.4:
            yield Fault(round(at - dice.uniform(3.0, 6.0), 3), host, *_clock(dice)[:2])
    if dice.random() < 0.5:
        how = {"seconds": dice.choice((3.0, 12.0, 40.0))}
        yield Fault(round(at + seconds - 0.5, 3), host, "looks_fail", how)
    if dice.random() < 0.3:
        yield _blinds(dice, host, round(at + seconds + dice.uniform(0.5, 20.0), 3))[0]


def _deaf(dice: random.Random, host: str, at: float) -> Iterator[Fault]:
    """libvirtd says nothing, something fails, and the agent ends before it hears of it."""
    yield Fault(at, host, "libvirt_hangs", {"seconds": dice.choice((12.0, 40.0))})
    yield _fails_once(dice, host, at + dice.uniform(0.1, 6.0), pause=dice.random() < 0.3)
    yield Fault(
        round(at + dice.uniform(6.5, 11.0), 3), host, *dice.choice((_kill, _power, _freeze))(dice)[:2]
    )


def _two_disks(dice: random.Random, host: str, at: float) -> Iterator[Fault]:
    """A second disk fails while its guest stops for the first; then one of them fails again."""
    first = _fails_once(dice, host, at, pause=True, stays=dice.choice((0.05, 0.05, 4.0)))
    behind = dice.choice((0.0, 0.02, 0.1, 1.2, 3.0))
    yield replace(first, how={**first.how, "behind": behind})
    for after in (8.0, 16.0):
        disk = dice.randrange(2)
        yield replace(
            first, at=round(at + after, 3), how={**first.how, "disk": disk, "times": [[1, 3.0, 1.0]]}
        )


def _busy_end(dice: random.Random, host: str, at: float) -> Iterator[Fault]:
    """A busy host, on which something fails and something ends."""
    yield Fault(at, host, "slow_host", {"seconds": 20.0, "lag": dice.choice((0.3, 1.5, 4.0))})
    end = at + dice.uniform(4.0, 16.0)
    for _ in range(2):
        yield _fails_once(dice, host, end - dice.uniform(0.0, 4.0), pause=dice.random() < 0.6, stays=2.0)
    error = _fails_once(dice, host, end - dice.uniform(1.0, 4.0), pause=False)
    yield replace(error, how={**error.how, "times": [[1, 0.3, 0.1]] * 12})
    ends = dice.choice((_kill, _kill, _power, _freeze, _libvirt))
    yield Fault(round(end, 3), host, *ends(dice)[:2])


def _late_disk(dice: random.Random, host: str, at: float) -> Iterator[Fault]:
    """The spool's disk takes nothing, and meanwhile the clock is set and something fails."""
    yield Fault(at, host, "disk", {"seconds": 30.0, "how": dice.choice(("full", "fails"))})
    yield Fault(round(at + dice.uniform(2.0, 28.0), 3), host, *_clock(dice)[:2])
    yield _fails_once(dice, host, at + dice.uniform(0.0, 32.0), pause=dice.random() < 0.5)
    if dice.random() < 0.6:
        yield _blinds(dice, host, round(at + dice.uniform(0.0, 28.0), 3))[0]


def _unseen_resume(dice: random.Random, host: str, at: float) -> Iterator[Fault]:
    """A guest stands, is resumed unseen, and stands again."""
    blind, seconds = _blinds(dice, host, at)
    first = _fails_once(dice, host, at - dice.uniform(0.5, 8.0), pause=True)
    if dice.random() < 0.5:  # of a disk whose events libvirt 9.0 loses
        first = replace(first, how={**first.how, "guest": 2, "disk": 1})
    again = dice.uniform(0.3, 6.0)
    yield blind
    yield replace(
        first,
        how={**first.how, "times": [[1, at - first.at + seconds / 2, again + seconds / 2], [1, 4.0, 1.0]]},
    )


def _lost_commit(dice: random.Random, host: str, at: float) -> Iterator[Fault]:
    """A process or a host ends in the middle of a commit, of which there are some."""
    point = dice.choice(SPOOL_POINTS)
    if dice.random() < 0.5:
        how = {"after": 5.0, "keeps": dice.choice(("nothing", "some", "torn"))}
        yield Fault(at, host, "power_cut_at", {**how, "point": point, "nth": dice.choice((1, 2))})
    else:
        yield Fault(at, host, "kill_at", {"point": point, "nth": dice.choice((1, 2)), "after": 3.0})
    for _ in range(3):
        yield _fails_once(dice, host, at + dice.uniform(0.1, 6.0), pause=dice.random() < 0.5, stays=1.5)


def _earlier_clock(dice: random.Random, host: str, at: float) -> Iterator[Fault]:
    """The clock is set, and the agent starts again."""
    yield Fault(at, host, "step_clock", {"step": dice.choice((-7200.0, -30.0, 30.0))})
    yield Fault(round(at + dice.uniform(0.1, 5.0), 3), host, "kill", {"after": dice.choice((0.5, 5.0))})
    yield _fails_once(dice, host, at + dice.uniform(0.0, 8.0), pause=dice.random() < 0.5)


def _other_clock(dice: random.Random, host: str, at: float) -> Iterator[Fault]:
    """Errors that nobody sees, of disks that failed before; the clock was set back meanwhile."""
    blind, seconds = _blinds(dice, host, at)
    yield blind
    yield Fault(
        round(at - dice.uniform(3.0, 6.0), 3), host, "step_clock", {"step": dice.choice((-7200.0, -30.0))}
    )
    guest = dice.randrange(3)
    for disk in dice.choice(((0,), (1,), (0, 1))):
        for when in (at - dice.uniform(8.0, 15.0), at + dice.uniform(1.5, seconds - 1.0)):
            error = _fails_once(dice, host, when, pause=False)
            yield replace(error, how={**error.how, "guest": guest, "disk": disk})


def _cut_short(dice: random.Random, host: str, at: float) -> Iterator[Fault]:
    """Readers and the broker end while something is on its way to them."""
    yield _fails_once(dice, host, at, pause=True)
    for who, steps in (("consumer", CONSUMER_STEPS), ("reactor", REACTOR_STEPS)):
        how = {"step": dice.choice(steps), "nth": 1, "after": 3.0, "keeps": dice.random() < 0.8}
        yield Fault(round(at - 0.1, 3), who, "kill_at", how)
    yield Fault(round(at - 0.1, 3), "broker", dice.choice(("confirms", "cut", "stop")), {"seconds": 5.0})


MEETINGS = (
    _blind_spot, _blind_spot, _late_disk, _unseen_resume, _lost_commit, _earlier_clock, _cut_short, _deaf,
    _two_disks, _busy_end,
)  # fmt: skip
CALM_MEETINGS = (*MEETINGS, _other_clock, _other_clock, _other_clock)


def _often(dice: random.Random, where: str, end: float, mean: float, draw_one: Any) -> Iterator[Fault]:
    at = dice.expovariate(1 / mean)
    while at < end:
        what, how, lasts = draw_one(dice)
        yield Fault(round(at, 3), where, what, how)
        at += lasts + dice.expovariate(1 / mean)


Drawn = tuple[str, dict[str, Any], float]  # what, how, and for how long nothing of this kind follows


def _trouble(dice: random.Random) -> Drawn:
    """A disk fails for a while; whoever watches resumes the guest."""
    pause = dice.random() < 0.7
    times = [
        [dice.choice((1, 1, 1, 3)), dice.choice((0.05, 1.5, 4.0, 15.0)), dice.choice((0.1, 2.0, 10.0))]
        for _ in range(dice.choice((1, 1, 2, 5)))
    ]
    how = {
        "guest": dice.randrange(4),
        "disk": dice.randrange(2),
        "pause": pause,
        "copying": dice.random() < 0.1,
        "times": times,  # errors, seconds until the resume, seconds until the next
    }
    return "trouble", how, sum(stays + runs for _, stays, runs in times)


def _kill(dice: random.Random) -> Drawn:
    after = dice.choice((0.5, 3.0, 20.0))
    if dice.random() < 0.5:
        return "kill", {"after": after}, after
    return (
        "kill_at",
        {"point": dice.choice(SPOOL_POINTS), "nth": dice.choice((1, 1, 2, 5)), "after": after},
        30.0,
    )


def _power(dice: random.Random) -> Drawn:
    after = dice.choice((5.0, 30.0))
    keeps = dice.choice(("nothing", "some", "torn"))
    how = {"after": after, "keeps": keeps}
    if dice.random() < 0.5:
        return "power_cut", how, after
    point = dice.choice(SPOOL_POINTS)
    return "power_cut_at", {**how, "point": point, "nth": dice.choice((1, 2, 5))}, 30.0


def _freeze(dice: random.Random) -> Drawn:
    seconds = dice.choice((2.0, 9.0, 40.0))
    return "freeze", {"seconds": seconds, "asleep": dice.random() < 0.4}, seconds


def _clock(dice: random.Random) -> Drawn:
    return "step_clock", {"step": dice.choice((-7200.0, -30.0, 30.0, 7200.0))}, 0.0


def _libvirt(dice: random.Random) -> Drawn:
    seconds = dice.choice((1.0, 5.0, 40.0))
    if dice.random() < 0.3:
        stalls = dice.choice((0.5, 3.0, 12.0))
        return "libvirt_dies", {"stalls": stalls, "seconds": seconds}, stalls + seconds
    return dice.choice(("libvirt_restarts", "libvirt_hangs")), {"seconds": seconds}, seconds


def _looks(dice: random.Random) -> Drawn:
    seconds = dice.choice((5.0, 30.0))
    if dice.random() < 0.5:
        return "looks_fail", {"seconds": seconds}, 0.0
    return "looks_hang", {"seconds": seconds, "guest": dice.randrange(2)}, 0.0


def _guest(dice: random.Random) -> Drawn:
    seconds = dice.choice((1.0, 20.0))
    how = {"seconds": seconds, "guest": dice.randrange(2), "renamed": dice.random() < 0.2}
    return "guest_restarts", how, seconds


def _unplug(dice: random.Random) -> Drawn:
    seconds = dice.choice((0.5, 20.0))
    return "unplug", {"seconds": seconds, "guest": dice.randrange(4), "disk": dice.randrange(2)}, seconds


def _slow(dice: random.Random) -> Drawn:
    seconds = dice.choice((5.0, 20.0))
    return "slow_host", {"seconds": seconds, "lag": dice.choice((0.1, 1.0, 4.0))}, seconds


def _snapshot(dice: random.Random) -> Drawn:
    return "snapshot", {"guest": dice.randrange(4), "disk": dice.randrange(2)}, 0.0


def _migrate(dice: random.Random, others: list[str]) -> Drawn:
    seconds = dice.choice((0.5, 5.0))
    return "migrate", {"to": dice.choice(others), "seconds": seconds, "guest": dice.randrange(4)}, seconds


def _disk(dice: random.Random) -> Drawn:
    seconds = dice.choice((3.0, 30.0))
    return "disk", {"seconds": seconds, "how": dice.choice(("full", "full", "fails"))}, seconds


def _terminate(dice: random.Random) -> Drawn:
    return "terminate", {}, 30.0


def _broker(dice: random.Random) -> Drawn:
    seconds = dice.choice((1.0, 10.0, 40.0))
    what = dice.choice(("stop", "cut", "slow", "unroutable", "confirms", "poison", "refuses_letters"))
    return what, {"seconds": seconds}, seconds


def _kill_reader(steps: tuple[str, ...]) -> Any:
    def one(dice: random.Random) -> Drawn:
        after = dice.random() * 20
        if dice.random() < 0.3:
            return "kill", {"after": after}, after
        return "kill_at", {"step": dice.choice(steps), "nth": dice.choice((1, 1, 2, 5)), "after": after}, 30.0

    def drawn(dice: random.Random) -> Drawn:
        what, how, lasts = one(dice)
        return what, {**how, "keeps": dice.random() < 0.8}, lasts

    return drawn


def _plane(dice: random.Random, plan: Plan) -> Drawn:
    seconds = dice.choice((5.0, 60.0))
    what = dice.choice(("stop", "slow", "refuses", "loses_answers", "wiped", "registered_anew", "taken_back"))
    return what, {"seconds": seconds, "host": dice.choice(plan.hosts).name}, seconds


def _outage(dice: random.Random, plan: Plan) -> Drawn:
    lasts = dice.uniform(60.0, 240.0)
    hit = [host.name for host in plan.hosts if dice.random() < 0.8]
    return "outage", {"system": dice.randrange(3), "hosts": hit, "seconds": lasts}, lasts


def _host_fault(dice: random.Random, plan: Plan) -> Drawn:
    lasts = dice.uniform(120.0, 240.0)
    return "host_fault", {"host": dice.choice(plan.hosts).name, "seconds": lasts}, lasts + 200.0
