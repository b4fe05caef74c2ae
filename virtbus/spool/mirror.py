"""What the spool's two threads share: one file, the memory that mirrors it, and the locks between them.

`Index` knows what the publisher may take next: positions of pending rows by partition key, without their
bodies. It is rebuilt from the file at each start, about ten bytes a row. Taking costs the same with a
thousand rows and with a million, with one key and with thousands.
"""

from __future__ import annotations

import sqlite3
import threading
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from heapq import heapify, heappop, heappush
from pathlib import Path

from virtbus.config import SpoolLimits
from virtbus.model import Clock
from virtbus.spool import files
from virtbus.spool.files import EventRow, NotOurs
from virtbus.spool.missing import Account, Missing, put_loss
from virtbus.telemetry import Trouble, emit

FIRST_PARK_SECONDS = 1.0
LONGEST_PARK_SECONDS = 60.0

_PAGE = 4096  # rows per page of codes
# A row's code is its class + 1 (0: no such row) and these flags:
_RESERVED = 0x40  # a commit is about to remove it
_TAKEN = 0x80  # with the publisher

# State of a lane: its first row is ready, with the publisher, parked (unroutable or nacked), or reserved by
# a commit.
_QUEUED, _TAKEN_OUT, _PARKED, _BLOCKED = range(4)


# A row's bytes, of which damage may say anything.
SIZE = "max(0, CAST(ifnull(bytes, 0) AS INTEGER))"


def stored(db: sqlite3.Connection, table: str) -> tuple[int, int]:
    """How many rows table events or dead has, and their bytes."""
    count, size = db.execute(f"SELECT count(*), total({SIZE}) FROM {table}").fetchone()  # noqa: S608 - our own names
    return count, int(size)


class Mirror:
    """The one owner of what is counted: pending rows, bytes, dead letters, losses and accounts.

    Two locks, taken in this order: `writing`, `memory`.
    """

    def __init__(self, path: Path, lock: files.Lock, limits: SpoolLimits, clock: Clock) -> None:
        """Empty; `opening` fills it from the file."""
        self.path, self.lock, self.limits, self.clock = path, lock, limits, clock
        # Orders writing transactions; held while the disk syncs.
        self.writing = threading.Lock()
        # Guards everything below; held for microseconds only.
        self.memory = threading.Lock()
        self.changed = threading.Condition(self.memory)
        self.account = Account(0, "", 0, 0)  # this run's
        # By how many ns a stamp made after `alive_ns` may lie before it, because the clock was set meanwhile.
        self.earlier_ns = 0
        self.accounts: dict[str, Account] = {}  # by epoch
        self.index = Index()
        self.births = Births()
        self.bytes = self.dead = self.dead_bytes = 0
        self.next_position = 1
        self.losses: dict[int, Missing] = {}  # what no gap event names yet, by its row in the file
        self.connections: list[Connection] = []
        self.closed = False

    def add(self, row: EventRow, born: float) -> None:
        """A row is in the file. The caller holds `memory`, as for all that follows."""
        self.index.add(row.position, row.key, row.rank)
        self.births.add(row.position, born)
        self.bytes += row.size
        self.next_position = max(self.next_position, row.position + 1)

    def remove(self, rows: Iterable[EventRow]) -> None:
        """Rows are in the file no longer."""
        for row in rows:
            self.index.remove(row.position, row.key)
            self.bytes -= row.size

    def bury(self, size: int) -> None:
        """A dead letter was added, as it was written."""
        self.dead += 1
        self.dead_bytes += size

    def add_losses(self, losses: Iterable[Missing], db: sqlite3.Connection) -> dict[int, Missing]:
        """Write losses, a range each, into the caller's transaction; what to add to `losses` after it."""
        number = max(self.losses, default=0)
        added = {number + at: loss for at, loss in enumerate(losses, 1)}
        for number, loss in added.items():
            put_loss(db, number, loss)
        return added

    def check(self) -> None:
        """Raise what SQLite would raise when the file can't be written, or is not ours any more."""
        self.lock.check(self.path)
        files.check_writable(self.path)

    def begin(self, db: sqlite3.Connection) -> None:
        """Begin a writing transaction. Raises NotOurs: then nobody may commit it."""
        db.execute("BEGIN IMMEDIATE")
        self.lock.check(self.path)
        (last,) = db.execute("SELECT max(run) FROM runs").fetchone()
        if last is not None and last > self.account.run:
            # Its process has read the file: what we wrote now would be overwritten or never be seen.
            raise NotOurs("another agent has begun to write here")


