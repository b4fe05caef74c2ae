"""Connects, registers and lists without ever being held up by a daemon that does not answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from virtbus.errors import SourceUnavailable
from virtbus.sources.crew import Crew
from virtbus.sources.link import Connector, DomainAt, HostFacts, Link
from virtbus.sources.session import Session

OPEN_SECONDS = 30.0  # then an attempt to connect is given up (its thread ends when its call does)
OPENING_LIMIT = 4  # attempts that hang at the same time


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
        self.over = False  # its call has returned
        self._uri = uri
        self._lock = threading.Lock()
        self._given_up = False
        self._result: Opened | Exception | None = None

    def bring(self, result: Opened | Exception) -> None:
        """The call has returned; nobody wants a connection that comes too late."""
        with self._lock:
            self.over, late = True, self._given_up
            self._result = result
        if late and isinstance(result, Opened):
            result.link.close()

    def give_up(self) -> None:
        """Don't wait any longer."""
        with self._lock:
            self._given_up, result = True, self._result
        if isinstance(result, Opened):
            result.link.close()

    def result(self, now: float) -> Opened | None:
        """None while it is under way. Raises what the attempt raised, SourceUnavailable at the deadline."""
        with self._lock:
            result = self._result
            if result is None and now < self.deadline:
                return None
            if result is not None:
                self._result = None
        if isinstance(result, Exception):
            raise result
        if result is None:
            raise SourceUnavailable(
                f"{self._uri} did not answer within {OPEN_SECONDS:.0f} s; is libvirtd frozen?"
            )
        return result


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
        self._attempts = [attempt for attempt in self._attempts if not attempt.over]
        if len(self._attempts) >= limit:
            raise SourceUnavailable(
                f"{self._connector.uri}: {limit} attempts to connect hang; is libvirtd frozen?"
            )
        opening = Opening(self._connector.uri, now + OPEN_SECONDS)

        def attempt() -> None:
            try:
                result: Opened | Exception = self.connect(session)
            except Exception as error:  # noqa: BLE001 - it is raised on the other side
                result = error
            opening.bring(result)
            wake()

        self._attempts.append(opening)
        self._crew.run(attempt)
        return opening
