"""The publisher thread's side of the spool: taking records, and settling what became of them.

Its connection is synchronous=NORMAL: losing a settlement in a power cut only sends an event again, and a
later commit syncs the whole log, also the frames before its own, so no commit is weakened by it.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec

from virtbus import redaction
from virtbus.errors import SpoolCorrupt
from virtbus.model import Confirmed, Deferred, Nacked, Outcome, Parked, Record, Refused, SequenceRange
from virtbus.spool import faults, files
from virtbus.spool.files import EventRow
from virtbus.spool.mirror import Connection, Mirror, stored
from virtbus.spool.missing import CHUNK, Missing, mark, put_run
from virtbus.telemetry import EventDeadLettered, SpoolStumbled, Trouble, emit
from virtbus.words import GapReason

MAX_UNSETTLED = 1024  # sent and not settled, beyond which nothing is taken while the disk takes nothing
SETTLE_PATIENCE_SECONDS = 0.25  # how long settling waits for a commit that hangs on the disk
RETRY_SECONDS = 1.0  # between two tries while the disk refuses
COMPACT_PENDING = 4096  # a longer backlog is sent first: it takes a twentieth longer while pages are moved
COMPACT_SECONDS = 1.0  # between two looks at how many pages are free, while some are given back
IDLE_COMPACT_SECONDS = 60.0  # the same when nothing was settled: an eviction or an operator frees pages too
COMPACT_PAGES = 256  # so many free pages, and half of the file, are given back to the file system


@dataclass(slots=True)
class _Unwritten:
    """What became of rows, settled in memory and not in the file yet."""

    confirmed: list[int] = field(default_factory=list)  # positions
    confirmed_bytes: int = 0
    again: list[int] = field(default_factory=list)  # positions; they are sent again
    refused: list[tuple[EventRow, Exception]] = field(default_factory=list)
    damaged: list[tuple[int, str, str]] = field(default_factory=list)  # (position, key, error)

    @property
    def outcomes(self) -> int:
        """How many of them the broker had a say in."""
        return len(self.confirmed) + len(self.again) + len(self.refused)

    def __bool__(self) -> bool:
        return bool(self.outcomes or self.damaged)


def _words(error: Exception) -> str:
    """An error's text for the file: a broker's words may hold what is not Unicode."""
    return redaction.text(error).encode("utf-8", "replace").decode()


class Settler:
    """Takes and settles. One thread uses it."""

    def __init__(self, mirror: Mirror) -> None:
        """Open the connection that settles."""
        self._mirror = mirror
        self._taken: dict[int, EventRow] = {}  # by position, without attributes and bodies
        self._unwritten = _Unwritten()
        self._compact_at = mirror.clock().monotonic + COMPACT_SECONDS
        self._settle_again_at = 0.0
        self._read_again_at = 0.0
        self._file = Connection(mirror, "NORMAL")

    # ---- taking

    def take(self, limit: int, busy: AbstractSet[str]) -> list[Record]:
        """The oldest row of each key that is neither in `busy`, taken, nor parked; see virtbus.bus.Feed.

        Never waits for a commit. A damaged row is dead-lettered and named in a gap event, not returned.
        """
        now = self._mirror.clock().monotonic
        if self._unwritten:
            self._write(now, 0.0)
        if now < self._read_again_at:
            return []
        with self._mirror.memory:
            if self.unsettled:
                limit = min(limit, MAX_UNSETTLED - self.unsettled - len(self._taken))
            chosen = [] if self._mirror.closed else self._mirror.index.take(limit, busy, now)
        if not chosen:
            return []
        try:
            records = self._read(chosen)
        except BaseException as error:
            with self._mirror.memory:
                for position, key in chosen:
                    self._taken.pop(position, None)
                    self._mirror.index.give_back(position, key)
            if not isinstance(error, sqlite3.Error):
                raise
            self._read_again_at = now + RETRY_SECONDS
            self._stumbled("reading what is next", error)
            return []
        if self._unwritten.damaged:
            self._write(now, 0.0)
        return records

    def _read(self, chosen: Sequence[tuple[int, str]]) -> list[Record]:
        self._file.refresh()
        found = {row.position: row for row in files.read_events(self._file.db, [row for row, _ in chosen])}
        records = []
        for position, key in chosen:
            row = found.get(position)
            if row is None:
                emit(Trouble("reading the spool", f"row {position} is gone; a gap event names it"))
                self._unwritten.damaged.append((position, key, ""))
                continue
            try:
                if row.key != key or not files.is_whole("events", row):
                    raise ValueError("the row is not what was written")
                attributes = msgspec.json.decode(row.attributes)
                records.append(Record(*row[:5], attributes, row.body, row.created_ns, row.attempts))
                self._taken[position] = tuple.__new__(EventRow, (*row[:-2], "", b""))  # faster than _replace
            except files.UNREADABLE as error:
                self._unwritten.damaged.append((position, key, str(error)))
                emit(EventDeadLettered(f"row {position}", "damaged", str(error)))
        return records

    def _stumbled(self, doing: str, error: sqlite3.Error) -> None:
        """The disk refused: what was asked is tried again. Raises SpoolCorrupt when the file is damaged."""
        self._file.failed(error)
        if files.is_damage(error):
            raise files.translate(error, self._mirror.path) from error
        emit(SpoolStumbled(doing, error))

    def wait(self, timeout: float, stop: threading.Event) -> bool:
        """Sleep until something can be taken, for `timeout` seconds, or until `stop` is set.

        Who sets it must call `Spool.wake`.
        """
        deadline = self._mirror.clock().monotonic + timeout
        now = deadline - timeout
        if self._unwritten or now >= self._compact_at:
            self._write(now, 0.0, tidy=True)  # what the disk refused before
        with self._mirror.changed:
            while True:
                now = self._mirror.clock().monotonic
                due = self._mirror.index.next_due(now)
                if due is not None:
                    due = max(due, self._read_again_at - now)
                    if due <= 0 and self.unsettled < MAX_UNSETTLED:
                        return True
                left = deadline - now
                if left <= 0 or stop.is_set() or self._mirror.closed:
                    return False
                # Due, and yet nothing may be taken: settling, which the disk refused, is tried again soon.
                self._mirror.changed.wait(max(0.001, left if due is None else min(left, due or 0.25)))

    # ---- settling

    def settle(self, outcomes: Sequence[tuple[Record, Outcome]]) -> None:
        """What became of records that were taken, in one transaction.

        Confirmed deletes; Deferred gives back; Parked parks the key for 1 s, doubling to 60 s; a confirm of a
        key that was parked ends the wait of all. Refused makes a dead letter that is named in a gap event. A
        gap event that is refused is parked instead: it must not take with it what it names. What the disk
        does not take now is kept in memory and tried again; beyond MAX_UNSETTLED under way nothing is taken.
        """
        # A record that is not from here, or was settled before, is none of ours.
        rows = [(self._taken.pop(record.row, None), outcome) for record, outcome in outcomes]
        self._settle([(row, outcome) for row, outcome in rows if row is not None])

    def give_back(self, error: Exception) -> None:
        """Settle what was taken and has no outcome as not confirmed, because of `error`."""
        rows, self._taken = self._taken, {}
        if rows:
            self._settle([(row, Deferred(error)) for row in rows.values()])

    def _settle(self, rows: Sequence[tuple[EventRow, Outcome]]) -> None:
        now = self._mirror.clock().monotonic
        with self._mirror.changed:
            for row, outcome in rows:
                self._remember(row, outcome, now)
            self._mirror.changed.notify_all()
        self._write(now, SETTLE_PATIENCE_SECONDS)

    def _remember(self, row: EventRow, outcome: Outcome, now: float) -> None:
        """Settle a row in memory; the caller holds `memory`."""
        index, unwritten = self._mirror.index, self._unwritten
        if isinstance(outcome, Confirmed):
            index.confirm(row.position, row.key)
            unwritten.confirmed.append(row.position)
            unwritten.confirmed_bytes += row.size
            self._account(row.epoch, row.seq, row.seq)
            for item in _named_by(row):
                self._account(item.epoch, item.first, item.last)
            return
        if isinstance(outcome, Refused) and row.names is not None:
            emit(Trouble("a gap event was refused; parked", outcome.error, row.id))
            outcome = Nacked("refused")
        if isinstance(outcome, Refused):
            index.remove(row.position, row.key)
            unwritten.refused.append((row, outcome.error))
        else:
            unwritten.again.append(row.position)
            if isinstance(outcome, Parked):
                index.park(row.position, row.key, now)
            else:
                index.give_back(row.position, row.key)

    def _account(self, epoch: str, first: int, last: int) -> None:
        account = self._mirror.accounts.get(epoch)
        if account is not None:
            account.settle(first, last)

    @property
    def unsettled(self) -> int:
        """Outcomes that the file does not know yet."""
        return self._unwritten.outcomes

    # ---- the file

    def _write(self, now: float, patience: float, *, tidy: bool = False) -> None:
        """Write what was settled, unless the disk just refused or a commit hangs on it.

        Tidied up is between two batches only: while one goes out, moving pages would hold it up.
        """
        if now < self._settle_again_at or not self._mirror.writing.acquire(timeout=patience):
            return
        try:
            self._file.refresh()
            if self._settle_again_at:  # on a full disk deletions find room in the log once it is folded
                with suppress(sqlite3.Error):
                    self._file.db.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
            if self._unwritten:
                self._write_outcomes()
                self._compact_at = min(self._compact_at, now + COMPACT_SECONDS)
            if tidy:
                self._compact(now)
            self._settle_again_at = 0.0
        except sqlite3.Error as error:
            self._settle_again_at = now + RETRY_SECONDS
            self._stumbled("settling what was sent", error)
        finally:
            self._mirror.writing.release()

    def _write_outcomes(self) -> None:
        settled, mirror = self._unwritten, self._mirror
        losses: list[Missing] = []
        with self._file.transaction() as db:
            _change(db, "DELETE FROM events", settled.confirmed)
            _change(db, "UPDATE events SET attempts=attempts+1", settled.again)
            faults.reach("during_settle")
            for row, error in settled.refused:
                why = _words(error)
                losses.append(
                    Missing((_of(row),), GapReason.DEAD_LETTER, row.occurrences, row.created_ns, why[:200])
                )
                self._bury(db, row.position, "refused", why)
            for position, _, problem in settled.damaged:
                self._bury(db, position, "damaged", problem)
            if settled.damaged:
                # What they were is not to be trusted: the ledger says which sequences are missing now.
                detail = "rows of the spool were not what was written"
                holes = self._holes(db, losses)
                losses += [Missing((item,), GapReason.SPOOL_DAMAGED, detail=detail) for item in holes]
                (_, pending), dead = (stored(db, table) for table in ("events", "dead"))
            named = mirror.add_losses(losses, db)
            self._write_accounts(db)
        with mirror.changed:
            for account in mirror.accounts.values():
                account.touched.clear()
                account.finished.clear()
            mirror.bytes -= settled.confirmed_bytes
            for row, _ in settled.refused:
                mirror.bytes -= row.size
                mirror.bury(row.size)
            if settled.damaged:
                mirror.bytes, (mirror.dead, mirror.dead_bytes) = pending, dead
            mirror.losses |= named
            for position, key, _ in settled.damaged:
                mirror.index.remove(position, key)
            mirror.changed.notify_all()
        self._unwritten = _Unwritten()
        for row, error in settled.refused:
            emit(EventDeadLettered(row.id, "refused", error))
        faults.reach("after_settle")

    def _bury(self, db: sqlite3.Connection, position: int, why: str, error: str) -> None:
        """Move a row to the dead letters, as it is."""
        columns = ",".join(files.EVENT)
        db.execute(
            f"INSERT OR REPLACE INTO dead ({columns}, why, error, died_ns) "  # noqa: S608 - our own names
            f"SELECT {columns}, ?, ?, ? FROM events WHERE position=?",
            (why, error, self._mirror.clock().wall_ns, position),
        )
        db.execute("DELETE FROM events WHERE position=?", (position,))

    def _holes(self, db: sqlite3.Connection, losses: Sequence[Missing]) -> list[SequenceRange]:
        """Sequences that nothing accounts for any more; reads every row, so only after damage.

        A row that is not what was written accounts for nothing: neither for itself nor for what it names.
        """
        present: dict[str, dict[int, int]] = {epoch: {} for epoch in self._mirror.accounts}
        with self._mirror.memory:
            waiting = [item for loss in (*self._mirror.losses.values(), *losses) for item in loss.ranges]
        rows = (EventRow(*row) for row in db.execute(files.select("events")) if files.is_whole("events", row))
        standing = (item for row in rows for item in (_of(row), *_named_by(row)))
        for item in (*waiting, *standing):
            if item.epoch in present:
                mark(present[item.epoch], item.first, item.last)
        return [item for epoch, each in self._mirror.accounts.items() for item in each.holes(present[epoch])]

    def _write_accounts(self, db: sqlite3.Connection) -> None:
        """Bring the ledger in the file up to what is settled in memory."""
        with self._mirror.memory:
            for account in self._mirror.accounts.values():
                base = account.run << 32
                for chunk in account.touched:
                    files.put(
                        db, "accounts", base + chunk, account.bitmaps[chunk].to_bytes(CHUNK // 8, "little")
                    )
                for chunk in account.finished:
                    db.execute("DELETE FROM accounts WHERE slot=?", (base + chunk,))
                if account.finished:
                    put_run(db, account)

    def _compact(self, now: float) -> None:
        """Give free pages back to the file system, a little at a time, when most of the file is free."""
        if now < self._compact_at or self._mirror.index.pending > COMPACT_PENDING:
            return
        self._compact_at = now + IDLE_COMPACT_SECONDS
        (free,) = self._file.db.execute("PRAGMA freelist_count").fetchone()
        (pages,) = self._file.db.execute("PRAGMA page_count").fetchone()
        if free < COMPACT_PAGES or free * 2 < pages:
            return
        self._compact_at = now + COMPACT_SECONDS
        with self._file.transaction() as db:
            for _ in range(min(free, COMPACT_PAGES * 4)):
                db.execute("PRAGMA incremental_vacuum(1)")
            faults.reach("during_compaction")

    def close(self) -> None:
        """Settle what is left, and let go of the file."""
        try:
            self._settle_again_at = 0.0
            self._write(self._mirror.clock().monotonic, 2.0)
        except SpoolCorrupt as error:
            emit(Trouble("closing the spool", error))
        self._file.close()


def _change(db: sqlite3.Connection, statement: str, positions: Sequence[int]) -> None:
    """Run a statement on the rows at `positions`, in their order: pages next to each other change at once.

    A statement a row, in the order in which a broker confirms, writes up to 25 times as much into the log.
    """
    for start in range(0, len(positions), 1000):  # SQLite takes 32,766 parameters at most
        some = positions[start : start + 1000]
        db.execute(f"{statement} WHERE position IN ({','.join('?' * len(some))})", some)


def _of(row: EventRow) -> SequenceRange:
    return SequenceRange(row.epoch, row.seq, row.seq)


def _named_by(row: EventRow) -> tuple[SequenceRange, ...]:
    """The sequences that a gap event answers for, beside its own."""
    return () if row.names is None else Missing.parse(row.names).ranges
