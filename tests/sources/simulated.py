"""A simulated hypervisor behind `virtbus.sources.link`: any number of domains, calls that hang at will."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from virtbus.errors import SourceUnavailable
from virtbus.model import Hypervisor
from virtbus.observations import Observation, RawIoError
from virtbus.sources.link import (
    ACTION_PAUSE,
    PAUSED,
    PAUSED_IOERROR,
    RUNNING,
    STARTED,
    STOPPED,
    SUSPENDED,
    SUSPENDED_IOERROR,
    DomainAt,
    Handler,
    HostFacts,
    NoSuchDomain,
    Space,
)

DEADLINE = 10.0  # seconds that a test waits for what must happen


@dataclass
class Guest:
    """One domain of the host."""

    uuid: str
    name: str
    number: int
    state: int = RUNNING
    reason: int = 1
    disk_errors: dict[str, int] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    jobs: set[str] = field(default_factory=set)  # targets of disks with a block job
    xml: str = ""

    def __post_init__(self) -> None:
        self.xml = self.xml or (
            f"<domain id='{self.number}'><name>{self.name}</name><uuid>{self.uuid}</uuid><devices>"
            "<disk type='file' device='disk'><source file='/img/a'/><target dev='vda' bus='virtio'/>"
            "<alias name='virtio-disk0'/></disk></devices></domain>"
        )


class SimulatedHost:
    """The host: guests, connections, and a switch for each thing that can go wrong. Also a Connector."""

    def __init__(self, guests: int = 0, *, keeps_messages: bool = False) -> None:
        self.uri = "simulated:///"
        self.appeared_ns: int | None = None
        self.guests: dict[str, Guest] = {}
        self.keeps_messages = keeps_messages
        self.qemu = "7.2.0"
        self.probed = threading.Event()  # while not set, the question for QEMU's version hangs
        self.probed.set()
        self.probing = 0  # how many such questions were asked
        self.links: list[SimulatedLink] = []
        self.down = False
        self.frozen = threading.Event()  # while set, `open` hangs
        self.answers = threading.Event()  # while not set, questions on the events' connection hang
        self.answers.set()
        self.hanging: set[str] = set()  # domains whose looks hang
        self.release = threading.Event()
        self.failures: dict[str, float] = {}  # a call's name → how many of its next answers are failures
        self.calls = 0
        self.most_calls = 0
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        for _ in range(guests):
            self.add()

    def add(self, **more: object) -> Guest:
        """A guest that runs, without saying so."""
        number = next(self._numbers)
        guest = Guest(f"00000000-0000-0000-0000-{number:012}", f"guest{number}", number, **more)  # type: ignore[arg-type]
        self.guests[guest.uuid] = guest
        return guest

    def open(self, handler: Handler | None) -> SimulatedLink:
        """See Connector."""
        while self.frozen.is_set():
            time.sleep(0.01)
        if self.down:
            raise SourceUnavailable("simulated: connection refused")
        link = SimulatedLink(self, handler)
        self.links.append(link)
        return link

    # ---- what happens on it

    def handlers(self) -> list[Handler]:
        """Whoever is registered."""
        return [link.handler for link in self.links if link.open and link.handler is not None]

    def io_error(
        self,
        guest: Guest,
        alias: str = "virtio-disk0",
        action: int = ACTION_PAUSE,
        reason: str = "",
        path: str = "/img/a",
    ) -> None:
        """The error's event alone."""
        raw = RawIoError(guest.uuid, guest.name, guest.number, path, alias, action, reason, time.time_ns())
        for handler in self.handlers():
            handler.io_error(raw)

    def suspend(self, guest: Guest) -> None:
        """Pause it by an I/O error, without the error's event."""
        guest.state, guest.reason, guest.disk_errors = PAUSED, PAUSED_IOERROR, {"vda": 1}
        self.lifecycle(guest, SUSPENDED, SUSPENDED_IOERROR)

    def lifecycle(self, guest: Guest, event: int, detail: int = 0) -> None:
        """A lifecycle event."""
        for handler in self.handlers():
            handler.lifecycle(guest.uuid, guest.name, guest.number, event, detail)

    def start(self) -> Guest:
        """A new guest, and its event."""
        guest = self.add()
        self.lifecycle(guest, STARTED)
        return guest

    def stop(self, guest: Guest) -> None:
        """A guest ends, and its event."""
        del self.guests[guest.uuid]
        self.lifecycle(guest, STOPPED)

    def cut(self) -> None:
        """Close every connection from the daemon's side."""
        for link in self.links:
            was_open, link.open = link.open, False
            if was_open and link.handler is not None:
                link.handler.closed("the daemon closed the connection", 0.0)

    # ---- counting calls

    def call(self, uuid: str) -> Guest:
        """One look at a domain: it may hang, for ever."""
        with self._lock:
            self.calls += 1
            self.most_calls = max(self.most_calls, self.calls)
        try:
            if uuid in self.hanging:
                self.release.wait()
            guest = self.guests.get(uuid)
            if guest is None:
                raise NoSuchDomain(f"domain {uuid} is not there")
            return guest
        finally:
            with self._lock:
                self.calls -= 1


