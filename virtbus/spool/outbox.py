"""The durable outbox: what is committed here is delivered, or named by number in a gap event.

Two threads meet here and nowhere else. The intake thread commits; its connection is synchronous=FULL, so
a commit that returned is on the disk. The publisher thread takes and settles on a connection of its own
with synchronous=NORMAL: losing a settlement in a power cut only sends an event again, and a later FULL
commit syncs the whole log, also the frames before its own, so no commit is weakened by it. One Python
lock orders the two writers (SQLite would make them sleep and poll); taking never waits for it.

On the disk the spool is bounded by `max_bytes` of pages holding events (`disk_bytes`), by twice that for
the file as a whole (PRAGMA max_page_count: pages of a spool that was emptied here and there are part full),
by about 8 MiB of log (a checkpoint each 1,000 pages, under the lock, so it always ends), and by two damaged
files that were set aside. In memory it holds about ten bytes an event and no body.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from virtbus import envelope
from virtbus.errors import SpoolCorrupt, SpoolFull
from virtbus.model import (
    Clock,
    Confirmed,
    Deferred,
    Event,
    Gap,
    Heartbeat,
    Host,
    IoError,
    IoErrorResolved,
    Origin,
    Outcome,
    Phase,
    PreviousRun,
    Record,
    Refused,
    SequenceRange,
    Stamp,
    Unroutable,
    to_datetime,
    to_ns,
)
from virtbus.spool import contents, files, wishes
from virtbus.spool.contents import Births, Contents, GapFacts, Loss
from virtbus.spool.files import Damaged, insert_sql, sealed
from virtbus.spool.ledger import Account, count_events, mark, merge_ranges, subtract_ranges
from virtbus.telemetry import EventDeadLettered, EventsGaveWay, SpoolSetAside, Trouble, emit

ALIVE_SECONDS = 10.0
MAX_RANGES = 400  # in one gap event: about 42 KB of JSON, and 64 KiB must hold the whole message
MAX_UNSETTLED = 1024  # confirmed in memory and not in the file: so many duplicates at worst after a kill
STEP = 100  # a full spool makes room for a hundredth of its size at once
MANY_GAPS = 32  # so many gap events become one before anything else gives way
MERGE_AT_ONCE = 256
SETTLE_PATIENCE_SECONDS = 0.25  # how long the publisher waits for a commit that hangs on the disk
COMPACT_PAGES = 256  # free pages given back to the file system in one step

UPDATED, RESOLVED, OPENED, GAP = range(4)  # classes, in the order in which they give way

_GAP_RESERVE = 2048
_NOT_DAMAGE = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY)  # at the start; what else fails then is damage
_READ_SIZES = (1, 8, 64, 256)  # rows a SELECT, so that few statements are cached


def _no_fault(point: str) -> None:
    """Tests put their own call here, to kill or to fail at a named point; see tests/faults."""


_fault: Callable[[str], None] = _no_fault


@dataclass(frozen=True, slots=True)
class SpoolLimits:
    """The spool's bounds. `max_age_seconds` counts time that passed, whatever a clock says."""

    max_bytes: int = 256 << 20
    max_age_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Opening:
    """What was found at the start: facts for the first event of the run.

    `missing` is named by the next commit in any case: by the caller's own gap event, or by one of ours.
    """

    previous: PreviousRun | None  # the last run that committed something, as far as the file knows
    last_alive_ns: int | None  # its last sign of life
    damage: str | None  # what was wrong with the file
    set_aside: Path | None  # where the damaged file is now
    rescued: int  # events copied from it
    missing: tuple[SequenceRange, ...]  # sequences that the file should hold and does not
    fresh: bool  # there never was a spool in this folder


@dataclass(frozen=True, slots=True)
class SpoolStats:
    """Numbers of one moment. Bytes are bytes on the disk, ages are measured on the monotonic clock."""

    pending: int
    in_flight: int
    parked_keys: int
    dead: int
    bytes: int
    dead_bytes: int
    oldest_seconds: float | None
    committed_sequence: int  # of this run
    confirmed_sequence: int  # everything up to it, of this run, was confirmed or named in a confirmed gap
    unsettled: int  # confirmed, and the file does not know it yet
    unnamed: int  # losses that the next commit names


def disk_bytes(payload: int) -> int:
    """Bytes of 4096-byte pages that a row of so many bytes takes (SQLite file format, 1.6 and 1.7)."""
    local, overflow = payload, 0
    if payload > 4061:
        local = 489 + (payload - 489) % 4092
        local = local if local <= 4061 else 489
        overflow = -(-(payload - local) // 4092)
    return 4096 // max(1, 4084 // (local + 12)) + 4096 * overflow


# ------------------------------------------------------------------------------------- a commit's draft


@dataclass(slots=True, eq=False)
class _New:
    """An event that is about to get a row."""

    seq: int
    id: str
    key: str
    rank: int
    count: int
    size: int
    created_ns: int
    names: str | None
    attributes: str
    body: bytes
    epoch: str
    error: Exception | None = None  # it breaks its schema: a dead letter

    def row(self, position: int) -> tuple[files.SqlValue, ...]:
        """The values of table events."""
        return sealed(
            "events",
            (
                position,
                self.epoch,
                self.seq,
                self.id,
                self.key,
                self.rank,
                self.count,
                self.size,
                self.created_ns,
                0,
                b"",
                self.names,
                self.attributes,
                self.body,
            ),
        )


@dataclass(frozen=True, slots=True)
class _Claim:
    """Something a gap event has to name."""

    reason: str
    ranges: tuple[SequenceRange, ...]
    occurrences: int
    started_ns: int | None
    detail: str | None = None
    found: int = 0
    previous: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True)
class _Taken:
    """What the publisher has to know of a row that it took, beside the record."""

    size: int
    count: int
    facts: GapFacts | None


