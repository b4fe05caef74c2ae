"""A model of the spool against the real one: random commits, outcomes, crashes, wishes and clock jumps.

As a script it runs many examples and prints one line: `spool-model runs=… lost=… duplicates=…`.
"""

from __future__ import annotations

import io
import os
import shutil
import sqlite3
import sys
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.faults.spool_kit import Book, HandClock, crash, gap, invalid, io_error, open_spool, resolved
from virtbus import telemetry
from virtbus.model import Confirmed, Deferred, Record, Refused, Unroutable
from virtbus.seen import Moment
from virtbus.spool import SpoolLimits, requests
from virtbus.words import Phase

DOMAINS = st.integers(0, 4)
TALLY = {"runs": 0, "lost": 0, "duplicates": 0}


class SpoolMachine(RuleBasedStateMachine):
    """Whatever happens: what commit returned for arrives or is named, once or as an exact duplicate."""

    @initialize(room=st.sampled_from([30_000, 64 << 20]))
    def begin(self, room: int) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="virtbus-model-"))
        self.starts = 0
        self.clock = HandClock()
        self.limits = SpoolLimits(max_bytes=room)
        self.book = Book()
        self.states: dict[str, bytes] = {}
        self.flying: list[Record] = []
        self.order: dict[str, tuple[int, int]] = {}  # key → the newest (run, seq) that was confirmed
        self.runs: dict[str, int] = {}
        self.folder = self.root / "0"
        self._open()

    def _open(self) -> None:
        self.spool = open_spool(self.folder, limits=self.limits, clock=self.clock)
        assert self.spool.opening.damage is None
        self.runs[self.spool.epoch] = self.starts
        self.flying = []

    @rule(
        domains=st.lists(DOMAINS, max_size=6),
        kind=st.sampled_from(["opened", "updated", "resolved", "gap", "invalid", "big"]),
        state=st.sampled_from([None, b"one", b"two"]),
    )
    def commit(self, domains: list[int], kind: str, state: bytes | None) -> None:
        make = {
            "opened": io_error,
            "updated": lambda domain: io_error(domain, phase=Phase.UPDATED, count=3),
            "resolved": resolved,
            "gap": lambda _: gap("source_lost"),
            "invalid": lambda _: invalid(),
            "big": lambda domain: io_error(domain, phase=Phase.UPDATED, padding=6000),
        }[kind]
        name = f"incident-{len(domains)}"
        stamps = self.spool.commit([make(domain) for domain in domains], {name: state})
        self.book.promise(stamps)
        if state is None:
            self.states.pop(name, None)
        else:
            self.states[name] = state

    @rule(limit=st.integers(1, 8), busy=st.sets(DOMAINS, max_size=2))
    def take(self, limit: int, busy: set[int]) -> None:
        keys = frozenset(io_error(domain).domain.uuid for domain in busy)
        taken = self.spool.take(limit, keys)
        assert len(taken) <= limit
        flying = {record.key for record in self.flying}
        for record in taken:
            assert record.key not in keys
            assert record.key not in flying, "two of one key are in flight"
            flying.add(record.key)
            place = (self.runs[record.epoch], record.seq)
            assert place > self.order.get(record.key, (-1, 0)) or record.id in self.book.confirmed
            TALLY["duplicates"] += record.id in self.book.confirmed
            self.book.went_out(record)
        self.flying += taken

    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        outcomes = []
        for record in self.flying:
            outcome = data.draw(
                st.sampled_from(
                    [
                        Confirmed(),
                        Confirmed(),
                        Deferred(OSError("cut")),
                        Unroutable(),
                        Refused(ValueError("no")),
                    ]
                )
            )
            outcomes.append((record, outcome))
            if isinstance(outcome, Confirmed):
                self.book.arrived(record)
                self.order[record.key] = max(
                    self.order.get(record.key, (-1, 0)), (self.runs[record.epoch], record.seq)
                )
        self.flying = []
        self.spool.settle(outcomes)

    @rule(seconds=st.sampled_from([0.5, 15.0, 61.0]), step=st.sampled_from([0.0, 3600.0, -3600.0]))
    def time_passes(self, seconds: float, step: float) -> None:
        self.clock.pass_time(seconds)
        self.clock.jump(step)
        assert self.spool.alive(Moment.of(self.clock()))

    @rule()
    def killed(self) -> None:
        self._lift_off()
        crash(self.folder, self.root / str(self.starts))
        self._land()

    @rule(arrived=st.integers(0, 3))
    def killed_before_settling(self, arrived: int) -> None:
        """The broker had some of them; the spool never heard of it: duplicates, nothing else."""
        self._lift_off()
        crash(self.folder, self.root / str(self.starts))
        for record in self.flying[:arrived]:
            self.book.arrived(record)
        self._land()

    @rule()
    def restarted(self) -> None:
        self._lift_off()
        self.spool.close()
        crash(self.folder, self.root / str(self.starts))
        self._land()

    def _lift_off(self) -> None:
        self.starts += 1

    def _land(self) -> None:
        self.spool.close()
        self.folder = self.root / str(self.starts)
        self._open()

    @rule(action=st.sampled_from([requests.RETRY, requests.DROP]), table=st.sampled_from(["events", "dead"]))
    def an_operator_wishes(self, action: str, table: str) -> None:
        db = sqlite3.connect(self.folder / "spool.db", isolation_level=None)
        rows = [row for (row,) in db.execute(f"SELECT position FROM {table} ORDER BY position LIMIT 3")]
        requests.submit(db, action, rows)
        db.close()

    @invariant()
    def numbers_are_sane(self) -> None:
        if not hasattr(self, "spool"):
            return
        stats = self.spool.stats()
        assert stats.in_flight == len(self.flying)
        assert stats.confirmed_sequence <= stats.committed_sequence
        assert min(stats.pending, stats.bytes, stats.dead, stats.dead_bytes, stats.parked_keys) >= 0
        assert (stats.pending == 0) == (stats.bytes == 0)
        assert self.spool.states() == self.states
        assert not self.book.problems, self.book.problems

    def teardown(self) -> None:
        """The broker takes everything: now nothing may be left that is not accounted for."""
        if not hasattr(self, "spool"):
            return
        try:
            self.spool.settle([(record, Deferred(OSError("cut"))) for record in self.flying])
            for _ in range(8):
                while batch := self.spool.take(100, frozenset()):
                    for record in batch:
                        self.book.went_out(record)
                        self.book.arrived(record)
                    self.spool.settle([(record, Confirmed()) for record in batch])
                self.clock.pass_time(61.0)
                self.spool.alive(Moment.of(self.clock()))
                self.spool.commit(())
            lost = self.book.unaccounted()
            TALLY["runs"] += 1
            TALLY["lost"] += len(lost)
            stats = self.spool.stats()
            assert not lost, lost
            assert not self.book.problems, self.book.problems
            assert (stats.pending, stats.bytes, stats.unnamed) == (0, 0, 0)
            assert stats.confirmed_sequence == stats.committed_sequence
        finally:
            self.spool.close()
            shutil.rmtree(self.root)


def model_settings(examples: int) -> settings:
    return settings(
        max_examples=examples,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )


def main() -> int:
    """Run as many examples as the first argument says (1,000)."""
    examples = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    telemetry.configure(stream=io.StringIO())
    run_state_machine_as_test(SpoolMachine, settings=model_settings(examples))
    print("spool-model " + " ".join(f"{name}={value}" for name, value in TALLY.items()))
    return 0 if TALLY["lost"] == 0 else 1


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    sys.exit(main())
