"""The wall clock jumps an hour forward and back under load: python -m tests.faults.clock [--quick]

`clock[libfaketime]`: whole agents whose process sees the jumps, killed and started again in between; the
account is that of tests/faults/kills.py, and `pause_max_seconds` is the longest time without a commit at 200
errors a second: a wait that followed the wall clock would last an hour. `clock[injected]`: an agent with a
clock of its own; `late_max_seconds` is how far the windows of an incident (1, 2 and 4 s) and the heartbeats
(each second) strayed from monotonic time.
"""

from __future__ import annotations

import io
import itertools
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.amqp_kit import make_queue, private_broker
from tests.faults.kills import Bench
from virtbus.agent.agent import Agent, AgentOptions
from virtbus.agent.incidents import IncidentLimits, Incidents
from virtbus.bus import BusOptions, open_bus
from virtbus.envelope import uuid7
from virtbus.model import IoError, Now, Stamp
from virtbus.spool import Spool, SpoolLimits
from virtbus.telemetry import configure
from virtbus.testing import FakeSource, a_raw_io_error
from virtbus.words import Phase

AGENT = "11111111-2222-4333-8444-555555555555"
LIBRARY = "libfaketime.so.1"
HOUR = 3600


class Jumping:
    """The system's clocks with a wall clock that can be set."""

    ahead_ns = 0

    def __call__(self) -> Now:
        return Now(time.time_ns() + self.ahead_ns, time.monotonic())


@dataclass(frozen=True)
class Commit:
    at: float
    events: list[Any]
    stamps: list[Stamp]


def injected(url: str, folder: Path, *, seconds: float = 9.0) -> bool:
    """One domain's errors for `seconds`; the clock jumps forward after a third, back after two."""
    make_queue(url)
    clock = Jumping()
    spool = Spool.open(folder / "state", limits=SpoolLimits(), agent_id=AGENT, clock=clock)  # type: ignore[arg-type]
    commits: list[Commit] = []
    beats: list[float] = []
    commit = spool.commit

    def noted(events: Any, states: Any = None) -> list[Stamp]:
        stamps = commit(events, states)
        commits.append(Commit(time.monotonic(), list(events), stamps))
        return stamps

    spool.commit = noted
    source = FakeSource()
    agent = Agent(
        source=source,
        bus=open_bus(url, BusOptions()),
        spool=spool,
        incidents=Incidents(IncidentLimits(), new_id=lambda: uuid7(clock().wall_ns)),
        agent_id=AGENT,
        options=AgentOptions(heartbeat_seconds=1.0),
        clock=clock,
    )
    heartbeat = agent.heartbeat

    def beat() -> Any:
        beats.append(time.monotonic())
        return heartbeat()

    agent.heartbeat = beat
    agent.start()
    while not agent.intake.opened.is_set():
        time.sleep(0.01)
    begun = time.monotonic()
    while (passed := time.monotonic() - begun) < seconds:
        clock.ahead_ns = int([0, HOUR, -HOUR][min(2, int(3 * passed / seconds))] * 1e9)
        agent.queue.put(a_raw_io_error(observed_at=clock().wall_ns))
        time.sleep(0.05)
    agent.stop()
    agent.join()
    phases = [
        (each.at, event.incident.phase)
        for each in commits
        for event in each.events
        if isinstance(event, IoError) and each.at < begun + seconds
    ]
    opened = [at for at, phase in phases if phase is Phase.OPENED]
    updated = [at for at, phase in phases if phase is Phase.UPDATED]
    due = [opened[0] + after for after in (1, 3, 7) if after < seconds - 0.5]
    late = [abs(at - when) for at, when in zip(updated, due, strict=False)]
    late += [abs(after - before - 1.0) for before, after in itertools.pairwise(beats)]
    stamps = [stamp for each in commits for stamp in each.stamps]
    ids_used_twice = len(stamps) - len({stamp.id for stamp in stamps})
    numbers = [stamp.sequence or 0 for stamp in stamps]
    holes = sum(after != before + 1 for before, after in itertools.pairwise(numbers))
    unordered = sum(after.id <= before.id for before, after in itertools.pairwise(stamps))
    print(
        f"clock[injected] runs=1 jumps=2 opened={len(opened)} updated={len(updated)} expected={len(due)} "
        f"heartbeats={len(beats)} late_max_seconds={max(late):.2f} ids_used_twice={ids_used_twice} "
        f"ids_out_of_order={unordered} sequence_holes={holes}",
        flush=True,
    )
    return (
        (len(opened), len(updated)) == (1, len(due))
        and len(beats) >= seconds - 2
        and max(late) <= 1.0
        and not (ids_used_twice or holes or unordered)
    )


def faked(url: str, folder: Path, runs: int, library: Path) -> bool:
    """`runs` agents, killed one after the other, whose wall clocks jump; then a last one drains."""
    offset = folder / "offset"
    offset.write_text("+0")
    bench = Bench(url, folder)
    environment = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }

    told: list[float] = []
    note = bench._note

    def noted(line: str, begun: float) -> float | None:
        told.append(time.monotonic())
        return note(line, begun)

    bench._note = noted
    longest = 0.0

    def jumps() -> None:
        nonlocal longest
        begun = time.monotonic()
        for jump in ("+3600", "-3600", "+0"):
            time.sleep(2.0)
            offset.write_text(jump)
        time.sleep(2.0)
        moments = [at for at in told if at >= begun]
        longest = max(longest, *(after - before for before, after in itertools.pairwise(moments)))

    try:
        for _ in range(runs):
            bench.run("random", rate=200, kill_after=8.5, midway=jumps, **environment)
        bench.finish()
        good = bench.report("clock[libfaketime]", runs)
        print(f"clock[libfaketime] jumps={3 * runs} pause_max_seconds={longest:.2f}", flush=True)
        return good and longest <= 10.0
    finally:
        bench.close()


def main() -> None:
    """Print the lines."""
    quick = "--quick" in sys.argv
    good = True
    with private_broker() as broker, tempfile.TemporaryDirectory(prefix="vbclock-", dir="/tmp") as name:
        configure(level="error", stream=io.StringIO())
        folder = Path(name)
        good = injected(broker.url(broker.vhost()), folder, seconds=4.5 if quick else 9.0)
        found = [*Path("/usr/lib").glob(f"*/faketime/{LIBRARY}")]
        if found:
            good = faked(broker.url(broker.vhost()), folder, 1 if quick else 10, found[0]) and good
        else:
            print(f"clock[libfaketime] NOT RUN: it needs {LIBRARY} (Debian: libfaketime)", flush=True)
            good = False
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