@dataclass(frozen=True, slots=True)
class _Victim:
    """A row that gives way."""

    position: int
    key: str
    size: int


@dataclass(frozen=True, slots=True)
class _Fallen:
    """An event that gave way, as its gap event has to count it."""

    epoch: str
    seq: int
    count: int
    created_ns: int


@dataclass(slots=True)
class _Draft:
    """Everything one commit is about to do."""

    seq: int
    wall_ns: int
    new: list[_New] = field(default_factory=list)
    claims: list[_Claim] = field(default_factory=list)
    victims: list[_Victim] = field(default_factory=list)
    named_losses: list[int] = field(default_factory=list)
    held: list[tuple[int, str]] = field(default_factory=list)
    dead_dropped: list[tuple[int, int]] = field(default_factory=list)  # (position, bytes)
    gave_way: int = 0
    tells_opening: bool = False


def _rank(event: Event) -> int:
    if isinstance(event, Gap):
        return GAP
    if isinstance(event, IoErrorResolved):
        return RESOLVED
    assert isinstance(event, IoError)
    return OPENED if event.incident.phase is Phase.OPENED else UPDATED


def _count(event: Event) -> int:
    """Errors that the event alone accounts for: callbacks, live or replayed, never what was inferred."""
    if isinstance(event, IoError) and event.origin in (Origin.EVENT, Origin.REPLAY):
        return event.occurrences.count
    return 0


# ------------------------------------------------------------------------------------------ the spool


