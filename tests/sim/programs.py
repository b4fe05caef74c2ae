"""The programs of a simulated cloud, of the real parts: agents, a consumer, reactors; and their deaths."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING

from tests.sim import disk
from tests.sim.broker import ModelBus
from tests.sim.hypervisor import Daemon, Guest
from tests.sim.node import Node
from tests.sim.oracle import READ_SECONDS
from tests.sim.plane import PlaneIntegration
from tests.sim.runtime import HostClock, Process
from virtbus.agent.agent import Agent, AgentOptions
from virtbus.agent.incidents import IncidentLimits, Incidents
from virtbus.config import Discover
from virtbus.consumer import Consumer
from virtbus.envelope import uuid7
from virtbus.errors import SpoolFull
from virtbus.fleet import Fleet
from virtbus.integrations.policy import HoldPolicy, HoldRules
from virtbus.integrations.reactor import Reactor
from virtbus.integrations.store import ActionStore
from virtbus.model import Clock, Stamp
from virtbus.seen import Moment
from virtbus.sequences import MissingEvents
from virtbus.sources import Source, SourceOptions
from virtbus.sources.many import ManySource
from virtbus.sources.observer import Observer
from virtbus.spool import Spool, SpoolLimits

if TYPE_CHECKING:
    from tests.sim.world import World

LIMITS = IncidentLimits(quiet_seconds=60.0)
RULES = HoldRules(raise_seconds=10.0, clear_seconds=20.0, max_share=0.34)
HEARTBEAT_SECONDS = 30.0
IDLE_SECONDS = 5.0  # how long the consumer waits at a time
STEP_SECONDS = 2.0  # how long a reactor does, which judges its fleet as often


class Program:
    """A program with a folder of its own, that may be armed to be killed where it gets to."""

    def __init__(self, world: World, name: str, clock: HostClock) -> None:
        self.world, self.name, self.clock = world, name, clock
        self.process: Process | None = None
        self.runs = 0
        self.folder = world.root / f"{name}-0"
        self.folder.mkdir(mode=0o700)
        self._armed: dict[str, tuple[int, Callable[[], None]]] = {}

    @property
    def alive(self) -> bool:
        return self.process is not None and not self.process.dead

    def start(self) -> None:
        """A new process in the present folder."""
        process = self.process = Process(self.name, self.clock)
        self.runs += 1
        self.world.sched.spawn(lambda: self.main(process), process)

    def main(self, process: Process) -> None:
        raise NotImplementedError

    def arm(self, place: str, nth: int, what: Callable[[], None]) -> None:
        """Do it when the program comes to `place` for the nth time."""
        self._armed[place] = (nth, what)

    def reach(self, place: str) -> None:
        """The program is at `place`; what was armed for it may end it here."""
        current = self.world.sched.current
        if (
            place not in self._armed
            or self.world.ending
            or current is None
            or current.process is not self.process
        ):
            return
        nth, what = self._armed.pop(place)
        if nth > 1:
            self._armed[place] = (nth - 1, what)
            return
        what()
        assert self.process is not None
        if self.process.dead:
            self.world.sched.block(None)

    def kill(self, after: float, why: str, *, power: str | None = None, keeps: bool = True) -> None:
        """SIGKILL, or a power cut that `power` says what it keeps; it starts again `after` seconds later.

        Without `keeps` its folder is lost as well: it starts on another machine.
        """
        if not self.alive:
            return
        assert self.process is not None
        world = self.world
        world.tally.faults += 1
        world.tell(self.name, f"{'SIGKILL' if power is None else f'power cut (keeps {power})'} {why}")
        self.process.killed = True
        world.sched.kill(self.process)
        self.killed(after, keeps)
        new = world.root / f"{self.name}-{self.runs}"
        new.mkdir(mode=0o700)
        for file in self.folder.iterdir() if keeps else ():
            if power is not None:
                (new / file.name).write_bytes(world.journal.after_power_cut(file, power, world.sched.random))
            elif not file.name.endswith("-shm"):  # SQLite's shared memory is gone with the process
                shutil.copy(file, new / file.name)
        if power is not None:
            for shared in new.glob("*-shm"):
                shared.unlink()
        for file in new.iterdir():
            file.chmod(0o600)
        self.folder = new

        def again() -> None:
            world.sched.sleep(after)
            world.tell(self.name, "starts again" if keeps else "starts on another machine")
            self.start()

        world.sched.spawn(again, world.sched.world)

    def killed(self, after: float, keeps: bool) -> None:
        """It is gone for `after` seconds."""


class SimAgent(Program):
    """An agent and its host."""

    def __init__(self, world: World, name: str, number: int, clock: HostClock, daemon: Daemon | Node) -> None:
        super().__init__(world, name, clock)
        self.daemon = daemon
        self.agent_id = f"6f2c3a30-9f5e-4c3e-8a40-{number:012d}"
        self.agent: Agent | None = None
        self.observer: Observer | None = None  # of a host with one daemon
        self.disk: str | None = None  # "full" or "fails"
        self.blind: list[tuple[float, float]] = []

    def guest(self, number: int) -> Guest:
        """One that is or was here."""
        known = list(self.daemon.guests.values())
        return known[number % len(known)]

    def sees(self) -> bool:
        """Whether it is connected to libvirt, and has been for a while."""
        return self.observer is not None and self.observer.connected

    def killed(self, after: float, keeps: bool) -> None:
        now = self.world.sched.now
        self.world.truth.ends[self.name].append(now)
        self.blind = [(begin, min(end, now)) for begin, end in self.blind]
        self.blind.append((now, now + after))

    def main(self, process: Process) -> None:
        """What `virtbus run` does, with a model of libvirt and of the broker."""
        self.agent = None
        sched = self.world.sched
        while True:
            try:
                spool = Spool.open(
                    self.folder, limits=SpoolLimits(max_bytes=64 << 20), agent_id=self.agent_id
                )
                break
            except SpoolFull:
                sched.sleep(2.0)
        self._watch(spool)
        agent = Agent(
            source=self._source(SourceOptions(since_ns=spool.opening.stamps_since_ns)),
            bus=ModelBus(self.world.broker, process, self.name),
            spool=spool,
            incidents=Incidents(LIMITS, new_id=lambda: uuid7(self.clock.wall_ns(sched.now))),
            agent_id=self.agent_id,
            options=AgentOptions(drain_seconds=2.0, heartbeat_seconds=HEARTBEAT_SECONDS),
        )
        self.agent = agent
        agent.start()
        while not agent.wait(30.0):
            continue
        agent.join()
        process.dead = True

    def _source(self, options: SourceOptions) -> Source:
        daemon = self.daemon
        if isinstance(daemon, Daemon):
            self.observer = Observer(daemon, options=options)
            return self.observer
        settings = Discover(sockets=(daemon.pattern,), host=self.name)
        return ManySource(settings, options=options, connector=daemon.connector)

    def _watch(self, spool: Spool) -> None:
        """What the oracle hears of commits."""
        truth, sched = self.world.truth, self.world.sched
        commit, alive, stamp = spool.commit, spool.alive, spool._scribe._stamp
        clocks = truth.clocks.setdefault(self.name, set())
        clocks.add(self.clock.skew)

        def committed(*args: object) -> list[Stamp]:
            stamps = commit(*args)  # type: ignore[arg-type]
            truth.promise(self.name, spool.epoch, stamps)
            clocks.add(self.clock.skew)
            return stamps

        def signed(seen: Moment) -> bool:
            done = alive(seen)
            if done:
                clocks.add(self.clock.skew)
            return done

        def stamped(draft: object) -> Stamp:
            made = stamp(draft)  # type: ignore[arg-type]
            truth.made[made.id] = (sched.now, self.clock.skew)
            return made

        truth.epochs.setdefault(self.name, []).append(spool.epoch)
        spool.commit = committed  # type: ignore[method-assign, assignment]
        spool.alive = signed  # type: ignore[method-assign]
        spool._scribe._stamp = stamped  # type: ignore[method-assign]

    def disk_code(self, path: str) -> int:
        """What a write to a file of ours meets."""
        if not path.startswith(f"{self.folder}/"):
            return 0
        return disk.FULL if self.disk == "full" else disk.FAILS


class SimConsumer(Program):
    """A program of a user: it acts on each event, on its own clock."""

    def main(self, process: Process) -> None:
        world = self.world
        bus = ModelBus(world.broker, process, self.name)
        bus.reach = self.reach
        world.next_bus = bus
        consumer = Consumer(
            "model:",
            group="g",
            dedupe=self.folder / "seen.db",
            prefetch=16,
            check_gaps=True,
            group_commit=world.plan.group_commit,
            on_missing=self._missing,
        )
        write = consumer._seen.write

        def written(*args: object) -> None:
            write(*args)  # type: ignore[arg-type]
            self.reach("marks")

        consumer._seen.write = written  # type: ignore[method-assign]
        acting = world.truth.acting
        while True:
            delivery = consumer.receive(IDLE_SECONDS)
            if delivery is None:
                continue
            if not world.ending and world.sched.random.random() < 0.03:
                delivery.retry(world.sched.random.random() * 3)
                continue
            acting.begin(delivery.id)
            self.reach("effect")
            delivery.ack()
            acting.acknowledged(delivery.id, at=world.sched.now, grouped=world.plan.group_commit)
            self.reach("acked")

    def killed(self, after: float, keeps: bool) -> None:
        self.world.truth.acting.killed(self.world.sched.now)

    def _missing(self, told: MissingEvents) -> None:
        world = self.world
        world.tell(self.name, f"is told that {told.first} to {told.last} of {told.epoch} are missing")
        last = told.first if told.last is None else told.last
        come = {
            arrival.record.seq
            for arrival in world.broker.log
            if arrival.record.epoch == told.epoch and arrival.at < world.sched.now - READ_SECONDS
        }
        if come & {*range(told.first, last + 1)}:  # what comes later than `reorder_seconds` may be told
            world.truth.missing_told.append(f"{told.epoch} {told.first} to {told.last}")


class SlowReactor(Reactor):
    """It waits longer at a time: whatever comes wakes it, and a simulated one is not asked to stop."""

    def step(self, timeout: float) -> None:
        super().step(STEP_SECONDS if timeout else 0.0)


class SimReactor(Program):
    """`virtbus react` with a model of a control plane."""

    def main(self, process: Process) -> None:
        world = self.world
        bus = ModelBus(world.broker, process, self.name)
        bus.reach = self.reach
        world.next_bus = bus
        consumer = Consumer("model:", group="react-plane", prefetch=64, exclusive=True)
        store = ActionStore(self.folder / "plane.db")

        def acting(key: str) -> None:
            world.truth.handing = (self.name, key)

        reactor = SlowReactor(
            PlaneIntegration(world.plane, self.reach, acting),
            consumer=consumer,
            store=store,
            fleet=Fleet(),
            policy=HoldPolicy(RULES),
            by=self.name,
            clock=Clock(),
            tell=lambda event: None,
        )
        finish = store.finish

        def finished(*args: object, **named: object) -> None:
            finish(*args, **named)  # type: ignore[arg-type]
            world.truth.handing = None

        store.finish = finished  # type: ignore[method-assign, assignment]
        reactor.run()

    def killed(self, after: float, keeps: bool) -> None:
        truth = self.world.truth
        if truth.handing is not None and truth.handing[0] == self.name:
            truth.hand_again[truth.handing[1]] += 1
            truth.handing = None
        if not keeps:
            truth.stores_lost = True
            with closing(sqlite3.connect(self.folder / "plane.db")) as db:
                waiting = db.execute("SELECT key FROM actions WHERE state = 'waiting'").fetchall()
            truth.lost_waiting |= {key for (key,) in waiting}
