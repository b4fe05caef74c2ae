"""What an event costs as the spool grows from 10³ to 10⁶ events, and the domains from 1 to 1,000.

CPU time of one process with a bus that confirms at once: a million events would measure the broker, not us.
Each size stands behind a backlog of that many events and does the same work: 2,000 events are taken and
settled, and 2,000 are committed in transactions of 20.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.bench.drain import AGENT, LIMITS, fill
from tests.bench.measure import Row
from virtbus.envelope import uuid7
from virtbus.model import Confirmed, Record
from virtbus.spool import Spool
from virtbus.testing import a_domain, an_io_error

SIZES = (1_000, 10_000, 100_000, 1_000_000)
DOMAINS = (1, 10, 100, 1000)
WORK = 2000


def cost(backlog: int, domains: int) -> tuple[float, float]:
    """µs of CPU (take and settle, commit) of one event behind `backlog` events of `domains` domains."""
    with tempfile.TemporaryDirectory(prefix="virtbus-bench-", dir="/var/tmp") as folder:
        fill(Path(folder) / "s", backlog, domains)
        spool = Spool.open(Path(folder) / "s", limits=LIMITS, agent_id=AGENT)
        made = [an_io_error(domain=a_domain(uuid=uuid7(number))) for number in range(domains)]
        work = min(WORK, backlog // 2)
        settled = 0
        begun = time.process_time()
        while settled < work:
            records: Sequence[Record] = spool.take(64, frozenset())
            spool.settle([(record, Confirmed()) for record in records])
            settled += len(records)
        middle = time.process_time()
        for start in range(0, WORK, 20):
            spool.commit([made[number % domains] for number in range(start, start + 20)])
        end = time.process_time()
        spool.close()
    return (middle - begun) / settled * 1e6, (end - middle) / WORK * 1e6


def rows(rounds: int, *, sizes: Sequence[int] = SIZES) -> list[Row]:
    """Costs behind each backlog and with each number of domains; the largest over the smallest."""
    taken: dict[int, list[float]] = {}
    committed: dict[int, list[float]] = {}
    by_domains: dict[int, list[float]] = {}
    for turn in range(rounds):
        for size in sizes:
            if size < 1_000_000 or turn == 0:  # filling a million takes minutes
                take, commit = cost(size, min(1000, size))
                taken.setdefault(size, []).append(take)
                committed.setdefault(size, []).append(commit)
        for domains in DOMAINS:
            by_domains.setdefault(domains, []).append(cost(10_000, domains)[1])
    found = []
    for name, each in (("take and settle", taken), ("commit", committed)):
        found += [
            Row(f"growth {name} {size}", f"{name}, {size:,} events in the spool", tuple(v), "µs")
            for size, v in each.items()
        ]
        first = sum(each[sizes[0]]) / len(each[sizes[0]])
        found.append(
            Row(
                f"growth {name}",
                f"{name}: {sizes[-1]:,} events ÷ {sizes[0]:,}",
                (found[-1].median / first,),
                goal=1.25,
                least=False,
            )
        )
    found += [
        Row(f"growth domains {n}", f"commit, {n:,} domains", tuple(v), "µs") for n, v in by_domains.items()
    ]
    most, one = by_domains[DOMAINS[-1]], by_domains[1]
    found.append(
        Row(
            "growth domains",
            "commit: 1,000 domains ÷ 1",
            tuple(a / b for a, b in zip(most, one, strict=True)),
            goal=1.25,
            least=False,
        )
    )
    return found
