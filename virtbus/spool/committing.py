"""The intake thread's side of the spool: commits, what was seen through, operator requests.

Its connection is synchronous=FULL, so a commit that returned is on the disk.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from virtbus.errors import SpoolFull
from virtbus.model import Event, Now, Stamp
from virtbus.seen import STEP_NS, Moment
from virtbus.spool import faults, files, requests
from virtbus.spool.draft import Draft, Eviction, Scribe
from virtbus.spool.files import EventRow
from virtbus.spool.mirror import Connection, Mirror, stored
from virtbus.spool.missing import put_run
from virtbus.spool.opening import put_clock
from virtbus.telemetry import METRICS, EventDeadLettered, EventsGaveWay, Trouble, emit

ALIVE_SECONDS = 10.0
CLOSE_PATIENCE_SECONDS = 2.0  # how long closing waits for a commit that hangs on the disk
REQUESTS_SECONDS = 0.5  # how long errors may wait for what an operator asked for


class Committer:
    """Commits. One thread uses it."""

    def __init__(self, mirror: Mirror, scribe: Scribe) -> None:
        """Open the connection that commits."""
        self._mirror, self._scribe = mirror, scribe
        now = mirror.clock()
        self._seen = Moment.stamped(mirror.account.alive_ns, now)  # not in the file yet perhaps
        self._opened = self._seen
        # As the file has them: the wall clock's beginning, and Mirror.earlier_ns.
        self._clock = self._clock_written = (self._seen.booted_ns, mirror.earlier_ns)
        self._owing = False  # a commit failed and none succeeded since: what it held is not safe
        self.refusal: SpoolFull | None = None  # why the disk did not take what `alive` was given last
        self._opening_told = False
        self._signed = False  # the lock file names this run: it has committed something
        self._sign_at = now.monotonic + ALIVE_SECONDS
        self._name_at = 0.0
        self._file = Connection(mirror, "FULL")

    def commit(
        self, events: Sequence[Event], states: Mapping[str, bytes | None] | None = None
    ) -> list[Stamp]:
        """Make events and incident states (None deletes one) durable in one transaction → their stamps.

        An event that breaks its schema becomes a dead letter; when the spool is full the least important
        are evicted. Either is named in a gap event of the same transaction, as is what got lost since the
        last commit. Raises SpoolFull when the disk does not take it: nothing has changed then, call again.
        Raises SpoolCorrupt when the file turned out damaged: end, the next start rescues it.
        """
        mirror, now = self._mirror, self._mirror.clock()
        draft = Draft(seq=mirror.account.last, wall_ns=now.wall_ns)
        stamps = [self._scribe.event(draft, event) for event in events]
        self._owing = True
        with self._writing():
            try:
                with self._file.transaction() as db:
                    self._scribe.claim_losses(draft, dict(mirror.losses), events)
                    room = Eviction(mirror, db, draft)
                    if mirror.limits.max_age_seconds is not None:
                        room.expire(now.monotonic - mirror.limits.max_age_seconds)
                    room.make_room()
                    self._scribe.name_claims(draft)
                    self._write(db, draft, states or {})
                    faults.reach("before_commit")
            except BaseException:
                self._release(draft.victims)
                raise
            faults.reach("after_commit")
            self._committed(draft, now.monotonic)
        self._owing = False
        self.refusal = None
        for reason in draft.gap_reasons:  # the caller counts its own
            METRICS.events.labels("gap", "", "").inc()
            METRICS.gaps.labels(reason).inc()
        for row, error in draft.invalid:
            emit(EventDeadLettered(row.id, "invalid", error))
        if draft.evicted:
            emit(EventsGaveWay(draft.evicted))
        return stamps

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """The right to write, on a healthy connection; SQLite's errors become ours."""
        with self._mirror.writing:
            try:
                self._heal()
                yield
            except sqlite3.Error as error:
                raise files.translate(error, self._mirror.path) from error

    def _heal(self) -> None:
        """After a failed transaction: make sure of the log before anything is built on it.

        A failed fsync is reported once and its pages then count as clean, so frames that the log holds
        may never have reached the disk; and what follows them in the log hangs on them. So the whole
        log is folded into the file (which syncs it) and started over. On a full disk this also finds room.
        """
        failed = self._file.refresh()
        if failed is None:
            return
        self._file.error = failed  # until the log is folded
        busy, log, folded = self._file.db.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
        full = isinstance(failed, sqlite3.Error) and files.code_of(failed) == sqlite3.SQLITE_FULL
        if (busy or log != folded) and not full:
            raise SpoolFull(f"{self._mirror.path} can't be synced yet; check the disk")
        self._file.error = None
        for other in self._mirror.connections:
            if other is not self._file:
                other.error = other.error or failed  # what it holds may be another file

    def _write(self, db: sqlite3.Connection, draft: Draft, states: Mapping[str, bytes | None]) -> None:
        position = self._mirror.next_position
        draft.new[:] = [row._replace(position=position + at) for at, row in enumerate(draft.new)]
        position += len(draft.new)
        db.executemany(files.INSERT["events"], draft.new)
        for at, (row, error) in enumerate(draft.invalid):
            dead = row._replace(position=position + at)
            db.execute(files.INSERT["dead"], (*dead, "invalid", str(error), draft.wall_ns))
        db.executemany("DELETE FROM events WHERE position=?", [(row.position,) for row in draft.victims])
        db.executemany("DELETE FROM dead WHERE position=?", [(each,) for each in draft.dead_dropped])
        draft.dead_left = stored(db, "dead") if draft.dead_dropped else None
        db.executemany("DELETE FROM losses WHERE number=?", [(each,) for each in draft.named_losses])
        for name, value in states.items():
            if value is None:
                db.execute("DELETE FROM states WHERE name=?", (name,))
            else:
                files.put(db, "states", name, value)
        if draft.tells_opening and not self._opening_told:
            db.execute("DELETE FROM meta WHERE name='opening'")
        self._write_run(db, draft.seq)

    def _write_run(self, db: sqlite3.Connection, last: int) -> None:
        """The run's record with what was seen, in the wall clock as it is now.

        After a reboot a stamp of a clock that was set since could not be compared.
        """
        self._follow_clock(self._mirror.clock())
        put_run(db, self._mirror.account, last=last, alive_ns=self._seen.wall_ns)
        booted_ns, earlier_ns = self._clock
        if abs(self._seen.booted_ns - booted_ns) >= STEP_NS or self._mirror.earlier_ns != earlier_ns:
            self._clock_written = (self._seen.booted_ns, self._mirror.earlier_ns)
            put_clock(db, *self._clock_written)

    def _follow_clock(self, now: Now) -> bool:
        """Tell what was seen in the wall clock as it is now; whether that was set."""
        seen = self._seen.at(now)
        if seen is self._seen:
            return False
        earlier_ns = self._mirror.earlier_ns + seen.wall_ns - self._seen.wall_ns
        self._seen, self._mirror.earlier_ns = seen, max(0, earlier_ns)
        return True

    def _release(self, victims: Sequence[EventRow]) -> None:
        with self._mirror.changed:
            for row in victims:
                self._mirror.index.release(row.position, row.key)
            self._mirror.changed.notify_all()

    def _committed(self, draft: Draft, now: float) -> None:
        """The transaction is durable: let the publisher see it."""
        mirror = self._mirror
        with mirror.changed:
            mirror.account.last = draft.seq
            mirror.account.alive_ns = self._seen.wall_ns
            self._clock = self._clock_written
            mirror.remove(draft.victims)
            for row in draft.new:
                mirror.add(row, now)
            for row, _ in draft.invalid:
                mirror.bury(row.size)
                mirror.next_position += 1
            if draft.dead_left is not None:
                mirror.dead, mirror.dead_bytes = draft.dead_left
            for number in draft.named_losses:
                del mirror.losses[number]
            mirror.births.forget(mirror.index.oldest_row() or mirror.next_position)
            if draft.new or draft.victims:  # else there is nothing new to take
                mirror.changed.notify_all()
        self._opening_told = self._opening_told or draft.tells_opening
        if not self._signed and draft.seq:
            self._signed = True
            mirror.lock.sign(mirror.account.epoch)

    def alive(self, seen: Moment) -> bool:
        """Keep `seen`: everything up to it was seen and is committed. Cheap to call often.

        False while the disk does not take it (`refusal` says why), or the folder is not ours any more.

        - It is written with the next commit, after 10 s, or once the wall clock was set; and at `close`.
        - An earlier moment than the last one changes nothing, by whatever wall clock it was read.
        - After a failed commit it is ignored until a commit succeeds.
        - Losses are named within a second of it, and operators' requests granted when it is written.
        """
        reading = self._mirror.clock()
        now = reading.monotonic
        if not self._owing and seen.boot_ns > self._seen.boot_ns:
            self._seen = seen
            # The intake read the clock microseconds from here: the start itself does not count as progress.
            if seen.boot_ns - self._opened.boot_ns >= STEP_NS:
                self._mirror.earlier_ns = 0
        if self._follow_clock(reading):  # a power cut from here on must find it
            self._sign_at = now
        try:
            if self._mirror.losses and now >= self._name_at:
                self._name_at = now + 1.0
                self.commit(())
            self._mirror.lock.check(self._mirror.path)
            if now < self._sign_at:
                return self.refusal is None
            self._sign_at = now + ALIVE_SECONDS
            with self._writing():
                more = self._grant()
                self._sign()
            while more:
                if self._mirror.clock().monotonic - now > REQUESTS_SECONDS:
                    self._sign_at = now  # go on at the next call
                    break
                with self._writing():
                    more = self._grant()
        except SpoolFull as error:
            self.refusal = error
            return False
        except files.NotOurs as error:
            self._sign_at = now  # should the folder come back, that shows at once
            self.refusal = SpoolFull(str(files.translate(error, self._mirror.path)))
            return False
        self.refusal = None
        return True

    def _sign(self) -> None:
        """Write what was seen, in a transaction of its own."""
        with self._file.transaction() as db:
            self._write_run(db, self._mirror.account.last)
        self._mirror.account.alive_ns = self._seen.wall_ns
        self._clock = self._clock_written

    def _grant(self) -> bool:
        """Do what an operator asked for beside us; what is in flight waits for another round.

        True when there is more to do now. The caller holds `writing`.
        """
        mirror, db = self._mirror, self._file.db
        asked = requests.waiting(db)
        if not asked:
            return False
        waiting = files.whole_events(db, [one.position for one in asked])
        rows = {(row.position, row.epoch, row.seq): row for row in waiting}
        reserved: list[EventRow] = []
        free: list[requests.Request] = []
        with mirror.memory:
            for one in asked:
                row = rows.get(one[2:])
                if one.action == requests.DROP and row is not None:
                    if not mirror.index.reserve(row.position):
                        continue
                    reserved.append(row)
                free.append(one)
        try:
            with self._file.transaction():
                done = requests.grant(db, free, mirror.next_position)
                losses = mirror.add_losses(done.losses, db)
                dead = stored(db, "dead")
        except BaseException:
            self._release(reserved)
            raise
        now = mirror.clock().monotonic
        with mirror.changed:
            mirror.remove(done.dropped)
            for row in done.revived:
                mirror.add(row, now)
            mirror.dead, mirror.dead_bytes = dead
            mirror.losses |= losses
            mirror.changed.notify_all()
        return len(asked) == requests.AT_ONCE and bool(free)

    def states(self) -> dict[str, bytes]:
        """The incident states as last committed."""
        with self._mirror.writing:
            return {name: value for name, value, _ in self._file.db.execute(files.select("states"))}

    def close(self) -> bool:
        """Write the moment that `alive` was given last, and let go of the file.

        Not the present one: a drain may have gone on for long after observing ended, and what happened
        meanwhile belongs into the gap that the next start reports.

        False when a commit still hangs in the kernel: then the file is left as a kill would leave it.
        """
        if not self._mirror.writing.acquire(timeout=CLOSE_PATIENCE_SECONDS):
            hung = TimeoutError(f"a commit on {self._mirror.path} hangs; left as it is, check the disk")
            emit(Trouble("closing the spool", hung))
            return False
        try:
            files.check_writable(self._mirror.path)
            self._sign()
        except sqlite3.Error as error:
            emit(Trouble("closing the spool", error))
        finally:
            self._mirror.writing.release()
        self._file.close()
        return True
