"""Connects, registers and lists without ever being held up by a daemon that does not answer."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Event as StopEvent

from virtbus.errors import SourceUnavailable
from virtbus.sources.link import Connector, DomainAt, HostFacts, Link
from virtbus.sources.session import Session

OPEN_SECONDS = 30.0  # then an attempt to connect is given up (its thread ends when its call does)
OPENING_LIMIT = 4  # attempts that hang at the same time
POLL_SECONDS = 0.5  # how soon `stop` is seen


@dataclass(slots=True)
class Opened:
    """A connection whose callbacks are registered, and what was there then."""

    link: Link
    facts: HostFacts
    domains: Sequence[DomainAt]


class Opener:
    """Makes connections of one Connector; remembers the attempts that hang."""

    def __init__(self, connector: Connector) -> None:
        self._connector = connector
        self._hanging: list[threading.Thread] = []

    def connect(self, session: Session | None) -> Opened:
        """Open, register, list. May block for ever."""
        link = self._connector.open(session)
        try:
            return Opened(link, link.facts(), link.domains())
        except BaseException:
            link.close()
            raise

    def open(self, session: Session, stop: StopEvent) -> Opened | None:
        """`connect` on a thread that is left behind when it hangs; None when `stop` came first.

        A daemon that is frozen lets a client connect and then says nothing, before keepalive begins.
        """
        self._hanging = [thread for thread in self._hanging if thread.is_alive()]
        if len(self._hanging) >= OPENING_LIMIT:
            raise SourceUnavailable(
                f"{self._connector.uri}: {OPENING_LIMIT} attempts to connect hang; is libvirtd frozen?"
            )
        results: queue.SimpleQueue[Opened | Exception] = queue.SimpleQueue()
        given_up = threading.Event()

        def attempt() -> None:
            try:
                opened = self.connect(session)
            except Exception as error:  # noqa: BLE001 - it is raised on the other side
                results.put(error)
                return
            results.put(opened)
            if given_up.is_set():
                opened.link.close()

        thread = threading.Thread(target=attempt, name="virtbus-connect", daemon=True)
        thread.start()
        end = time.monotonic() + OPEN_SECONDS
        result: Opened | Exception | None = None
        while result is None and not stop.is_set() and time.monotonic() < end:
            try:
                result = results.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
        if result is None:
            given_up.set()
            session.end()
            self._hanging.append(thread)
            if stop.is_set():
                return None
            raise SourceUnavailable(
                f"{self._connector.uri} did not answer within {OPEN_SECONDS:.0f} s; is libvirtd frozen?"
            )
        if isinstance(result, Exception):
            raise result
        return result
