"""The network swallows everything under load: python -m tests.faults.black_hole [seconds] [backlog]

An agent on a real spool gets the backlog's events of 1,000 domains while nothing comes through; then it
drains over the same proxy over which raw pipelined kombu then publishes the same messages
(`drain_ratio_to_raw_kombu`). With the default heartbeat the hole must be found within 30 s.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.bench import publish as bench
from tests.faultkit import TcpFaultProxy
from tests.faults.amqp_kit import QUEUE, check, drain_queue, make_queue, private_broker, report
from tests.waiting import wait_until
from virtbus.agent.agent import Agent, AgentOptions
from virtbus.agent.incidents import IncidentLimits, Incidents
from virtbus.bus import BusOptions, open_bus
from virtbus.envelope import uuid7
from virtbus.model import Record
from virtbus.spool import Spool, SpoolLimits
from virtbus.telemetry import METRICS
from virtbus.testing import FakeSource, a_raw_io_error

AGENT = "11111111-2222-4333-8444-555555555555"
DOMAINS = 1000


class Watched:
    """An agent whose commits are noted: what it owes, and each record as the bus gets it."""

    def __init__(self, state: Path, url: str) -> None:
        self.spool = Spool.open(state, limits=SpoolLimits(max_bytes=1 << 30), agent_id=AGENT)
        self.owed: list[str] = []
        self.records: dict[str, Record] = {}
        commit, take = self.spool.commit, self.spool.take

        def noted_commit(events: Any, states: Any = None) -> Any:
            stamps = commit(events, states)
            self.owed += [stamp.id for stamp in stamps]
            return stamps

        def noted_take(limit: int, busy: Any) -> Any:
            records = take(limit, busy)
            for record in records:
                self.records.setdefault(record.id, record)
            return records

        self.spool.commit = noted_commit
        self.spool.take = noted_take
        self.agent = Agent(
            source=FakeSource(),
            bus=open_bus(url, BusOptions()),
            spool=self.spool,
            incidents=Incidents(IncidentLimits(fold=False), new_id=lambda: uuid7(time.time_ns())),
            agent_id=AGENT,
            options=AgentOptions(heartbeat_seconds=0, fold=False),
        )
        self.agent.start()
        wait_until(lambda: bool(self.owed), timeout=20, what="the start")

    def observe(self, count: int, rate: float) -> None:
        """`count` errors, `rate` a second."""
        begun = time.monotonic()
        for number in range(count):
            uuid = f"00000000-0000-4000-8000-{number % DOMAINS:012d}"
            self.agent.queue.put(a_raw_io_error(domain_uuid=uuid, observed_at=time.time_ns()))
            while len(self.agent.queue) > 5000:  # beyond 10,000 errors fold, and the backlog gets small
                time.sleep(0.01)
            if number % 20 == 0:
                time.sleep(max(0.0, begun + number / rate - time.monotonic()))

    def confirmed(self) -> bool:
        """Everything so far is confirmed, and the spool knows it."""
        return len(self.agent.queue) == 0 and self.spool.stats().pending == 0

    def trouble(self) -> bool:
        """The agent says that the broker is away."""
        return self.agent.status()["bus"]["error"] is not None  # type: ignore[index]


def serve_proxy(port: int, ours: Connection) -> None:
    """The network, in a process of its own: it must not take the publishers' share of the interpreter."""
    with TcpFaultProxy("127.0.0.1", port) as proxy:
        ours.send((proxy.host, proxy.port))
        while (order := ours.recv()) != "end":
            getattr(proxy, order)()
            ours.send("done")


class Network:
    """Orders to `serve_proxy`."""

    def __init__(self, port: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve_proxy, args=(port, theirs), daemon=True)
        self._process.start()
        self.host, self.port = self._pipe.recv()

    def order(self, name: str) -> None:
        self._pipe.send(name)
        self._pipe.recv()

    def close(self) -> None:
        self._pipe.send("end")
        self._process.join(10)


def main() -> None:
    """Print the line."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    backlog = int(sys.argv[2]) if len(sys.argv) > 2 else 60_000
    bench.EXCHANGE = "virtbus.events"  # raw kombu publishes to the same exchange and queue
    with private_broker() as broker, tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        vhost = broker.vhost()
        direct = broker.url(vhost)
        make_queue(direct)
        with closing(Network(broker.port)) as proxy:
            url = f"amqp://guest:guest@{proxy.host}:{proxy.port}/{vhost}"
            watched = Watched(Path(folder) / "state", url)
            watched.observe(200, 1000)
            wait_until(watched.confirmed, timeout=30, what="the first events")
            time.sleep(1.0)
            proxy.order("black_hole")
            began = time.monotonic()
            watched.observe(100, 1000)  # something is under way when the hole opens
            found = wait_until(watched.trouble, timeout=seconds, what="the black hole")
            left = max(1.0, began + seconds - 5.0 - time.monotonic())
            watched.observe(backlog - 100, backlog / left)
            wait_until(lambda: len(watched.owed) >= backlog + 200, timeout=120, what="the commits")
            time.sleep(max(0.0, began + seconds - time.monotonic()))
            before = watched.spool.stats().pending
            proxy.order("heal")
            healed = time.monotonic()
            wait_until(lambda: watched.spool.stats().pending < before, timeout=60, what="a confirm")
            first = time.monotonic()
            wait_until(watched.confirmed, timeout=600, what="the backlog's drain")
            drained = time.monotonic()
            watched.agent.stop()
            watched.agent.join()
            owed = list(watched.records.values())
            account = check(owed, drain_queue(direct, QUEUE))
            account.lost += len(set(watched.owed) - watched.records.keys())
            raw_rate = bench.raw_pipelined(url, owed[-before:], BusOptions().window)
    account.reconnect_max_seconds = first - healed
    rate = before / (drained - first)
    report(
        "black_hole",
        1,
        [account],
        good=found <= 30.0 and rate / raw_rate >= 0.5 and before >= 0.9 * backlog,
        black_hole_seconds=f"{seconds:g}",
        found_seconds=round(found, 1),
        backlog=before,
        drain_per_second=round(rate),
        drain_ratio_to_raw_kombu=round(rate / raw_rate, 2),
        bus_reconnects=int(METRICS.bus_reconnects._value.get()),
    )


if __name__ == "__main__":
    main()
