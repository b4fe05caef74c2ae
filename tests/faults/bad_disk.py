"""The disk under a running agent fills up, fails, or turns read-only: python -m tests.faults.bad_disk [runs]

The obligations are the callbacks that were made: each is in a delivered event's count, or in the count that
a gap event names as dropped, and that is what `virtbus_dropped_total` says. `back_max_seconds` is the longest
time from the mended disk to the first commit. `many`: more different errors than are kept in memory, so that
some must be dropped. `aborted`: the kernel turned the file system read-only (ext4 after an error), which only
an unmount mends: the agent stays up until then, and after its restart all that was committed arrives.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tests.faults.amqp_kit import QUEUE, drain_queue, make_queue, private_broker
from tests.faults.disks import Disk, failing_disk, missing_tools, read_only_disk, read_only_files, small_disk
from tests.faults.kills import Bench
from tests.waiting import wait_until
from virtbus.agent.agent import Agent, AgentOptions
from virtbus.agent.incidents import IncidentLimits, Incidents
from virtbus.bus import BusOptions, open_bus
from virtbus.envelope import uuid7
from virtbus.model import Event, IoError, Stamp
from virtbus.spool import Spool, SpoolLimits
from virtbus.telemetry import METRICS, configure
from virtbus.testing import FakeSource, a_raw_io_error

AGENT = "11111111-2222-4333-8444-555555555555"
LAST = "ffffffff-ffff-4fff-8fff-ffffffffffff"  # the domain of the error that ends a wait


@dataclass
class Account:
    """Counts of one run; `told` are callbacks in delivered events, `named` those that gap events count."""

    made: int
    told: int
    named: int
    counter: int
    gaps: int  # gap events about the disk
    crashes: int
    duplicates: int
    back_seconds: float

    @property
    def lost(self) -> int:
        return self.made - self.told - self.named

    @property
    def good(self) -> bool:
        return (
            self.lost == 0
            and self.named == self.counter
            and self.gaps > 0
            and self.crashes == 0
            and self.back_seconds <= 5.0
        )


class Watched(Agent):
    """An agent that tells which domains its committed events are about."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.committed: set[str] = set()

    def _committed(self, events: Sequence[Event], stamps: Sequence[Stamp]) -> None:
        self.committed.update(event.domain.uuid for event in events if isinstance(event, IoError))
        super()._committed(events, stamps)


def start(state: Path, url: str) -> Watched:
    """An agent in this process; each callback is an event of its own, so that the counts are out at once."""
    source = FakeSource()
    agent = Watched(
        source=source,
        bus=open_bus(url, BusOptions()),
        spool=Spool.open(state, limits=SpoolLimits(), agent_id=AGENT),
        incidents=Incidents(IncidentLimits(fold=False), new_id=lambda: uuid7(time.time_ns())),
        agent_id=AGENT,
        options=AgentOptions(heartbeat_seconds=0.0, fold=False),
    )
    agent.start()
    return agent


def feed(agent: Agent, count: int, domains: int, seconds: float) -> int:
    """`count` callbacks of `domains` domains, spread over `seconds`; how many."""
    begun = time.monotonic()
    for number in range(count):
        uuid = f"00000000-0000-4000-8000-{number % domains:012d}"
        agent.queue.put(a_raw_io_error(domain_uuid=uuid, observed_at=time.time_ns()))
        if number % 100 == 0:
            time.sleep(max(0.0, begun + seconds * number / count - time.monotonic()))
    return count


def finish(agent: Agent) -> None:
    """Wait until everything that was observed has been confirmed."""
    wait_until(lambda: len(agent.queue) == 0, timeout=120, what="the intake's queue")
    # The queue is empty before its last batch is committed; what is observed now comes behind that batch.
    agent.queue.put(a_raw_io_error(domain_uuid=LAST, observed_at=time.time_ns()))
    wait_until(lambda: LAST in agent.committed, timeout=120, what="the last commit")
    agent.committed.discard(LAST)

    def done() -> bool:
        stats = agent.spool.stats()
        return not (stats.pending or stats.unsettled or stats.unnamed)

    wait_until(done, timeout=240, what="the last confirmation")


