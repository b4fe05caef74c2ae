"""What waits to be executed, in memory: in order for each target and topic; holds and releases go first."""

from __future__ import annotations

from collections import deque
from heapq import heapify, heappop, heappush, nsmallest
from itertools import islice

from virtbus.integrations.base import EVENT, HOLD, RELEASE, Action

Line = tuple[str, str]
"""Target and topic: what is done in order."""

Entry = tuple[int, Action, int]
"""A stored action's number, the action, and how often it was tried."""


def line_of(action: Action) -> Line:
    """A report that fails does not keep its host from being held."""
    return (action.target, action.topic)


class Lines:
    """Times are monotonic seconds. Not thread-safe: its owner locks."""

    def __init__(self) -> None:
        """Nothing waits."""
        self._queues: dict[Line, deque[Entry]] = {}
        # When, number, line: of holds and releases, then of the rest: no host waits behind many events.
        self._due: tuple[list[tuple[float, int, Line]], list[tuple[float, int, Line]]] = ([], [])
        self._in_hand: Line | None = None
        self.waiting = 0
        self.events = 0  # of them, those that hand over an event

    def __contains__(self, line: Line) -> bool:
        return line in self._queues

    def append(self, entry: Entry) -> bool:
        """Add one; whether it is due at once."""
        action = entry[1]
        self.waiting += 1
        self.events += action.verb == EVENT
        line = line_of(action)
        if line in self._queues:
            self._queues[line].append(entry)
            return False
        self._queues[line] = deque([entry])
        self._push(0.0, line)
        return True

    def _push(self, at: float, line: Line) -> None:
        number, action, _ = self._queues[line][0]
        heappush(self._due[action.verb not in (HOLD, RELEASE)], (at, number, line))

    def due_at(self) -> float:
        """When the next one is due; infinite without one."""
        return min((heap[0][0] for heap in self._due if heap), default=float("inf"))

    def take(self, now: float) -> Entry:
        """One that is due; `end` says what became of it, before the next is taken."""
        heap = next(heap for heap in self._due if heap and heap[0][0] <= now)
        self._in_hand = heappop(heap)[2]
        return self._queues[self._in_hand][0]

    def end(self, at: float, *, settled: bool) -> None:
        """What was taken is settled, or stays first of its line; the line is due again at `at`."""
        line, self._in_hand = self._in_hand, None
        assert line is not None
        queue = self._queues[line]
        number, action, attempts = queue[0]
        if settled:
            queue.popleft()
            self.waiting -= 1
            self.events -= action.verb == EVENT
        else:
            queue[0] = (number, action, attempts + 1)
        if queue:
            self._push(at, line)
        else:
            del self._queues[line]

    def cut(self, count: int) -> list[Entry]:
        """Take the oldest `count` events out, but for the one in hand; oldest first."""
        waiting = (
            entry
            for line, queue in self._queues.items()
            for entry in islice(queue, line == self._in_hand, None)
            if entry[1].verb == EVENT
        )
        cut = nsmallest(count, waiting, key=lambda entry: entry[0])
        numbers = {number for number, *_ in cut}
        for line in {line_of(action) for _, action, _ in cut}:
            left = deque(entry for entry in self._queues[line] if entry[0] not in numbers)
            if left:
                self._queues[line] = left
            else:
                del self._queues[line]
        for heap in self._due:
            heap[:] = [item for item in heap if item[2] in self._queues]
            heapify(heap)
        self.waiting -= len(cut)
        self.events -= len(cut)
        return cut