class Connection:
    """One thread's connection to the file: transactions of ours alone, and a new one after a failure."""

    def __init__(self, mirror: Mirror, sync: str) -> None:
        """`sync` is PRAGMA synchronous."""
        self._mirror, self._sync = mirror, sync
        self.error: BaseException | None = None  # since which it can't be trusted
        self.db = self._connect()
        mirror.connections.append(self)

    def _connect(self) -> sqlite3.Connection:
        db = files.connect(self._mirror.path, sync=self._sync)
        pages = max(2 * self._mirror.limits.max_bytes // 4096, 1024)
        db.execute(f"PRAGMA max_page_count={pages}").fetchall()
        return db

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A writing transaction: on any error nothing of it stays. The caller holds `writing`."""
        try:
            self._mirror.begin(self.db)
            yield self.db
            self.db.execute("COMMIT")
        except BaseException as error:
            failed = isinstance(error, sqlite3.Error) and not isinstance(error, NotOurs)
            try:
                if self.db.in_transaction:
                    files.check_writable(self._mirror.path)
                    self.db.execute("ROLLBACK")
            except sqlite3.Error:
                failed = True  # and closing it rolls back
            if failed:
                self.failed(error)
            raise

    def failed(self, error: BaseException) -> None:
        """Reconnect before the next use. Damage leaves a marker file: a later check may not find it again."""
        self.error = error
        if isinstance(error, sqlite3.Error) and files.is_damage(error):
            try:
                self._mirror.path.with_name(self._mirror.path.name + ".suspect").touch()
            except OSError as refusal:
                emit(Trouble("marking the spool as damaged", refusal))

    def refresh(self) -> BaseException | None:
        """Before each use: raise what SQLite would raise; reconnect after a failure, and return that one."""
        self._mirror.check()
        error, self.error = self.error, None
        if error is not None:
            try:
                self.db.close()
            except sqlite3.Error as trouble:
                emit(Trouble("closing the spool after a failure", trouble))
            try:
                self.db = self._connect()
            except BaseException:
                self.error = error
                raise
        return error

    def close(self) -> None:
        """Let go of the file."""
        try:
            files.close(self.db, self._mirror.path)
        except sqlite3.Error:
            return  # left to the end of the process


# ------------------------------------------------------------------------------- what may be taken next


class _Lane:
    """The rows of one key, oldest first; the order a key keeps is the order of `rows`."""

    __slots__ = ("due", "entry", "head", "rows", "state", "wait")

    def __init__(self) -> None:
        self.rows = array("q")
        self.head = 0
        self.state = _QUEUED
        self.entry = -1  # the row that stands for this lane in the heap; others there are stale
        self.wait = 0.0
        self.due = 0.0


class Index:
    """Pending rows, in the order of their positions, by key and by class. Pure; the caller holds the lock."""

    def __init__(self) -> None:
        self._lanes: dict[str, _Lane] = {}
        self._codes: dict[int, bytearray] = {}  # page → the codes of its rows, ascending
        self._alive: dict[int, int] = {}  # page → rows that are there
        self._ready: list[tuple[int, str]] = []
        self._parked: list[tuple[float, str]] = []
        self.pending = 0  # rows, also taken and parked ones
        self.taken = 0
        self.parked_keys = 0

    # ---- rows come and go

    def add(self, row: int, key: str, rank: int) -> None:
        """A row was committed; positions only grow. `rank` is its class."""
        page, at = divmod(row, _PAGE)
        if page not in self._codes:
            self._codes[page], self._alive[page] = bytearray(_PAGE), 0
        self._codes[page][at] = rank + 1
        self._alive[page] += 1
        self.pending += 1
        lane = self._lanes.setdefault(key, _Lane())
        lane.rows.append(row)
        if lane.state == _QUEUED and lane.entry < 0:
            self._queue(key, lane)

    def remove(self, row: int, key: str) -> None:
        """The row is gone: confirmed, dead-lettered, evicted or dropped."""
        page, at = divmod(row, _PAGE)
        codes = self._codes.get(page)
        if codes is None or not codes[at]:
            return
        self.taken -= bool(codes[at] & _TAKEN)
        self.pending -= 1
        codes[at] = 0
        self._alive[page] -= 1
        if not self._alive[page]:
            del self._codes[page], self._alive[page]
        lane = self._lanes.get(key)
        if lane is not None and lane.entry == row:  # the next one stands for the lane now
            self.parked_keys -= lane.state == _PARKED
            self._queue(key, lane)

    def sort(self, key: str, order: dict[int, tuple[int, int]]) -> None:
        """Put a lane into the order of (run, sequence): a damaged file may have had another one."""
        lane = self._lanes[key]
        lane.rows = array("q", sorted(lane.rows[lane.head :], key=lambda row: order[row]))
        lane.head = 0
        self._queue(key, lane)

    def _code(self, row: int) -> int:
        codes = self._codes.get(row // _PAGE)
        return codes[row % _PAGE] if codes is not None else 0

    def _first(self, lane: _Lane) -> int | None:
        rows, head = lane.rows, lane.head
        while head < len(rows) and not self._code(rows[head]):
            head += 1
        if head > 64 and head * 2 > len(rows):
            del rows[:head]
            head = 0
        lane.head = head
        return rows[head] if head < len(rows) else None

    def _queue(self, key: str, lane: _Lane) -> None:
        """Put the lane's first row where `take` finds it, or forget a lane without rows."""
        row = self._first(lane)
        if row is None:
            del self._lanes[key]
            return
        lane.state, lane.entry = _QUEUED, row
        heappush(self._ready, (row, key))
        if len(self._ready) > 4 * len(self._lanes) + 4096:
            # Stale entries pile up when rows are evicted and nobody takes any.
            self._ready = [(row, key) for row, key in self._ready if self._ready_lane(row, key)]
            heapify(self._ready)

    def _ready_lane(self, row: int, key: str) -> _Lane | None:
        """The lane that an entry of the heap stands for; None for a stale one."""
        lane = self._lanes.get(key)
        return lane if lane is not None and lane.entry == row and lane.state == _QUEUED else None

    # ---- the publisher's side

    def take(self, limit: int, busy: AbstractSet[str], now: float) -> list[tuple[int, str]]:
        """Up to `limit` (row, key), oldest first, one per key, none of a key that waits or is in `busy`."""
        self._unpark(now)
        out: list[tuple[int, str]] = []
        skipped: list[tuple[int, str]] = []
        while self._ready and len(out) < limit:
            row, key = entry = heappop(self._ready)
            lane = self._ready_lane(row, key)
            if lane is None:
                continue
            code = self._code(row)
            if not code:
                self._queue(key, lane)
            elif code & _RESERVED:
                lane.state = _BLOCKED
            elif key in busy:
                skipped.append(entry)
            else:
                self._codes[row // _PAGE][row % _PAGE] = code | _TAKEN
                lane.state = _TAKEN_OUT
                self.taken += 1
                out.append(entry)
        for entry in skipped:
            heappush(self._ready, entry)
        return out

    def give_back(self, row: int, key: str) -> None:
        """Not confirmed: the row is the first of its key again."""
        lane = self._untake(row, key)
        if lane is not None:
            self._queue(key, lane)

    def park(self, row: int, key: str, now: float) -> None:
        """The broker does not take the row now: its key waits, twice as long as the last time."""
        lane = self._untake(row, key)
        if lane is None:
            return
        lane.wait = min(LONGEST_PARK_SECONDS, lane.wait * 2 or FIRST_PARK_SECONDS)
        lane.due = now + lane.wait
        lane.state = _PARKED
        self.parked_keys += 1
        heappush(self._parked, (lane.due, key))

    def _untake(self, row: int, key: str) -> _Lane | None:
        lane = self._lanes.get(key)
        if lane is None or lane.state != _TAKEN_OUT or lane.entry != row:
            return None
        self._codes[row // _PAGE][row % _PAGE] ^= _TAKEN
        self.taken -= 1
        return lane

    def confirm(self, row: int, key: str) -> None:
        """The broker has the row. If its key had been parked, the cause may be over: try all parked keys."""
        lane = self._lanes.get(key)
        waited = lane is not None and lane.wait > 0
        if lane is not None:
            lane.wait = 0.0
        self.remove(row, key)
        if waited:
            self._unpark(float("inf"))

    def _unpark(self, now: float) -> None:
        while self._parked and self._parked[0][0] <= now:
            due, key = heappop(self._parked)
            lane = self._lanes.get(key)
            if lane is not None and lane.state == _PARKED and lane.due == due:
                self.parked_keys -= 1
                self._queue(key, lane)

    def next_due(self, now: float) -> float | None:
        """Seconds until something can be taken: 0 now, None when nothing is in sight."""
        if self._ready:
            return 0.0
        return max(0.0, self._parked[0][0] - now) if self._parked else None

    # ---- the commit's side

    def oldest(self, rank: int) -> Iterator[int]:
        """Rows of a class, oldest first, neither taken nor reserved. Don't change the index meanwhile."""
        for page, codes in self._codes.items():
            at = codes.find(rank + 1)
            while at >= 0:
                yield page * _PAGE + at
                at = codes.find(rank + 1, at + 1)

    def reserve(self, row: int) -> bool:
        """Keep the publisher off a row that a commit is about to remove; False when it is taken."""
        code = self._code(row)
        if not code or code & (_TAKEN | _RESERVED):
            return False
        self._codes[row // _PAGE][row % _PAGE] |= _RESERVED
        return True

    def release(self, row: int, key: str) -> None:
        """The commit leaves the row as it is."""
        if self._code(row) & _RESERVED:
            self._codes[row // _PAGE][row % _PAGE] ^= _RESERVED
            lane = self._lanes.get(key)
            if lane is not None and lane.state == _BLOCKED:
                self._queue(key, lane)

    def oldest_row(self) -> int | None:
        """The first position that is still there."""
        for page, codes in self._codes.items():
            return page * _PAGE + len(codes) - len(codes.lstrip(b"\0"))
        return None


class Births:
    """When rows were committed, on the monotonic clock, in buckets: a clock that jumps ages nothing."""

    KEPT = 4096

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
        if len(self._last) > self.KEPT:
            # Each bucket keeps its younger half's time: nothing is called older than it is.
            self._last, self._born = self._last[1::2], self._born[1::2]

    def of(self, position: int) -> float | None:
        """The time of a row's bucket: the row is at least that old."""
        at = bisect_left(self._last, position)
        return self._born[at] if at < len(self._born) else None

    def forget(self, before: int) -> None:
        """Drop buckets of rows below a position."""
        at = bisect_left(self._last, before)
        del self._last[:at], self._born[:at]
