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
from typing import NamedTuple

import msgspec

from virtbus import redaction
from virtbus.errors import SpoolCorrupt
from virtbus.model import Confirmed, Deferred, Nacked, Outcome, Parked, Record, Refused, SequenceRange
from virtbus.spool import contents, faults, files
from virtbus.spool.contents import GapFacts, Loss, run_row
from virtbus.spool.files import insert_sql, sealed
from virtbus.spool.ledger import mark, spans
from virtbus.spool.mirror import SharedState, select_events
from virtbus.telemetry import EventDeadLettered, SpoolStumbled, Trouble, emit
from virtbus.words import GapReason

MAX_UNSETTLED = 1024  # confirmed in memory and not in the file: so many duplicates at worst after a kill
SETTLE_PATIENCE_SECONDS = 0.25  # how long settling waits for a commit that hangs on the disk
COMPACT_PENDING = 4096  # a longer backlog is sent first: it takes a twentieth longer while pages are moved
COMPACT_PAGES = 256  # so many free pages, and half of the file, are given back to the file system


class _Taken(NamedTuple):
    """A row that is with the publisher."""

    record: Record
    size: int
    occurrences: int
    facts: GapFacts | None


class _Dead(NamedTuple):
    """A row whose record the broker refused."""

    taken: _Taken
    error: Exception


@dataclass(slots=True)
class _Unwritten:
    """What became of rows, settled in memory and not in the file yet."""

    confirmed: list[int] = field(default_factory=list)  # positions
    again: list[int] = field(default_factory=list)  # positions of what is sent again
    refused: list[_Dead] = field(default_factory=list)
    damaged: list[tuple[int, str, str]] = field(default_factory=list)  # (position, key, error)
    freed: int = 0  # bytes that leave table events with the confirmed and the refused

    @property
    def outcomes(self) -> int:
        """How many of them the broker had a say in."""
        return len(self.confirmed) + len(self.again) + len(self.refused)

    def __bool__(self) -> bool:
        return bool(self.confirmed or self.again or self.refused or self.damaged)


def _words(error: Exception) -> str:
    """An error's text for the file: a broker's words may hold what is no Unicode."""
    return redaction.text(error).encode("utf-8", "replace").decode()


