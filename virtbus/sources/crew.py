"""Threads for calls that may never return. A call that hangs takes no thread away from the others."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

from virtbus.telemetry import Trouble, emit

AT_ONCE = 8  # calls that run at the same time, those that hang not counted
LATE_SECONDS = 1.0  # a call that runs for longer hangs
IDLE_SECONDS = 5.0  # an idle thread is kept so long

Call: TypeAlias = Callable[[], None]


class Crew:
    """Runs calls in the order given; one that hangs for ever costs one thread. Thread-safe.

    Whoever shares a crew bounds the calls that it has under way: one question and one attempt to connect a
    hypervisor, so that no more threads hang than hypervisors do.
    """

    def __init__(self, at_once: int = AT_ONCE, clock: Callable[[], float] = time.monotonic) -> None:
        self._at_once = at_once
        self._clock = clock
        self._changed = threading.Condition()
        self._waiting: deque[Call] = deque()
        self._running: dict[object, float] = {}  # a worker's own key → when its call began
        self._idle = 0

    def run(self, call: Call) -> None:
        """Run it soon, on another thread; what it raises is logged."""
        with self._changed:
            self._waiting.append(call)
            self._dispatch()

    def check(self) -> float | None:
        """Let calls that wait pass those that hang → when to check again (monotonic), or None."""
        with self._changed:
            self._dispatch()
            return self._clock() + LATE_SECONDS if self._waiting else None

    def _dispatch(self) -> None:
        now = self._clock()
        busy = sum(1 for began in self._running.values() if now - began < LATE_SECONDS)
        for _ in range(min(len(self._waiting), self._idle)):
            self._changed.notify()
        places = min(len(self._waiting) - self._idle, self._at_once - busy - self._idle)
        for _ in range(places):
            call = self._waiting.popleft()
            worker = threading.Thread(target=self._work, args=(call,), name="virtbus-call", daemon=True)
            try:
                worker.start()
            except RuntimeError as error:  # no more threads: the call waits for the next check
                self._waiting.appendleft(call)
                emit(Trouble("call", error))
                return

    def _work(self, call: Call) -> None:
        me = object()
        following: Call | None = call
        while following is not None:
            with self._changed:
                self._running[me] = self._clock()
            try:
                following()
            except Exception as error:  # noqa: BLE001 - one call's failure must not take the others' thread
                emit(Trouble("call", error))
            with self._changed:
                del self._running[me]
                following = self._next()

    def _next(self) -> Call | None:
        """The next call, None when there is none for so long that the thread may end; the lock is held."""
        self._idle += 1
        self._changed.wait_for(lambda: self._waiting, IDLE_SECONDS)
        self._idle -= 1
        return self._waiting.popleft() if self._waiting else None
