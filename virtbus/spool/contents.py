"""Reading a spool's file: whole when it is healthy, whatever can be read when it is not.

`load` trusts nothing: SQLite's own check, our version, every row's checksum, and the ledger. `rescue`
copies what passes into a new file and sets the old one aside; each of its steps can be killed.
"""

from __future__ import annotations

import json
import sqlite3
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from virtbus.model import SequenceRange, to_datetime
from virtbus.seen import boot_id
from virtbus.spool import files
from virtbus.spool.files import COLUMNS, Damaged, SqlValue
from virtbus.spool.index import Index
from virtbus.spool.ledger import CHUNK_BYTES, FULL, Account, mark
from virtbus.words import GapReason

KEEP_SET_ASIDE = 2  # damaged files that are kept: they hold up to the spool's whole size each
_MAX_PROBES = 500  # look-ups between two unreadable places
_BIRTHS = 4096

# Whatever a damaged file can make SQLite or a conversion of its values raise.
UNREADABLE = (sqlite3.Error, ValueError, TypeError, OverflowError, MemoryError)


@dataclass(frozen=True, slots=True)
class Loss:
    """Sequences that are gone and that no gap event names yet."""

    number: int  # the row in the file
    ranges: tuple[SequenceRange, ...]
    reason: GapReason
    occurrences: int  # counted errors that went with them
    started_ns: int | None
    detail: str | None


def loss_row(loss: Loss) -> tuple[SqlValue, ...]:
    """The values of table losses; a loss in the file has one range."""
    (item,) = loss.ranges
    return files.sealed(
        "losses",
        (
            loss.number,
            item.epoch,
            item.first,
            item.last,
            loss.reason,
            loss.occurrences,
            loss.started_ns,
            loss.detail,
            b"",
        ),
    )


def run_row(
    account: Account, *, last: int | None = None, alive_ns: int | None = None
) -> tuple[SqlValue, ...]:
    """The values of table runs."""
    return files.sealed(
        "runs",
        (
            account.run,
            account.epoch,
            account.started_ns,
            account.alive_ns if alive_ns is None else alive_ns,
            account.last if last is None else last,
            account.below,
            b"",
        ),
    )


def clock_row(booted_ns: int) -> tuple[SqlValue, ...]:
    """The row of table meta that says in which clock `alive_ns` is told: this boot's, and its beginning."""
    return files.sealed("meta", ("clock", json.dumps({"boot": boot_id(), "booted_ns": booted_ns}), b""))


@dataclass(frozen=True, slots=True)
class GapFacts:
    """What a gap event's row says in its `names` column, independent of any schema version."""

    ranges: tuple[SequenceRange, ...]
    occurrences: int = 0
    found: int = 0
    started_ns: int | None = None
    ended_ns: int = 0
    previous: tuple[str, int] | None = None

    def dump(self) -> str:
        """The column's text."""
        return json.dumps(
            {
                "ranges": [[item.epoch, item.first, item.last] for item in self.ranges],
                "occurrences": self.occurrences,
                "found": self.found,
                "started_ns": self.started_ns,
                "ended_ns": self.ended_ns,
                "previous": self.previous,
            },
            separators=(",", ":"),
        )

    @classmethod
    def parse(cls, text: str) -> GapFacts:
        """The column's text again; what a later release adds is ignored."""
        data = json.loads(text)
        previous = data.get("previous")
        return cls(
            tuple(SequenceRange(epoch, first, last) for epoch, first, last in data["ranges"]),
            data.get("occurrences", 0),
            data.get("found", 0),
            data.get("started_ns"),
            data.get("ended_ns", 0),
            (previous[0], previous[1]) if previous else None,
        )


class Births:
    """When rows were committed, on the monotonic clock, in buckets: a clock that jumps ages nothing."""

    def __init__(self) -> None:
        self._last: list[int] = []  # the last position of each bucket
        self._born: list[float] = []

    def add(self, position: int, born: float) -> None:
        """Positions grow; a bucket is a second wide, wider when there are many."""
        if self._born and born - self._born[-1] < 1.0:
            self._last[-1] = position
            return
        self._last.append(position)
        self._born.append(born)
        if len(self._last) > _BIRTHS:
            # Each bucket keeps its younger half's time: nothing is called older than it is.
            self._last, self._born = self._last[1::2], self._born[1::2]

    def of(self, position: int) -> float | None:
        """The time of a row's bucket: the row is at least that old."""
        at = bisect_left(self._last, position)
        return self._born[at] if at < len(self._born) else None

    def forget(self, before: int) -> None:
        """Drop buckets of rows below a position."""
        at = bisect_left(self._last, before)
        if at > 64:
            del self._last[:at], self._born[:at]