class Spool:
    """One state folder's outbox, held exclusively.

    It guarantees:
    1. what `commit` returned for is on the disk, incident states and events together, or nothing is;
    2. each event keeps its id, epoch and sequence for ever, and no other event gets them;
    3. what leaves without the broker's confirmation (given way, refused, damaged, dropped) is named in a
       gap event, and that event is named again if it gets lost itself;
    4. a row that is not what was written is never taken.

    One thread calls commit and alive, one take, settle and wait; any calls stats.
    """

    def __init__(
        self,
        path: Path,
        lock: files.Lock,
        limits: SpoolLimits,
        agent_id: str,
        clock: Clock,
        found: Contents,
        account: Account,
        opening: Opening,
        minor: int,
    ) -> None:
        """Use `Spool.open`."""
        self.path = path
        self.epoch = account.epoch
        self.opening = opening
        self.format = f"{files.MAJOR}.{minor}"
        self.host: Host | None = None  # for gap events that the spool makes itself
        self._lock_file = lock
        self._limits = limits
        self._agent_id = agent_id
        self._clock = clock
        # Guards everything in memory; held for microseconds only.
        self._memory = threading.Lock()
        self._changed = threading.Condition(self._memory)
        # Guards writing transactions; held while the disk syncs. Taken before `_memory`, never after.
        self._writing = threading.Lock()
        self._accounts = found.accounts
        self._account = account
        self._index = found.index
        self._births = Births()
        now = clock()
        for position, created_ns in found.births:
            age = max(0.0, (now.wall_ns - created_ns) / 1e9)
            self._births.add(position, now.monotonic - age)
        self._bytes, self._dead, self._dead_bytes = found.bytes, found.dead, found.dead_bytes
        self._next_position = found.next_position
        self._losses = list(found.losses)
        self._taken: dict[int, _Taken] = {}  # the publisher's alone
        self._untold_opening = True
        self._signed = False  # the lock file names this run: it has committed something
        self._done: list[tuple[Record, Outcome]] = []  # settled here, not in the file yet
        self._damaged: list[tuple[int, str, str]] = []  # (position, key, error), not in the file yet
        self._alive_at = self._wishes_at = now.monotonic
        self._naming_at = 0.0
        self._compact_at = now.monotonic
        self._settle_again_at = 0.0
        self._read_again_at = 0.0
        self._writer_sick: sqlite3.Error | None = None
        self._reader_stale = (
            False  # the writer had to be opened anew: what the reader holds may be another file
        )
        self._closed = False
        self._writer = self._connect("FULL")
        self._reader = self._connect("NORMAL")

    # ---- opening

    @classmethod
    def open(
        cls, state_dir: Path, *, limits: SpoolLimits, agent_id: str, clock: Clock | None = None
    ) -> Spool:
        """Take the folder's lock, check the file (rescue it when it is damaged) and begin a new epoch.

        Raises ConfigError (the folder can't be used), SpoolBusy (another process, named), SpoolFull (the
        disk does not take it now: try again), SpoolCorrupt (a file of an unknown major version).
        """
        clock = clock or Clock()
        files.prepare_state_dir(state_dir)
        path = state_dir / files.DATABASE
        lock = files.Lock(state_dir)
        try:
            return cls._open(path, lock, limits, agent_id, clock)
        except sqlite3.Error as error:
            lock.close()
            raise files.translate(error, path) from error
        except OSError as error:
            lock.close()
            raise SpoolFull(f"{path} can't be made: {error.strerror}; check space and rights") from error
        except BaseException:
            lock.close()
            raise

    @classmethod
    def _open(cls, path: Path, lock: files.Lock, limits: SpoolLimits, agent_id: str, clock: Clock) -> Spool:
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
            found, minor = cls._examine(path)
        except Damaged as damage:
            cls._check_writable(path)
            _fault("before_rescue")
            rescue = contents.rescue(path, now.wall_ns, str(damage))
            suspect.unlink(missing_ok=True)
            try:
                found, minor = cls._examine(path)
            except Damaged as again:
                # Not to start would lose more than what is set aside here.
                why = f"{damage}; and what was rescued: {again}"
                rescue = contents.rescue(path, now.wall_ns + 1000, why, copy=False)
                found, minor = cls._examine(path)
            emit(SpoolSetAside(str(path), str(rescue.set_aside), rescue.rescued, str(damage)))
        note = {**note, **found.opening}
        return cls._begin(path, lock, limits, agent_id, clock, found, minor, note, fresh)

    @staticmethod
    def _examine(path: Path) -> tuple[Contents, int]:
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
            with closing(files.connect_to_read(path)) as connection:
                files.check_schema(connection)
                return contents.load(connection), minor
        except contents.UNREADABLE as error:
            if isinstance(error, sqlite3.Error) and files.code_of(error) & 0xFF in _NOT_DAMAGE:
                raise
            raise Damaged(f"{type(error).__name__}: {error}") from error

    @staticmethod
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

    @classmethod
    def _begin(
        cls,
        path: Path,
        lock: files.Lock,
        limits: SpoolLimits,
        agent_id: str,
        clock: Clock,
        found: Contents,
        minor: int,
        note: dict[str, Any],
        fresh: bool,
    ) -> Spool:
        """Write the new run, and what has to be named because of what was found."""
        now = clock()
        known = sorted(found.accounts.values(), key=lambda each: each.run)
        told = [each for each in known if each.last > 0]
        damage: str | None = note.get("damage")
        previous = PreviousRun(told[-1].epoch, told[-1].last) if told else None
        last_alive_ns = told[-1].alive_ns or None if told else None
        before = lock.before.epoch
        if before is not None and (before not in found.accounts or not found.accounts[before].last):
            # The file went back to before that run began: SQLite dropped its log, or it was replaced.
            damage = damage or f"the file does not know of the last run ({before}): what it committed is lost"
            previous = PreviousRun(before, 0)
        if found.holes:
            damage = damage or f"{count_events(found.holes)} events that were committed are not in the file"
        account = Account(
            run=known[-1].run + 1 if known else 1,
            epoch=envelope.uuid7(now.wall_ns),
            started_ns=now.wall_ns,
            alive_ns=now.wall_ns,
        )
        stale = [each for each in known if each.last == 0 or (each.complete and each is not told[-1])]
        connection = files.connect(path)
        try:
            connection.execute("BEGIN IMMEDIATE")
            number = max((item.number for item in found.losses), default=0)
            for item in found.holes:
                number += 1
                loss = Loss(number, (item,), "spool_damaged", 0, None, damage)
                connection.execute(insert_sql("losses"), contents.loss_row(loss))
                found.losses.append(loss)
            for each in stale:
                connection.execute("DELETE FROM runs WHERE run=?", (each.run,))
                connection.execute(
                    "DELETE FROM accounts WHERE slot>=? AND slot<?", (each.run << 32, (each.run + 1) << 32)
                )
                del found.accounts[each.epoch]
            connection.execute(insert_sql("runs"), _run_row(account))
            if damage:
                text = json.dumps({**note, "damage": damage})
                connection.execute(insert_sql("meta"), sealed("meta", ("opening", text, b"")))
            _fault("during_open")
            connection.execute("COMMIT")
        finally:
            connection.close()
        lock.sign(None)
        found.accounts[account.epoch] = account
        aside = note.get("set_aside")
        missing = [item for loss in found.losses if loss.reason == "spool_damaged" for item in loss.ranges]
        opening = Opening(
            previous=previous,
            last_alive_ns=last_alive_ns,
            damage=damage,
            set_aside=Path(aside) if aside else None,
            rescued=note.get("rescued", 0),
            missing=merge_ranges(missing),
            fresh=fresh,
        )
        return cls(path, lock, limits, agent_id, clock, found, account, opening, minor)

    def _connect(self, sync: str) -> sqlite3.Connection:
        connection = files.connect(self.path, sync=sync)
        connection.text_factory = files.decode_text
        pages = max(2 * self._limits.max_bytes // 4096, 1024)
        connection.execute(f"PRAGMA max_page_count={pages}").fetchall()
        return connection

    # ---- committing (intake thread)

    def commit(
        self, events: Sequence[Event], states: Mapping[str, bytes | None] | None = None
    ) -> list[Stamp]:
        """Make events and incident states (None deletes one) durable in one transaction → a stamp an event.

        An event that breaks its schema becomes a dead letter; when the spool is full the least important
        give way. Either is named in a gap event of the same transaction, as is what got lost since the
        last commit. Raises SpoolFull when the disk does not take it: nothing has changed then, call again.
        Raises SpoolCorrupt when the file turned out damaged: end, the next start rescues it.
        """
        now = self._clock()
        draft = _Draft(seq=self._account.last, wall_ns=now.wall_ns)
        stamps = [self._draft_event(draft, event) for event in events]
        with self._writing:
            self._heal()
            try:
                self._draft_losses(draft, events)
                self._make_room(draft, now.monotonic)
                self._draft_gaps(draft)
                self._write(draft, states or {})
            except sqlite3.Error as error:
                self._roll_back(draft.held)
                self._fail(error)
            except BaseException:
                self._roll_back(draft.held)
                raise
            _fault("after_commit")
            self._publish_draft(draft, now.monotonic)
        for item in draft.new:
            if item.error is not None:
                emit(EventDeadLettered(item.id, "invalid", item.error))
        if draft.gave_way:
            emit(EventsGaveWay(draft.gave_way))
        return stamps

    def _draft_event(self, draft: _Draft, event: Event) -> Stamp:
        if isinstance(event, Heartbeat):
            raise TypeError("a heartbeat is never spooled")
        facts: GapFacts | None = None
        if isinstance(event, Gap):
            draft.tells_opening = True
            rest = event.missing[MAX_RANGES:]
            if rest:
                # Encoding would cut what does not fit: the rest goes into gap events of ours.
                draft.claims.append(_Claim(event.reason, rest, 0, _ns(event.started_at), event.detail))
                kept = event.missing[:MAX_RANGES]
                event = replace(event, missing=kept, missing_events=count_events(kept))
            facts = GapFacts(
                event.missing,
                event.missing_occurrences,
                event.found,
                _ns(event.started_at),
                to_ns(event.ended_at),
                (event.previous.epoch, event.previous.last_sequence) if event.previous else None,
            )
        stamp = self._stamp(draft)
        item = self._encode(event, stamp, facts)
        draft.new.append(item)
        if item.error is not None:
            mine = (SequenceRange(self.epoch, item.seq, item.seq),)
            claim = _Claim("dead_letter", mine, item.count, draft.wall_ns, str(item.error)[:200])
            draft.claims.append(claim)
            if facts is not None:  # what it was going to name is still to be named
                draft.claims.append(
                    replace(
                        claim,
                        ranges=facts.ranges,
                        occurrences=facts.occurrences,
                        started_ns=facts.started_ns,
                        found=facts.found,
                    )
                )
        return stamp

    def _stamp(self, draft: _Draft) -> Stamp:
        draft.seq += 1
        return Stamp(envelope.uuid7(draft.wall_ns), self._agent_id, self.epoch, draft.seq, draft.wall_ns)

    def _encode(self, event: Event, stamp: Stamp, facts: GapFacts | None) -> _New:
        error: Exception | None = None
        try:
            encoded = envelope.encode(event, stamp)
        except envelope.InvalidEvent as invalid:
            encoded, error = invalid.encoded, invalid
        attributes = msgspec.json.encode(encoded.attributes).decode()
        names = facts.dump() if facts is not None else None
        payload = len(attributes) + len(encoded.body) + len(names or "") + 190
        assert stamp.sequence is not None
        return _New(
            seq=stamp.sequence,
            id=stamp.id,
            key=encoded.attributes["partitionkey"],
            rank=_rank(event),
            count=_count(event),
            size=disk_bytes(payload),
            created_ns=stamp.recorded_ns,
            names=names,
            attributes=attributes,
            body=encoded.body,
            epoch=stamp.epoch,
            error=error,
        )

    def _draft_losses(self, draft: _Draft, events: Sequence[Event]) -> None:
        """Claim the losses that wait; what the caller's own gap events name needs no other."""
        with self._memory:
            losses = list(self._losses)
        if not losses:
            return
        named = [item for event in events if isinstance(event, Gap) for item in event.missing]
        for loss in losses:
            draft.named_losses.append(loss.number)
            left = subtract_ranges(loss.ranges, named)
            if left:
                claim = _Claim(loss.reason, left, loss.occurrences, loss.started_ns, loss.detail)
                draft.claims.append(claim)

    # ---- giving way

    def _make_room(self, draft: _Draft, now: float) -> None:
        if self._limits.max_age_seconds is not None:
            self._expire(draft, now - self._limits.max_age_seconds)
        with self._memory:
            total = self._bytes + self._dead_bytes
        total -= sum(victim.size for victim in draft.victims)
        need = total + sum(item.size for item in draft.new) - self._limits.max_bytes
        if draft.claims:
            need += _GAP_RESERVE
        if need <= 0:
            return
        # In steps, so that each step is one gap event and not each commit.
        need += self._limits.max_bytes // STEP + (0 if draft.claims else _GAP_RESERVE)
        need = self._drop_dead(draft, need)
        need = self._merge_gaps(draft, need, MANY_GAPS)
        victims: list[_Fallen] = []
        for rank in (UPDATED, RESOLVED, OPENED):
            need = self._choose(draft, rank, need, victims)
            for item in [item for item in draft.new if item.rank == rank and item.error is None]:
                if need <= 0:
                    break
                draft.new.remove(item)
                need -= item.size
                victims.append(_Fallen(item.epoch, item.seq, item.count, item.created_ns))
        self._merge_gaps(draft, need, 2)
        self._claim_victims(draft, victims, "spool_full")

    def _expire(self, draft: _Draft, born_before: float) -> None:
        victims: list[_Fallen] = []
        for rank in (UPDATED, RESOLVED, OPENED):
            rows: list[int] = []
            with self._memory:
                for row in self._index.oldest(rank):
                    born = self._births.of(row)
                    if born is None or born > born_before or len(rows) >= 1000:
                        break
                    rows.append(row)
            self._take_victims(draft, rows, len(rows) << 40, victims)
        self._claim_victims(draft, victims, "spool_expired")

    def _choose(self, draft: _Draft, rank: int, need: int, victims: list[_Fallen]) -> int:
        """Hold the oldest rows of a class until `need` bytes are free; what is still needed."""
        while need > 0:
            with self._memory:
                rows = [row for row, _ in zip(self._index.oldest(rank), range(256), strict=False)]
            if not rows:
                break
            before = need
            need = self._take_victims(draft, rows, need, victims)
            if need == before:
                break
        return need

    def _take_victims(self, draft: _Draft, rows: list[int], need: int, victims: list[_Fallen]) -> int:
        for position, epoch, seq, key, count, size, created_ns in self._select(
            self._writer, "position, epoch, seq, key, count, bytes, created_ns", rows
        ):
            if need <= 0:
                break
            with self._memory:
                held = self._index.hold(position)
            if held:
                draft.held.append((position, key))
                draft.victims.append(_Victim(position, key, size))
                victims.append(_Fallen(epoch, seq, count, created_ns))
                need -= size
        return need

    def _claim_victims(self, draft: _Draft, victims: list[_Fallen], reason: str) -> None:
        if not victims:
            return
        draft.gave_way += len(victims)
        draft.claims.append(
            _Claim(
                reason,
                merge_ranges(SequenceRange(each.epoch, each.seq, each.seq) for each in victims),
                sum(each.count for each in victims),
                min(each.created_ns for each in victims),
            )
        )

    def _drop_dead(self, draft: _Draft, need: int) -> int:
        """Dead letters go first, oldest first: a gap event has named them already."""
        if not self._dead:
            return need
        for position, size in self._writer.execute("SELECT position, bytes FROM dead ORDER BY position"):
            if need <= 0:
                break
            draft.dead_dropped.append((position, size))
            need -= size
        return need

    def _merge_gaps(self, draft: _Draft, need: int, least: int) -> int:
        """Make one gap event of `least` or more of the oldest, which says what they all said."""
        if need <= 0:
            return need
        with self._memory:
            rows = [row for row, _ in zip(self._index.oldest(GAP), range(MERGE_AT_ONCE), strict=False)]
        if len(rows) < least:
            return need
        said: list[_Claim] = []
        ranges: tuple[SequenceRange, ...] = ()
        chosen: list[_Victim] = []
        for position, epoch, seq, key, size, names in self._select(
            self._writer, "position, epoch, seq, key, bytes, names", rows
        ):
            facts = GapFacts.parse(names)
            wider = merge_ranges([*ranges, SequenceRange(epoch, seq, seq), *facts.ranges])
            if len(wider) > MAX_RANGES:
                break
            ranges = wider
            chosen.append(_Victim(position, key, size))
            said.append(
                _Claim("", (), facts.occurrences, facts.started_ns, None, facts.found, facts.previous)
            )
        if len(chosen) < least:
            return need
        with self._memory:
            if not all(self._index.hold(each.position) for each in chosen):
                # The publisher took one meanwhile; there will be another commit.
                for each in chosen:
                    self._index.release(each.position, each.key)
                return need
        draft.held += [(each.position, each.key) for each in chosen]
        draft.victims += chosen
        detail = f"{len(chosen)} gap events were merged into this one"
        draft.claims.append(replace(_join(said), reason="spool_full", ranges=ranges, detail=detail))
        return need - sum(each.size for each in chosen) + _GAP_RESERVE

    # ---- naming

    def _draft_gaps(self, draft: _Draft) -> None:
        """Turn the claims into gap events, one a reason (or several, when one can't hold all ranges).

        Each is an event of its own and never changes: a file that loses its last commits may bring an
        event back as it was before, and the same id must not have gone out with other words.
        """
        for reason in dict.fromkeys(claim.reason for claim in draft.claims):
            claim = _join([each for each in draft.claims if each.reason == reason])
            for at in range(0, max(1, len(claim.ranges)), MAX_RANGES):
                part = replace(claim, ranges=claim.ranges[at : at + MAX_RANGES])
                if at:
                    part = replace(part, occurrences=0, found=0)
                draft.new.append(self._gap(draft, self._stamp(draft), part))

    def _gap(self, draft: _Draft, stamp: Stamp, claim: _Claim) -> _New:
        started_ns = None if claim.started_ns is None else min(claim.started_ns, draft.wall_ns)
        event = Gap(
            host=self.host,
            agent_id=self._agent_id,
            reason=claim.reason,
            detail=claim.detail,
            started_at=None if started_ns is None else to_datetime(started_ns),
            ended_at=to_datetime(draft.wall_ns),
            previous=PreviousRun(*claim.previous) if claim.previous else None,
            missing=claim.ranges,
            missing_events=count_events(claim.ranges),
            missing_occurrences=claim.occurrences,
            found=claim.found,
        )
        facts = GapFacts(
            claim.ranges, claim.occurrences, claim.found, started_ns, draft.wall_ns, claim.previous
        )
        item = self._encode(event, stamp, facts)
        if item.error is not None:
            emit(Trouble("a gap event of the spool breaks its schema; sent as it is", item.error))
            item.error = None
        return item

    # ---- the transaction

    def _write(self, draft: _Draft, states: Mapping[str, bytes | None]) -> None:
        db = self._writer
        db.execute("BEGIN IMMEDIATE")
        position = self._next_position
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
        alive_ns = max(self._account.alive_ns, draft.wall_ns)
        db.execute(insert_sql("runs"), _run_row(self._account, last=draft.seq, alive_ns=alive_ns))
        _fault("before_commit")
        db.execute("COMMIT")

    def _roll_back(self, held: Sequence[tuple[int, str]]) -> None:
        """Nothing of a transaction stays: not in the file, and no row is held."""
        if self._writer.in_transaction:
            try:
                self._writer.execute("ROLLBACK")
            except sqlite3.Error as error:
                self._writer_sick = error
        with self._memory:
            for row, key in held:
                self._index.release(row, key)
            self._changed.notify_all()

    def _publish_draft(self, draft: _Draft, now: float) -> None:
        """The transaction is durable: let the publisher see it."""
        with self._memory:
            self._account.last = draft.seq
            self._account.alive_ns = max(self._account.alive_ns, draft.wall_ns)
            for victim in draft.victims:
                self._index.remove(victim.position, victim.key)
                self._bytes -= victim.size
            for item in draft.new:
                position = self._next_position
                self._next_position += 1
                if item.error is not None:
                    self._dead += 1
                    self._dead_bytes += item.size
                    continue
                self._index.add(position, item.key, item.rank)
                self._bytes += item.size
            for _, size in draft.dead_dropped:
                self._dead -= 1
                self._dead_bytes -= size
            named = set(draft.named_losses)
            self._losses = [loss for loss in self._losses if loss.number not in named]
            if draft.new:
                self._births.add(self._next_position - 1, now)
            self._births.forget(self._index.oldest_row() or self._next_position)
            self._changed.notify_all()
        if not self._signed and draft.seq:
            self._signed = True
            self._lock_file.sign(self.epoch)
        self._untold_opening &= not draft.tells_opening
        self._alive_at = now

    def alive(self, wall_ns: int) -> bool:
        """A sign of life at most every 10 s, and what waits to be named or done; cheap to call often.

        False when the disk did not take it: the next commit will say so.
        """
        now = self._clock().monotonic
        try:
            if self._losses and now >= self._naming_at:
                self._naming_at = now + 1.0
                self.commit(())
            if now - min(self._alive_at, self._wishes_at) < ALIVE_SECONDS:
                return True
            self._alive_at = self._wishes_at = now
            with self._writing:
                self._heal()
                try:
                    self._grant_wishes(wall_ns)
                    alive_ns = max(self._account.alive_ns, wall_ns)
                    self._writer.execute(insert_sql("runs"), _run_row(self._account, alive_ns=alive_ns))
                    self._account.alive_ns = alive_ns
                except sqlite3.Error as error:
                    self._fail(error)
        except SpoolFull:
            return False
        return True

    def _grant_wishes(self, wall_ns: int) -> None:
        """Do what an operator asked for beside us; what is in flight waits for another round."""
        db = self._writer
        asked = db.execute(contents.select_sql("requests", "ORDER BY number LIMIT 1000")).fetchall()
        if not asked:
            return
        keys = {row[0]: row[1] for row in self._select(db, "position, key", [each[2] for each in asked])}
        held: list[tuple[int, str]] = []
        free: list[tuple[int, str, int]] = []
        with self._memory:
            for number, action, position in asked:
                if action == wishes.DROP and position in keys:
                    if not self._index.hold(position):
                        continue
                    held.append((position, keys[position]))
                free.append((number, action, position))
        try:
            db.execute("BEGIN IMMEDIATE")
            done = wishes.grant(db, free, self._next_position, self._next_loss(), wall_ns)
            db.execute("COMMIT")
        except BaseException:
            self._roll_back(held)
            raise
        now = self._clock().monotonic
        with self._memory:
            for position, key, size in done.dropped:
                self._index.remove(position, key)
                self._bytes -= size
            for position, key, rank, size in done.revived:
                self._index.add(position, key, rank)
                self._next_position = position + 1
                self._bytes += size
                self._births.add(position, now)
            for size in [each[3] for each in done.revived] + done.buried:
                self._dead -= 1
                self._dead_bytes -= size
            self._losses += done.losses
            self._changed.notify_all()

    def _next_loss(self) -> int:
        return max((loss.number for loss in self._losses), default=0) + 1

    def states(self) -> dict[str, bytes]:
        """The incident states as last committed."""
        with self._writing:
            return {name: value for name, value, _ in self._writer.execute(contents.select_sql("states"))}

    # ---- taking and settling (publisher thread)

    def take(self, limit: int, busy: AbstractSet[str]) -> list[Record]:
        """The oldest row of each key that is neither in `busy`, taken, nor parked; see virtbus.bus.Feed.

        Never waits for a commit. A row that is not what was written is set aside and named, not returned.
        """
        now = self._clock().monotonic
        if self._done or self._damaged:
            self._settle_later(now, 0.0)
        if now < self._read_again_at:
            return []
        with self._memory:
            if self._closed or len(self._done) >= MAX_UNSETTLED:
                return []
            chosen = self._index.take(limit, busy, now)
        if not chosen:
            return []
        try:
            records = self._read(chosen)
            if self._damaged:
                self._settle_later(now, 0.0)
            return records
        except sqlite3.Error as error:
            with self._memory:
                for row, key in chosen:
                    self._index.give_back(row, key)
            self._read_again_at = now + 1.0
            self._reader_stale = True
            if files.is_damage(error):
                self._suspect()
                raise files.translate(error, self.path) from error
            emit(Trouble("reading the spool; tried again", error))
            return []

    def _read(self, chosen: list[tuple[int, str]]) -> list[Record]:
        self._refresh_reader()
        columns = ",".join(files.EVENT)
        found = {row[0]: row for row in self._select(self._reader, columns, [row for row, _ in chosen])}
        records = []
        for position, key in chosen:
            row = found.get(position)
            try:
                if row is None or row[4] != key or not files.is_whole("events", row):
                    raise ValueError("the row is not what was written")
                facts = GapFacts.parse(row[11]) if row[11] is not None else None
                self._taken[position] = _Taken(row[7], row[6], facts)
                records.append(
                    Record(
                        row=position,
                        epoch=row[1],
                        seq=row[2],
                        id=row[3],
                        key=key,
                        attributes=msgspec.json.decode(row[12]),
                        body=row[13],
                        created_ns=row[8],
                        attempts=row[9],
                    )
                )
            except contents.UNREADABLE as error:
                self._damaged.append((position, key, str(error)))
                emit(EventDeadLettered(f"row {position}", "damaged", str(error)))
        return records

    @staticmethod
    def _select(db: sqlite3.Connection, columns: str, rows: Sequence[int]) -> list[Any]:
        """Rows of table events by position, ascending, with few different statements."""
        found: list[Any] = []
        at = 0
        while at < len(rows):
            size = next((each for each in _READ_SIZES if each >= len(rows) - at), _READ_SIZES[-1])
            part = list(rows[at : at + size])
            at += len(part)
            part += part[-1:] * (size - len(part))
            marks = ",".join("?" * size)
            sql = f"SELECT {columns} FROM events WHERE position IN ({marks}) ORDER BY position"  # noqa: S608
            found += db.execute(sql, part).fetchall()
        return found

    def settle(self, outcomes: Sequence[tuple[Record, Outcome]]) -> None:
        """What became of records that were taken, in one transaction.

        Confirmed deletes; Deferred gives back; Unroutable parks the key (1 s, doubling to 60 s, or until
        a parked key is confirmed); Refused makes a dead letter that is named in a gap event. A gap event
        that is refused is parked instead: it must not take with it what it names. What the disk does not
        take now is kept in memory and tried again; beyond MAX_UNSETTLED nothing more is taken.
        """
        now = self._clock().monotonic
        with self._memory:
            for record, outcome in outcomes:
                row, key = record.row, record.key
                what = outcome
                if isinstance(what, Refused) and self._taken[row].facts is not None:
                    emit(Trouble("a gap event was refused; parked", what.error))
                    what = Unroutable("refused")
                if isinstance(what, Confirmed):
                    self._index.confirm(row, key)
                    self._settle_account(record)
                elif isinstance(what, Deferred):
                    self._index.give_back(row, key)
                elif isinstance(what, Unroutable):
                    self._index.park(row, key, now)
                else:
                    self._index.remove(row, key)
                self._done.append((record, what))
            self._changed.notify_all()
        self._settle_later(now, SETTLE_PATIENCE_SECONDS)

    def _settle_account(self, record: Record) -> None:
        facts = self._taken[record.row].facts
        for item in (SequenceRange(record.epoch, record.seq, record.seq), *(facts.ranges if facts else ())):
            account = self._accounts.get(item.epoch)
            if account is not None:
                account.settle(item.first, item.last)

    def _settle_later(self, now: float, patience: float) -> None:
        """Write what was settled, unless the disk just refused or a commit hangs on it."""
        if now < self._settle_again_at or not self._writing.acquire(timeout=patience):
            return
        try:
            self._refresh_reader()
            if self._settle_again_at:
                self._free_log()
            self._write_outcomes()
            self._compact(now)
            self._settle_again_at = 0.0
        except sqlite3.Error as error:
            self._reader_stale = True  # and closing it rolls back
            self._settle_again_at = now + 1.0
            if files.is_damage(error):
                self._suspect()
                raise files.translate(error, self.path) from error
            emit(Trouble("settling in the spool; tried again", error))
        finally:
            self._writing.release()

    def _free_log(self) -> None:
        """On a full disk: fold the log into the file, so that deletions find room in the log again."""
        try:
            self._reader.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
        except sqlite3.Error:
            return

    def _write_outcomes(self) -> None:
        done, damaged = list(self._done), list(self._damaged)
        if not done and not damaged:
            return
        db = self._reader
        wall_ns = self._clock().wall_ns
        losses: list[Loss] = []
        number = self._next_loss()
        db.execute("BEGIN IMMEDIATE")
        confirmed = [(record.row,) for record, outcome in done if isinstance(outcome, Confirmed)]
        db.executemany("DELETE FROM events WHERE position=?", confirmed)
        again = [(record.row,) for record, outcome in done if isinstance(outcome, Deferred | Unroutable)]
        db.executemany("UPDATE events SET attempts=attempts+1 WHERE position=?", again)
        _fault("during_settle")
        freed = sum(self._taken[row].size for (row,) in confirmed)
        buried = 0
        for record, outcome in done:
            if isinstance(outcome, Refused):
                size, count = self._taken[record.row].size, self._taken[record.row].count
                freed += size
                buried += size
                mine = (SequenceRange(record.epoch, record.seq, record.seq),)
                why = str(outcome.error)[:200]
                losses.append(Loss(number + len(losses), mine, "dead_letter", count, record.created_ns, why))
                self._bury(record.row, "refused", str(outcome.error), wall_ns)
        for position, _, error in damaged:
            self._bury(position, "damaged", error, wall_ns)
        if damaged:
            # What they were is not to be trusted: the ledger tells which sequences are missing now.
            detail = "rows of the spool were not what was written"
            for item in self._holes(db, losses):
                losses.append(Loss(number + len(losses), (item,), "spool_damaged", 0, None, detail))
            (stored,) = db.execute("SELECT total(bytes) FROM events").fetchone()
        for loss in losses:
            db.execute(insert_sql("losses"), contents.loss_row(loss))
        self._write_accounts(db)
        db.execute("COMMIT")
        with self._memory:
            for account in self._accounts.values():
                account.touched.clear()
                account.finished.clear()
            self._bytes = int(stored) if damaged else self._bytes - freed
            self._dead += len(damaged) + sum(1 for _, outcome in done if isinstance(outcome, Refused))
            self._dead_bytes += buried
            self._losses += losses
            for position, key, _ in damaged:
                self._index.remove(position, key)
            self._changed.notify_all()
        for record, outcome in done:
            if isinstance(outcome, Confirmed | Refused):
                self._taken.pop(record.row, None)
            if isinstance(outcome, Refused):
                emit(EventDeadLettered(record.id, "refused", outcome.error))
        del self._done[: len(done)], self._damaged[: len(damaged)]
        _fault("after_settle")

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
        """Sequences that nothing accounts for any more; reads every row's number, so only after damage."""
        present: dict[str, dict[int, bytearray]] = {epoch: {} for epoch in self._accounts}
        for epoch, seq, names in db.execute("SELECT epoch, seq, names FROM events"):
            ranges = [SequenceRange(epoch, seq, seq)]
            if names is not None:
                ranges += GapFacts.parse(names).ranges
            for item in ranges:
                if item.epoch in present:
                    mark(present[item.epoch], item.first, item.last)
        with self._memory:
            waiting = [*self._losses, *losses]
        for loss in waiting:
            for item in loss.ranges:
                mark(present.setdefault(item.epoch, {}), item.first, item.last)
        return [item for epoch, each in self._accounts.items() for item in each.holes(present[epoch])]

    def _write_accounts(self, db: sqlite3.Connection) -> None:
        """Bring the ledger in the file up to what is settled in memory."""
        with self._memory:
            for account in self._accounts.values():
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
                    db.execute(insert_sql("runs"), _run_row(account))

    def _compact(self, now: float) -> None:
        """Give free pages back to the file system, a little at a time, when most of the file is free."""
        if now - self._compact_at < 1.0:
            return
        self._compact_at = now
        db = self._reader
        (free,) = db.execute("PRAGMA freelist_count").fetchone()
        (pages,) = db.execute("PRAGMA page_count").fetchone()
        if free < COMPACT_PAGES or free * 2 < pages:
            return
        # A script, because this PRAGMA frees a page a step and `execute` would take only one step of it.
        db.executescript(f"BEGIN IMMEDIATE; PRAGMA incremental_vacuum({COMPACT_PAGES * 4})")
        _fault("during_compaction")
        db.execute("COMMIT")

    def wait(self, timeout: float, stop: threading.Event) -> bool:
        """Sleep until something can be taken, `timeout` seconds, or `stop` (seen each 0.25 s, or `wake`)."""
        deadline = self._clock().monotonic + timeout
        with self._changed:
            while True:
                now = self._clock().monotonic
                due = self._index.next_due(now)
                if due is not None:
                    due = max(due, self._read_again_at - now)
                    if due <= 0 and len(self._done) < MAX_UNSETTLED:
                        return True
                left = deadline - now
                if left <= 0 or stop.is_set() or self._closed:
                    return False
                self._changed.wait(max(0.001, min(left, 0.25, due or 0.25)))

    def wake(self) -> None:
        """End a `wait` at once."""
        with self._changed:
            self._changed.notify_all()

    # ---- what it is like

    def take_losses(self) -> list[Loss]:
        """What no gap event names yet. Whoever commits a gap event with these ranges has named them; the
        spool names by itself what is left, so calling this is only needed to choose the words.
        """
        with self._memory:
            return list(self._losses)

    def stats(self) -> SpoolStats:
        """Numbers of this moment; any thread, no disk."""
        now = self._clock().monotonic
        with self._memory:
            oldest = self._index.oldest_row()
            born = None if oldest is None else self._births.of(oldest)
            return SpoolStats(
                pending=self._index.pending,
                in_flight=self._index.taken,
                parked_keys=self._index.parked_keys,
                dead=self._dead,
                bytes=self._bytes,
                dead_bytes=self._dead_bytes,
                oldest_seconds=None if oldest is None else max(0.0, now - (now if born is None else born)),
                committed_sequence=self._account.last,
                confirmed_sequence=self._account.settled_through,
                unsettled=len(self._done),
                unnamed=sum(count_events(loss.ranges) for loss in self._losses),
            )

    def close(self) -> None:
        """Settle what is left, sign off and let go of the folder; idempotent. Both threads have ended."""
        if self._closed:
            return
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        now = self._clock()
        try:
            self._settle_again_at = 0.0
            self._settle_later(now.monotonic, 2.0)
            with self._writing:
                alive_ns = max(self._account.alive_ns, now.wall_ns)
                self._writer.execute(insert_sql("runs"), _run_row(self._account, alive_ns=alive_ns))
        except (sqlite3.Error, SpoolFull, SpoolCorrupt) as error:
            emit(Trouble("closing the spool", error))
        finally:
            for connection in (self._reader, self._writer):
                try:
                    connection.close()
                except sqlite3.Error as error:
                    emit(Trouble("closing the spool", error))
            self._lock_file.close()

    # ---- when the disk fails

    def _fail(self, error: sqlite3.Error) -> NoReturn:
        self._writer_sick = error
        if files.is_damage(error):
            self._suspect()
        files.raise_translated(error, self.path)

    def _suspect(self) -> None:
        """Leave word for the next start that SQLite found damage, which its check may not find again."""
        try:
            self.path.with_name(self.path.name + ".suspect").touch()
        except OSError as error:
            emit(Trouble("marking the spool as damaged", error))

    def _heal(self) -> None:
        """After a failed transaction: make sure of the log before anything is built on it.

        A failed fsync is reported once and its pages then count as clean, so frames that the log holds
        may never have reached the disk; and what follows them in the log hangs on them. So the whole
        log is folded into the file (which syncs it) and begun anew. On a full disk this also finds room.
        """
        if self._writer_sick is None:
            return
        try:
            self._writer.close()
        except sqlite3.Error as error:
            emit(Trouble("closing the spool after a failure", error))
        try:
            self._writer = self._connect("FULL")
            busy, log, folded = self._writer.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
            full = files.code_of(self._writer_sick) & 0xFF == sqlite3.SQLITE_FULL
            if (busy or log != folded) and not full:
                raise SpoolFull(f"{self.path} can't be synced yet; check the disk")
        except sqlite3.Error as error:
            files.raise_translated(error, self.path)
        self._writer_sick = None
        self._reader_stale = True

    def _refresh_reader(self) -> None:
        """Open the publisher's connection anew after a failure; its own thread, before it is used."""
        if self._reader_stale:
            self._reader.close()
            self._reader = self._connect("NORMAL")
            self._reader_stale = False


def _ns(moment: datetime | None) -> int | None:
    return None if moment is None else to_ns(moment)


def _join(claims: Sequence[_Claim]) -> _Claim:
    """One claim that says what all of them say."""
    starts = [claim.started_ns for claim in claims]
    details = list(dict.fromkeys(claim.detail for claim in claims if claim.detail))
    return _Claim(
        claims[0].reason,
        merge_ranges(item for claim in claims for item in claim.ranges),
        sum(claim.occurrences for claim in claims),
        None if None in starts else min(start for start in starts if start is not None),
        "; ".join(details[:3]) + ("; …" if len(details) > 3 else "") if details else None,
        sum(claim.found for claim in claims),
        next((claim.previous for claim in reversed(claims) if claim.previous), None),
    )


def _run_row(
    account: Account, *, last: int | None = None, alive_ns: int | None = None
) -> tuple[files.SqlValue, ...]:
    """The values of table runs."""
    return sealed(
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
