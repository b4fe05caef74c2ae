"""Starting on a spool's file: check it, rescue it when it is damaged, and begin a new run in it."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from virtbus import envelope
from virtbus.errors import SpoolBusy, SpoolFull
from virtbus.model import Clock, Now, PreviousRun, SequenceRange
from virtbus.seen import Moment, boot_id
from virtbus.spool import contents, faults, files
from virtbus.spool.contents import Contents, Loss, run_row
from virtbus.spool.files import Damaged, insert_sql, sealed
from virtbus.spool.ledger import Account, count_events, merge_ranges
from virtbus.telemetry import SpoolSetAside, emit
from virtbus.words import GapReason

_TRIES = 5
_NOT_DAMAGE = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY)  # what else fails at the start is damage


@dataclass(frozen=True, slots=True)
class Opening:
    """What was found at the start: facts for the first event of the run.

    `missing` is named by the next commit in any case: by the caller's own gap event, or by one of ours.
    """

    previous: PreviousRun | None  # the last run that committed something, as far as the file knows
    last_alive_ns: int | None  # up to when it saw everything, in the wall clock as it is now
    damage: str | None  # what was wrong with the file
    set_aside: Path | None  # where the damaged file is now
    rescued: int  # events copied from it
    missing: tuple[SequenceRange, ...]  # sequences that the file should hold and does not
    fresh: bool  # there never was a spool in this folder


@dataclass(frozen=True, slots=True)
class Start:
    """A run that has begun: what the file holds, the run's own account, and what was found."""

    found: Contents
    account: Account
    opening: Opening
    minor: int


def start(path: Path, lock: files.Lock, clock: Clock) -> Start:
    """Begin a run on the file of `lock`'s folder, or on a new one; a damaged one is set aside and rescued."""
    for _ in range(_TRIES):
        try:
            return _start(path, lock, clock)
        except _Changed:
            continue  # by one whose lock file was removed: it sees our lock now, and stops writing
    raise SpoolBusy(f"{path} is being written by another process; stop it first")


def _start(path: Path, lock: files.Lock, clock: Clock) -> Start:
    now = clock()
    contents.finish_rescue(path)
    fresh = False
    note: dict[str, Any] = {}
    if not path.exists():
        fresh = lock.before.epoch is None
        if not fresh:
            note = {"damage": f"{path.name} is gone, and a run has been here before"}
        draft = path.with_name(path.name + ".new")
        for leftover in (draft, *files.siblings(draft)):
            leftover.unlink(missing_ok=True)
        files.finish(files.create(draft), draft)
        draft.rename(path)
        files.sync_file(path.parent)
    suspect = path.with_name(path.name + ".suspect")
    try:
        if suspect.exists():
            raise Damaged("SQLite found damage while the spool was in use")
        seen = _examine(path)
    except Damaged as damage:
        _check_writable(path)
        faults.reach("before_rescue")
        rescue = contents.rescue(path, now.wall_ns, str(damage))
        suspect.unlink(missing_ok=True)
        try:
            seen = _examine(path)
        except Damaged as again:
            # Not to start would lose more than what is set aside here.
            why = f"{damage}; and what was rescued: {again}"
            rescue = contents.rescue(path, now.wall_ns + 1000, why, copy=False)
            seen = _examine(path)
        emit(SpoolSetAside(str(path), str(rescue.set_aside), rescue.rescued, str(damage)))
    note = {**note, **seen.found.opening}
    with closing(seen.reader):
        return _begin(path, lock, clock, seen, note, fresh=fresh)


def _in_this_clock(alive_ns: int, clock: dict[str, Any], now: Now) -> int | None:
    """When the last run last saw everything, as the wall clock would have said it had it been as it is now.

    Of the same boot the time that passed is known. Else the stamp is believed, unless it lies after this
    boot began: the clock was wrong then or is now, and the boot's beginning is the latest that it can be.
    """
    if not alive_ns:
        return None
    here, then = boot_id(), clock.get("boot")
    if here is None or then is None:
        return min(alive_ns, now.wall_ns)
    moment = Moment(alive_ns, clock["booted_ns"])
    if here == then and moment.boot_ns <= int(now.boot * 1e9):
        return min(moment.wall(now), now.wall_ns)
    return min(alive_ns, Moment.of(now).booted_ns)


@dataclass(frozen=True, slots=True)
class _Examined:
    """What the file holds, and the connection that read it and knows when another one has changed it."""

    found: Contents
    minor: int
    reader: sqlite3.Connection
    version: int

    def is_stale(self) -> bool:
        return _version_of(self.reader) != self.version


class _Changed(Exception):
    """Another process committed between the reading of the file and the beginning of our run."""