@dataclass(slots=True)
class Contents:
    """What a healthy file holds, without bodies."""

    accounts: dict[str, Account] = field(default_factory=dict)
    present: set[str] = field(default_factory=set)  # epochs with rows here: waiting events, dead letters
    index: Index = field(default_factory=Index)
    births: list[tuple[int, int]] = field(default_factory=list)  # (position, created_ns), a second apart
    bytes: int = 0
    dead: int = 0
    dead_bytes: int = 0
    next_position: int = 1
    losses: list[Loss] = field(default_factory=list)
    holes: tuple[SequenceRange, ...] = ()
    clock: dict[str, Any] = field(default_factory=dict)  # in which the last run's times are told
    opening: dict[str, Any] = field(default_factory=dict)  # what an earlier start found and nobody told yet


def select_sql(table: str, tail: str = "") -> str:
    """SELECT of all columns that this release knows."""
    return f"SELECT {','.join(COLUMNS[table])} FROM {table} {tail}"  # noqa: S608 - our own names


def load(connection: sqlite3.Connection) -> Contents:
    """Read and check everything. Raises Damaged at the first thing that is not as it was written."""
    try:
        problems = [row[0] for row in connection.execute("PRAGMA quick_check(1)")]
        if problems != ["ok"]:
            raise Damaged(f"SQLite's check says: {problems[0] if problems else 'nothing'}")
        (vacuum,) = connection.execute("PRAGMA auto_vacuum").fetchone()
        if vacuum != 2:
            raise Damaged("the file's header is not what was written")
        return _load(connection)
    except UNREADABLE as error:
        raise Damaged(f"{type(error).__name__}: {error}") from error


def _whole_rows(connection: sqlite3.Connection, table: str) -> Iterator[Any]:
    for row in connection.execute(select_sql(table, f"ORDER BY {COLUMNS[table][0]}")):
        if not files.is_whole(table, row):
            raise Damaged(f"a row of table {table} ({row[0]!r}) is not what was written")
        yield row


def _load(connection: sqlite3.Connection) -> Contents:
    found = Contents()
    for name, value, _ in _whole_rows(connection, "meta"):
        if name == "opening":
            found.opening = json.loads(value)
        elif name == "clock":
            found.clock = json.loads(value)
    by_run: dict[int, Account] = {}
    for run, epoch, started_ns, alive_ns, last, below, _ in _whole_rows(connection, "runs"):
        by_run[run] = found.accounts[epoch] = Account(run, epoch, started_ns, alive_ns, last, below)
    for slot, settled, _ in _whole_rows(connection, "accounts"):
        account = by_run.get(slot >> 32)
        if account is None or len(settled) != CHUNK_BYTES:
            raise Damaged("a bitmap belongs to no run")
        account.bitmaps[slot & 0xFFFF_FFFF] = FULL if settled == FULL else bytearray(settled)
    present: dict[str, dict[int, bytearray]] = {epoch: {} for epoch in found.accounts}
    _load_events(connection, found, present)
    for item in _whole_rows(connection, "losses"):
        number, epoch, first, last, reason, occurrences, started_ns, detail, _ = item
        ranges = (SequenceRange(epoch, first, last),)
        found.losses.append(Loss(number, ranges, GapReason(reason), occurrences, started_ns, detail))
        mark(present.setdefault(epoch, {}), first, last)
    dead = connection.execute("SELECT count(*), total(bytes), max(position) FROM dead").fetchone()
    found.present |= {epoch for (epoch,) in connection.execute("SELECT DISTINCT epoch FROM dead")}
    found.dead, found.dead_bytes = dead[0], int(dead[1])
    found.next_position = max(found.next_position, int(dead[2] or 0) + 1)
    list(_whole_rows(connection, "states"))
    holes: list[SequenceRange] = []
    for epoch, account in found.accounts.items():
        holes += account.holes(present[epoch])
    found.holes = tuple(holes)
    return found


