"""What the publisher may take next: positions of pending rows by partition key, without their bodies.

Rebuilt from the file at each start, about ten bytes a row. Taking costs the same with a thousand rows
and with a million, with one key and with thousands. Pure; the caller holds the lock and the clock.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from heapq import heapify, heappop, heappush

FIRST_PARK_SECONDS = 1.0
LONGEST_PARK_SECONDS = 60.0

_PAGE = 4096  # rows per page of codes
# A row's code is its class + 1 (0: no such row) and these flags:
_HELD = 0x40  # a commit evicts or rewrites it
_TAKEN = 0x80  # with the publisher

# State of a lane: its first row is ready, with the publisher, parked (unroutable or nacked), or held by a
# commit.
_QUEUED, _TAKEN_OUT, _PARKED, _BLOCKED = range(4)


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
    """Pending rows, in the order of their positions, by key and by class. Not thread-safe."""

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
        code = self._code(row)
        if not code:
            return
        page = row // _PAGE
        self.taken -= bool(code & _TAKEN)
        self.pending -= 1
        self._codes[page][row % _PAGE] = 0
        self._alive[page] -= 1
        if not self._alive[page]:
            del self._codes[page], self._alive[page]
        lane = self._lanes.get(key)
        if lane is None:
            return
        first = self._first(lane)
        if first is None or (lane.state != _QUEUED and first != lane.entry):
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
            elif code & _HELD:
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
        """Rows of a class, oldest first, neither taken nor held. Don't change the index meanwhile."""
        for page, codes in self._codes.items():
            at = codes.find(rank + 1)
            while at >= 0:
                yield page * _PAGE + at
                at = codes.find(rank + 1, at + 1)

    def hold(self, row: int) -> bool:
        """Keep the publisher off a row while a commit evicts or rewrites it; False when it is taken."""
        code = self._code(row)
        if not code or code & (_TAKEN | _HELD):
            return False
        self._codes[row // _PAGE][row % _PAGE] |= _HELD
        return True

    def release(self, row: int, key: str) -> None:
        """The commit leaves the row as it is."""
        if self._code(row) & _HELD:
            self._codes[row // _PAGE][row % _PAGE] ^= _HELD
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
