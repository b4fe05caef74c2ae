"""The intake: callbacks from one thread until they are durable; masakari-monitors' callback path beside it.

Ours counts a callback when its transaction is on the disk (fsync on). masakari-monitors' counts when its HTTP
request has been answered by a sink that does nothing.
"""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path

from tests.bench import peers
from tests.bench.measure import Row
from virtbus import telemetry
from virtbus.agent.agent import Agent, AgentOptions
from virtbus.agent.incidents import IncidentLimits, Incidents
from virtbus.envelope import uuid7
from virtbus.observations import RawIoError
from virtbus.sources import Sink
from virtbus.spool import Spool, SpoolLimits
from virtbus.testing import AGENT_ID, FakeBus, FakeSource


class Storm(FakeSource):
    """Calls the sink as libvirt's callback does: `count` errors of `domains` domains, as fast as it can."""

    def __init__(self, count: int, domains: int) -> None:
        super().__init__()
        self._count, self._uuids = count, [uuid7(number) for number in range(domains)]
        self.go = threading.Event()
        self.begun = self.put = 0.0

    def run(self, sink: Sink, stop: threading.Event) -> None:
        sink(self.snapshot())
        self.go.wait()
        self.begun, now, uuids, domains = time.perf_counter(), time.time_ns, self._uuids, len(self._uuids)
        for number in range(self._count):
            sink(RawIoError(uuids[number % domains], "guest", 1, "/p", "virtio-disk0", 2, "", now()))
        self.put = time.perf_counter()
        stop.wait()


def rate(count: int, domains: int) -> float:
    """Callbacks a second from the first call to the last commit."""
    telemetry.configure(level="error", fmt="json")
    with tempfile.TemporaryDirectory(prefix="virtbus-bench-", dir="/var/tmp") as folder:
        source = Storm(count, domains)
        incidents = Incidents(IncidentLimits(), new_id=lambda: uuid7(time.time_ns()))
        spool = Spool.open(Path(folder) / "state", limits=SpoolLimits(), agent_id=AGENT_ID)
        committed: list[tuple[float, int]] = []
        agent = Agent(
            source=source, bus=FakeBus(), spool=spool, incidents=incidents, agent_id=AGENT_ID,
            options=AgentOptions(heartbeat_seconds=0),
        )  # fmt: skip
        commit = spool.commit

        def told(*words: object) -> object:
            # On the intake's thread, so incidents stand still: their totals are what this commit holds.
            total = sum(each.total for each in incidents.open_incidents(limit=1_000_000)) if source.put else 0
            stamps = commit(*words)  # type: ignore[arg-type]
            committed.append((time.perf_counter(), total))
            return stamps

        spool.commit = told  # type: ignore[method-assign, assignment]
        agent.start()
        while spool.stats().committed_sequence == 0:
            time.sleep(0.01)
        source.go.set()
        while not committed or committed[-1][1] < count:
            time.sleep(0.002)
        seconds = next(at for at, total in committed if total >= count) - source.begun
        agent.abort()
        agent.join()
    return count / seconds


def rows(rounds: int, *, callbacks: int = 300_000) -> list[Row]:
    """Rates with 1,000 domains; the peer with as many as it takes in some seconds."""
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(rate(callbacks, 1000))
        answer = peers.run("masakari", "1000")
        theirs.append(answer["count"] / answer["seconds"])
    return [
        Row("intake", "intake: callbacks → committed (fsync on), 1,000 domains", tuple(ours), "/s", 50_000),
        Row("intake masakari", "masakari-monitors' callback path → a sink's answer", tuple(theirs), "/s"),
    ]