def _load_events(
    connection: sqlite3.Connection, found: Contents, present: dict[str, dict[int, bytearray]]
) -> None:
    newest: dict[str, tuple[int, int]] = {}  # key → (run, seq) of its last row
    unsorted: set[str] = set()
    named: list[SequenceRange] = []
    for row in _whole_rows(connection, "events"):
        position, epoch, seq, _, key, rank, _, size, created_ns, attempts, _, names, _, _ = row
        if not isinstance(attempts, int):
            raise Damaged(f"the number of attempts of event {seq} of run {epoch} is not what was written")
        account = found.accounts.get(epoch)
        if account is None or seq > account.last:
            # The run's row is older than its events, or gone: they tell what it would have said.
            raise Damaged(f"run {epoch} has an event {seq} that its record does not know")
        if not mark(present[epoch], seq, seq):
            raise Damaged(f"event {seq} of run {epoch} is there twice")
        place = (account.run, seq)
        if place < newest.get(key, (0, 0)):
            unsorted.add(key)
        newest[key] = place
        found.present.add(epoch)
        found.index.add(position, key, rank)
        found.bytes += size
        found.next_position = position + 1
        if not found.births or abs(created_ns - found.births[-1][1]) >= 1_000_000_000:
            found.births.append((position, created_ns))
        else:
            found.births[-1] = (position, found.births[-1][1])
        if names is not None:
            named += GapFacts.parse(names).ranges
    for item in named:
        if item.epoch in present:
            mark(present[item.epoch], item.first, min(item.last, found.accounts[item.epoch].last))
    for key in unsorted:
        order = {
            position: (found.accounts[epoch].run, seq)
            for position, epoch, seq in connection.execute(
                "SELECT position, epoch, seq FROM events WHERE key=?", (key,)
            )
        }
        found.index.sort(key, order)


# ---------------------------------------------------------------------------------------- rescue


@dataclass(frozen=True, slots=True)
class Rescue:
    """What came of a damaged file."""

    set_aside: Path
    rescued: int  # events


def readable(connection: sqlite3.Connection, table: str) -> Iterator[tuple[SqlValue, ...]]:
    """Rows of a damaged table: from the front, from the back, and then between what is broken."""
    columns = COLUMNS[table]
    key = columns[0]
    low: Any = None
    try:
        for row in connection.execute(select_sql(table, f"ORDER BY {key}")):
            yield row
            low = row[0]
        return
    except UNREADABLE:
        pass
    high: Any = None
    try:
        for row in connection.execute(select_sql(table, f"ORDER BY {key} DESC")):
            if low is not None and type(row[0]) is type(low) and row[0] <= low:
                return
            yield row
            high = row[0]
    except UNREADABLE:
        pass
    if isinstance(low, str) or isinstance(high, str):
        return
    probe, step, tries = (low or 0) + 1, 1, 0
    while (high is None or probe < high) and tries < _MAX_PROBES:
        tries += 1
        found = False
        try:
            for row in connection.execute(select_sql(table, f"WHERE {key}>=? ORDER BY {key}"), (probe,)):
                if not isinstance(row[0], int) or row[0] < probe or (high is not None and row[0] >= high):
                    return
                found, probe, step = True, row[0] + 1, 1
                yield row
            return
        except UNREADABLE:
            if not found:
                # Past the broken page, at first row by row: most pages hold few.
                probe, step = probe + step, min(step * 2, 64) if tries % 8 == 0 else step


def copy_readable(source: sqlite3.Connection, target: sqlite3.Connection) -> int:
    """Copy all rows that are what was written; the number of events. Errors of `target` are raised."""
    rescued = 0
    seen: set[tuple[str, int]] = set()
    last: dict[str, int] = {}
    for table in ("events", "dead", "accounts", "runs", "losses", "states", "meta"):
        sql = files.insert_sql(table)
        for row in readable(source, table):
            values: Sequence[Any] = row
            try:
                if not files.is_whole(table, values):
                    continue
            except UNREADABLE:
                continue
            if table == "events":
                epoch, seq = values[1], values[2]
                if (epoch, seq) in seen:
                    continue
                seen.add((epoch, seq))
                last[epoch] = max(seq, last.get(epoch, 0))
                rescued += 1
            if table == "meta" and values[0] == "version":
                continue
            target.execute(sql, _sane(table, values))
    _mend_runs(target, last)
    return rescued


