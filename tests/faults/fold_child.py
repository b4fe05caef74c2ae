"""An agent that a parent kills in a storm over many devices: fold_child.py LEDGER_FD STATE_DIR.

Its incidents fold at all three levels, its broker is away, and its ledger says what it has committed.
"""

from __future__ import annotations

import sys
import threading
import time
from itertools import count
from pathlib import Path

from tests.lab.storm_agent import keep
from virtbus.agent.agent import Agent, AgentOptions
from virtbus.agent.incidents import IncidentLimits, Incidents
from virtbus.envelope import uuid7
from virtbus.errors import BusUnavailable
from virtbus.observations import DomainState, RawIoError, SourceReady
from virtbus.sources import Sink
from virtbus.spool import Spool, SpoolLimits
from virtbus.testing import AGENT_ID, FakeBus, FakeSource

DEVICES = 2000
GUESTS = [f"00000000-0000-4000-8000-{number:012d}" for number in range(DEVICES // 10)]
LIMITS = IncidentLimits(max_open=100)


class Storm(FakeSource):
    """Three errors of each device in turn, with one reason and then another; every guest runs."""

    def snapshot(self) -> SourceReady:
        """See virtbus.sources.Source."""
        running = (DomainState(uuid, "guest", "running", False, None) for uuid in GUESTS)
        return SourceReady(self.host, time.time_ns(), tuple(running))

    def run(self, sink: Sink, stop: threading.Event) -> None:
        """See virtbus.sources.Source."""
        sink(self.snapshot())
        for number in count():
            if stop.is_set():
                break
            if number % 1000 == 0:
                time.sleep(0.01)  # a hundred thousand a second at most
            turn, device = divmod(number // 3, DEVICES)
            reason = "enospc" if turn % 2 else ""
            uuid, alias = GUESTS[device // 10], f"disk{device % 10}"
            sink(RawIoError(uuid, "guest", 1, "/p", alias, 2, reason, time.time_ns()))


def main() -> None:
    """Run until killed."""
    keep(int(sys.argv[1]))
    bus = FakeBus()
    bus.unavailable = BusUnavailable("away")
    Agent(
        source=Storm(),
        bus=bus,
        spool=Spool.open(Path(sys.argv[2]), limits=SpoolLimits(), agent_id=AGENT_ID),
        incidents=Incidents(LIMITS, new_id=lambda: uuid7(time.time_ns())),
        agent_id=AGENT_ID,
        options=AgentOptions(heartbeat_seconds=0.0),
    ).start()
    threading.Event().wait()


if __name__ == "__main__":
    main()
