"""SIGKILL in storms over many devices: what was committed is counted exactly, at every level of folding."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from itertools import product
from pathlib import Path

import msgspec
import pytest

from tests.faults.fold_child import LIMITS
from tests.waiting import wait_until
from virtbus.model import Confirmed
from virtbus.spool import Spool, SpoolLimits
from virtbus.testing import AGENT_ID

LIVES = 4
ENOUGH = 5000  # callbacks that each life commits, at the least


def last(ledger: Path, word: str) -> int:
    """The last number behind a word of the ledger."""
    lines = [line.split() for line in ledger.read_text().splitlines()]
    return next((int(number) for said, number in reversed(lines) if said == word), 0)


def storm_until_killed(ledger: Path, state: Path) -> tuple[int, int]:
    """One life: callbacks that were committed for certain, and those that may have been."""
    with ledger.open("wb") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.fold_child", str(file.fileno()), str(state)],
            pass_fds=[file.fileno()],
        )
    try:
        wait_until(lambda: last(ledger, "done") >= ENOUGH, timeout=60, what="commits")
        time.sleep(random.uniform(0.1, 1.5))
    finally:
        child.kill()
        child.wait()
    return last(ledger, "done"), last(ledger, "begin")


@pytest.mark.slow
def test_storms_over_many_devices_lose_no_count_over_kills(tmp_path: Path) -> None:
    state = tmp_path / "state"
    lives = [storm_until_killed(tmp_path / f"ledger-{life}", state) for life in range(LIVES)]
    with closing(Spool.open(state, limits=SpoolLimits(), agent_id=AGENT_ID)) as spool:
        states = [msgspec.json.decode(kept) for key, kept in spool.states().items() if "incident/" in key]
        pending = sum(each["count"] for kept in states for each in kept.get("pending", ()))
        told, opened = 0, Counter[str]()
        while records := spool.take(256, frozenset()):
            for record in records:
                if record.attributes["type"].endswith("io_error.v1"):
                    data = msgspec.json.decode(record.body)
                    assert data["origin"] == "event"
                    told += data["occurrences"]["count"]
                    opened[data["incident"]["scope"]] += data["incident"]["phase"] == "opened"
            spool.settle([(record, Confirmed()) for record in records])
    assert told + pending in {sum(each) for each in product(*lives)}
    assert pending > 0
    assert min(opened["device"], opened["domain"], opened["host"]) > 0
    assert len(states) <= LIMITS.max_open
