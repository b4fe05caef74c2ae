"""Starting on a spool's file: read and check it, rescue it when it is damaged, and begin a new run in it.

Nothing is trusted: SQLite's own check, our version, every row's checksum, and the accounts must agree.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from virtbus import envelope
from virtbus.config import SpoolLimits
from virtbus.errors import SpoolFull
from virtbus.model import Clock, Now, PreviousRun, SequenceRange, to_datetime
from virtbus.seen import Moment, boot_id
from virtbus.spool import faults, files
from virtbus.spool.files import COLUMNS, UNREADABLE, Damaged, EventRow, SqlValue
from virtbus.spool.mirror import Mirror, stored
from virtbus.spool.missing import CHUNK, FULL, Account, Missing, count_events, mark, merge_ranges, put_run
from virtbus.telemetry import SpoolSetAside, emit
from virtbus.words import GapReason

_NOT_DAMAGE = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY)  # what else fails at the start is damage
KEEP_SET_ASIDE = 2  # damaged files that are kept: they hold up to the spool's whole size each
_MAX_PROBES = 500  # look-ups between two unreadable places


@dataclass(frozen=True, slots=True)
class Opening:
    """What was found at the start: facts for the first event of the run.

    `missing` is named by the next commit in any case: by the caller's own gap event, or by one of ours.
    """

    previous: PreviousRun | None  # the last run that committed something, as far as the file knows
    last_alive_ns: int | None  # up to when it saw everything, in the wall clock as it is now
    placed: bool  # False: the clock was set back over a reboot, and `last_alive_ns` is only the latest moment
    stamps_since_ns: int | None  # no stamp made after that moment is older, by the clock of then or of now
    damage: str | None  # what was wrong with the file
    set_aside: Path | None  # where the damaged file is now
    rescued: int  # events copied from it
    missing: tuple[SequenceRange, ...]  # sequences that the file should hold and does not
    fresh: bool  # there never was a spool in this folder


@dataclass(slots=True)
class _Found:
    """What was read beside what the mirror keeps."""

    present: set[str] = field(default_factory=set)  # epochs with rows here: waiting events, dead letters
    holes: list[SequenceRange] = field(default_factory=list)
    clock: dict[str, Any] = field(default_factory=dict)  # of the last run's times
    note: dict[str, Any] = field(default_factory=dict)  # what an earlier start found and nobody reported yet


def start(path: Path, lock: files.Lock, limits: SpoolLimits, clock: Clock) -> tuple[Mirror, Opening, int]:
    """Begin a run on the file of `lock`'s folder, or on a new one; a damaged one is moved away and rescued.

    → (the mirror of the file, what was found, the file's minor version).
    """
    finish_rescue(path)
    fresh = False
    note: dict[str, Any] = {}
    if not path.exists():
        fresh = lock.before.epoch is None
        if not fresh:
            note = {"damage": f"{path.name} is gone, and a run has been here before"}
        draft = path.with_name(path.name + ".new")
        with files.new_database(draft):
            pass
        draft.rename(path)
        files.sync_file(path.parent)
    suspect = path.with_name(path.name + ".suspect")
    mirror = Mirror(path, lock, limits, clock)
    try:
        if suspect.exists():
            raise Damaged("SQLite found damage while the spool was in use")
        return _begin(mirror, note, fresh=fresh)
    except Damaged as error:
        damage = error
    _check_writable(path)
    faults.reach("before_rescue")
    wall_ns = clock().wall_ns
    aside, rescued = rescue(path, wall_ns, str(damage))
    suspect.unlink(missing_ok=True)
    try:
        return _begin(Mirror(path, lock, limits, clock), note, fresh=fresh)
    except Damaged as again:
        # Not to start would lose more than what is moved away here.
        why = f"{damage}; and what was rescued: {again}"
        aside, rescued = rescue(path, wall_ns + 1000, why, copy=False)
        return _begin(Mirror(path, lock, limits, clock), note, fresh=fresh)
    finally:
        emit(SpoolSetAside(str(path), str(aside), rescued, str(damage)))


def _check_writable(path: Path) -> None:
    """A rescue is for damaged content: on a disk that takes nothing everything looks damaged."""
    probe = path.with_name(path.name + ".probe")
    try:
        probe.write_bytes(b"\0" * 4096)
        files.sync_file(probe)
        probe.unlink()
    except OSError as error:
        probe.unlink(missing_ok=True)
        raise SpoolFull(f"{path.parent} can't be written: {error.strerror}; check the disk") from error


def _begin(mirror: Mirror, note: dict[str, Any], *, fresh: bool) -> tuple[Mirror, Opening, int]:
    """Read the file, and write the new run and what has to be named because of what was found.

    In one transaction, which shuts out a process whose lock file was removed: it sees our lock afterwards.
    Raises Damaged; SpoolCorrupt when the file is from the future.
    """
    path = mirror.path
    reading = True
    try:
        if not path.is_file() or path.stat().st_size == 0:
            raise Damaged("the file is empty")
        with closing(files.connect_to_read(path)) as reader:
            minor = files.check_version(reader, path)
        with closing(files.connect(path)) as db:
            files.migrate(db, minor)
            with files.transaction(db):
                found = load(db, mirror)
                reading = False
                opening = _begin_run(db, mirror, found, {**note, **found.note}, fresh=fresh)
                faults.reach("during_open")
    except UNREADABLE as error:
        if not reading or (isinstance(error, sqlite3.Error) and files.code_of(error) in _NOT_DAMAGE):
            raise
        raise Damaged(f"{type(error).__name__}: {error}") from error
    mirror.lock.sign(None)
    return mirror, opening, max(minor, len(files.MIGRATIONS) - 1)


# ------------------------------------------------------------------------------------ reading


def load(db: sqlite3.Connection, mirror: Mirror) -> _Found:
    """Read and check everything into an empty mirror. Raises Damaged, or one of UNREADABLE."""
    problems = [row[0] for row in db.execute("PRAGMA quick_check(1)")]
    if problems != ["ok"]:
        raise Damaged(f"SQLite's check says: {problems[0] if problems else 'nothing'}")
    if db.execute("PRAGMA auto_vacuum").fetchone() != (2,):
        raise Damaged("the file's header is not what was written")
    for table, columns in COLUMNS.items():
        lacking = set(columns) - {row[1] for row in db.execute(f"PRAGMA table_info({table})")}
        if lacking:
            raise Damaged(f"table {table} lacks {', '.join(sorted(lacking))}")
    found = _Found()
    notes = {name: value for name, value, _ in _whole_rows(db, "meta")}
    found.note, found.clock = (json.loads(notes.get(name, "{}")) for name in ("opening", "clock"))
    runs = {row[0]: Account(*row[:6]) for row in _whole_rows(db, "runs")}
    mirror.accounts = {account.epoch: account for account in runs.values()}
    for slot, settled, _ in _whole_rows(db, "accounts"):
        account = runs.get(slot >> 32)
        if account is None or len(settled) != CHUNK // 8:
            raise Damaged("a bitmap belongs to no run")
        bitmap = int.from_bytes(settled, "little")
        account.bitmaps[slot & 0xFFFF_FFFF] = FULL if bitmap == FULL else bitmap
    present: dict[str, dict[int, int]] = {epoch: {} for epoch in mirror.accounts}
    found.present = _load_events(db, mirror, present)
    for number, epoch, first, last, reason, *counts, _ in _whole_rows(db, "losses"):
        mirror.losses[number] = Missing((SequenceRange(epoch, first, last),), GapReason(reason), *counts)
        mark(present.setdefault(epoch, {}), first, last)
    mirror.dead, mirror.dead_bytes = stored(db, "dead")
    (position,) = db.execute("SELECT coalesce(max(position), 0) FROM dead").fetchone()
    mirror.next_position = max(mirror.next_position, position + 1)
    found.present |= {epoch for (epoch,) in db.execute("SELECT DISTINCT epoch FROM dead")}
    list(_whole_rows(db, "states"))
    found.holes = [hole for epoch, run in mirror.accounts.items() for hole in run.holes(present[epoch])]
    return found


def _whole_rows(db: sqlite3.Connection, table: str) -> Iterator[Any]:
    for row in db.execute(files.select(table, f"ORDER BY {COLUMNS[table][0]}")):
        if not files.is_whole(table, row):
            raise Damaged(f"a row of table {table} ({row[0]!r}) is not what was written")
        yield row


def _load_events(db: sqlite3.Connection, mirror: Mirror, present: dict[str, dict[int, int]]) -> set[str]:
    """Take the rows of table events into the mirror, mark what they answer for; the epochs they are of."""
    newest: dict[str, tuple[int, int]] = {}  # key → (run, seq) of its last row
    unsorted: set[str] = set()
    named: list[SequenceRange] = []
    epochs: set[str] = set()
    now = mirror.clock()
    for row in map(EventRow._make, _whole_rows(db, "events")):
        if not isinstance(row.attempts, int):
            raise Damaged(
                f"the number of attempts of event {row.seq} of run {row.epoch} is not what was written"
            )
        account = mirror.accounts.get(row.epoch)
        if account is None or row.seq > account.last:
            # The run's row is older than its events, or gone: they show what it would have said.
            raise Damaged(f"run {row.epoch} has an event {row.seq} that its record does not know")
        if not mark(present[row.epoch], row.seq, row.seq):
            raise Damaged(f"event {row.seq} of run {row.epoch} is there twice")
        place = (account.run, row.seq)
        if place < newest.get(row.key, (0, 0)):
            unsorted.add(row.key)
        newest[row.key] = place
        epochs.add(row.epoch)
        mirror.add(row, now.monotonic - max(0.0, (now.wall_ns - row.created_ns) / 1e9))
        if row.names is not None:
            named += Missing.parse(row.names).ranges
    for item in named:
        if item.epoch in present:
            mark(present[item.epoch], item.first, min(item.last, mirror.accounts[item.epoch].last))
    for key in unsorted:
        rows = db.execute("SELECT position, epoch, seq FROM events WHERE key=?", (key,))
        mirror.index.sort(key, {at: (mirror.accounts[epoch].run, seq) for at, epoch, seq in rows})
    return epochs


# ------------------------------------------------------------------------------------ the new run


def _in_this_clock(alive_ns: int, clock: dict[str, Any], now: Now) -> tuple[int | None, bool]:
    """When the last run last saw everything, in the wall clock as it is now, and whether that is certain.

    Of the same boot the time that passed is known. Else the stamp is believed, unless it lies after this
    boot began: the clock was wrong then or is now. Then the result is the boot's beginning, as the latest
    moment that it can be, and False.
    """
    if not alive_ns:
        return None, True
    here, then = boot_id(), clock.get("boot")
    latest = now.wall_ns
    if here is not None and then is not None:
        moment = Moment(alive_ns, clock["booted_ns"])
        if here == then and moment.boot_ns <= int(now.boot * 1e9):
            return min(moment.wall(now), now.wall_ns), True
        latest = Moment.of(now).booted_ns
    return min(alive_ns, latest), alive_ns <= latest


def put_clock(db: sqlite3.Connection, booted_ns: int, earlier_ns: int) -> None:
    """Say by which clock `alive_ns` is: this boot's, and when that began; see Mirror.earlier_ns."""
    clock = {"boot": boot_id(), "booted_ns": booted_ns, "earlier_ns": earlier_ns}
    files.put(db, "meta", "clock", json.dumps(clock))


def _begin_run(
    db: sqlite3.Connection, mirror: Mirror, found: _Found, note: dict[str, Any], *, fresh: bool
) -> Opening:
    now = mirror.clock()
    known = sorted(mirror.accounts.values(), key=lambda each: each.run)
    used = [each for each in known if each.last > 0]
    damage: str | None = note.get("damage")
    previous = PreviousRun(used[-1].epoch, used[-1].last) if used else None
    alive_ns = used[-1].alive_ns if used else 0
    last_alive_ns, placed = _in_this_clock(alive_ns, found.clock, now)
    stamps_since_ns = None
    if last_alive_ns is not None:
        stamps_since_ns = min(last_alive_ns, alive_ns - found.clock.get("earlier_ns", 0))
        mirror.earlier_ns = last_alive_ns - stamps_since_ns
    before = mirror.lock.before.epoch
    if before is not None and (before not in mirror.accounts or not mirror.accounts[before].last):
        # The file went back to before that run began: SQLite dropped its log, or it was replaced.
        damage = damage or f"the file does not know of the last run ({before}): what it committed is lost"
        previous = PreviousRun(before, 0)
    if found.holes:
        damage = damage or f"{count_events(found.holes)} events that were committed are not in the file"
    mirror.account = account = Account(
        run=known[-1].run + 1 if known else 1,
        epoch=envelope.uuid7(now.wall_ns, above=[*mirror.accounts, *([] if before is None else [before])]),
        started_ns=now.wall_ns,
        alive_ns=now.wall_ns if last_alive_ns is None else last_alive_ns,  # nothing is seen yet
    )
    if last_alive_ns is not None and last_alive_ns != alive_ns:
        used[-1].alive_ns = last_alive_ns
        put_run(db, used[-1])
    holes = [Missing((item,), GapReason.SPOOL_DAMAGED, detail=damage) for item in found.holes]
    mirror.losses |= mirror.add_losses(holes, db)
    for run in known:
        # A dead letter may be sent again, and its event needs the record of its run then.
        settled = run.last == 0 or (run.complete and run is not used[-1])
        if settled and run.epoch not in found.present:
            db.execute("DELETE FROM runs WHERE run=?", (run.run,))
            db.execute("DELETE FROM accounts WHERE slot>=? AND slot<?", (run.run << 32, run.run + 1 << 32))
            del mirror.accounts[run.epoch]
    mirror.accounts[account.epoch] = account
    put_run(db, account)
    put_clock(db, Moment.of(now).booted_ns, mirror.earlier_ns)
    if damage:
        files.put(db, "meta", "opening", json.dumps({**note, "damage": damage}))
    missing = [each.ranges[0] for each in mirror.losses.values() if each.reason == GapReason.SPOOL_DAMAGED]
    return Opening(
        previous=previous,
        last_alive_ns=last_alive_ns,
        placed=placed,
        stamps_since_ns=stamps_since_ns,
        damage=damage,
        set_aside=Path(note["set_aside"]) if note.get("set_aside") else None,
        rescued=note.get("rescued", 0),
        missing=merge_ranges(missing),
        fresh=fresh,
    )


# ------------------------------------------------------------------------------------ the rescue


def _readable(connection: sqlite3.Connection, table: str) -> Iterator[tuple[SqlValue, ...]]:
    """Rows of a damaged table: from the front, from the back, and then between what is broken."""
    key = COLUMNS[table][0]
    low: Any = None
    try:
        for row in connection.execute(files.select(table, f"ORDER BY {key}")):
            yield row
            low = row[0]
        return
    except UNREADABLE:
        pass
    high: Any = None
    try:
        for row in connection.execute(files.select(table, f"ORDER BY {key} DESC")):
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
            for row in connection.execute(files.select(table, f"WHERE {key}>=? ORDER BY {key}"), (probe,)):
                if not isinstance(row[0], int) or row[0] < probe or (high is not None and row[0] >= high):
                    return
                found, probe, step = True, row[0] + 1, 1
                yield row
            return
        except UNREADABLE:
            if not found:
                # Past the broken page, at first row by row: most pages hold few.
                probe, step = probe + step, min(step * 2, 64) if tries % 8 == 0 else step


def _copy(source: sqlite3.Connection, target: sqlite3.Connection) -> int:
    """Copy all rows that are what was written; the number of events. Errors of `target` are raised."""
    copied: set[tuple[str, int]] = set()
    for table in ("events", "dead", "accounts", "runs", "losses", "states", "meta"):
        for row in _readable(source, table):
            values: list[Any] = list(row)
            try:
                if not files.is_whole(table, values):
                    continue
            except UNREADABLE:
                continue
            if table == "events":
                if (values[1], values[2]) in copied:
                    continue
                copied.add((values[1], values[2]))
            if table == "meta" and values[0] == "version":
                continue
            if table in ("events", "dead"):
                # What no checksum covers is not worth losing an event for.
                values[9] = values[9] if isinstance(values[9], int) else 0
            if table == "dead":
                values[14] = values[14] if values[14] in ("refused", "invalid") else "damaged"
                values[15] = values[15] if isinstance(values[15], str) else "the reason is damaged"
                values[16] = values[16] if isinstance(values[16], int) else 0
            target.execute(files.INSERT[table], values)
    _fix_runs(target, copied)
    return len(copied)


def _fix_runs(target: sqlite3.Connection, copied: set[tuple[str, int]]) -> None:
    """Make the runs fit the rescued events: one whose record is lost or older than its events."""
    last: dict[str, int] = {}
    for epoch, seq in copied:
        last[epoch] = max(seq, last.get(epoch, 0))
    runs = {row[1]: Account(*row[:6]) for row in target.execute(files.select("runs"))}
    numbers = {run.run for run in runs.values()}
    slots = [slot for (slot,) in target.execute("SELECT slot FROM accounts")]
    # Oldest first, as UUIDv7 sorts; it only matters when several records were lost at once.
    lost = sorted(epoch for epoch in last if epoch not in runs)
    orphans = sorted({slot >> 32 for slot in slots} - numbers)
    for epoch in lost:
        # Its bitmaps show its number when there is no doubt whose they are.
        number = orphans.pop() if len(orphans) == len(lost) == 1 else max(numbers, default=0) + 1
        numbers.add(number)
        put_run(target, Account(number, epoch, 0, 0, last[epoch]))
    for epoch, run in runs.items():
        if last.get(epoch, 0) > run.last:
            put_run(target, run, last=last[epoch])
    stray = [(slot,) for slot in slots if slot >> 32 not in numbers]
    target.executemany("DELETE FROM accounts WHERE slot=?", stray)


def rescue(path: Path, wall_ns: int, why: str, *, copy: bool = True) -> tuple[Path, int]:
    """Copy what can be read of the damaged `path` into a new file in its place; set the old one aside.

    → (where it is now, how many events were copied). Without `copy` the new file is empty: for when a copy
    turned out unusable too.

    May be killed at any point: the copy counts once it has the name `spool.db.rescued-<time>`, and
    `finish_rescue` at the next start does what was left. Raises sqlite3.Error or OSError when the new
    file can't be written; the damaged one is untouched then.
    """
    stamp = to_datetime(wall_ns).strftime("%Y%m%dT%H%M%S.%fZ")
    aside, whole = (path.with_name(f"{path.name}.{kind}-{stamp}") for kind in ("damaged", "rescued"))
    draft = path.with_name(path.name + ".new")
    rescued = 0
    with files.new_database(draft) as target:
        source: sqlite3.Connection | None = None
        try:
            source = files.connect_to_read(path) if copy else None
        except UNREADABLE:
            source = None
        if source is not None:
            rescued = _copy(source, target)
            source.close()
        note = json.dumps({"damage": why, "set_aside": str(aside), "rescued": rescued})
        files.put(target, "meta", "opening", note)
    draft.rename(whole)
    files.sync_file(path.parent)
    _set_aside(path, aside, whole)
    return aside, rescued


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
    for old in sorted(path.parent.glob(f"{path.name}.damaged-*Z"))[:-KEEP_SET_ASIDE]:
        for each in (old, *files.siblings(old)):
            each.unlink(missing_ok=True)
