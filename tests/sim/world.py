"""One simulated cloud: hosts with agents, a broker, a consumer, reactors, a control plane; and its faults."""

from __future__ import annotations

import gc
import io
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.sim import disk, node, oracle
from tests.sim.broker import Broker, ModelBus
from tests.sim.hypervisor import ALIASES, DISKS, PAUSED_USER, RELEASES, SECRET, Daemon, Guest
from tests.sim.node import NODES, Node
from tests.sim.plan import Fault, Plan, Shape, draw
from tests.sim.plane import Node as PlaneNode
from tests.sim.plane import Plane
from tests.sim.programs import Program, SimAgent, SimConsumer, SimReactor
from tests.sim.runtime import HostClock, Process, Scheduler, Virtual, installed
from virtbus import consumer as consumer_module
from virtbus import statefiles, telemetry
from virtbus.bus import BusOptions
from virtbus.sources import SourceOptions, many
from virtbus.sources.link import PAUSED, RUNNING
from virtbus.spool import faults as points

GRACE_SECONDS = SourceOptions().grace_seconds
ON_TMPFS = Path("/dev/shm")


@dataclass
class Tally:
    """What a run held."""

    seeds: int = 0
    hours: float = 0.0
    faults: int = 0
    errors: int = 0
    events: int = 0
    holds: int = 0
    turns: int = 0
    violations: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.seeds += other.seeds
        self.hours += other.hours
        self.faults += other.faults
        self.errors += other.errors
        self.events += other.events
        self.holds += other.holds
        self.turns += other.turns
        self.violations += other.violations

    def line(self) -> str:
        return (
            f"seeds={self.seeds} simulated_hours={self.hours:.1f} faults={self.faults} errors={self.errors} "
            f"events={self.events} holds={self.holds} violations={len(self.violations)}"
        )


def settle() -> None:
    """What is loaded stays: before each world only what the last one left is collected, not all modules."""
    gc.collect()
    gc.freeze()


def _let_go(root: Path) -> None:
    """Close the lock files of processes that were killed, as the kernel would."""
    for file in list(statefiles._OPEN):
        with suppress(OSError):
            if Path(f"/proc/self/fd/{file.fd}").readlink().is_relative_to(root):
                file.close()
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            held = descriptor.readlink()
            if held.is_relative_to(root) and held.name == "lock":
                os.close(int(descriptor.name))


