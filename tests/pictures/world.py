"""Six hosts, each with libvirtd, guests and an agent of its own, and seven minutes in which things break.

The hosts are labs with names of their own on this machine; an array is nbdkit behind one address on each
of them. RabbitMQ, the agents (`virtbus run`), `virtbus fleet` and Prometheus are what an operator runs.
Windows and heartbeats are shorter, and spools smaller, than by default: minutes show what takes hours.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any

from tests.agent.process import COMMAND, AgentProcess
from tests.brokers.rabbitmq import RabbitMQ
from tests.chart.prometheus import Prometheus, fill, panels
from tests.faultkit import TcpFaultProxy
from tests.lab.lab import PAUSED_IOERROR, Guest, Lab, NbdDisk, ThinDisk
from tests.pictures.terminal import Terminal

SETTINGS = """\
[heartbeat]
interval_seconds = 10
[incidents]
max_window_seconds = 2
quiet_seconds = 30
[spool]
max_bytes = 1048576
"""
SCRAPE_SECONDS = 5
ARRAY, SECOND_ARRAY, THIRD_ARRAY = "10.61.0.7", "10.62.0.5", "10.63.0.9"


@dataclass(frozen=True)
class Seen:
    """What the run left: the terminal's lines, and each panel with the series of its queries."""

    fleet: list[str]  # lines
    start: float
    end: float
    step: float
    breakages: list[tuple[str, float, float]]  # what was broken, from, to
    panels: list[dict[str, Any]]  # the dashboard's, each target with its "series"


class Story:
    """The clock of the run: `at` waits for a second of it, `broken` notes what was broken and how long."""

    def __init__(self) -> None:
        self.start = time.time()
        self.breakages: list[tuple[str, float, float]] = []

    def at(self, second: float, what: str = "") -> None:
        """Wait for a second of the run, and say what comes then."""
        time.sleep(max(0.0, self.start + second - time.time()))
        if what:
            print(f"{second:4.0f} s  {what}", file=sys.stderr, flush=True)

    @contextmanager
    def broken(self, what: str) -> Iterator[None]:
        """Note it."""
        since = time.time()
        yield
        self.breakages.append((what, since, time.time()))


class World:
    """The parts of the run, each started for real and ended with the `with` block."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> World:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        enter = self._stack.enter_context
        self.folder = Path(
            enter(tempfile.TemporaryDirectory(prefix="vbpics-", dir="/tmp", ignore_cleanup_errors=True))
        )
        self.broker = RabbitMQ.shared(self.folder / "rabbitmq")
        self._stack.callback(self.broker.close)
        self.url = self.broker.url(self.broker.vhost())
        self.proxy = enter(TcpFaultProxy("127.0.0.1", self.broker.port))
        self.labs = [enter(Lab(hostname=f"compute-{number:02}")) for number in range(1, 7)]
        self.guests = {guest.name: guest.start() for guest in self._guests()}
        consume = [*COMMAND, "consume", "--bus", self.url, "--group", "scheduler"]
        consumer = Popen(consume, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL)
        self._stack.callback(consumer.wait)
        self._stack.callback(consumer.terminate)
        self.prometheus = enter(Prometheus(self.folder, seconds=SCRAPE_SECONDS))
        self.terminal = enter(Terminal([*COMMAND, "fleet"], columns=150, rows=24, VIRTBUS_BUS__URL=self.url))
        self.story = Story()
        self.agents: dict[str, AgentProcess] = {}
        for lab in self.labs:
            self.start_agent(lab)
        for agent in self.agents.values():
            agent.ready(120)

    def _guests(self) -> Iterator[Guest]:
        one, two, three, four, five, six = self.labs

        def on(address: str) -> NbdDisk:  # reports its errors, 18 a second, and the guest goes on
            return NbdDisk(address=address, bus="ide", policy="report")

        yield one.guest("web-1", on(ARRAY), boot="tick")
        yield one.guest("batch-1", NbdDisk(bus="ide", policy="report"), boot="storm")
        yield two.guest("db-1", NbdDisk(address=ARRAY))
        yield three.guest("web-2", on(ARRAY), boot="tick")
        yield three.guest("mail-1", NbdDisk(address=ARRAY))
        yield four.guest("app-1", NbdDisk(address=SECOND_ARRAY))
        yield four.guest("app-2", on(THIRD_ARRAY), boot="tick")
        yield five.guest("log-1", ThinDisk())
        yield six.guest("cache-1", NbdDisk(address=SECOND_ARRAY))

    def start_agent(self, lab: Lab) -> AgentProcess:
        """Start (again) the agent of a host, and have it scraped."""
        folder = self.folder / lab.hostname
        folder.mkdir(exist_ok=True)
        through = self.url.replace(f":{self.broker.port}/", f":{self.proxy.port}/")
        agent = AgentProcess(folder, libvirt=lab.uri_ro, bus=through, settings=SETTINGS)
        self.agents[lab.hostname] = self._stack.enter_context(agent)
        self.prometheus.targets({name: each.http for name, each in self.agents.items()})
        return agent


def run() -> Seen:
    """Seven minutes."""
    with World() as world:
        fleet = _play(world)
        end = time.time()
        found = panels()
        rate = f"{4 * SCRAPE_SECONDS}s"  # as Grafana takes it for so short a time
        for panel in found:
            for target in panel["targets"]:
                query = fill(target["expr"], rate)
                target["series"] = world.prometheus.ask_range(query, world.story.start, end, SCRAPE_SECONDS)
        return Seen(fleet, world.story.start, end, SCRAPE_SECONDS, world.story.breakages, found)


def _play(world: World) -> list[str]:
    story, guests, labs = world.story, world.guests, world.labs
    story.at(30, "a thin pool is full: log-1 is paused")
    guests["log-1"].fail()
    guests["log-1"].wait_state(PAUSED_IOERROR)
    story.at(45, "an array fails under three hosts")
    for name in ("web-1", "db-1", "web-2", "mail-1"):
        guests[name].fail()
    story.at(60, "one host loses two arrays")
    for name in ("app-1", "app-2"):
        guests[name].fail()
    story.at(85, "a host's libvirt hangs")
    with story.broken("libvirt frozen"):
        labs[5].freeze()
        story.at(130)
        fleet = world.terminal.screen()
        labs[5].thaw()
    story.at(150, "a storm: a guest fails as fast as it can")
    with story.broken("storm"):
        guests["batch-1"].fail()
        story.at(165)
        guests["batch-1"].heal()
    guests["batch-1"].destroy()
    story.at(190, "the broker is away")
    with story.broken("broker away"):
        world.proxy.refuse()
        world.proxy.cut()
        story.at(280)
        world.proxy.heal()
    story.at(305, "the arrays work again")
    for guest in guests.values():
        if guest.name not in ("log-1", "batch-1", "cache-1"):
            guest.heal()
            if guest.state() == PAUSED_IOERROR:
                guest.resume()
    story.at(330, "an agent is killed, and started again")
    with story.broken("agent killed"):
        world.agents["compute-03"].kill()
        story.at(345)
        world.start_agent(labs[2]).ready(120)
    story.at(400)
    return fleet