class PublisherSide:
    """Takes and settles. One thread uses it."""

    def __init__(self, state: SharedState) -> None:
        """Open the connection that settles."""
        self._state = state
        self._taken: dict[int, _Taken] = {}
        self._unwritten = _Unwritten()
        self._compact_at = state.clock().monotonic
        self._settle_again_at = 0.0
        self._read_again_at = 0.0
        self._reader = state.connect("NORMAL")

    def take(self, limit: int, busy: AbstractSet[str]) -> list[Record]:
        """The oldest row of each key that is neither in `busy`, taken, nor parked; see virtbus.bus.Feed.

        Never waits for a commit. A row that is not what was written is set aside and named, not returned.
        """
        now = self._state.clock().monotonic
        if self._unwritten:
            self._settle_later(now, 0.0)
        if now < self._read_again_at:
            return []
        with self._state.memory:
            if self._state.closed or self.unsettled >= MAX_UNSETTLED:
                return []
            chosen = self._state.index.take(limit, busy, now)
        if not chosen:
            return []
        try:
            records = self._read(chosen)
            if self._unwritten.damaged:
                self._settle_later(now, 0.0)
            return records
        except BaseException as error:
            with self._state.memory:
                for row, key in chosen:
                    self._taken.pop(row, None)
                    self._state.index.give_back(row, key)
            if not isinstance(error, sqlite3.Error):
                raise
            self._read_again_at = now + 1.0
            self._state.reader_stale = True
            if files.is_damage(error):
                self._state.suspect()
                raise files.translate(error, self._state.path) from error
            emit(SpoolStumbled("reading what is next", error))
            return []

    def _read(self, chosen: list[tuple[int, str]]) -> list[Record]:
        self._refresh_reader()
        columns = ",".join(files.EVENT)
        found = {row[0]: row for row in select_events(self._reader, columns, [row for row, _ in chosen])}
        records = []
        for position, key in chosen:
            row = found.get(position)
            try:
                if row is None or row[4] != key or not files.is_whole("events", row):
                    raise ValueError("the row is not what was written")
                _, epoch, seq, id_, _, _, count, size, created_ns, attempts, _, names, text, body = row
                facts = GapFacts.parse(names) if names is not None else None
                attributes = msgspec.json.decode(text)
                record = Record(position, epoch, seq, id_, key, attributes, body, created_ns, attempts)
                self._taken[position] = _Taken(record, size, count, facts)
                records.append(record)
            except contents.UNREADABLE as error:
                self._unwritten.damaged.append((position, key, str(error)))
                emit(EventDeadLettered(f"row {position}", "damaged", str(error)))
        return records

    def settle(self, outcomes: Sequence[tuple[Record, Outcome]]) -> None:
        """What became of records that were taken, in one transaction.

        Confirmed deletes; Deferred gives back; Parked parks the key (1 s, doubling to 60 s, or until
        a parked key is confirmed); Refused makes a dead letter that is named in a gap event. A gap event
        that is refused is parked instead: it must not take with it what it names. What the disk does not
        take now is kept in memory and tried again; beyond MAX_UNSETTLED nothing more is taken.
        """
        now = self._state.clock().monotonic
        state, unwritten = self._state, self._unwritten
        confirmed: dict[str, list[int]] = {}  # sequences by epoch
        with state.memory:
            for record, outcome in outcomes:
                row = record.row
                taken = self._taken.pop(row, None)
                if taken is None:
                    continue  # not from here, or settled before
                if not isinstance(outcome, Confirmed):
                    self._keep(taken, outcome, now)
                    continue
                state.index.confirm(row, record.key)
                unwritten.confirmed.append(row)
                unwritten.freed += taken.size
                sequences = confirmed.get(record.epoch)
                if sequences is None:
                    sequences = confirmed[record.epoch] = []
                sequences.append(record.seq)
                if taken.facts is not None:
                    for item in taken.facts.ranges:
                        self._settle_account(item.epoch, item.first, item.last)
            for epoch, sequences in confirmed.items():
                for first, last in spans(sequences):
                    self._settle_account(epoch, first, last)
            state.changed.notify_all()
        self._settle_later(now, SETTLE_PATIENCE_SECONDS)

    def give_back(self, error: Exception) -> None:
        """Settle what was taken and has no outcome as not confirmed, because of `error`."""
        if self._taken:
            self.settle([(taken.record, Deferred(error)) for taken in self._taken.values()])

    def _keep(self, taken: _Taken, outcome: Outcome, now: float) -> None:
        """Settle in memory what the broker did not confirm; the caller holds `memory`."""
        row, key, index, unwritten = taken.record.row, taken.record.key, self._state.index, self._unwritten
        if isinstance(outcome, Refused) and taken.facts is not None:
            emit(Trouble("a gap event was refused; parked", outcome.error, taken.record.id))
            outcome = Nacked("refused")
        if isinstance(outcome, Refused):
            index.remove(row, key)
            unwritten.refused.append(_Dead(taken, outcome.error))
            unwritten.freed += taken.size
            return
        if isinstance(outcome, Parked):
            index.park(row, key, now)
        else:
            index.give_back(row, key)
        unwritten.again.append(row)

    def _settle_account(self, epoch: str, first: int, last: int) -> None:
        account = self._state.accounts.get(epoch)
        if account is not None:
            account.settle(first, last)

    def _settle_later(self, now: float, patience: float) -> None:
        """Write what was settled, unless the disk just refused or a commit hangs on it."""
        if now < self._settle_again_at or not self._state.writing.acquire(timeout=patience):
            return
        try:
            self._refresh_reader()
            if self._settle_again_at:
                self._free_log()
            self._write_outcomes()
            self._compact(now)
            self._settle_again_at = 0.0
        except sqlite3.Error as error:
            self._roll_back()
            self._state.reader_stale = True
            self._settle_again_at = now + 1.0
            if files.is_damage(error):
                self._state.suspect()
                raise files.translate(error, self._state.path) from error
            emit(SpoolStumbled("settling what was sent", error))
        except BaseException:
            self._roll_back()
            raise
        finally:
            self._state.writing.release()

    def _roll_back(self) -> None:
        """Leave no transaction open, for it would shut out every commit."""
        try:
            if self._reader.in_transaction:
                files.check_writable(self._state.path)
                self._reader.execute("ROLLBACK")
        except sqlite3.Error:
            self._state.reader_stale = True  # and closing it rolls back

    def _free_log(self) -> None:
        """On a full disk: fold the log into the file, so that deletions find room in the log again."""
        try:
            self._reader.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
        except sqlite3.Error:
            return

    def _write_outcomes(self) -> None:
        told = self._unwritten
        if not told:
            return
        db = self._reader
        wall_ns = self._state.clock().wall_ns
        losses: list[Loss] = []
        number = self._state.next_loss()
        self._state.begin(db)
        # A backlog leaves in the order in which it came: one statement for many rows.
        db.executemany("DELETE FROM events WHERE position BETWEEN ? AND ?", spans(told.confirmed))
        again = [(row,) for row in told.again]
        db.executemany("UPDATE events SET attempts=attempts+1 WHERE position=?", again)
        faults.reach("during_settle")
        for taken, error in told.refused:
            record = taken.record
            mine = (SequenceRange(record.epoch, record.seq, record.seq),)
            why = _words(error)[:200]
            losses.append(
                Loss(
                    number + len(losses),
                    mine,
                    GapReason.DEAD_LETTER,
                    taken.occurrences,
                    record.created_ns,
                    why,
                )
            )
            self._bury(record.row, "refused", _words(error), wall_ns)
        for position, _, problem in told.damaged:
            self._bury(position, "damaged", problem, wall_ns)
        if told.damaged:
            # What they were is not to be trusted: the ledger tells which sequences are missing now.
            detail = "rows of the spool were not what was written"
            for item in self._holes(db, losses):
                losses.append(Loss(number + len(losses), (item,), GapReason.SPOOL_DAMAGED, 0, None, detail))
            (stored,) = db.execute("SELECT total(bytes) FROM events").fetchone()
        for loss in losses:
            db.execute(insert_sql("losses"), contents.loss_row(loss))
        self._write_accounts(db)
        db.execute("COMMIT")
        with self._state.memory:
            for account in self._state.accounts.values():
                account.touched.clear()
                account.finished.clear()
            self._state.bytes = int(stored) if told.damaged else self._state.bytes - told.freed
            self._state.dead += len(told.damaged) + len(told.refused)
            self._state.dead_bytes += sum(dead.taken.size for dead in told.refused)
            self._state.losses += losses
            for position, key, _ in told.damaged:
                self._state.index.remove(position, key)
            self._state.changed.notify_all()
        self._unwritten = _Unwritten()
        for dead in told.refused:
            emit(EventDeadLettered(dead.taken.record.id, "refused", dead.error))
        faults.reach("after_settle")

    def _bury(self, position: int, why: str, error: str, wall_ns: int) -> None:
        """Move a row to the dead letters, as it is."""
        columns = ",".join(files.EVENT)
        self._reader.execute(
            f"INSERT OR REPLACE INTO dead ({columns}, why, error, died_ns) "  # noqa: S608 - our own names
            f"SELECT {columns}, ?, ?, ? FROM events WHERE position=?",
            (why, error, wall_ns, position),
        )
        self._reader.execute("DELETE FROM events WHERE position=?", (position,))

    def _holes(self, db: sqlite3.Connection, losses: Sequence[Loss]) -> list[SequenceRange]:
        """Sequences that nothing accounts for any more; reads every row, so only after damage.

        A row that is not what was written accounts for nothing: neither for itself nor for what it names.
        """
        present: dict[str, dict[int, bytearray]] = {epoch: {} for epoch in self._state.accounts}
        for row in db.execute(contents.select_sql("events")):
            if not files.is_whole("events", row):
                continue
            ranges = [SequenceRange(row[1], row[2], row[2])]
            if row[11] is not None:
                ranges += GapFacts.parse(row[11]).ranges
            for item in ranges:
                if item.epoch in present:
                    mark(present[item.epoch], item.first, item.last)
        with self._state.memory:
            waiting = [*self._state.losses, *losses]
        for loss in waiting:
            for item in loss.ranges:
                mark(present.setdefault(item.epoch, {}), item.first, item.last)
        return [item for epoch, each in self._state.accounts.items() for item in each.holes(present[epoch])]

    def _write_accounts(self, db: sqlite3.Connection) -> None:
        """Bring the ledger in the file up to what is settled in memory."""
        with self._state.memory:
            for account in self._state.accounts.values():
                if not account.touched and not account.finished:
                    continue
                base = account.run << 32
                rows = [
                    sealed("accounts", (base + chunk, bytes(account.bitmaps[chunk]), b""))
                    for chunk in account.touched
                ]
                db.executemany(insert_sql("accounts"), rows)
                if account.finished:
                    done = [(base + chunk,) for chunk in account.finished]
                    db.executemany("DELETE FROM accounts WHERE slot=?", done)
                    db.execute(insert_sql("runs"), run_row(account))

    def _compact(self, now: float) -> None:
        """Give free pages back to the file system, a little at a time, when most of the file is free."""
        if now - self._compact_at < 1.0 or self._state.index.pending > COMPACT_PENDING:
            return
        self._compact_at = now
        db = self._reader
        (free,) = db.execute("PRAGMA freelist_count").fetchone()
        (pages,) = db.execute("PRAGMA page_count").fetchone()
        if free < COMPACT_PAGES or free * 2 < pages:
            return
        # A script, because this PRAGMA frees a page a step and `execute` would take only one step of it.
        db.executescript(f"BEGIN IMMEDIATE; PRAGMA incremental_vacuum({COMPACT_PAGES * 4})")
        faults.reach("during_compaction")
        db.execute("COMMIT")

    def wait(self, timeout: float, stop: threading.Event) -> bool:
        """Sleep until something can be taken, `timeout` seconds, or `stop`: who sets it calls `wake`."""
        begun = self._state.clock().monotonic
        self._settle_later(begun, 0.0)  # what the disk refused before; and a time to tidy up
        deadline = begun + timeout
        with self._state.changed:
            while True:
                now = self._state.clock().monotonic
                due = self._state.index.next_due(now)
                if due is not None:
                    due = max(due, self._read_again_at - now)
                    if due <= 0 and self.unsettled < MAX_UNSETTLED:
                        return True
                left = deadline - now
                if left <= 0 or stop.is_set() or self._state.closed:
                    return False
                # Due, and yet nothing may be taken: settling, which the disk refused, is tried again soon.
                self._state.changed.wait(max(0.001, left if due is None else min(left, due or 0.25)))

    def _refresh_reader(self) -> None:
        """Open the publisher's connection anew after a failure; its own thread, before it is used."""
        self._state.check()
        if self._state.reader_stale:
            self._reader.close()
            self._reader = self._state.connect("NORMAL")
            self._state.reader_stale = False

    @property
    def unsettled(self) -> int:
        """Outcomes that the file does not know yet."""
        return self._unwritten.outcomes

    def close(self) -> None:
        """Settle what is left, and let go of the file."""
        try:
            self._settle_again_at = 0.0
            self._settle_later(self._state.clock().monotonic, 2.0)
        except SpoolCorrupt as error:
            emit(Trouble("closing the spool", error))
        with suppress(sqlite3.Error):
            files.let_go(self._reader, self._state.path)
