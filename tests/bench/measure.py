"""What a benchmark says: rows with a goal and a floor, and the numbers of a process from /proc.

A row's values come from rounds in which the ways that are compared took turns on the same broker, so noise
hits both; the row stands by its median. `pass` means that the goal is met, `short` that it is not; below the
committed floor (floors.json) the run as a whole fails.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

FLOORS = Path(__file__).with_name("floors.json")
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Row:
    """One line of the table. `goal` None: told for comparison only. `least`: more is better."""

    name: str
    what: str
    values: tuple[float, ...]
    unit: str = "×"
    goal: float | None = None
    least: bool = True

    @property
    def median(self) -> float:
        """What the row stands by."""
        return statistics.median(self.values)

    def meets(self, limit: float) -> bool:
        """Whether the median is on the right side of `limit`."""
        return self.median >= limit if self.least else self.median <= limit

    @property
    def verdict(self) -> str:
        """`pass`, `short`, or nothing where there is no goal."""
        return "" if self.goal is None else "pass" if self.meets(self.goal) else "short"

    def number(self, value: float) -> str:
        """A value of this row in few digits."""
        if value and abs(value) < 0.1:
            return f"{value:.3f}"
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"

    def as_json(self) -> dict[str, object]:
        """For the file that the report is made of."""
        return asdict(self)

    @classmethod
    def of_json(cls, data: dict[str, object]) -> Row:
        """The other way round."""
        return cls(**{**data, "values": tuple(data["values"])})  # type: ignore[arg-type]


def below_floor(rows: Sequence[Row]) -> list[str]:
    """Names of rows that are worse than what is committed as acceptable on a slow, noisy machine."""
    floors: dict[str, float] = json.loads(FLOORS.read_text())
    return [row.name for row in rows if row.name in floors and not row.meets(floors[row.name])]


def ratio(
    name: str,
    what: str,
    over: Sequence[float],
    under: Sequence[float],
    goal: float | None,
    *,
    least: bool = True,
) -> Row:
    """A row of ratios, pair by pair."""
    return Row(name, what, tuple(a / b for a, b in zip(over, under, strict=True)), goal=goal, least=least)


def speed() -> float:
    """What one core does, in thousands a CPU-second: a document of an event's size is written as JSON, hashed
    and read again. The best of five, so that it is the machine's figure and not its neighbours'.
    """
    document = {
        f"field {number}": ["vda", number, {"path": "/var/lib/libvirt/images/a"}] for number in range(20)
    }
    times = 500

    def one() -> float:
        begun = time.process_time()
        for _ in range(times):
            text = json.dumps(document)
            hashlib.sha256(text.encode()).digest()
            json.loads(text)
        return times / (time.process_time() - begun) / 1000

    return max(one() for _ in range(5))


# ------------------------------------------------------------------------------------- /proc


def memory(pid: int) -> dict[str, float]:
    """VmRSS, RssAnon, RssFile, VmHWM of a process, in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = {line.split(":")[0]: line.split()[1] for line in lines if ":" in line and len(line.split()) > 1}
    return {key: int(found[key]) / 1024 for key in ("VmRSS", "RssAnon", "RssFile", "VmHWM")}


def cpu_seconds(pid: int) -> float:
    """CPU time of a process, all its threads, in ns resolution where the kernel has it."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            total += int((task / "schedstat").read_text().split()[0])
        except (OSError, IndexError):
            continue
    if total:
        return total / 1e9
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / TICKS


def wakeups(pid: int) -> dict[str, int]:
    """Voluntary context switches of each thread: how often it slept and was woken; by name and number."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            status = (task / "status").read_text()
            name = (task / "comm").read_text().strip()
        except OSError:
            continue  # it ended
        line = next(line for line in status.splitlines() if line.startswith("voluntary_ctxt"))
        found[f"{name}:{task.name}"] = int(line.split()[1])
    return found