class SimulatedLink:
    """One simulated connection; see virtbus.sources.link.Link."""

    def __init__(self, host: SimulatedHost, handler: Handler | None) -> None:
        self.host, self.handler, self.open = host, handler, True

    def _check(self, call: str = "") -> None:
        if not self.open:
            raise SourceUnavailable("simulated: the connection is closed")
        if self.host.failures.get(call, 0) > 0:
            self.host.failures[call] -= 1
            raise SourceUnavailable("Timed out during operation: cannot acquire state change lock")

    def heard(self, then: Callable[[], None]) -> None:
        self._check()
        self.host.answers.wait()
        then()

    def facts(self) -> HostFacts:
        self._check()
        return HostFacts(
            name="simulated",
            hypervisor=Hypervisor("QEMU", None, "9.0.0"),
            keeps_messages=self.host.keeps_messages,
            local=False,
        )

    def version(self) -> str:
        self._check("version")
        self.host.probing += 1
        self.host.probed.wait()
        return self.host.qemu

    def capabilities(self) -> str:
        self._check("capabilities")
        return "<capabilities><host><uuid>8205ba32-5064-4f22-a9f1-ef2a4c104c2b</uuid></host></capabilities>"

    def domains(self) -> Sequence[DomainAt]:
        self._check()
        return [DomainAt(g.uuid, g.name, g.number, g.state, g.reason) for g in self.host.guests.values()]

    def state(self, uuid: str) -> tuple[int, int]:
        self._check("state")
        guest = self.host.call(uuid)
        return guest.state, guest.reason

    def xml(self, uuid: str) -> str:
        self._check("xml")
        return self.host.call(uuid).xml

    def has_job(self, uuid: str, target: str) -> bool:
        self._check("has_job")
        return target in self.host.call(uuid).jobs

    def disk_errors(self, uuid: str) -> Mapping[str, int]:
        self._check("disk_errors")
        return dict(self.host.call(uuid).disk_errors)

    def messages(self, uuid: str) -> Sequence[str]:
        self._check("messages")
        return list(self.host.call(uuid).messages)

    def space(self, uuid: str, target: str) -> Space:
        self._check()
        self.host.call(uuid)
        return Space(1, 1, 1)

    def alive(self) -> bool:
        return self.open

    def close(self) -> None:
        self.open = False


class Seen:
    """A sink that remembers; `wait` until something was seen."""

    def __init__(self) -> None:
        self.all: list[Observation] = []
        self._changed = threading.Condition()

    def __call__(self, observation: Observation) -> None:
        with self._changed:
            self.all.append(observation)
            self._changed.notify_all()

    def of(self, *kinds: type) -> list[Observation]:
        """What was seen of these kinds."""
        return [item for item in self.all if isinstance(item, kinds)]

    def wait(
        self, what: Callable[[Observation], bool] | type, count: int = 1, seconds: float = DEADLINE
    ) -> list[Observation]:
        """Until `count` observations are of a kind, or please a function; AssertionError after `seconds`."""
        pleases = what if not isinstance(what, type) else (lambda item: isinstance(item, what))
        with self._changed:
            found: list[Observation] = []

            def enough() -> bool:
                found[:] = [item for item in self.all if pleases(item)]
                return len(found) >= count

            assert self._changed.wait_for(enough, seconds), (
                f"saw {len(found)} of {count} in {seconds} s: {self.all}"
            )
            return found