class World:
    """Play a plan; then `story` tells it and `tally.violations` says which promises were broken."""

    def __init__(self, plan: Plan | int) -> None:
        self.plan = plan if isinstance(plan, Plan) else draw(plan)
        self.story: list[tuple[float, str, str]] = []
        self.tally = Tally(seeds=1)
        self.truth = oracle.Truth(shape=self.plan.shape)
        self.hosts: list[SimAgent] = []
        self.reactors: list[SimReactor] = []
        self.ending = False
        self.next_bus: ModelBus | None = None  # what the next Consumer opens

    def run(self) -> Tally:
        """Play it through and ask the oracle."""
        plan = self.plan
        self.sched = Scheduler(plan.seed)
        self.root = Path(tempfile.mkdtemp(prefix="virtbus-sim-", dir=ON_TMPFS if ON_TMPFS.is_dir() else None))
        log = io.StringIO()
        telemetry.configure(stream=log)
        opener = consumer_module.open_bus
        gc.collect()  # connections of an earlier world are closed by the rules of theirs
        gc.disable()  # a world of minutes makes few cycles, and none while it matters
        try:
            sockets = ((many, "look", node.look), (many, "Watch", node.Watch))
            with disk.watched() as self.journal, installed(self.sched, sockets) as virtual:
                self.journal.failing = self._disk_code
                unsafe = {f.where for f in plan.faults if f.what in ("power_cut", "power_cut_at", "disk")}
                self.journal.watching = lambda path: any(f"/{name}-" in path for name in unsafe)
                points.hook = self._at_point
                consumer_module.open_bus = self._open_bus  # type: ignore[assignment]
                self._build(virtual)
                for fault in plan.faults:
                    self._schedule(fault)
                self.sched.run(plan.faulty_seconds)
                self._heal()
                self.sched.run(plan.faulty_seconds + plan.quiet_seconds)
                self._wait_for_the_last()
                self._look()
        finally:
            gc.enable()
            NODES.clear()
            points.hook = points._nothing
            consumer_module.open_bus = opener
            _let_go(self.root)
            shutil.rmtree(self.root, ignore_errors=True)
        if SECRET in log.getvalue():
            self.truth.problems.append("a secret of a domain's description is in the log")
        self.tally.violations = [f"seed {plan.seed}: {each}" for each in oracle.judge(self.truth)]
        self.tally.errors = len(self.truth.errors)
        self.tally.events = len({arrival.record.id for arrival in self.truth.log})
        self.tally.holds = len(self.plane.held)
        self.tally.hours = self.sched.now * len(self.hosts) / 3600
        self.tally.turns = self.sched.turns
        return self.tally

    # ---- the cast

    def _build(self, virtual: Virtual) -> None:
        plan = self.plan
        self.broker = Broker(self.sched, virtual, plan.broker)
        self.broker.group("g")
        if plan.reactors:
            self.broker.group("react-plane")
        self.truth.log, self.truth.messages = self.broker.log, self.broker.messages
        self.truth.stores_lost = plan.reactors > 1
        self.broker.returned = self.truth.returned
        self.plane = Plane(self.sched, standing=self._standing)
        for number, host in enumerate(plan.hosts, 1):
            quirks = RELEASES[host.release]
            clock = HostClock(host.skew)
            daemon: Daemon | Node = (
                Node(self.sched, virtual, host.name, quirks, self.root, clock)
                if host.sockets
                else Daemon(self.sched, virtual, host.name, quirks)
            )
            fleet = plan.shape is Shape.FLEET
            for index in range(1, 1 + host.guests):
                uuid = f"{number:08d}-0000-4000-8000-{index:012d}"
                systems = (
                    {ALIASES[0]: (number + index) % 3, ALIASES[1]: (number + index + 1) % 3} if fleet else {}
                )
                daemon.take(Guest(uuid, f"guest-{number}{index}", index, unnamed=index == 3, systems=systems))
            agent = SimAgent(self, host.name, number, clock, daemon)
            self.hosts.append(agent)
            self.truth.skews[host.name] = [(0.0, host.skew)]
            self.plane.nodes[host.name] = PlaneNode(f"uid-{number}")
            self.tell(host.name, f"libvirt {quirks.libvirt} ({quirks.name}), wall clock {host.skew:+.0f} s")
            agent.start()
        self.consumer = SimConsumer(self, "consumer", HostClock())
        self.consumer.start()
        for number in range(1, plan.reactors + 1):
            reactor = SimReactor(self, f"reactor-{number}", HostClock())
            self.reactors.append(reactor)
            reactor.start()

    def _standing(self, host: str) -> list[str]:
        (agent,) = [one for one in self.hosts if one.name == host]
        return [guest.name for guest in agent.daemon.guests.values() if guest.state == PAUSED]

    def _open_bus(self, url: str, options: BusOptions) -> ModelBus:
        bus, self.next_bus = self.next_bus, None
        assert bus is not None
        return bus

    def tell(self, who: str, what: str) -> None:
        """A line of the story."""
        self.story.append((self.sched.now, who, what))

    def page(self, guest: str | None = None, *, around: tuple[float, float] = (0.0, 1e9)) -> list[str]:
        """The story, with what came of it; of one guest's disks alone, and of a part of the time."""
        lines = sorted([*self.story, *oracle.story(self.truth)], key=lambda line: line[0])
        other = re.compile(rf"guest-(?!{guest.removeprefix('guest-')}\b)" if guest else "^$")
        begin, end = around
        return [
            f"{at:9.3f}  {who:<9} {what}"
            for at, who, what in lines
            if not other.search(what) and begin <= at <= end
        ]

    # ---- what goes wrong

    def _schedule(self, fault: Fault) -> None:
        def happen() -> None:
            self.sched.sleep(fault.at)
            if not self.ending:
                self._happen(fault)

        owner = next((host for host in self.hosts if host.name == fault.where), None)
        # QEMU, an operator: a process that is never killed, with the clocks of its host.
        self.sched.spawn(happen, Process(fault.where, HostClock() if owner is None else owner.clock))

    def _happen(self, fault: Fault) -> None:
        how: dict[str, Any] = dict(fault.how)
        if fault.what not in ("trouble", "kill", "kill_at", "power_cut", "power_cut_at", "terminate"):
            self.tally.faults += 1
        host = next((host for host in self.hosts if host.name == fault.where), None)
        if host is not None:
            getattr(self, f"_do_{fault.what}")(host, **how)
        elif fault.where == "consumer":
            self._kill_reader(
                self.consumer, fault.what, keeps=True, **{k: v for k, v in how.items() if k != "keeps"}
            )
        elif fault.where == "reactor":
            active = self.broker.group("react-plane").active
            found = [
                one for one in self.reactors if getattr(active, "_bus", None) and active._bus.host == one.name
            ]  # type: ignore[attr-defined]
            self._kill_reader((found or self.reactors)[0], fault.what, **how)
        else:
            getattr(self, f"_{fault.where}_{fault.what}")(**how)

    def _kill_reader(
        self, program: Program, what: str, after: float, keeps: bool, step: str = "", nth: int = 1
    ) -> None:
        if what == "kill":
            program.kill(after, "", keeps=keeps)
        else:
            program.arm(step, nth, lambda: program.kill(after, f"at {step}", keeps=keeps))

    # ---- of a host

    def _do_trouble(
        self,
        host: SimAgent,
        guest: int,
        disk: int,
        pause: bool,
        copying: bool,
        times: list[list[float]],
        behind: float | None = None,
    ) -> None:
        """A disk fails for a while, and its neighbour `behind` it; whoever watches resumes the guest."""
        daemon = host.daemon
        one = host.guest(guest)
        alias = ALIASES[disk]
        if not one.here or alias in one.unplugged:
            return
        if copying:
            one.copying.add(alias)
        what = f"{'pauses' if pause else 'reports'}{', block job' if copying else ''}"
        self.tell(host.name, f"{one.name} {alias} fails ({what})")
        for events, stays, runs in times:
            if not one.here or one.state != RUNNING or alias in one.unplugged:
                break
            before = len(daemon.errors)
            daemon.error(one, alias, pause=pause, events=int(events))
            self.tell(host.name, f"  {one.name} {alias}: {len(daemon.errors) - before} errors")
            if behind is not None:
                self.sched.sleep(behind)
                other = ALIASES[1 - disk]
                if one.here and other not in one.unplugged:
                    daemon.error(one, other, pause=True)
                    daemon.hide(one, alias)
                    self.tell(host.name, f"  {one.name} {other}: 1 error, on its way already")
            self.sched.sleep(stays)
            if pause:
                if daemon.quirks.late:
                    self.sched.sleep(daemon.quirks.latest())  # an event comes before its guest is resumed
                daemon.resume(one)
                self.tell(host.name, f"  {one.name} is resumed")
                self.sched.sleep(runs)
        one.copying.discard(alias)

    def _do_kill(self, host: SimAgent, after: float) -> None:
        host.kill(after, "")

    def _do_kill_at(self, host: SimAgent, point: str, nth: int, after: float) -> None:
        host.arm(point, nth, lambda: host.kill(after, f"at the spool's point {point}"))

    def _do_power_cut(self, host: SimAgent, after: float, keeps: str, at: str = "") -> None:
        if not host.alive:
            return
        clock, now = host.clock, self.sched.now
        host.kill(after, at, power=keeps)
        clock.booted, clock.suspended, clock.boots = -(now + after / 2), 0.0, clock.boots + 1
        self.truth.boots.setdefault(host.name, []).append(now)
        here = [guest for guest in host.daemon.guests.values() if guest.here]
        for guest in here:
            host.daemon.leave(guest)

        def boot() -> None:
            self.sched.sleep(after / 2)
            for guest in here:
                if not guest.here:
                    host.daemon.enter(guest)

        self.sched.spawn(boot, Process(host.name, clock))

    def _do_power_cut_at(self, host: SimAgent, point: str, nth: int, after: float, keeps: str) -> None:
        host.arm(point, nth, lambda: self._do_power_cut(host, after, keeps, f"at the spool's point {point}"))

    def _at_point(self, point: str) -> None:
        """A spool reached a point of `virtbus.spool.faults`."""
        task = self.sched.current
        if task is None or self.sched.over:
            return
        for host in self.hosts:
            if host.process is task.process:
                host.reach(point)

    def _disk_code(self, path: str) -> int:
        return next((code for host in self.hosts if host.disk and (code := host.disk_code(path))), 0)

    def _do_terminate(self, host: SimAgent) -> None:
        if host.agent is None or not host.alive:
            return
        self.tally.faults += 1
        self.tell(host.name, "SIGTERM of the agent")
        self.truth.ends[host.name].append(self.sched.now)
        host.agent.stop()
        process = host.process
        assert process is not None
        while not process.dead:
            self.sched.sleep(0.5)
        if not process.killed:
            self.tell(host.name, "the agent starts again")
            host.start()

    def _do_freeze(self, host: SimAgent, seconds: float, asleep: bool) -> None:
        process = host.process
        if process is None or process.dead or process.stopped_until > self.sched.now:
            return
        self.tell(host.name, f"{'the host sleeps' if asleep else 'SIGSTOP'} for {seconds:.0f} s")
        process.stopped_until = self.sched.now + seconds
        self.truth.frozen.setdefault(host.name, []).append((self.sched.now, process.stopped_until))
        if seconds > 20 and host.sees():
            times = self.truth.standstills.setdefault(host.name, [])
            times.append((self.sched.now, self.sched.now + seconds))
        if seconds > 20:
            host.blind.append((self.sched.now, self.sched.now + seconds))
        if asleep:
            host.clock.suspended += seconds
        if seconds > 20:  # libvirtd's keepalive gives up a client that says nothing
            self.sched.sleep(seconds - 1)
            for link in [link for link in host.daemon.links if link.process is process]:
                link.cut("End of file while reading data", 0.0)

    def _do_slow_host(self, host: SimAgent, seconds: float, lag: float) -> None:
        """Others have its processors: each thread of the agent comes late to whatever it does."""
        process = host.process
        if process is None or process.dead:
            return
        self.tell(host.name, f"the host is busy for {seconds:.0f} s")
        process.lag = lag
        if lag >= GRACE_SECONDS:
            self.truth.slow.setdefault(host.name, []).append((self.sched.now, self.sched.now + seconds))
        self.sched.sleep(seconds)
        process.lag = 0.0

    def _do_step_clock(self, host: SimAgent, step: float) -> None:
        self.tell(host.name, f"the wall clock is set by {step:+.0f} s")
        host.clock.skew += step
        self.truth.skews[host.name].append((self.sched.now, host.clock.skew))

    def _do_libvirt_restarts(self, host: SimAgent, seconds: float) -> None:
        self.tell(host.name, f"libvirtd restarts, away for {seconds:.0f} s")
        host.daemon.restart(seconds)

    def _do_libvirt_dies(self, host: SimAgent, stalls: float, seconds: float) -> None:
        self.tell(host.name, f"libvirtd stands still for {stalls:.1f} s and ends, away for {seconds:.0f} s")
        host.daemon.die(stalls, seconds)

    def _do_libvirt_hangs(self, host: SimAgent, seconds: float) -> None:
        self.tell(host.name, f"libvirtd hangs for {seconds:.0f} s")
        host.daemon.hang(seconds)

    def _do_looks_fail(self, host: SimAgent, seconds: float) -> None:
        self.tell(host.name, f"looks fail for {seconds:.0f} s")
        host.daemon.failing_until = self.sched.now + seconds
        self._leave_unanswered(host, seconds)

    def _do_looks_hang(self, host: SimAgent, seconds: float, guest: int) -> None:
        one = host.guest(guest)
        self.tell(host.name, f"looks at {one.name} hang for {seconds:.0f} s")
        one.hangs_until = self.sched.now + seconds
        self._leave_unanswered(host, seconds)

    def _leave_unanswered(self, host: SimAgent, seconds: float) -> None:
        times = self.truth.unanswered.setdefault(host.name, [])
        times.append((self.sched.now, self.sched.now + seconds))

    def _do_guest_restarts(self, host: SimAgent, seconds: float, guest: int, renamed: bool = False) -> None:
        one = host.guest(guest)
        if one.here:
            self.tell(host.name, f"{one.name} is shut off, and comes back in {seconds:.0f} s")
            host.daemon.leave(one)
            self.sched.sleep(seconds)
            if renamed and not one.here:
                self.tell(host.name, f"{one.name} is renamed {one.name}+")
                host.daemon.rename(one, f"{one.name}+")
            if not one.here:
                host.daemon.enter(one)

    def _do_operator_pauses(self, host: SimAgent, guest: int, seconds: float) -> None:
        one = host.guest(guest)
        if host.daemon.works and one.here and one.state == RUNNING and one.hangs_until <= self.sched.now:
            self.tell(host.name, f"an operator pauses {one.name} for {seconds:.1f} s")
            host.daemon.suspend(one)
            self.sched.sleep(seconds)
            while one.here and one.reason == PAUSED_USER and not host.daemon.works:
                self.sched.sleep(0.5)
            if one.here and one.reason == PAUSED_USER:
                host.daemon.resume(one)

    def _do_unplug(self, host: SimAgent, seconds: float, guest: int, disk: int) -> None:
        one, alias = host.guest(guest), ALIASES[disk]
        if not one.here or one.state != RUNNING or alias in one.unplugged:
            return
        self.tell(host.name, f"{one.name} {alias} is unplugged for {seconds:.0f} s")
        host.daemon.unplug(one, alias)
        self.sched.sleep(seconds)
        if alias in one.unplugged:
            host.daemon.plug(one, alias)

    def _do_snapshot(self, host: SimAgent, guest: int, disk: int) -> None:
        one, alias = host.guest(guest), ALIASES[disk]
        self.tell(host.name, f"a snapshot of {one.name} {alias}")
        one.snapshots[alias] = one.snapshots.get(alias, 0) + 1

    def _do_migrate(self, host: SimAgent, to: str, seconds: float, guest: int) -> None:
        """A guest goes to another host; one that stands is resumed there."""
        (there,) = [one for one in self.hosts if one.name == to]
        one = host.guest(guest)
        working = all(each.daemon.works for each in (host, there))
        if not one.here or not working or one.copying or one.hangs_until > self.sched.now:
            return
        self.tell(host.name, f"{one.name} is migrated to {to}")
        new = host.daemon.give(one, there.daemon)
        self.sched.sleep(seconds)
        there.daemon.resume(new)

    def _do_disk(self, host: SimAgent, seconds: float, how: str) -> None:
        self.tell(
            host.name, f"the spool's disk {'is full' if how == 'full' else 'fails'} for {seconds:.0f} s"
        )
        host.disk = how
        self.sched.sleep(seconds)
        host.disk = None

    # ---- of storage

    def _storage_outage(self, system: int, hosts: list[str], seconds: float) -> None:
        self.tell("storage", f"system {system} fails for {seconds:.0f} s on {', '.join(hosts)}")
        for host in self.hosts:
            if host.name in hosts:
                self._lose(host, seconds, lambda guest, alias: guest.systems.get(alias) == system)

    def _storage_host_fault(self, host: str, seconds: float) -> None:
        (one,) = [each for each in self.hosts if each.name == host]
        self.tell(host, f"loses all its storage for {seconds:.0f} s")
        self.truth.at_fault.setdefault(host, []).append((self.sched.now, self.sched.now + seconds))
        self._lose(one, seconds, lambda guest, alias: True)

    def _lose(self, host: SimAgent, seconds: float, hit: Callable[[Guest, str], bool]) -> None:
        """Each disk that is hit fails once within some seconds, and its guest stands until it is over."""

        def guest_loses(guest: Guest) -> None:
            began = self.sched.now
            self.sched.sleep(self.sched.random.random() * 20)
            for alias in DISKS:
                if hit(guest, alias) and guest.here and alias not in guest.unplugged:
                    host.daemon.error(guest, alias, pause=True)
                    self.tell(host.name, f"  {guest.name} {alias}: 1 error")
                    break
            self.sched.sleep(began + seconds - self.sched.now)
            host.daemon.resume(guest)

        for guest in host.daemon.guests.values():
            if any(hit(guest, alias) for alias in DISKS):
                self.sched.spawn(lambda guest=guest: guest_loses(guest), Process(host.name, host.clock))  # type: ignore[misc]

    # ---- of the broker

    def _broker_stop(self, seconds: float) -> None:
        self.tell("broker", f"is away for {seconds:.0f} s")
        self.broker.stop(seconds)

    def _broker_cut(self, seconds: float) -> None:
        self.tell("broker", "every connection ends")
        self.broker.cut()

    def _broker_slow(self, seconds: float) -> None:
        self._broker_for(seconds, "slow", 0.5)

    def _broker_unroutable(self, seconds: float) -> None:
        self._broker_for(seconds, "unroutable", True)

    def _broker_confirms(self, seconds: float) -> None:
        self._broker_for(seconds, "loses_confirms", 0.3)

    def _broker_refuses_letters(self, seconds: float) -> None:
        self._broker_for(seconds, "refuses_letters", True)

    def _broker_for(self, seconds: float, what: str, value: float) -> None:
        self.tell("broker", f"{what} for {seconds:.0f} s")
        before = getattr(self.broker, what)
        setattr(self.broker, what, value)
        self.sched.sleep(seconds)
        setattr(self.broker, what, before)

    def _broker_poison(self, seconds: float) -> None:
        self.tell("broker", "somebody publishes what is not an event")
        key = next(iter(self.hosts[0].daemon.guests))
        self.truth.poison += 1
        self.broker.put({"ce-type": "x"}, "text/plain", b"\xff\x00 not an event", key)

    # ---- of the control plane

    def _plane_stop(self, seconds: float, host: str) -> None:
        self._plane_for(seconds, "up", False)

    def _plane_slow(self, seconds: float, host: str) -> None:
        self._plane_for(seconds, "slow", 3.0)

    def _plane_refuses(self, seconds: float, host: str) -> None:
        self._plane_for(seconds, "refuses", True)

    def _plane_loses_answers(self, seconds: float, host: str) -> None:
        self._plane_for(seconds, "loses_answers", True)

    def _plane_for(self, seconds: float, what: str, value: float) -> None:
        self.tell("plane", f"{what} = {value} for {seconds:.0f} s")
        before = getattr(self.plane, what)
        setattr(self.plane, what, value)
        self.sched.sleep(seconds)
        setattr(self.plane, what, before)

    def _plane_wiped(self, seconds: float, host: str) -> None:
        self.tell("plane", f"another controller wipes the taints of {host}")
        self.plane.wipe(host)

    def _plane_registered_anew(self, seconds: float, host: str) -> None:
        self.tell("plane", f"{host} is registered anew")
        self.plane.register_anew(host)

    def _plane_taken_back(self, seconds: float, host: str) -> None:
        self.tell("plane", f"an operator takes our hold of {host} away")
        self.plane.take_back(host)

    # ---- the end

    def _heal(self) -> None:
        """Everything works again: from here on nothing may stay open."""
        self.ending = True
        self.tell("world", "everything works again")
        broker, plane = self.broker, self.plane
        broker.slow, broker.unroutable, broker.loses_confirms, broker.refuses_letters = 0.0, False, 0.0, False
        plane.up, plane.slow, plane.refuses, plane.loses_answers = True, 0.0, False, False
        for host in self.hosts:
            host.disk = None
            self.sched.spawn(lambda host=host: self._heal_host(host), Process(host.name, host.clock))  # type: ignore[misc]

    def _heal_host(self, host: SimAgent) -> None:
        self.sched.sleep(30.0)
        for guest in host.daemon.guests.values():
            host.daemon.resume(guest)

    def _wait_for_the_last(self) -> None:
        """What was sent a moment ago, a heartbeat say, may take a second to be acknowledged."""
        end = self.sched.now + 1.0
        agents = [host.agent for host in self.hosts if host.agent is not None]
        while self.sched.now < end and (
            any(map(len, self.broker.groups.values())) or any(one.spool.stats().pending for one in agents)
        ):
            self.sched.run(self.sched.now + 0.05)

    def _look(self) -> None:
        """What is left, for the oracle."""
        truth = self.truth
        for host in self.hosts:
            truth.errors += host.daemon.errors
            truth.stood += host.daemon.stood
            if isinstance(host.daemon, Node):
                truth.sockets.update(host.daemon.owners)
            for uuid, times in host.daemon.away.items():
                truth.away.setdefault(uuid, []).extend(times)
            truth.blind[host.name] = host.blind
            if host.agent is None or not host.alive:
                truth.problems.append(f"{host.name}: no agent runs in the end")
                continue
            truth.pending[host.name] = host.agent.spool.stats().pending
            truth.open[host.name] = {one.id for one in host.agent.incidents.open_incidents()}
        truth.problems += [
            f"{one.name} does not run in the end" for one in (self.consumer, *self.reactors) if not one.alive
        ]
        truth.queued = {name: len(group) for name, group in self.broker.groups.items()}
        truth.letters = [(group, message.body, reason) for group, message, reason in self.broker.letters]
        truth.plane = self.plane
        truth.ended = self.sched.now
