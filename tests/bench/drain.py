"""Drain a spool through the agent's own publisher, in a process of its own: what it costs, nobody else's.

    python -m tests.bench.drain STATE_DIR BUS_URL WINDOW     (used by publish.py and kafka.py)

`fill` writes the spool that is drained: io_error events of many domains, round robin.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tests.bench.measure import cpu_seconds, memory
from virtbus import telemetry
from virtbus.agent.agent import Agent, AgentOptions
from virtbus.agent.incidents import IncidentLimits, Incidents
from virtbus.bus import BusOptions, open_bus
from virtbus.commands.run import spare_collector
from virtbus.envelope import uuid7
from virtbus.spool import Spool, SpoolLimits
from virtbus.testing import FakeSource, a_domain, an_io_error

AGENT = "11111111-2222-4333-8444-555555555555"
LIMITS = SpoolLimits(max_bytes=4 << 30)
NAME = "bench.events"  # exchange and topic


@dataclass(frozen=True)
class Drained:
    """What a drain took: events, seconds until the last was confirmed and settled, RSS in MiB, CPU seconds.

    `rss_begin` is the memory when a twentieth was out: connected, caches full, all statements prepared.
    """

    events: int
    seconds: float
    rss_begin: float
    rss_peak: float
    cpu: float

    @property
    def rate(self) -> float:
        """Events a second."""
        return self.events / self.seconds


def fill(state: Path, events: int, domains: int = 1000) -> None:
    """A spool with `events` io_error events of `domains` domains in it."""
    spool = Spool.open(state, limits=LIMITS, agent_id=AGENT)
    made = [
        an_io_error(domain=a_domain(uuid=uuid7(number), name=f"guest-{number}")) for number in range(domains)
    ]
    for start in range(0, events, 500):
        spool.commit([made[n % domains] for n in range(start, min(start + 500, events))])
    spool.close()


def drained(
    url: str, events: int, *, window: int, domains: int = 1000, filled: Path | None = None
) -> Drained:
    """Fill a spool (or take the one in `filled`) and drain it in another process."""
    with tempfile.TemporaryDirectory(prefix="virtbus-bench-", dir="/var/tmp") as folder:
        state = filled or Path(folder) / "state"
        if filled is None:
            fill(state, events, domains)
        words = [sys.executable, "-m", "tests.bench.drain", str(state), url, str(window)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            raise RuntimeError(f"the drain failed: {done.stderr[-3000:]}")
        return Drained(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Drain, and print what it took as JSON."""
    telemetry.configure(level="error", fmt="json")
    state, url, window = sys.argv[1:]
    spool = Spool.open(Path(state), limits=LIMITS, agent_id=AGENT)
    agent = Agent(
        source=FakeSource(),
        bus=open_bus(url, BusOptions(exchange=NAME, topic=NAME, window=int(window))),
        spool=spool,
        incidents=Incidents(IncidentLimits(), new_id=lambda: uuid7(time.time_ns())),
        agent_id=AGENT,
        options=AgentOptions(heartbeat_seconds=0),
    )
    events = spool.stats().pending
    me = os.getpid()
    samples: list[tuple[int, float]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            samples.append((spool.stats().pending, memory(me)["VmRSS"]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    spare_collector()
    agent.start()
    # The clock starts with the first record under way: connecting and looking at libvirt came before it.
    while not spool.stats().in_flight and spool.stats().pending >= events:
        time.sleep(0.0005)
    cpu, begun = cpu_seconds(me), time.perf_counter()
    while spool.stats().committed_sequence == 0 or spool.stats().pending:
        time.sleep(0.01)  # each look takes Python's lock from the thread that is measured
    seconds, cpu = time.perf_counter() - begun, cpu_seconds(me) - cpu
    over.set()
    watcher.join()
    agent.stop()
    agent.join()
    later = [rss for pending, rss in samples if pending <= 0.95 * events] or [memory(me)["VmRSS"]]
    print(
        json.dumps(
            {"events": events, "seconds": seconds, "rss_begin": later[0], "rss_peak": max(later), "cpu": cpu}
        )
    )


if __name__ == "__main__":
    main()
