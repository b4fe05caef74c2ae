"""Random damage to the spool's files: it starts, publishes nothing corrupt, and names what is missing.

As a script: `python -m tests.faults.spool_damage [runs] [seed]` prints one line.
"""

from __future__ import annotations

import io
import random
import shutil
import sqlite3
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.spool_kit import Book, HandClock, crash, gap, gaps_of, io_error, open_spool, resolved
from virtbus import telemetry
from virtbus.model import Confirmed, Deferred, Gap, Refused, to_datetime
from virtbus.seen import Moment
from virtbus.spool import Spool
from virtbus.words import Phase

KINDS = ("flip", "flips", "sector", "page", "truncate", "empty", "remove")


@dataclass
class Tally:
    runs: int = 0
    started: int = 0
    set_aside: int = 0
    delivered: int = 0
    named: int = 0
    corrupt_published: int = 0
    id_reused: int = 0
    unnamed_missing: int = 0
    notes: list[str] = field(default_factory=list)

    def line(self) -> str:
        return "spool-damage " + " ".join(
            f"{name}={getattr(self, name)}" for name in self.__dataclass_fields__ if name != "notes"
        )

    @property
    def clean(self) -> bool:
        return self.started == self.runs and not (
            self.corrupt_published or self.id_reused or self.unnamed_missing
        )


@dataclass
class Base:
    """A spool with a history, as a kill left it, and what its callers were promised."""

    folder: Path
    book: Book
    clock: HandClock
    recorded: dict[str, int]  # id → when it was committed
    bodies: dict[str, bytes]


def first_gap(spool: Spool, clock: HandClock) -> Gap:
    """The first event of a start, as the agent makes it."""
    opening = spool.opening
    since = opening.last_alive_ns
    return Gap(
        host=None,
        agent_id=gap().agent_id,
        reason="agent_down",
        detail=opening.damage,
        started_at=None if since is None else to_datetime(since),
        ended_at=to_datetime(clock.wall_ns),
        previous=opening.previous,
        missing=opening.missing,
        missing_events=sum(item.last - item.first + 1 for item in opening.missing),
    )


def make_base(root: Path, number: int, chance: random.Random) -> Base:
    """Several runs with commits, outcomes of every kind, checkpoints now and then, and a kill at the end."""
    clock, book = HandClock(), Book()
    recorded: dict[str, int] = {}
    folder = root / f"base{number}-0"
    runs = chance.randint(1, 3)
    for run in range(runs):
        spool = open_spool(folder, clock=clock)
        stamps = spool.commit([first_gap(spool, clock)])
        for _ in range(chance.randint(3, 25)):
            clock.pass_time(chance.random() * 3)
            domain = chance.randint(0, 7)
            events = [
                chance.choice((io_error(domain), io_error(domain, phase=Phase.UPDATED), resolved(domain)))
                for _ in range(chance.randint(1, 6))
            ]
            stamps += spool.commit(events, {f"state-{domain}": b"x" * chance.randint(1, 300)})
            if chance.random() < 0.5:
                taken = spool.take(chance.randint(1, 6), frozenset())
                outcomes = []
                for record in taken:
                    book.went_out(record)
                    outcome = chance.choice(
                        (Confirmed(), Confirmed(), Deferred(OSError("cut")), Refused(ValueError("no")))
                    )
                    if isinstance(outcome, Confirmed):
                        book.arrived(record)
                    outcomes.append((record, outcome))
                spool.settle(outcomes)
            if chance.random() < 0.1:
                db = sqlite3.connect(folder / "spool.db")
                db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
                db.close()
            spool.alive(Moment.of(clock()))
        book.promise(stamps)
        recorded.update((stamp.id, stamp.recorded_ns) for stamp in stamps)
        if chance.random() < 0.3:
            spool.close()
        after = crash(folder, root / f"base{number}-{run + 1}")
        spool.close()
        folder = after
        clock.pass_time(5)
    pristine = sqlite3.connect(crash(folder, root / f"base{number}-pristine") / "spool.db")
    bodies = dict(pristine.execute("SELECT id, body FROM events"))
    pristine.close()
    return Base(folder, book, clock, recorded, bodies)


