"""What the scenarios about gaps share: when each error was injected, what came, and the account."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.agent.process import AgentProcess
from tests.bench.events import Events
from tests.faults.amqp_kit import private_broker
from tests.lab.lab import Guest, Lab, wait_until

SETTINGS = (
    "heartbeat.interval_seconds = 0\nincidents.first_window_seconds = 0.5\nincidents.max_window_seconds = 2\n"
    "incidents.quiet_seconds = 5\n"
)
POLL_SECONDS = 0.02


def seconds_of(text: str | None) -> float:
    """A time in an event, as seconds since 1970; none is since ever."""
    return 0.0 if text is None else datetime.fromisoformat(text).timestamp()


class Injector(threading.Thread):
    """Reads the guests' disk servers' logs as they grow: (time before, time after, errors) of each step."""

    def __init__(self, *guests: Guest) -> None:
        super().__init__(daemon=True)
        self.steps: list[tuple[float, float, int]] = []
        self._guests, self._over = guests, threading.Event()
        self._told = self._sum()
        self.start()

    def _sum(self) -> int:
        return sum(guest.injected() for guest in self._guests)

    def run(self) -> None:
        before = time.time()
        while True:
            over = self._over.wait(POLL_SECONDS)
            now, total = time.time(), self._sum()
            if total > self._told:
                self.steps.append((before, now, total - self._told))
                self._told = total
            before = now
            if over:
                return

    def close(self) -> None:
        self._over.set()
        self.join()

    @property
    def total(self) -> int:
        return sum(errors for _, _, errors in self.steps)

    def within(self, spans: Sequence[tuple[float, float]]) -> int:
        """At most so many were injected within these times."""
        return sum(
            errors
            for before, after, errors in self.steps
            if any(before <= ended and after >= started for started, ended in spans)
        )


@dataclass
class Came:
    """What an exchange's events say."""

    events: Events

    @property
    def all(self) -> list[dict[str, Any]]:
        return [event for _, event in list(self.events.seen)]

    def gaps(self) -> list[dict[str, Any]]:
        return [event["data"] for event in self.all if event["type"].endswith(".gap.v1")]

    def spans(self) -> list[tuple[float, float]]:
        return [(seconds_of(gap["started_at"]), seconds_of(gap["ended_at"])) for gap in self.gaps()]

    def counted(self) -> int:
        """Errors that events of callbacks count; an event that came twice counts once."""
        found = {event["id"]: event["data"] for event in self.all if event["type"].endswith(".io_error.v1")}
        return sum(data["occurrences"]["count"] for data in found.values() if data["origin"] == "event")

    def unnamed(self) -> int:
        """Sequences of a run that neither came nor are named in a gap event."""
        came: dict[str, set[int]] = {}
        named: set[tuple[str, int]] = set()
        for event in self.all:
            came.setdefault(event["epoch"], set()).add(int(event["sequence"]))
        for gap in self.gaps():
            for each in gap["missing"]:
                named |= {(each["epoch"], n) for n in range(each["first"], each["last"] + 1)}
        return sum(
            (epoch, number) not in named
            for epoch, numbers in came.items()
            for number in set(range(1, max(numbers) + 1)) - numbers
        )

    def settle(self, quiet: float = 3.0, most: float = 90.0) -> None:
        """Wait until nothing has come for `quiet` seconds."""
        end = time.monotonic() + most
        while time.monotonic() < end:
            before = len(self.events.seen)
            time.sleep(quiet)
            if len(self.events.seen) == before:
                return


class Stage(ExitStack):
    """A broker, a private libvirtd and a folder for agents."""

    def __enter__(self) -> Stage:
        super().__enter__()
        self.folder = Path(self.enter_context(tempfile.TemporaryDirectory(prefix="vbseen-", dir="/tmp")))
        broker = self.enter_context(private_broker())
        self.url = broker.url(broker.vhost())
        self.lab = self.enter_context(Lab())
        self.came = Came(self.enter_context(Events(self.url)))
        self._names = itertools.count()
        return self

    def guest(self, boot: str) -> Guest:
        """A guest whose errors are reported to it, so that it goes on: "tick" 18 a second, or a "storm"."""
        name = f"{boot}{next(self._names)}"
        return self.lab.guest(name, error="EIO", policy="report", bus="ide", boot=boot).start()

    def agent(self, folder: str = "agent") -> AgentProcess:
        place = self.folder / folder
        place.mkdir(exist_ok=True)
        return AgentProcess(place, libvirt=self.lab.uri_ro, bus=self.url, settings=SETTINGS)

    @contextmanager
    def injecting(self, *guests: Guest) -> Iterator[Injector]:
        injector = Injector(*guests)
        try:
            yield injector
        finally:
            injector.close()

    def virsh_seconds(self, limit: float) -> float:
        """How long libvirtd takes to answer another client; `limit` when it does not by then."""
        begun = time.monotonic()
        words = [*self.lab._enter(), "virsh", "-c", f"qemu:///system?socket={self.lab.socket}", "list"]
        try:
            subprocess.run(words, capture_output=True, timeout=limit, check=True)
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
            return limit
        return time.monotonic() - begun

    def daemon_mib(self) -> int:
        """Memory of libvirtd."""
        status = Path(f"/proc/{self.lab.libvirtd_pid}/status").read_text(encoding="ascii")
        return int(status.partition("VmRSS:")[2].split()[0]) // 1024


def drained(agent: AgentProcess) -> None:
    """Wait until the agent has sent all."""
    wait_until(lambda: agent.metric("virtbus_spool_oldest_unpublished_seconds") == 0, "a drained spool", 60)


def report(name: str, came: Came, injector: Injector, *, good: bool = True, **more: object) -> bool:
    """Print the line → whether every error that was injected is counted, or lies within a gap."""
    counted, within = came.counted(), injector.within(came.spans())
    lost = max(0, injector.total - counted - within)
    words = {"injected": injector.total, "counted": counted, "within_gaps": within, "lost": lost,
             "unnamed": came.unnamed(), **more}  # fmt: skip
    print(name, *(f"{key}={value}" for key, value in words.items()), flush=True)
    return good and lost == 0 and came.unnamed() == 0


def end(good: bool) -> None:
    """End the scenario's process."""
    sys.exit(0 if good else 1)