def one(url: str, disk: Disk, *, callbacks: int, domains: int) -> Account:
    """Harm the disk under load, mend it, and account for every callback."""
    make_queue(url)
    dropped = METRICS.dropped._value.get()
    agent = start(disk.at / "state", url)
    wait_until(agent.intake.opened.is_set, timeout=20, what="the start")
    made = feed(agent, 200, 20, 0.2) + 2
    finish(agent)
    disk.harm()
    made += feed(agent, callbacks, domains, 3.0)
    wait_until(lambda: agent.intake.writer.error is not None, timeout=20, what="the disk's refusal")
    crashes = len(agent.dead_threads())
    committed = agent.spool.stats().committed_sequence
    disk.mend()
    mended = time.monotonic()
    wait_until(lambda: agent.spool.stats().committed_sequence > committed, timeout=60, what="the next commit")
    back = time.monotonic() - mended
    made += feed(agent, 50, 10, 0.1)
    finish(agent)
    crashes += len(agent.dead_threads())
    agent.stop()
    agent.join()
    counter = int(METRICS.dropped._value.get() - dropped)
    stored = drain_queue(url, QUEUE)
    first = dict(stored)
    told = named = gaps = 0
    for body in first.values():
        data = json.loads(body)
        if "occurrences" in data:
            told += data["occurrences"]["count"]
        else:
            named += data["missing_occurrences"]
            gaps += data["reason"] == "spool_unwritable"
    return Account(made, told, named, counter, gaps, crashes, len(stored) - len(first), back)


def aborted(url: str, folder: Path, runs: int) -> bool:
    """The kernel turns the disk read-only under load; only a restart on the mended disk helps."""
    with read_only_disk(folder, 128) as disk:
        bench = Bench(url, disk.at)
        try:
            for _ in range(runs):
                bench.run("random", rate=500, kill_after=10.0, midway=lambda: (time.sleep(1.0), disk.harm()))
                disk.mend()
            bench.finish()
            return bench.report("bad_disk[aborted]", runs)
        finally:
            bench.close()


Maker = Callable[[Path], AbstractContextManager[Disk]]
KINDS: dict[str, tuple[Maker, int, int]] = {
    # kind: (disk, callbacks while it is bad, different domains)
    "full": (lambda folder: small_disk(folder, 64), 12_000, 50),
    "eio": (lambda folder: failing_disk(folder, 128), 12_000, 50),
    "read_only": (lambda folder: read_only_files(folder, 128), 12_000, 50),
    "many": (lambda folder: small_disk(folder, 256), 50_000, 40_000),
}


def main() -> None:
    """Print a line a kind of trouble."""
    configure(level="error", stream=io.StringIO())  # the failures are what is asked for
    if missing := missing_tools():
        sys.exit(f"bad_disk needs {', '.join(missing)} (Debian: e2fsprogs, mount) and root")
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    chosen = sys.argv[2:] or list(KINDS)
    good = True
    with private_broker() as broker:
        configure(level="error", stream=io.StringIO())
        for kind in chosen:
            if kind not in KINDS:
                continue
            make, callbacks, domains = KINDS[kind]
            accounts = []
            for _ in range(runs if kind != "many" else max(1, runs // 5)):
                with (
                    tempfile.TemporaryDirectory(prefix="vbdisk-", dir="/tmp") as folder,
                    make(Path(folder)) as disk,
                ):
                    url = broker.url(broker.vhost())
                    accounts.append(one(url, disk, callbacks=callbacks, domains=domains))
            good = all(account.good for account in accounts) and good
            total = {
                field.name: sum(getattr(account, field.name) for account in accounts)
                for field in fields(Account)
                if field.name != "back_seconds"
            }
            words = {
                "runs": len(accounts),
                "callbacks": total["made"],
                "lost": sum(account.lost for account in accounts),
                "duplicates": total["duplicates"],
                "dropped": total["named"],
                "counter": total["counter"],
                "gaps": total["gaps"],
                "crashes": total["crashes"],
                "back_max_seconds": round(max(account.back_seconds for account in accounts), 2),
            }
            print(f"bad_disk[{kind}]", *(f"{name}={value}" for name, value in words.items()), flush=True)
        if not sys.argv[2:] or "aborted" in sys.argv[2:]:
            with tempfile.TemporaryDirectory(prefix="vbdisk-", dir="/tmp") as folder:
                good = aborted(broker.url(broker.vhost()), Path(folder), max(1, runs // 3)) and good
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