def damage(folder: Path, chance: random.Random) -> str:
    """Harm one or two of the files; what was done, for the note of a failure."""
    done = []
    for _ in range(chance.choice((1, 1, 2))):
        files = [folder / name for name in ("spool.db", "spool.db-wal") if (folder / name).exists()]
        files = [path for path in files if path.stat().st_size]
        if not files:
            break
        path = chance.choice(files)
        data = bytearray(path.read_bytes())
        kind = chance.choices(KINDS, (30, 20, 10, 8, 20, 2, 2))[0]
        at = chance.randrange(len(data))
        if kind == "flip":
            data[at] ^= 1 << chance.randrange(8)
        elif kind == "flips":
            for _ in range(chance.randint(2, 20)):
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        elif kind == "sector":
            at -= at % 512
            data[at : at + 512] = bytes(len(data[at : at + 512]))
        elif kind == "page":
            at -= at % 4096
            data[at : at + 4096] = chance.randbytes(len(data[at : at + 4096]))
        elif kind == "truncate":
            del data[at:]
        elif kind == "empty":
            data.clear()
        done.append(f"{kind} {path.name} at {at} of {path.stat().st_size}")
        if kind == "remove":
            path.unlink()
        else:
            path.write_bytes(data)
    return ", ".join(done)


def check(base: Base, folder: Path, what: str, tally: Tally) -> None:
    """Start on the damaged files, let the broker take everything, and compare with what was promised."""
    tally.runs += 1
    clock = HandClock()
    clock.wall_ns, clock.monotonic = base.clock.wall_ns, base.clock.monotonic
    book = Book(
        dict(base.book.owed),
        dict(base.book.sent),
        dict(base.book.places),
        set(base.book.confirmed),
        set(base.book.named),
        dict(base.book.tails),
    )
    try:
        spool = open_spool(folder, clock=clock)
    except Exception as error:
        tally.notes.append(f"{what}: {type(error).__name__}: {error}")
        return
    fresh: set[str] = set()
    intervals: list[tuple[int | None, int]] = []
    try:
        tally.started += 1
        tally.set_aside += spool.opening.set_aside is not None
        stamps = spool.commit([first_gap(spool, clock), io_error(1), io_error(2)], {"state-1": b"y"})
        fresh = {stamp.id for stamp in stamps}
        book.promise(stamps)
        for _ in range(3):
            while batch := spool.take(100, frozenset()):
                for record in batch:
                    book.went_out(record)
                    book.arrived(record)
                    tally.delivered += 1
                    known = base.bodies.get(record.id)
                    if known is not None and known != record.body:
                        tally.corrupt_published += 1
                        tally.notes.append(f"{what}: {record.id} is not what was committed")
                    if known is None and record.epoch != spool.epoch and record.id not in base.book.sent:
                        tally.corrupt_published += 1
                        tally.notes.append(f"{what}: {record.id} was never committed")
                    for data in gaps_of([record]):
                        started = data["started_at"]
                        intervals.append(
                            (None if started is None else parse(started), parse(data["ended_at"]))
                        )
                spool.settle([(record, Confirmed()) for record in batch])
            clock.pass_time(61)
            spool.alive(Moment.of(clock()))
            spool.commit(())
    except Exception as error:
        tally.notes.append(f"{what}: running: {type(error).__name__}: {error}")
        tally.started -= 1
        return
    finally:
        spool.close()
    if book.problems or fresh & set(base.recorded):
        tally.id_reused += 1
        tally.notes.append(f"{what}: {book.problems}")
    tally.named += len(book.named - base.book.named)
    missing = []
    for place in book.unaccounted(tails=True):
        at = base.recorded.get(book.owed[place], clock.wall_ns)
        if not any((start is None or start <= at) and at <= end for start, end in intervals):
            missing.append(place)
    if missing:
        tally.unnamed_missing += len(missing)
        tally.notes.append(f"{what}: {missing} are missing; opening {spool.opening}")


def parse(text: str) -> int:
    from datetime import datetime

    from virtbus.model import to_ns

    return to_ns(datetime.fromisoformat(text))


def run(runs: int, seed: int) -> Tally:
    """`runs` damages over histories of 25 each."""
    chance, tally = random.Random(seed), Tally()
    with tempfile.TemporaryDirectory(prefix="virtbus-damage-") as name:
        root = Path(name)
        for number in range(runs):
            if number % 25 == 0:
                base = make_base(root, number, chance)
            folder = root / f"run{number}"
            shutil.copytree(base.folder, folder)
            what = f"run {number} (seed {seed}): {damage(folder, chance)}"
            check(base, folder, what, tally)
            shutil.rmtree(folder)
    return tally


def main() -> int:
    telemetry.configure(stream=io.StringIO())
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 30)
    tally = run(runs, seed)
    for note in tally.notes[:20]:
        print(note, file=sys.stderr)
    print(tally.line() + f" seed={seed}")
    return 0 if tally.clean else 1


if __name__ == "__main__":
    sys.exit(main())