def _sane(table: str, values: Sequence[Any]) -> Sequence[Any]:
    """The row with columns that no checksum covers made usable: they are not worth losing an event."""
    if table not in ("events", "dead"):
        return values
    sane = [*values]
    sane[9] = values[9] if isinstance(values[9], int) else 0
    if table == "dead":
        sane[14] = values[14] if values[14] in ("refused", "invalid") else "damaged"
        sane[15] = values[15] if isinstance(values[15], str) else "the reason is damaged"
        sane[16] = values[16] if isinstance(values[16], int) else 0
    return sane


def _mend_runs(target: sqlite3.Connection, last: dict[str, int]) -> None:
    """Make the ledger fit the rescued rows: a run whose record is lost or older than its events."""
    runs = {row[1]: row for row in target.execute(select_sql("runs"))}
    numbers = {row[0] for row in runs.values()}
    slots = [slot for (slot,) in target.execute("SELECT slot FROM accounts")]
    # Newest first is what UUIDv7 gives; it only matters when several records were lost at once.
    lost = sorted(epoch for epoch in last if epoch not in runs)
    orphans = sorted({slot >> 32 for slot in slots} - numbers)
    for epoch in lost:
        # Its bitmaps tell its number when there is no doubt whose they are.
        number = orphans.pop() if len(orphans) == len(lost) == 1 else max(numbers, default=0) + 1
        numbers.add(number)
        row = (number, epoch, 0, 0, last[epoch], 0, b"")
        target.execute(files.insert_sql("runs"), files.sealed("runs", row))
    for epoch, row in runs.items():
        if last.get(epoch, 0) > row[4]:
            longer = (*row[:4], last[epoch], *row[5:])
            target.execute(files.insert_sql("runs"), files.sealed("runs", longer))
    for slot in slots:
        if slot >> 32 not in numbers:
            target.execute("DELETE FROM accounts WHERE slot=?", (slot,))


def rescue(path: Path, wall_ns: int, why: str, *, copy: bool = True) -> Rescue:
    """Copy what can be read of the damaged `path` into a new file in its place; set the old one aside.

    Without `copy` the new file is empty: for when a copy turned out unusable too.

    May be killed at any point: the copy counts once it has the name `spool.db.rescued-<time>`, and
    `finish_rescue` at the next start does what was left. Raises sqlite3.Error or OSError when the new
    file can't be written; the damaged one is untouched then.
    """
    draft = path.with_name(path.name + ".new")
    for leftover in (draft, *files.siblings(draft)):
        leftover.unlink(missing_ok=True)
    target = files.create(draft)
    try:
        target.execute("BEGIN")
        rescued = 0
        source: sqlite3.Connection | None = None
        try:
            source = files.connect_to_read(path) if copy else None
        except UNREADABLE:
            source = None
        stamp = to_datetime(wall_ns).strftime("%Y%m%dT%H%M%S.%fZ")
        aside = path.with_name(f"{path.name}.damaged-{stamp}")
        if source is not None:
            rescued = copy_readable(source, target)
            source.close()
        note = json.dumps({"damage": why, "set_aside": str(aside), "rescued": rescued})
        target.execute(files.insert_sql("meta"), files.sealed("meta", ("opening", note, b"")))
        target.execute("COMMIT")
        files.finish(target, draft)
    except BaseException:
        target.close()
        draft.unlink(missing_ok=True)
        raise
    whole = path.with_name(f"{path.name}.rescued-{stamp}")
    draft.rename(whole)
    files.sync_file(path.parent)
    _set_aside(path, aside, whole)
    return Rescue(aside, rescued)


def finish_rescue(path: Path) -> None:
    """Do what a killed rescue left; nothing otherwise."""
    for whole in sorted(path.parent.glob(f"{path.name}.rescued-*Z")):
        stamp = whole.name.removeprefix(f"{path.name}.rescued-")
        _set_aside(path, path.with_name(f"{path.name}.damaged-{stamp}"), whole)


def _set_aside(path: Path, aside: Path, whole: Path) -> None:
    for leftover in files.siblings(path):
        if leftover.exists():
            leftover.rename(aside.with_name(aside.name + leftover.name.removeprefix(path.name)))
    if path.exists():
        path.rename(aside)
    whole.rename(path)
    files.sync_file(path.parent)
    old = sorted(path.parent.glob(f"{path.name}.damaged-*Z"))[:-KEEP_SET_ASIDE]
    for name in old:
        for each in (name, *files.siblings(name)):
            each.unlink(missing_ok=True)
