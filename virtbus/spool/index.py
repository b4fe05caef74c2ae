"""What the publisher may take next: positions of pending rows by partition key, without their bodies.

Rebuilt from the file at each start, about ten bytes a row. Taking costs the same with a thousand rows
and with a million, with one key and with thousands. Pure; the caller holds the lock and the clock.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from heapq import heapify, heappop, heappush

FIRST_PARK_SECONDS = 1.0
LONGEST_PARK_SECONDS = 60.0

_PAGE = 4096  # rows a page of codes
_CLASS = 0x0F  # a row's class + 1; 0: no such row
_HELD = 0x40  # being given up or rewritten by a commit
_TAKEN = 0x80  # with the publisher


# A lane's state. Plain numbers, because each look at a member of an Enum costs as much as a call.
_QUEUED = 1  # its first row can be taken
_GIVEN = 2  # its first row is with the publisher
_PARKED = 3  # its first row came back as unroutable or nacked
_BLOCKED = 4  # its first row is in a commit's hands


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
        self._codes: dict[int, bytearray] = {}  # page → class and flags of each of its rows, ascending
        self._alive: dict[int, int] = {}  # page → rows that are there
        self._ready: list[tuple[int, str]] = []
        self._parked: list[tuple[float, str]] = []
        self.pending = 0  # rows, also taken and parked ones
        self.taken = 0
        self.parked_keys = 0

    # ---- rows come and go

    def add(self, row: int, key: str, rank: int) -> None:
        """A row was committed; positions only grow. `rank` is its class, lower gives way earlier."""
        page, at = divmod(row, _PAGE)
        codes = self._codes.get(page)
        if codes is None:
            codes = self._codes[page] = bytearray(_PAGE)
            self._alive[page] = 0
        codes[at] = rank + 1
        self._alive[page] += 1
        self.pending += 1
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = _Lane()
        lane.rows.append(row)
        if lane.state == _QUEUED and lane.entry < 0:
            self._queue(key, lane)

    def _queue(self, key: str, lane: _Lane) -> None:
        """Put the lane's first row where `take` finds it, or forget a lane without rows."""
        self._queue_at(self._first(lane), key, lane)

    def _queue_at(self, row: int | None, key: str, lane: _Lane) -> None:
        if row is None:
            if lane.state != _GIVEN:
                del self._lanes[key]
            return
        lane.state = _QUEUED
        lane.entry = row
        heappush(self._ready, (row, key))
        if len(self._ready) > 4 * len(self._lanes) + 4096:
            # Stale entries pile up when rows give way and nobody takes any.
            self._ready = [item for item in self._ready if self._stands(*item)]
            heapify(self._ready)

    def _stands(self, row: int, key: str) -> bool:
        lane = self._lanes.get(key)
        return lane is not None and lane.state == _QUEUED and lane.entry == row

    def _first(self, lane: _Lane) -> int | None:
        rows, head, pages = lane.rows, lane.head, self._codes
        while head < len(rows):
            row = rows[head]
            codes = pages.get(row // _PAGE)
            if codes is not None and codes[row % _PAGE]:
                break
            head += 1
        if head > 64 and head * 2 > len(rows):
            del rows[:head]
            head = 0
        lane.head = head
        return rows[head] if head < len(rows) else None

    def code(self, row: int) -> int:
        """0 when the row is not there."""
        codes = self._codes.get(row // _PAGE)
        return codes[row % _PAGE] if codes is not None else 0

    def remove(self, row: int, key: str) -> None:
        """The row is gone: confirmed, a dead letter, or given up."""
        page, at = divmod(row, _PAGE)
        codes = self._codes.get(page)
        code = codes[at] if codes is not None else 0
        if codes is None or not code:
            return
        if code & _TAKEN:
            self.taken -= 1
        codes[at] = 0
        self.pending -= 1
        self._alive[page] -= 1
        if not self._alive[page]:
            del self._codes[page], self._alive[page]
        lane = self._lanes.get(key)
        if lane is None:
            return
        first = self._first(lane)
        if lane.state != _QUEUED and (first is None or first != lane.entry):
            if lane.state == _PARKED:
                self.parked_keys -= 1
            lane.state = _QUEUED
            self._queue_at(first, key, lane)
        elif lane.state == _QUEUED and first is None:
            del self._lanes[key]

    def sort(self, key: str, order: dict[int, tuple[int, int]]) -> None:
        """Put a lane into the order of (run, sequence): a damaged file may have told another one."""
        lane = self._lanes[key]
        lane.rows = array("q", sorted(lane.rows[lane.head :], key=lambda row: order[row]))
        lane.head = 0
        lane.state = _QUEUED
        self._queue(key, lane)

    # ---- the publisher's side

    def take(self, limit: int, busy: AbstractSet[str], now: float) -> list[tuple[int, str]]:
        """Up to `limit` (row, key), the oldest first, one a key, none of a key that waits or is in `busy`."""
        self._unpark(now)
        lanes, pages = self._lanes, self._codes
        out: list[tuple[int, str]] = []
        skipped: list[tuple[int, str]] = []
        while self._ready and len(out) < limit:
            entry = heappop(self._ready)
            row, key = entry
            lane = lanes.get(key)
            if lane is None or lane.entry != row or lane.state != _QUEUED:
                continue  # stale
            codes = pages.get(row // _PAGE)
            code = codes[row % _PAGE] if codes is not None else 0
            if codes is None or not code:
                self._queue(key, lane)
            elif code & _HELD:
                lane.state = _BLOCKED
            elif key in busy:
                skipped.append(entry)
            else:
                codes[row % _PAGE] = code | _TAKEN
                lane.state = _GIVEN
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
        """Nobody wants the row now: its key waits, twice as long as the last time."""
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
        if lane is None or lane.state != _GIVEN or lane.entry != row:
            return None
        self._codes[row // _PAGE][row % _PAGE] &= ~_TAKEN & 0xFF
        self.taken -= 1
        lane.state = _QUEUED
        return lane

    def confirm(self, row: int, key: str) -> None:
        """The broker has the row. If its key had been parked, somebody binds again: try all parked keys."""
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
        """Keep the publisher off a row while a commit gives it up or rewrites it; False when it is taken."""
        code = self.code(row)
        if not code or code & (_TAKEN | _HELD):
            return False
        self._codes[row // _PAGE][row % _PAGE] |= _HELD
        return True

    def release(self, row: int, key: str) -> None:
        """The commit leaves the row as it is."""
        if self.code(row) & _HELD:
            self._codes[row // _PAGE][row % _PAGE] &= ~_HELD & 0xFF
            lane = self._lanes.get(key)
            if lane is not None and lane.state == _BLOCKED:
                self._queue(key, lane)

    def oldest_row(self) -> int | None:
        """The first position that is still there."""
        for page, codes in self._codes.items():
            return page * _PAGE + len(codes) - len(codes.lstrip(b"\0"))
        return None
