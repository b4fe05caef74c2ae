"""Copies what can be read of a damaged spool into a new file, and sets the old one aside."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from virtbus.model import to_datetime
from virtbus.spool import files
from virtbus.spool.files import COLUMNS, UNREADABLE, SqlValue
from virtbus.spool.missing import Account, put_run

KEEP_SET_ASIDE = 2  # damaged files that are kept: they hold up to the spool's whole size each
_MAX_PROBES = 500  # look-ups between two unreadable places


@dataclass(frozen=True, slots=True)
class Rescue:
    """What came of a damaged file."""

    set_aside: Path
    rescued: int  # events


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
    # Newest first is what UUIDv7 gives; it only matters when several records were lost at once.
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


def rescue(path: Path, wall_ns: int, why: str, *, copy: bool = True) -> Rescue:
    """Copy what can be read of the damaged `path` into a new file in its place; set the old one aside.

    Without `copy` the new file is empty: for when a copy turned out unusable too.

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
    for old in sorted(path.parent.glob(f"{path.name}.damaged-*Z"))[:-KEEP_SET_ASIDE]:
        for each in (old, *files.siblings(old)):
            each.unlink(missing_ok=True)
