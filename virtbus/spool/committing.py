"""The intake thread's side of the spool: commits, what gives way in them, and healing after a failure.

Its connection is synchronous=FULL, so a commit that returned is on the disk.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import NoReturn

from virtbus.errors import SpoolFull
from virtbus.model import Event, SequenceRange, Stamp
from virtbus.seen import STEP_NS, Moment
from virtbus.spool import contents, faults, files
from virtbus.spool import requests as wishes
from virtbus.spool.contents import GapFacts, run_row
from virtbus.spool.draft import (
    GAP,
    MAX_RANGES,
    OPENED,
    RESOLVED,
    UPDATED,
    Claim,
    Draft,
    Fallen,
    Scribe,
    Victim,
    join,
)
from virtbus.spool.files import insert_sql, sealed
from virtbus.spool.ledger import merge_ranges
from virtbus.spool.mirror import SharedState, whole_events
from virtbus.telemetry import METRICS, EventDeadLettered, EventsGaveWay, Trouble, emit
from virtbus.words import GapReason

ALIVE_SECONDS = 10.0
STEP = 100  # a full spool makes room for a hundredth of its size at once
MANY_GAPS = 32  # so many gap events become one before anything else gives way
MERGE_AT_ONCE = 256
CLOSE_PATIENCE_SECONDS = 2.0  # how long closing waits for a commit that hangs on the disk

WISHES_SECONDS = 0.5  # how long errors may wait for what an operator asked for

_WISHES = 1000  # a transaction
_GAP_RESERVE = 2048


class IntakeSide:
    """Commits. One thread uses it."""

    def __init__(self, state: SharedState, scribe: Scribe) -> None:
        """Open the connection that commits."""
        self._state = state
        self._scribe = scribe
        self._untold_opening = True
        self._seen = Moment.stamped(state.account.alive_ns, state.clock())  # not in the file yet perhaps
        self._booted_ns = self._seen.booted_ns  # the wall clock's beginning, as the file has it
        self._owing = False  # a commit failed and none succeeded since: what it held is not safe
        self.refusal: SpoolFull | None = None  # why the disk did not take the last sign of life
        self._signed = False  # the lock file names this run: it has committed something
        self._alive_at = self._wishes_at = state.clock().monotonic
        self._naming_at = 0.0
        self._writer_sick: sqlite3.Error | None = None
        self._writer = state.connect("FULL")

    def commit(
        self, events: Sequence[Event], states: Mapping[str, bytes | None] | None = None
    ) -> list[Stamp]:
        """Make events and incident states (None deletes one) durable in one transaction → a stamp an event.

        An event that breaks its schema becomes a dead letter; when the spool is full the least important
        give way. Either is named in a gap event of the same transaction, as is what got lost since the
        last commit. Raises SpoolFull when the disk does not take it: nothing has changed then, call again.
        Raises SpoolCorrupt when the file turned out damaged: end, the next start rescues it.
        """
        now = self._state.clock()
        draft = Draft(seq=self._state.account.last, wall_ns=now.wall_ns)
        stamps = [self._scribe.event(draft, event) for event in events]
        self._owing = True
        with self._state.writing:
            self._heal()
            try:
                with self._state.memory:
                    losses = list(self._state.losses)
                self._scribe.claim_losses(draft, losses, events)
                self._make_room(draft, now.monotonic)
                self._scribe.name_claims(draft)
                self._write(draft, states or {})
            except sqlite3.Error as error:
                self._roll_back(draft.held)
                self._fail(error)
            except BaseException:
                self._roll_back(draft.held)
                raise
            faults.reach("after_commit")
            self._publish_draft(draft, now.monotonic)
        self._owing = False
        self.refusal = None
        for reason in draft.gap_reasons:  # the caller counts its own
            METRICS.events.labels("gap", "", "").inc()
            METRICS.gaps.labels(reason).inc()
        for item in draft.new:
            if item.error is not None:
                emit(EventDeadLettered(item.id, "invalid", item.error))
        if draft.gave_way:
            emit(EventsGaveWay(draft.gave_way))
        return stamps

    def _make_room(self, draft: Draft, now: float) -> None:
        if self._state.limits.max_age_seconds is not None:
            self._expire(draft, now - self._state.limits.max_age_seconds)
        with self._state.memory:
            total = self._state.bytes + self._state.dead_bytes
        total -= sum(victim.size for victim in draft.victims)
        need = total + sum(item.size for item in draft.new) - self._state.limits.max_bytes
        if draft.claims:
            need += _GAP_RESERVE
        if need <= 0:
            return
        # In steps, so that each step is one gap event and not each commit.
        need += self._state.limits.max_bytes // STEP + (0 if draft.claims else _GAP_RESERVE)
        need = self._drop_dead(draft, need)
        need = self._merge_gaps(draft, need, MANY_GAPS)
        victims: list[Fallen] = []
        for rank in (UPDATED, RESOLVED, OPENED):
            need = self._choose(draft, rank, need, victims)
            for item in [item for item in draft.new if item.rank == rank and item.error is None]:
                if need <= 0:
                    break
                draft.new.remove(item)
                need -= item.size
                victims.append(Fallen(item.epoch, item.seq, item.count, item.created_ns))
        self._merge_gaps(draft, need, 2)
        self._claim_victims(draft, victims, GapReason.SPOOL_FULL)

    def _expire(self, draft: Draft, born_before: float) -> None:
        victims: list[Fallen] = []
        for rank in (UPDATED, RESOLVED, OPENED):
            rows: list[int] = []
            with self._state.memory:
                for row in self._state.index.oldest(rank):
                    born = self._state.births.of(row)
                    if born is None or born > born_before or len(rows) >= 1000:
                        break
                    rows.append(row)
            self._take_victims(draft, rows, len(rows) << 40, victims)
        self._claim_victims(draft, victims, GapReason.SPOOL_EXPIRED)

    def _choose(self, draft: Draft, rank: int, need: int, victims: list[Fallen]) -> int:
        """Hold the oldest rows of a class until `need` bytes are free; what is still needed."""
        while need > 0:
            with self._state.memory:
                rows = [row for row, _ in zip(self._state.index.oldest(rank), range(256), strict=False)]
            if not rows:
                break
            before = need
            need = self._take_victims(draft, rows, need, victims)
            if need == before:
                break
        return need

    def _take_victims(self, draft: Draft, rows: list[int], need: int, victims: list[Fallen]) -> int:
        for row in whole_events(self._writer, rows):
            position, epoch, seq, _, key, _, count, size, created_ns, *_ = row
            if need <= 0:
                break
            with self._state.memory:
                held = self._state.index.hold(position)
            if held:
                draft.held.append((position, key))
                draft.victims.append(Victim(position, key, size))
                victims.append(Fallen(epoch, seq, count, created_ns))
                need -= size
        return need

    def _claim_victims(self, draft: Draft, victims: list[Fallen], reason: GapReason) -> None:
        if not victims:
            return
        draft.gave_way += len(victims)
        draft.claims.append(
            Claim(
                reason,
                merge_ranges(SequenceRange(each.epoch, each.seq, each.seq) for each in victims),
                sum(each.count for each in victims),
                min(each.created_ns for each in victims),
            )
        )

    def _drop_dead(self, draft: Draft, need: int) -> int:
        """Dead letters go first, oldest first: a gap event has named them already."""
        if not self._state.dead:
            return need
        for position, size in self._writer.execute("SELECT position, bytes FROM dead ORDER BY position"):
            if need <= 0:
                break
            draft.dead_dropped.append((position, size))
            need -= size
        return need

    def _merge_gaps(self, draft: Draft, need: int, least: int) -> int:
        """Make one gap event of `least` or more of the oldest, which says what they all said."""
        if need <= 0:
            return need
        with self._state.memory:
            rows = [row for row, _ in zip(self._state.index.oldest(GAP), range(MERGE_AT_ONCE), strict=False)]
        if len(rows) < least:
            return need
        said: list[Claim] = []
        ranges: tuple[SequenceRange, ...] = ()
        chosen: list[Victim] = []
        for row in whole_events(self._writer, rows):
            position, epoch, seq, _, key, _, _, size, _, _, _, names, *_ = row
            facts = GapFacts.parse(names)
            wider = merge_ranges([*ranges, SequenceRange(epoch, seq, seq), *facts.ranges])
            if len(wider) > MAX_RANGES:
                break
            ranges = wider
            chosen.append(Victim(position, key, size))
            said.append(
                Claim(
                    GapReason.SPOOL_FULL,
                    (),
                    facts.occurrences,
                    facts.started_ns,
                    None,
                    facts.found,
                    facts.previous,
                )
            )
        if len(chosen) < least:
            return need
        with self._state.memory:
            if not all(self._state.index.hold(each.position) for each in chosen):
                # The publisher took one meanwhile; there will be another commit.
                for each in chosen:
                    self._state.index.release(each.position, each.key)
                return need
        draft.held += [(each.position, each.key) for each in chosen]
        draft.victims += chosen
        detail = f"{len(chosen)} gap events were merged into this one"
        draft.claims.append(replace(join(said), reason=GapReason.SPOOL_FULL, ranges=ranges, detail=detail))
        return need - sum(each.size for each in chosen) + _GAP_RESERVE

    def _write(self, draft: Draft, states: Mapping[str, bytes | None]) -> None:
        db = self._writer
        self._state.begin(db)
        position = self._state.next_position
        for item in draft.new:
            row = item.row(position)
            if item.error is None:
                db.execute(insert_sql("events"), row)
            else:
                db.execute(insert_sql("dead"), (*row, "invalid", str(item.error), draft.wall_ns))
            position += 1
        db.executemany("DELETE FROM events WHERE position=?", [(each.position,) for each in draft.victims])
        db.executemany("DELETE FROM dead WHERE position=?", [(each,) for each, _ in draft.dead_dropped])
        db.executemany("DELETE FROM losses WHERE number=?", [(each,) for each in draft.named_losses])
        for name, value in states.items():
            if value is None:
                db.execute("DELETE FROM states WHERE name=?", (name,))
            else:
                db.execute(insert_sql("states"), sealed("states", (name, value, b"")))
        if draft.tells_opening and self._untold_opening:
            db.execute("DELETE FROM meta WHERE name='opening'")
        self._write_run(last=draft.seq)
        faults.reach("before_commit")
        db.execute("COMMIT")

    def _write_run(self, *, last: int | None = None) -> None:
        """The run's record with what was seen, and the clock that its time is told in when that stepped."""
        seen = self._seen
        self._writer.execute(
            insert_sql("runs"), run_row(self._state.account, last=last, alive_ns=seen.wall_ns)
        )
        if abs(seen.booted_ns - self._booted_ns) >= STEP_NS:
            self._writer.execute(insert_sql("meta"), contents.clock_row(seen.booted_ns))
            self._booted_ns = seen.booted_ns

    def _roll_back(self, held: Sequence[tuple[int, str]]) -> None:
        """Nothing of a transaction stays: not in the file, and no row is held."""
        if self._writer.in_transaction:
            try:
                self._writer.execute("ROLLBACK")
            except sqlite3.Error as error:
                self._writer_sick = error
        with self._state.memory:
            for row, key in held:
                self._state.index.release(row, key)
            self._state.changed.notify_all()

    def _publish_draft(self, draft: Draft, now: float) -> None:
        """The transaction is durable: let the publisher see it."""
        with self._state.memory:
            self._state.account.last = draft.seq
            self._state.account.alive_ns = self._seen.wall_ns
            for victim in draft.victims:
                self._state.index.remove(victim.position, victim.key)
                self._state.bytes -= victim.size
            for item in draft.new:
                position = self._state.next_position
                self._state.next_position += 1
                if item.error is not None:
                    self._state.dead += 1
                    self._state.dead_bytes += item.size
                    continue
                self._state.index.add(position, item.key, item.rank)
                self._state.bytes += item.size
            for _, size in draft.dead_dropped:
                self._state.dead -= 1
                self._state.dead_bytes -= size
            named = set(draft.named_losses)
            self._state.losses = [loss for loss in self._state.losses if loss.number not in named]
            if draft.new:
                self._state.births.add(self._state.next_position - 1, now)
            self._state.births.forget(self._state.index.oldest_row() or self._state.next_position)
            self._state.changed.notify_all()
        if not self._signed and draft.seq:
            self._signed = True
            self._state.lock.sign(self._scribe.epoch)
        self._untold_opening &= not draft.tells_opening
        self._alive_at = now

    def alive(self, wall_ns: int) -> bool:
        """A sign of life, which is: whatever happened until `wall_ns` was seen; cheap to call often.

        `wall_ns` is told in the wall clock as it is now; a time before what was told already changes
        nothing. It is written with the next commit, or after 10 s (and at the end), with what waits to be
        named or done. It counts for nothing after a commit that failed, until one succeeds. False while
        the disk does not take it (`refusal` says why), or the folder is not ours any more.
        """
        reading = self._state.clock()
        now = reading.monotonic
        seen = Moment.stamped(wall_ns, reading)
        if not self._owing and seen.boot_ns > self._seen.boot_ns:
            self._seen = seen
        try:
            if self._state.losses and now >= self._naming_at:
                self._naming_at = now + 1.0
                self.commit(())
            self._state.lock.check(self._state.path)
            if now - min(self._alive_at, self._wishes_at) < ALIVE_SECONDS:
                return self.refusal is None
            self._alive_at = self._wishes_at = now
            with self._state.writing:
                self._heal()
                try:
                    more = self._grant_wishes(wall_ns)
                    self._sign()
                except sqlite3.Error as error:
                    self._fail(error)
            while more:
                if self._state.clock().monotonic - now > WISHES_SECONDS:
                    self._wishes_at = now - ALIVE_SECONDS  # go on at the next call
                    break
                with self._state.writing:
                    try:
                        more = self._grant_wishes(wall_ns)
                    except sqlite3.Error as error:
                        self._fail(error)
        except SpoolFull as error:
            self.refusal = error
            return False
        except files.NotOurs as error:
            self._alive_at = now - ALIVE_SECONDS  # should the folder come back, that shows at once
            self.refusal = SpoolFull(str(files.translate(error, self._state.path)))
            return False
        self.refusal = None
        return True

    def _sign(self) -> None:
        """Write what was seen, in a transaction of its own."""
        try:
            self._state.begin(self._writer)
            self._write_run()
            self._writer.execute("COMMIT")
        except BaseException:
            self._roll_back(())
            raise
        self._state.account.alive_ns = self._seen.wall_ns

    def _grant_wishes(self, wall_ns: int) -> bool:
        """Do what an operator asked for beside us; what is in flight waits for another round.

        True when there is more to do now. The caller holds `writing`.
        """
        db = self._writer
        asked = db.execute(contents.select_sql("requests", f"ORDER BY number LIMIT {_WISHES}")).fetchall()
        if not asked:
            return False
        keys = {row[:3]: row[4] for row in whole_events(db, [each[2] for each in asked])}
        held: list[tuple[int, str]] = []
        free: list[wishes.Wish] = []
        with self._state.memory:
            for each in asked:
                wish = wishes.Wish(*each)
                key = keys.get((wish.position, wish.epoch, wish.seq))
                if wish.action == wishes.DROP and key is not None:
                    if not self._state.index.hold(wish.position):
                        continue
                    held.append((wish.position, key))
                free.append(wish)
        try:
            self._state.begin(self._writer)
            done = wishes.grant(db, free, self._state.next_position, self._state.next_loss(), wall_ns)
            db.execute("COMMIT")
        except BaseException:
            self._roll_back(held)
            raise
        now = self._state.clock().monotonic
        with self._state.memory:
            for position, key, size in done.dropped:
                self._state.index.remove(position, key)
                self._state.bytes -= size
            for position, key, rank, size in done.revived:
                self._state.index.add(position, key, rank)
                self._state.next_position = position + 1
                self._state.bytes += size
                self._state.births.add(position, now)
            for size in [each[3] for each in done.revived] + done.buried:
                self._state.dead -= 1
                self._state.dead_bytes -= size
            self._state.losses += done.losses
            self._state.changed.notify_all()
        return len(asked) == _WISHES and bool(free)

    def states(self) -> dict[str, bytes]:
        """The incident states as last committed."""
        with self._state.writing:
            return {name: value for name, value, _ in self._writer.execute(contents.select_sql("states"))}

    def _fail(self, error: sqlite3.Error) -> NoReturn:
        if not isinstance(error, files.NotOurs):  # that is no fault of the connection
            self._writer_sick = error
        if files.is_damage(error):
            self._state.suspect()
        files.raise_translated(error, self._state.path)

    def _heal(self) -> None:
        """After a failed transaction: make sure of the log before anything is built on it.

        A failed fsync is reported once and its pages then count as clean, so frames that the log holds
        may never have reached the disk; and what follows them in the log hangs on them. So the whole
        log is folded into the file (which syncs it) and begun anew. On a full disk this also finds room.
        """
        try:
            self._state.check()
        except sqlite3.Error as error:
            self._fail(error)
        if self._writer_sick is None:
            return
        try:
            self._writer.close()
        except sqlite3.Error as error:
            emit(Trouble("closing the spool after a failure", error))
        try:
            self._writer = self._state.connect("FULL")
            busy, log, folded = self._writer.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
            full = files.code_of(self._writer_sick) & 0xFF == sqlite3.SQLITE_FULL
            if (busy or log != folded) and not full:
                raise SpoolFull(f"{self._state.path} can't be synced yet; check the disk")
        except sqlite3.Error as error:
            files.raise_translated(error, self._state.path)
        self._writer_sick = None
        self._state.reader_stale = True

    def close(self) -> bool:
        """Write the last sign of life that the caller gave, and let go of the file.

        None of its own: a drain may have gone on for long after observing ended, and what happened
        meanwhile belongs into the gap that the next start tells.

        False when a commit still hangs in the kernel: then the file is left as a kill would leave it.
        """
        if not self._state.writing.acquire(timeout=CLOSE_PATIENCE_SECONDS):
            hung = TimeoutError(f"a commit on {self._state.path} hangs; left as it is, check the disk")
            emit(Trouble("closing the spool", hung))
            return False
        try:
            files.check_writable(self._state.path)
            self._sign()
        except (sqlite3.Error, SpoolFull) as error:
            emit(Trouble("closing the spool", error))
        finally:
            self._state.writing.release()
        with suppress(sqlite3.Error):
            files.let_go(self._writer, self._state.path)
        return True
