"""An agent that kills itself at a named point; tells its parent each event over a pipe, after the commit.

    python -m tests.faults.kill_child FD STATE_DIR URL POINT NTH RATE

POINT is one of `POINTS`, "random" (the parent kills) or "drain" (no new errors; ends when all is
confirmed). NTH is the number of the visit to the point that kills. RATE is errors a second. Each error is an
event of its own (`incidents.fold = false`), so that there is much to lose.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from virtbus import telemetry
from virtbus.agent.agent import Agent, AgentOptions
from virtbus.agent.incidents import IncidentLimits, Incidents
from virtbus.bus import BusOptions, Feed, open_bus
from virtbus.envelope import uuid7
from virtbus.model import Event, Outcome, Record, Stamp
from virtbus.sources import Sink
from virtbus.spool import Spool, SpoolLimits, faults
from virtbus.testing import FakeSource, a_domain, a_raw_io_error, an_io_error

AGENT = "11111111-2222-4333-8444-555555555555"
DOMAINS = 50
# Named places of the path; those with an underscore are the spool's own.
POINTS = (
    "during_open",
    "before_commit",
    "after_commit",
    "after publish",
    "after ack",
    "during_settle",
    "after_settle",
    "during_compaction",
)


class Killer:
    """Ends this process with SIGKILL at the NTH visit to POINT."""

    def __init__(self, point: str, nth: int) -> None:
        self._point = point
        self._left = nth

    def visit(self, point: str) -> None:
        if point == self._point:
            self._left -= 1
            if self._left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)


class Storm(FakeSource):
    """Errors of many domains at a rate, for ever."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self._rate = rate

    def run(self, sink: Sink, stop: threading.Event) -> None:
        sink(self.snapshot())
        begun = time.monotonic()
        for number in itertools.count() if self._rate else ():
            if stop.wait(max(0.0, begun + number / self._rate - time.monotonic())):
                return
            sink(a_raw_io_error(domain_uuid=domain(number % DOMAINS), observed_at=time.time_ns()))
        stop.wait()


def domain(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012d}"


def main() -> None:
    fd, state_dir, url, point, nth, rate = sys.argv[1:]
    telemetry.configure(level="error", fmt="json")
    killer = Killer(point, int(nth))
    faults.hook = killer.visit
    pipe = os.fdopen(int(fd), "w", buffering=1)
    spool = Spool.open(Path(state_dir), limits=SpoolLimits(), agent_id=AGENT)
    commit = spool.commit

    def telling(events: list[Event], states: Any = None) -> list[Stamp]:
        stamps = commit(events, states)
        for stamp in stamps:
            pipe.write(json.dumps([stamp.id, stamp.epoch, stamp.sequence]) + "\n")
        return stamps

    spool.commit = telling
    if point == "during_compaction":
        # A backlog that is drained leaves free pages behind; only then there is something to compact.
        telling([an_io_error(domain=a_domain(uuid=domain(number % DOMAINS))) for number in range(3000)])
    bus = open_bus(url, BusOptions())
    publish = bus.publish

    def killable(feed: Feed) -> Iterator[tuple[Record, Outcome]]:
        class Watched:
            taken = 0

            def take(self, limit: int, busy: AbstractSet[str]) -> Any:
                if self.taken:
                    killer.visit("after publish")  # what the last call gave is on its way
                records = feed.take(limit, busy)
                self.taken += len(records)
                return records

        for each in publish(Watched()):
            killer.visit("after ack")  # confirmed, and not settled yet
            yield each

    bus.publish = killable
    agent = Agent(
        source=Storm(float(rate)),
        bus=bus,
        spool=spool,
        incidents=Incidents(IncidentLimits(fold=False), new_id=lambda: uuid7(time.time_ns())),
        agent_id=AGENT,
        options=AgentOptions(heartbeat_seconds=0.0, fold=False),
    )
    agent.start()
    if point == "drain":
        while not agent.intake.opened.is_set() or spool.stats().pending:
            time.sleep(0.01)
        agent.stop()
        agent.join()
        return
    threading.Event().wait(60)
    sys.exit(f"point {point!r} was not visited {nth} times in 60 s")


if __name__ == "__main__":
    main()
