"""Calls that may never return, on threads of their own: to connect, and to prove what was reported.

A connection proves what it has reported by answering a question (see virtbus.seen); a standstill of this
process is noticed by a wait that took too long.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from virtbus.errors import SourceUnavailable
from virtbus.model import Now
from virtbus.seen import STANDSTILL_SECONDS, stalled_words
from virtbus.sources.link import Connector, DomainAt, HostFacts, Link
from virtbus.sources.session import Closed, Session
from virtbus.telemetry import Trouble, emit
from virtbus.words import GapReason

AT_ONCE = 8  # calls that run at the same time, those that hang not counted
LATE_SECONDS = 1.0  # a call that runs for longer hangs
IDLE_SECONDS = 1.0  # an idle thread is kept so long
OPEN_SECONDS = 30.0  # then an attempt to connect is given up (its thread ends when its call does)
OPENING_LIMIT = 4  # attempts that hang at the same time
# Between two questions: a gap begins at most so long, and a margin, before its cause. A question wakes
# libvirt's loop some nine times, so where nothing is heard it is asked less often.
PROVE_SECONDS, QUIET_SECONDS = 2.0, 10.0

Call: TypeAlias = Callable[[], None]


def after(moment: float, every: float) -> float:
    """The next of the moments that all share who do something `every` so many seconds.

    One wake-up of this process then serves a hundred connections.
    """
    return (moment // every + 1.0) * every


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


@dataclass(slots=True)
class Opened:
    """A connection whose callbacks are registered, and what was there then."""

    link: Link
    facts: HostFacts
    domains: Sequence[DomainAt]


class Opening:
    """One attempt. The source thread asks for its result; the attempt's own thread brings it."""

    def __init__(self, uri: str, deadline: float) -> None:
        self.deadline = deadline  # monotonic
        self.brought: Future[Opened] = Future()
        self._uri = uri

    def give_up(self) -> None:
        """Don't wait any longer; nobody wants a connection that comes too late."""
        self.brought.add_done_callback(_close)

    def result(self, now: float) -> Opened | None:
        """None while it is under way. Raises what the attempt raised, SourceUnavailable at the deadline."""
        if self.brought.done():
            return self.brought.result()
        if now < self.deadline:
            return None
        raise SourceUnavailable(
            f"{self._uri} did not answer within {OPEN_SECONDS:.0f} s; is libvirtd frozen?"
        )


def _close(brought: Future[Opened]) -> None:
    if brought.exception() is None:
        brought.result().link.close()


class Opener:
    """Makes connections of one Connector; remembers the attempts that hang."""

    def __init__(self, connector: Connector, crew: Crew, limit: int | None = None) -> None:
        """`limit` attempts may hang at the same time."""
        self._connector = connector
        self._crew = crew
        self._limit = limit
        self._attempts: list[Opening] = []

    def connect(self, session: Session | None) -> Opened:
        """Open, register, list. May block for ever."""
        link = self._connector.open(session)
        try:
            return Opened(link, link.facts(), link.domains())
        except BaseException:
            link.close()
            raise

    def forget(self) -> None:
        """Another daemon listens now: what hangs says nothing about it."""
        self._attempts = []

    def begin(self, session: Session, now: float, wake: Callable[[], None]) -> Opening:
        """`connect` on another thread, which is left behind when it hangs; `wake` is called when it is over.

        A daemon that is frozen lets a client connect and then says nothing, before keepalive begins.
        Raises SourceUnavailable when too many attempts hang already.
        """
        limit = OPENING_LIMIT if self._limit is None else self._limit
        self._attempts = [attempt for attempt in self._attempts if not attempt.brought.done()]
        if len(self._attempts) >= limit:
            raise SourceUnavailable(
                f"{self._connector.uri}: {limit} attempts to connect hang; is libvirtd frozen?"
            )
        opening = Opening(self._connector.uri, now + OPEN_SECONDS)

        def attempt() -> None:
            try:
                opening.brought.set_result(self.connect(session))
            except Exception as error:  # noqa: BLE001 - it is raised on the other side
                opening.brought.set_exception(error)
            wake()

        self._attempts.append(opening)
        self._crew.run(attempt)
        return opening


class Pulse:
    """When the source thread last came by. Its owner calls `beat` after each wait, before anything else."""

    def __init__(self, now: Now) -> None:
        self.last = now
        self.before = now

    def beat(self, now: Now, waited: float) -> float | None:
        """After a wait of at most `waited` seconds → for how long the process stood still, if it did."""
        self.before, self.last = self.last, now
        stood = self.last.boot - self.before.boot - waited
        return stood if stood >= STANDSTILL_SECONDS else None

    def closed(self, session: Session, stood: float) -> Closed:
        """What a standstill means for a connection: blind since it last answered."""
        since = min(session.seen.boot, self.before.boot)
        return Closed(stalled_words(stood), self.last.boot - since, GapReason.AGENT_STANDSTILL)

    def why(self, session: Session, closed: Closed, now: Now, waited: float) -> Closed:
        """Why a connection ended: our own standstill, where its end is noticed before the next beat."""
        soon = Pulse(self.last)
        stood = soon.beat(now, waited)
        return closed if stood is None else soon.closed(session, stood)


class Witness:
    """Asks one session's connection again and again, on the crew's threads: a daemon may never answer.

    The source thread reads the time of a question after it has noticed a standstill: what is asked of a
    connection that was deaf meanwhile proves nothing.
    """

    def __init__(self, session: Session, link: Link, crew: Crew, now: Now, quiet: float | None) -> None:
        """`quiet`: seconds between two questions where nothing happens (None: QUIET_SECONDS)."""
        self._session, self._link, self._crew, self._quiet = session, link, crew, quiet
        self._asked = now
        self._asking = False

    def step(self, now: Now) -> float:
        """Ask if it is time to → when to be called again (monotonic)."""
        due = self._asked.boot + PROVE_SECONDS
        if not self._session.heard:
            due = max(due, after(self._asked.boot, QUIET_SECONDS if self._quiet is None else self._quiet))
        left = due - now.boot
        if left > 0:
            return now.monotonic + left
        if not self._asking:
            self._session.heard, self._asked, self._asking = False, now, True
            self._crew.run(partial(self._ask, now))
        return now.monotonic + PROVE_SECONDS

    def _ask(self, asked: Now) -> None:
        try:
            self._link.heard(partial(self._session.saw, asked))
        except SourceUnavailable:
            again = True  # the connection's end is reported by its own callback, silence by readiness
        except Exception as error:  # noqa: BLE001 - nobody else would ask
            again = True
            emit(Trouble("question to the connection of the events", error))
        else:
            again = False
        self._asking = False
        if again:
            self._session.hear()
