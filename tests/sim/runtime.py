"""Threads, clocks and randomness of the simulation: real code, one thread at a time, ordered by a seed.

virtbus's modules see other `threading`, `queue`, `time` and `random` modules while `installed` is active. Its
threads are greenlets; whatever blocks hands over to the scheduler, which takes the earliest that is due, and
among equals whom its seed says. Time passes only there. Each process reads the clocks of its host.
"""

from __future__ import annotations

import functools
import heapq
import queue as real_queue
import random as real_random
import sys
import threading as real_threading
import time as real_time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import greenlet

from virtbus import plugins, seen
from virtbus.agent import publisher
from virtbus.envelope import encoding
from virtbus.model import Clock, Now
from virtbus.spool import files

START_NS = 1_767_225_600_000_000_000  # 2026-01-01, true time 0
STEP_SECONDS = 20e-6  # what a turn of any thread takes
MAX_TURNS = 3_000_000


class Stuck(AssertionError):
    """A thread turns for ever without time passing, or the simulation takes too many turns."""


class HostClock:
    """The clocks of one host: the wall clock may be wrong and be set, monotonic time stops in a suspend."""

    def __init__(self, skew: float = 0.0, booted: float = 10_000.0) -> None:
        self.skew, self.booted, self.suspended = skew, booted, 0.0
        self.boots = 1

    def wall_ns(self, now: float) -> int:
        return START_NS + int((now + self.skew) * 1e9)

    def boot(self, now: float) -> float:
        return now + self.booted

    def monotonic(self, now: float) -> float:
        return now + self.booted - self.suspended


class Process:
    """One process of a host: threads that live, stand still and die together."""

    def __init__(self, name: str, clock: HostClock) -> None:
        self.name, self.clock = name, clock
        self.dead = self.killed = False
        self.stopped_until = 0.0
        self.lag = 0.0  # seconds that each of its turns may come late
        self.last_id = 0  # of virtbus.envelope.uuid7: a module's variable, so one a process
        self.at_death: list[Callable[[], None]] = []


class Task:
    """One thread."""

    def __init__(self, run: Callable[[], None], process: Process, parent: greenlet.greenlet) -> None:
        self.process = process
        self.turn = 0  # which of its appointments counts
        self.woken = False
        self.late = False
        self.done = False
        self.waiters: list[Task] = []
        self.greenlet = greenlet.greenlet(run, parent)


class Scheduler:
    """Who runs next, and what time it is."""

    def __init__(self, seed: int) -> None:
        self.random = real_random.Random(seed)
        self.now = 0.0
        self.turns = 0
        self.over = False
        self.current: Task | None = None
        self._hub = greenlet.getcurrent()
        self._due: list[tuple[float, float, int, Task, int, bool]] = []
        self._number = 0
        self._all: list[Task] = []
        self.world = Process("world", HostClock())
        self.until_switch = 100  # acquisitions of a lock

    # ---- for whoever makes threads

    def spawn(self, run: Callable[[], None], process: Process) -> Task:
        def body() -> None:
            try:
                run()
            finally:
                task.done = True
                for waiter in task.waiters:
                    self.wake(waiter)

        task = Task(body, process, self._hub)
        self._all.append(task)
        self._appoint(self.now, task, woken=False)
        return task

    def kill(self, process: Process) -> None:
        """SIGKILL: none of its threads runs again, not even what they meant to do in the end."""
        if process.dead:
            return
        process.dead = True
        for then in process.at_death:
            then()

    def die(self) -> None:
        """The present thread's process is killed here."""
        assert self.current is not None
        self.kill(self.current.process)
        self.block(None)

    def run(self, until: float) -> None:
        """Let time pass until then."""
        while self._due and self._due[0][0] <= until:
            at, _, _, task, turn, woken = heapq.heappop(self._due)
            if turn != task.turn or task.process.dead or task.done:
                continue
            if task.process.stopped_until > max(at, self.now):
                self._appoint(task.process.stopped_until, task, woken=woken)
                continue
            if task.process.lag and not task.late:
                task.late = True
                late = self.random.random() ** 3 * task.process.lag
                self._appoint(max(self.now, at) + late, task, woken=woken)
                continue
            task.late = False
            self.now = max(self.now, at)
            self.turns += 1
            if self.turns > MAX_TURNS:
                raise Stuck(f"{self.turns} turns by {self.now:.3f} s, the last by {task.process.name}")
            task.woken = woken
            self._resume(task)
        self.now = max(self.now, until)

    def end(self) -> None:
        """Unwind every thread that is left."""
        self.over = True
        for task in self._all:
            if not task.done and not task.greenlet.dead and task.greenlet.gr_frame is not None:
                self.current = task
                try:
                    task.greenlet.throw(greenlet.GreenletExit)
                except Exception:
                    continue
        self.current = None

    # ---- for threads

    def block(self, timeout: float | None) -> bool:
        """Wait until `wake`, or so many seconds; whether it was `wake`."""
        task = self.current
        if task is None or self.over:
            raise greenlet.GreenletExit
        task.turn += 1
        if timeout is not None:
            self._appoint(self.now + max(timeout, 0.0) + STEP_SECONDS, task, woken=False)
        self._hub.switch()
        return task.woken

    def wake(self, task: Task) -> None:
        self._appoint(self.now + STEP_SECONDS, task, woken=True)

    def sleep(self, seconds: float) -> None:
        self.block(seconds)

    def switch(self) -> None:
        """Another thread may come first here, at one lock in 500 or so."""
        self.until_switch = int(self.random.expovariate(1 / 500))
        self.block(self.random.random() * 0.002)

    def perhaps(self, chance: float) -> None:
        """Another thread may come first here."""
        if self.current is not None and not self.over and self.random.random() < chance:
            self.block(self.random.random() * 0.002)

    # ---- within

    def _appoint(self, at: float, task: Task, *, woken: bool) -> None:
        self._number += 1
        heapq.heappush(self._due, (at, self.random.random(), self._number, task, task.turn, woken))

    def _resume(self, task: Task) -> None:
        before, self.current = self.current, task
        encoding._last_tick = task.process.last_id
        try:
            task.greenlet.switch()
        finally:
            task.process.last_id = encoding._last_tick
            self.current = before