def _examine(path: Path) -> _Examined:
    """Check version and content. Raises Damaged; SpoolCorrupt when the file is from the future."""
    if not files.is_regular(path) or path.stat().st_size == 0:
        raise Damaged("the file is empty")
    try:
        with closing(files.connect_to_read(path)) as connection:
            minor = files.check_version(connection, path)
        if minor < len(files.MIGRATIONS) - 1:
            with closing(files.connect(path)) as connection:
                files.migrate(connection, minor)
            minor = len(files.MIGRATIONS) - 1
        reader = files.connect_to_read(path)
        try:
            files.check_schema(reader)
            version = _version_of(reader)
            return _Examined(contents.load(reader), minor, reader, version)
        except BaseException:
            reader.close()
            raise
    except contents.UNREADABLE as error:
        if isinstance(error, sqlite3.Error) and files.code_of(error) & 0xFF in _NOT_DAMAGE:
            raise
        raise Damaged(f"{type(error).__name__}: {error}") from error


def _version_of(reader: sqlite3.Connection) -> int:
    """A number that differs once another connection has changed the file since the last call."""
    (version,) = reader.execute("PRAGMA data_version").fetchone()
    return int(version)


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


def _begin(
    path: Path,
    lock: files.Lock,
    clock: Clock,
    seen: _Examined,
    note: dict[str, Any],
    *,
    fresh: bool,
) -> Start:
    """Write the new run, and what has to be named because of what was found. Raises _Changed."""
    now, found = clock(), seen.found
    known = sorted(found.accounts.values(), key=lambda each: each.run)
    told = [each for each in known if each.last > 0]
    damage: str | None = note.get("damage")
    previous = PreviousRun(told[-1].epoch, told[-1].last) if told else None
    last_alive_ns = _in_this_clock(told[-1].alive_ns, found.clock, now) if told else None
    before = lock.before.epoch
    if before is not None and (before not in found.accounts or not found.accounts[before].last):
        # The file went back to before that run began: SQLite dropped its log, or it was replaced.
        damage = damage or f"the file does not know of the last run ({before}): what it committed is lost"
        previous = PreviousRun(before, 0)
    if found.holes:
        damage = damage or f"{count_events(found.holes)} events that were committed are not in the file"
    account = Account(
        run=known[-1].run + 1 if known else 1,
        epoch=envelope.uuid7(now.wall_ns, above=[*found.accounts, *([] if before is None else [before])]),
        started_ns=now.wall_ns,
        alive_ns=now.wall_ns if last_alive_ns is None else last_alive_ns,  # nothing is seen yet
    )
    # A dead letter may be sent again, and its event needs the record of its run then.
    stale = [
        each
        for each in known
        if each.epoch not in found.present and (each.last == 0 or (each.complete and each is not told[-1]))
    ]
    connection = files.connect(path)
    try:
        connection.execute("BEGIN IMMEDIATE")
        if seen.is_stale():
            raise _Changed
        if last_alive_ns is not None and last_alive_ns != told[-1].alive_ns:
            told[-1].alive_ns = last_alive_ns
            connection.execute(insert_sql("runs"), run_row(told[-1]))
        number = max((item.number for item in found.losses), default=0)
        for item in found.holes:
            number += 1
            loss = Loss(number, (item,), GapReason.SPOOL_DAMAGED, 0, None, damage)
            connection.execute(insert_sql("losses"), contents.loss_row(loss))
            found.losses.append(loss)
        for each in stale:
            connection.execute("DELETE FROM runs WHERE run=?", (each.run,))
            connection.execute(
                "DELETE FROM accounts WHERE slot>=? AND slot<?", (each.run << 32, (each.run + 1) << 32)
            )
            del found.accounts[each.epoch]
        connection.execute(insert_sql("runs"), run_row(account))
        connection.execute(insert_sql("meta"), contents.clock_row(Moment.of(now).booted_ns))
        if damage:
            text = json.dumps({**note, "damage": damage})
            connection.execute(insert_sql("meta"), sealed("meta", ("opening", text, b"")))
        faults.reach("during_open")
        connection.execute("COMMIT")
    finally:
        connection.close()
    lock.sign(None)
    found.accounts[account.epoch] = account
    aside = note.get("set_aside")
    missing = [
        item for loss in found.losses if loss.reason == GapReason.SPOOL_DAMAGED for item in loss.ranges
    ]
    opening = Opening(
        previous=previous,
        last_alive_ns=last_alive_ns,
        damage=damage,
        set_aside=Path(aside) if aside else None,
        rescued=note.get("rescued", 0),
        missing=merge_ranges(missing),
        fresh=fresh,
    )
    return Start(found, account, opening, seen.minor)
