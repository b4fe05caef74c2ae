"""One simulated cloud: hosts with agents, one broker, one consumer, and the faults that a seed thinks of."""

from __future__ import annotations

import io
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.sim import oracle
from tests.sim.broker import Broker, ModelBus
from tests.sim.hypervisor import BOOKWORM, DISKS, FORKY, TRIXIE, Daemon, Guest
from tests.sim.runtime import HostClock, Process, Scheduler, Virtual, installed
from virtbus import consumer as consumer_module
from virtbus import telemetry
from virtbus.agent.agent import Agent, AgentOptions
from virtbus.agent.incidents import IncidentLimits, Incidents
from virtbus.bus import BusOptions
from virtbus.consumer import Consumer
from virtbus.envelope import uuid7
from virtbus.errors import SpoolFull
from virtbus.model import Stamp
from virtbus.sequences import MissingEvents
from virtbus.sources import SourceOptions
from virtbus.sources.observer import Observer
from virtbus.spool import Spool, SpoolLimits, faults

FAULTY_SECONDS = 600.0  # how long things go wrong
QUIET_SECONDS = 200.0  # and how long nothing does, before the books are closed
LIMITS = IncidentLimits(quiet_seconds=60.0)
ON_TMPFS = Path("/dev/shm")


@dataclass
class SimHost:
    """A host and what is true of it."""

    name: str
    agent_id: str
    clock: HostClock
    daemon: Daemon
    folder: Path
    process: Process | None = None
    agent: Agent | None = None
    runs: int = 0
    disk_full: bool = False
    blind: list[tuple[float, float]] = field(default_factory=list)  # standstills and absences, for certain


@dataclass
class Tally:
    """What a run held."""

    seeds: int = 0
    hours: float = 0.0
    faults: int = 0
    errors: int = 0
    events: int = 0
    turns: int = 0
    violations: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.seeds += other.seeds
        self.hours += other.hours
        self.faults += other.faults
        self.errors += other.errors
        self.events += other.events
        self.turns += other.turns
        self.violations += other.violations

    def line(self) -> str:
        return (
            f"seeds={self.seeds} simulated_hours={self.hours:.1f} faults={self.faults} errors={self.errors} "
            f"events={self.events} violations={len(self.violations)}"
        )