# --------------------------------------------------------------------------- the modules that virtbus sees


class Virtual:
    """The primitives of one scheduler."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = sched = scheduler

        class Lock:
            """threading.Lock and RLock."""

            def __init__(self) -> None:
                self.owner: object = None
                self.depth = 0
                self.waiters: deque[Task] = deque()

            def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
                me = sched.current
                if me is None or sched.over:
                    return True  # the oracle looks while nobody runs
                sched.until_switch -= 1
                if sched.until_switch < 0:
                    sched.switch()
                if self.owner is None:
                    self.owner, self.depth = me, 1
                    return True
                end = None if timeout < 0 else sched.now + timeout
                while self.owner is not None and self.owner is not me:
                    left = None if end is None else end - sched.now
                    if not blocking or (left is not None and left <= 0):
                        return False
                    self.waiters.append(me)
                    sched.block(left)
                    if me in self.waiters:
                        self.waiters.remove(me)
                self.owner = me
                self.depth += 1
                return True

            def release(self) -> None:
                if sched.current is None or sched.over:
                    return
                self.depth -= 1
                if self.depth == 0:
                    self.owner = None
                    if self.waiters:
                        sched.wake(self.waiters.popleft())

            def locked(self) -> bool:
                return self.owner is not None

            def __enter__(self) -> bool:
                return self.acquire()

            def __exit__(self, *_: object) -> None:
                self.release()

        class Condition:
            """threading.Condition."""

            def __init__(self, lock: Lock | None = None) -> None:
                self.lock = lock or Lock()
                self.acquire, self.release = self.lock.acquire, self.lock.release
                self.waiters: list[Task] = []

            def __enter__(self) -> bool:
                return self.lock.acquire()

            def __exit__(self, *_: object) -> None:
                self.lock.release()

            def wait(self, timeout: float | None = None) -> bool:
                me = sched.current
                assert me is not None
                self.waiters.append(me)
                depth, self.lock.depth = self.lock.depth, 1
                self.lock.release()
                woken = sched.block(timeout)
                if me in self.waiters:
                    self.waiters.remove(me)
                self.lock.acquire()
                self.lock.depth = depth
                return woken

            def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
                end = None if timeout is None else sched.now + timeout
                while not predicate():
                    left = None if end is None else end - sched.now
                    if left is not None and left <= 0:
                        break
                    self.wait(left)
                return predicate()

            def notify(self, count: int = 1) -> None:
                waking, self.waiters = self.waiters[:count], self.waiters[count:]
                for task in waking:
                    sched.wake(task)

            def notify_all(self) -> None:
                self.notify(len(self.waiters))

        class Event:
            """threading.Event."""

            def __init__(self) -> None:
                self.flag = False
                self.waiters: list[Task] = []

            def is_set(self) -> bool:
                return self.flag

            def set(self) -> None:
                self.flag = True
                waking, self.waiters = self.waiters, []
                for task in waking:
                    sched.wake(task)

            def clear(self) -> None:
                self.flag = False

            def wait(self, timeout: float | None = None) -> bool:
                if not self.flag:
                    me = sched.current
                    if me is not None and not sched.over:
                        self.waiters.append(me)
                    sched.block(timeout)
                    if me in self.waiters:
                        self.waiters.remove(me)
                return self.flag

        class Thread:
            """threading.Thread, in the process of whoever makes it."""

            def __init__(
                self,
                target: Callable[..., None],
                args: tuple[Any, ...] = (),
                name: str = "",
                daemon: bool = True,
            ) -> None:
                assert sched.current is not None
                self.name, self.daemon = name, daemon
                self._run = lambda: target(*args)
                self._process = sched.current.process
                self._task: Task | None = None

            def start(self) -> None:
                self._task = sched.spawn(self._run, self._process)

            @property
            def ident(self) -> int | None:
                return None if self._task is None else id(self._task)

            def is_alive(self) -> bool:
                return self._task is not None and not self._task.done

            def join(self, timeout: float | None = None) -> None:
                me = sched.current
                if self._task is not None and not self._task.done and me is not None:
                    self._task.waiters.append(me)
                    sched.block(timeout)

        class SimpleQueue:
            """queue.SimpleQueue."""

            def __init__(self) -> None:
                self.items: deque[Any] = deque()
                self.waiters: deque[Task] = deque()

            def __class_getitem__(cls, _: object) -> type:
                return cls

            def put(self, item: Any) -> None:
                self.items.append(item)
                if self.waiters:
                    sched.wake(self.waiters.popleft())

            def get(self, block: bool = True, timeout: float | None = None) -> Any:
                end = None if timeout is None else sched.now + timeout
                me = sched.current
                while not self.items:
                    left = None if end is None else end - sched.now
                    if not block or me is None or (left is not None and left <= 0):
                        raise real_queue.Empty
                    self.waiters.append(me)
                    sched.block(left)
                    if me in self.waiters:
                        self.waiters.remove(me)
                return self.items.popleft()

            def get_nowait(self) -> Any:
                return self.get(block=False)

            def empty(self) -> bool:
                return not self.items

        self.Lock, self.Condition, self.Event = Lock, Condition, Event
        self.Thread, self.SimpleQueue = Thread, SimpleQueue

    def _clock(self) -> HostClock:
        task = self.scheduler.current
        return (self.scheduler.world if task is None else task.process).clock

    def boot_id(self) -> str:
        """virtbus.seen.boot_id."""
        return f"boot-{self._clock().boots}"

    def modules(self) -> dict[ModuleType, ModuleType]:
        """Real module → what virtbus sees instead."""
        sched = self.scheduler

        def gettime(which: int) -> float:
            assert which == real_time.CLOCK_BOOTTIME
            return self._clock().boot(sched.now)

        return {
            real_time: _module(
                real_time,
                monotonic=lambda: self._clock().monotonic(sched.now),
                time_ns=lambda: self._clock().wall_ns(sched.now),
                time=lambda: self._clock().wall_ns(sched.now) / 1e9,
                clock_gettime=gettime,
                sleep=sched.sleep,
            ),
            real_threading: _module(
                real_threading,
                Lock=self.Lock,
                RLock=self.Lock,
                Event=self.Event,
                Condition=self.Condition,
                Thread=self.Thread,
            ),
            real_queue: _module(real_queue, SimpleQueue=self.SimpleQueue),
            real_random: _module(real_random, uniform=sched.random.uniform, random=sched.random.random),
        }


def _module(real: ModuleType, **changed: object) -> ModuleType:
    fake = ModuleType(real.__name__)
    fake.__dict__.update({**real.__dict__, **changed})
    return fake


_entry_points = functools.cache(plugins.entry_points)  # what is installed stays; each start reads it all


@contextmanager
def installed(scheduler: Scheduler, instead_of: Sequence[tuple[Any, str, object]] = ()) -> Iterator[Virtual]:
    """While inside, virtbus runs on this scheduler; `instead_of` are further (module, name, value)."""
    virtual = Virtual(scheduler)
    instead = virtual.modules()
    real_boot_id = seen.boot_id
    undo: list[tuple[Any, str, object]] = []
    for name, module in list(sys.modules.items()):
        if not name.startswith("virtbus.") or module is None:
            continue
        for key, value in list(vars(module).items()):
            new: object = None
            if isinstance(value, ModuleType) and value in instead:
                new = instead[value]
            elif value is real_threading.Event:
                new = virtual.Event
            elif value is real_boot_id:
                new = virtual.boot_id
            if new is not None:
                undo.append((module, key, value))
                setattr(module, key, new)
    undo.append((encoding, "os", encoding.os))
    encoding.os = _module(encoding.os, urandom=lambda size: scheduler.random.randbytes(size))

    def now(_: Clock) -> Now:  # HostClock's words, without its calls: a tenth of a seed's time was spent here
        at, task = scheduler.now, scheduler.current
        clock = (scheduler.world if task is None else task.process).clock
        wall_ns = START_NS + int((at + clock.skew) * 1e9)
        return Now(wall_ns, at + clock.booted - clock.suspended, clock.suspended)

    for owner, key, value in (
        (Clock, "__call__", now),
        (publisher, "_IDLE_SECONDS", 5.0),  # a model's connection needs no looking after
        (files.Lock, "check", lambda *_: None),  # nobody removes a folder here, nor turns it read-only
        (files, "check_writable", lambda _: None),
        (plugins, "entry_points", _entry_points),
        *instead_of,
    ):
        undo.append((owner, key, getattr(owner, key)))
        setattr(owner, key, value)
    state = real_random.getstate()
    real_random.seed(scheduler.random.random())  # tenacity's jitter
    try:
        yield virtual
    finally:
        scheduler.end()
        real_random.setstate(state)
        for owner, key, value in undo:
            setattr(owner, key, value)
