"""SIGKILL under load, at random moments: is there an error outside every event and every gap's interval?

    python -m tests.faults.gap_edges [kills]

The injector writes each error's number and time into a ledger before it hands it over. Half of the agents
have a source that proves what it told, half one that proves nothing.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Event as StopEvent

from tests.bench.events import Events
from tests.faults.amqp_kit import private_broker
from tests.faults.seen_kit import Came, end
from virtbus.agent.agent import Agent, AgentOptions
from virtbus.agent.incidents import IncidentLimits, Incidents
from virtbus.bus import BusOptions, open_bus
from virtbus.envelope import uuid7
from virtbus.model import Check, Clock
from virtbus.observations import Description, RawIoError, SourceReady, SourceSeen
from virtbus.sources import Sink
from virtbus.spool import Spool, SpoolLimits
from virtbus.telemetry import configure
from virtbus.testing import a_host

AGENT = "11111111-2222-4333-8444-555555555555"
RATE, DOMAINS = 400, 40


class Injector:
    """A source that keeps a ledger of what it told; see virtbus.sources.Source."""

    def __init__(self, ledger: Path, *, proves: bool) -> None:
        self._ledger, self._proves = ledger, proves

    def run(self, sink: Sink, stop: StopEvent) -> None:
        """Errors of 40 guests in turn, RATE a second, and a proof each tenth of one."""
        clock = Clock()
        fd = os.open(self._ledger, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        number = self._ledger.read_bytes().count(b"\n")
        sink(self.snapshot())
        begun, told = time.monotonic(), 0
        while not stop.wait(max(0.0, begun + told / RATE - time.monotonic())):
            if told % (RATE // 10) == 0 and self._proves:
                sink(SourceSeen(clock()))
            at, domain = time.time_ns(), number % DOMAINS
            os.write(fd, b"%d %d\n" % (number, at))
            uuid = f"00000000-0000-4000-8000-{domain:012d}"
            sink(RawIoError(uuid, f"guest{domain}", domain, "disk0", "virtio-disk0", 2, f"n{number}", at))
            number, told = number + 1, told + 1

    def describe(self, domain_uuid: str) -> Description | None:
        return None

    def snapshot(self) -> SourceReady:
        return SourceReady(a_host(), time.time_ns(), (), proves=self._proves)

    def probe(self) -> Sequence[Check]:
        return ()


def child(ledger: Path, state: Path, url: str, kind: str) -> None:
    """An agent until it is killed; `drain` only sends what is left."""
    agent = Agent(
        source=Injector(Path("/dev/null") if kind == "drain" else ledger, proves=kind == "proves"),
        bus=open_bus(url, BusOptions()),
        spool=Spool.open(state, limits=SpoolLimits(max_bytes=1 << 30), agent_id=AGENT),
        incidents=Incidents(IncidentLimits(fold=False), new_id=lambda: uuid7(time.time_ns())),
        agent_id=AGENT,
        options=AgentOptions(heartbeat_seconds=0, drain_seconds=60.0, fold=False),
    )
    if kind == "drain":
        agent.source.run = lambda sink, stop: (sink(agent.source.snapshot()), stop.wait())[0]  # type: ignore[method-assign, func-returns-value]
    agent.start()
    if kind == "drain":
        time.sleep(1)
        agent.stop()
    while not agent.wait(1.0):
        continue
    agent.join()


def scenario(kills: int, seed: int = 1) -> bool:
    """Kill so many, then let one deliver what is left."""
    chance = random.Random(seed)
    with private_broker() as broker, tempfile.TemporaryDirectory(prefix="vbedges-", dir="/tmp") as name:
        folder, url = Path(name), broker.url(broker.vhost())
        ledger = folder / "ledger"
        ledger.touch()
        with Events(url) as events:
            came = Came(events)

            def start(kind: str) -> subprocess.Popen[bytes]:
                words = [
                    sys.executable,
                    "-m",
                    "tests.faults.gap_edges",
                    "child",
                    ledger,
                    folder / "state",
                    url,
                    kind,
                ]
                return subprocess.Popen(words)

            for number in range(kills):
                size = ledger.stat().st_size
                process = start("proves" if number % 2 else "proves nothing")
                while ledger.stat().st_size == size:
                    time.sleep(0.01)
                time.sleep(chance.uniform(0.2, 4.0))
                process.kill()
                process.wait()
            if start("drain").wait(120):
                raise AssertionError("the last agent did not end well")
            came.settle(most=120)
            told = [(int(a), int(b) / 1e9) for a, b in map(str.split, ledger.read_text().splitlines())]
            reasons = {e["data"]["error"]["reason"] for e in came.all if e["type"].endswith(".io_error.v1")}
            spans = came.spans()
            undelivered = [(n, at) for n, at in told if f"n{n}" not in reasons]
            # Events have whole microseconds.
            lost = [n for n, at in undelivered if not any(a - 2e-6 <= at <= b + 2e-6 for a, b in spans)]
            print(
                f"gap_edges runs={kills} injected={len(told)} undelivered={len(undelivered)} "
                f"lost={len(lost)} gaps={len(spans)} unnamed={came.unnamed()}",
                flush=True,
            )
            return not lost and came.unnamed() == 0


def main() -> None:
    """Print the line; or be the child that is killed."""
    if sys.argv[1:2] == ["child"]:
        configure(level="error")
        child(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5])
    else:
        end(scenario(int([*sys.argv[1:], "100"][0])))


if __name__ == "__main__":
    main()