class World:
    """Play a seed; then `story` tells it and `tally.violations` says which promises were broken."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.story: list[tuple[float, str, str]] = []
        self.tally = Tally(seeds=1)
        self.truth = oracle.Truth()
        self.hosts: list[SimHost] = []
        self.ending = False
        self.consumer_process: Process | None = None
        self.consumer_runs = 0

    def run(self) -> Tally:
        """Play it through and ask the oracle."""
        self.sched = Scheduler(self.seed)
        self.random = self.sched.random
        root = Path(tempfile.mkdtemp(prefix="virtbus-sim-", dir=ON_TMPFS if ON_TMPFS.is_dir() else None))
        telemetry.configure(stream=io.StringIO())
        opener = consumer_module.open_bus
        try:
            with installed(self.sched) as virtual:
                faults.hook = self._at_point
                consumer_module.open_bus = self._open_bus  # type: ignore[assignment]
                self._build(root, virtual)
                self._plan()
                self.sched.run(FAULTY_SECONDS)
                self._heal()
                self.sched.run(FAULTY_SECONDS + QUIET_SECONDS)
                self._look()
        finally:
            faults.hook = faults._nothing
            consumer_module.open_bus = opener
            shutil.rmtree(root, ignore_errors=True)
        self.tally.violations = [f"seed {self.seed}: {each}" for each in oracle.judge(self.truth)]
        self.tally.errors = len(self.truth.errors)
        self.tally.events = len({arrival.record.id for arrival in self.truth.log})
        self.tally.hours = self.sched.now * len(self.hosts) / 3600
        self.tally.turns = self.sched.turns
        return self.tally

    # ---- the cast

    def _build(self, root: Path, virtual: Virtual) -> None:
        self.root = root
        self.broker = Broker(self.sched, virtual)
        self.truth.log = self.broker.log
        for number in range(1, self.random.choice((1, 2)) + 1):
            name = f"host-{number}"
            quirks = self.random.choice((BOOKWORM, TRIXIE, FORKY))
            daemon = Daemon(self.sched, virtual, name, quirks)
            for index in range(1, 4):
                uuid = f"{number:08d}-0000-4000-8000-{index:012d}"
                daemon.guests[uuid] = Guest(uuid, f"guest-{number}{index}", index, unnamed=index == 3)
            skew = self.random.choice((0.0, 0.0, self.random.uniform(-86400, 86400)))
            folder = root / f"{name}-0"
            agent_id = f"6f2c3a30-9f5e-4c3e-8a40-{number:012d}"
            host = SimHost(name, agent_id, HostClock(skew), daemon, folder)
            self.hosts.append(host)
            self.tell(host.name, f"libvirt {quirks.libvirt} ({quirks.name}), wall clock {skew:+.0f} s")
            self._start_agent(host)
        self._start_consumer()

    def tell(self, who: str, what: str) -> None:
        """A line of the story."""
        self.story.append((self.sched.now, who, what))

    def page(self, guest: str | None = None) -> list[str]:
        """The story, with what came of it; of one guest's disks alone."""
        lines = sorted([*self.story, *oracle.story(self.truth)], key=lambda line: line[0])
        other = re.compile(rf"guest-(?!{guest.removeprefix('guest-')}\b)" if guest else "^$")
        return [f"{at:9.3f}  {who:<9} {what}" for at, who, what in lines if not other.search(what)]

    # ---- agents

    def _start_agent(self, host: SimHost) -> None:
        host.process = process = Process(host.name, host.clock)
        host.runs += 1
        host.agent = None
        since = self.sched.now
        self.sched.spawn(lambda: self._run_agent(host, process, since), process)

    def _run_agent(self, host: SimHost, process: Process, since: float) -> None:
        sched = self.sched
        while True:
            try:
                if host.disk_full and host.runs > 1:
                    raise SpoolFull("no space left on device")
                spool = Spool.open(
                    host.folder, limits=SpoolLimits(max_bytes=64 << 20), agent_id=host.agent_id
                )
                break
            except SpoolFull:
                sched.sleep(2.0)
        self._watch_spool(host, spool)
        options = SourceOptions(since_ns=spool.opening.last_alive_ns)
        agent = Agent(
            source=Observer(host.daemon, options=options),
            bus=ModelBus(self.broker, process, host.name),
            spool=spool,
            incidents=Incidents(LIMITS, new_id=lambda: uuid7(host.clock.wall_ns(sched.now))),
            agent_id=host.agent_id,
            options=AgentOptions(drain_seconds=2.0),
        )
        host.agent = agent
        agent.start()
        while not agent.wait(5.0):
            continue
        agent.join()
        process.dead = True

    def _watch_spool(self, host: SimHost, spool: Spool) -> None:
        """What the oracle hears of commits, and where the disk fails."""
        commit, stamp, begin = spool.commit, spool._scribe._stamp, spool._mirror.begin

        def committed(*args: object) -> list[Stamp]:
            stamps = commit(*args)  # type: ignore[arg-type]
            self.truth.promise(host.name, spool.epoch, stamps)
            return stamps

        def stamped(draft: object) -> Stamp:
            made = stamp(draft)  # type: ignore[arg-type]
            self.truth.made[made.id] = (self.sched.now, host.clock.skew)
            return made

        def begun(db: sqlite3.Connection) -> None:
            if host.disk_full:
                error = sqlite3.OperationalError("database or disk is full")
                error.sqlite_errorcode, error.sqlite_errorname = sqlite3.SQLITE_FULL, "SQLITE_FULL"
                raise error
            begin(db)

        self.truth.epochs.setdefault(host.name, []).append(spool.epoch)
        spool.commit = committed  # type: ignore[method-assign, assignment]
        spool._scribe._stamp = stamped  # type: ignore[method-assign]
        spool._mirror.begin = begun  # type: ignore[method-assign]

    def _at_point(self, point: str) -> None:
        """The spool reached a point of `virtbus.spool.faults`."""
        task = self.sched.current
        if task is None or self.sched.over or self.ending:
            return
        if self.random.random() < 0.004:
            host = next((host for host in self.hosts if host.process is task.process), None)
            if host is not None:
                self.tell(host.name, f"SIGKILL of the agent at the spool's point {point}")
                self._killed(host)
                self.sched.block(None)

    def _killed(self, host: SimHost) -> None:
        assert host.process is not None
        self.tally.faults += 1
        host.process.killed = True
        self.sched.kill(host.process)
        after = self.random.choice((0.5, 3.0, 20.0))
        host.blind = [(begin, min(end, self.sched.now)) for begin, end in host.blind]
        host.blind.append((self.sched.now, self.sched.now + after))
        new = self.root / f"{host.name}-{host.runs}"
        _copy(host.folder, new)
        host.folder = new

        def again() -> None:
            self.sched.sleep(after)
            self.tell(host.name, "the agent starts again")
            self._start_agent(host)

        self.sched.spawn(again, self.sched.world)

    # ---- the consumer

    def _open_bus(self, url: str, options: BusOptions) -> ModelBus:
        assert self.consumer_process is not None
        return ModelBus(self.broker, self.consumer_process, "consumer")

    def _start_consumer(self) -> None:
        self.consumer_process = process = Process("consumer", HostClock())
        folder = self.root / f"consumer-{self.consumer_runs}"
        self.consumer_runs += 1
        if not folder.exists():
            folder.mkdir(mode=0o700)
        self.sched.spawn(lambda: self._consume(folder, process), process)

    def _consume(self, folder: Path, process: Process) -> None:
        consumer = Consumer(
            "embedded:",
            group="g",
            dedupe=folder / "seen.db",
            prefetch=16,
            check_gaps=True,
            group_commit=self.random.random() < 0.3,
            on_missing=self._missing,
        )
        while True:
            delivery = consumer.receive(1.0)
            if delivery is None:
                continue
            if not self.ending and self.random.random() < 0.03:
                delivery.retry(self.random.random() * 3)
                continue
            self.truth.effect(delivery.id)
            self._perhaps_kill_consumer("between an effect and its acknowledgement")
            delivery.ack()
            self.truth.settled.add(delivery.id)
            self._perhaps_kill_consumer("after an acknowledgement")

    def _missing(self, told: MissingEvents) -> None:
        self.tell("consumer", f"is told that {told.first} to {told.last} of {told.epoch} are missing")
        last = told.first if told.last is None else told.last
        come = {
            arrival.record.seq
            for arrival in self.broker.log
            if arrival.record.epoch == told.epoch and arrival.at < self.sched.now - oracle.READ_SECONDS
        }
        if come & {*range(told.first, last + 1)}:  # what comes later than `reorder_seconds` may be told
            self.truth.missing_told.append(f"{told.epoch} {told.first} to {told.last}")

    def _perhaps_kill_consumer(self, when: str) -> None:
        if not self.ending and self.random.random() < 0.004:
            self._kill_consumer(when)
            self.sched.block(None)

    def _kill_consumer(self, when: str = "") -> None:
        assert self.consumer_process is not None
        if self.consumer_process.dead:
            return
        self.tally.faults += 1
        self.tell("consumer", f"SIGKILL {when}")
        self.truth.consumer_killed()
        self.sched.kill(self.consumer_process)
        _copy(self.root / f"consumer-{self.consumer_runs - 1}", self.root / f"consumer-{self.consumer_runs}")

        def again() -> None:
            self.sched.sleep(self.random.random() * 20)
            self._start_consumer()

        self.sched.spawn(again, self.sched.world)

    # ---- what goes wrong

    def _plan(self) -> None:
        for host in self.hosts:
            self._repeat(host.name, 8.0, lambda host=host: self._trouble(host))
            for mean, fault in (
                (150.0, self._kill_agent),
                (150.0, self._freeze),
                (150.0, self._step_clock),
                (120.0, self._libvirt),
                (120.0, self._looks),
                (150.0, self._change_guest),
                (300.0, self._full_disk),
                (400.0, self._restart_agent),
            ):
                if self.random.random() < 0.5:  # each seed has faults of its own
                    self._repeat(host.name, mean, lambda host=host, fault=fault: fault(host))
        if self.random.random() < 0.6:
            self._repeat("broker", 90.0, self._broker)
        if self.random.random() < 0.5:
            self._repeat("consumer", 150.0, self._kill_consumer)

    def _repeat(self, who: str, mean: float, what: Callable[[], object]) -> None:
        def loop() -> None:
            while True:
                self.sched.sleep(self.random.expovariate(1 / mean))
                if self.sched.now > FAULTY_SECONDS - 60:
                    return
                what()

        self.sched.spawn(loop, self._on_host(who))

    def _on_host(self, who: str) -> Process:
        """A process that is never killed, with the clocks of a host: QEMU, an operator."""
        host = next((host for host in self.hosts if host.name == who), None)
        return Process(who, HostClock() if host is None else host.clock)

    def _trouble(self, host: SimHost) -> None:
        """A disk fails for a while; whoever watches resumes the guest."""
        daemon = host.daemon
        guest = self.random.choice(list(daemon.guests.values()))
        alias = self.random.choice(list(DISKS))
        pause = self.random.random() < 0.7
        if not guest.here:
            return
        guest.copying = self.random.random() < 0.1
        kind = "pauses" if pause else "reports"
        self.tell(host.name, f"{guest.name} {alias} fails ({kind}{', block job' if guest.copying else ''})")
        for _ in range(self.random.choice((1, 1, 2, 5))):
            if not guest.here or guest.state != 1:
                break
            before = len(daemon.errors)
            daemon.error(guest, alias, pause=pause, events=self.random.choice((1, 1, 1, 3)))
            self.tell(host.name, f"  {guest.name} {alias}: {len(daemon.errors) - before} errors")
            self.sched.sleep(self.random.choice((0.05, 1.5, 4.0, 15.0)))
            if pause:
                if daemon.quirks.late:
                    self.sched.sleep(daemon.quirks.late)  # an event comes before its guest is resumed
                daemon.resume(guest)
                self.tell(host.name, f"  {guest.name} is resumed")
                self.sched.sleep(self.random.choice((0.1, 2.0, 10.0)))
        guest.copying = False

    def _kill_agent(self, host: SimHost) -> None:
        if host.process is not None and not host.process.dead:
            self.tell(host.name, "SIGKILL of the agent")
            self._killed(host)

    def _restart_agent(self, host: SimHost) -> None:
        if host.agent is None or host.process is None or host.process.dead:
            return
        self.tally.faults += 1
        self.tell(host.name, "SIGTERM of the agent")
        host.agent.stop()
        process = host.process
        while not process.dead:
            self.sched.sleep(0.5)
        if not process.killed:
            self.tell(host.name, "the agent starts again")
            self._start_agent(host)

    def _freeze(self, host: SimHost) -> None:
        if host.process is None or host.process.dead:
            return
        self.tally.faults += 1
        seconds = self.random.choice((2.0, 9.0, 40.0))
        asleep = self.random.random() < 0.4
        self.tell(host.name, f"{'the host sleeps' if asleep else 'SIGSTOP'} for {seconds:.0f} s")
        process = host.process
        process.stopped_until = self.sched.now + seconds
        if seconds > 20:
            host.blind.append((self.sched.now, self.sched.now + seconds))
        if asleep:
            host.clock.suspended += seconds
        if seconds > 20:  # libvirtd's keepalive gives up a client that says nothing
            self.sched.sleep(seconds - 1)
            for link in [link for link in host.daemon.links if link.process is process]:
                link.cut("End of file while reading data", 0.0)

    def _step_clock(self, host: SimHost) -> None:
        self.tally.faults += 1
        step = self.random.choice((-7200.0, -30.0, 30.0, 7200.0))
        self.tell(host.name, f"the wall clock is set by {step:+.0f} s")
        host.clock.skew += step

    def _libvirt(self, host: SimHost) -> None:
        self.tally.faults += 1
        seconds = self.random.choice((1.0, 5.0, 40.0))
        if self.random.random() < 0.5:
            self.tell(host.name, f"libvirtd restarts, away for {seconds:.0f} s")
            host.daemon.restart(seconds)
        else:
            self.tell(host.name, f"libvirtd hangs for {seconds:.0f} s")
            host.daemon.hang(seconds)

    def _looks(self, host: SimHost) -> None:
        self.tally.faults += 1
        seconds = self.random.choice((5.0, 30.0))
        if self.random.random() < 0.5:
            self.tell(host.name, f"looks fail for {seconds:.0f} s")
            host.daemon.failing_until = self.sched.now + seconds
        else:
            guest = self.random.choice(list(host.daemon.guests.values()))
            self.tell(host.name, f"looks at {guest.name} hang for {seconds:.0f} s")
            guest.hangs_until = self.sched.now + seconds

    def _change_guest(self, host: SimHost) -> None:
        guest = self.random.choice(list(host.daemon.guests.values()))
        if guest.here:
            self.tally.faults += 1
            self.tell(host.name, f"{guest.name} is shut off, and comes back")
            host.daemon.leave(guest)
            self.sched.sleep(self.random.choice((1.0, 20.0)))
            host.daemon.enter(guest)

    def _full_disk(self, host: SimHost) -> None:
        self.tally.faults += 1
        seconds = self.random.choice((3.0, 30.0))
        self.tell(host.name, f"the spool's disk is full for {seconds:.0f} s")
        host.disk_full = True
        self.sched.sleep(seconds)
        host.disk_full = False

    def _broker(self) -> None:
        self.tally.faults += 1
        seconds = self.random.choice((1.0, 10.0, 40.0))
        what = self.random.choice(("stop", "cut", "slow", "unroutable", "confirms"))
        self.tell("broker", f"{what} ({seconds:.0f} s)")
        if what == "stop":
            self.broker.stop(seconds)
            return
        if what == "cut":
            self.broker.cut()
            return
        self.broker.slow = 0.5 if what == "slow" else 0.0
        self.broker.unroutable = what == "unroutable"
        self.broker.loses_confirms = 0.3 if what == "confirms" else 0.0
        self.sched.sleep(seconds)
        self.broker.slow, self.broker.unroutable, self.broker.loses_confirms = 0.0, False, 0.0

    # ---- the end

    def _heal(self) -> None:
        """Everything works again: from here on nothing may stay open."""
        self.ending = True
        for host in self.hosts:
            self.sched.spawn(lambda host=host: self._heal_host(host), self._on_host(host.name))
        self.tell("world", "everything works again")

    def _heal_host(self, host: SimHost) -> None:
        self.sched.sleep(30.0)
        for guest in host.daemon.guests.values():
            host.daemon.resume(guest)

    def _look(self) -> None:
        """What is left, for the oracle."""
        truth = self.truth
        for host in self.hosts:
            truth.errors += host.daemon.errors
            truth.blind[host.name] = host.blind
            if host.agent is None or host.process is None or host.process.dead:
                truth.problems.append(f"{host.name}: no agent runs in the end")
                continue
            truth.pending[host.name] = host.agent.spool.stats().pending
            truth.open[host.name] = {one.id for one in host.agent.incidents.open_incidents()}
        truth.queued = len(self.broker.queue)


def _copy(old: Path, new: Path) -> None:
    """What a SIGKILL leaves: the files as they are, without SQLite's shared memory."""
    new.mkdir(mode=0o700, exist_ok=True)
    for file in old.iterdir():
        if not file.name.endswith("-shm"):
            shutil.copy(file, new / file.name)
