"""What subscriptions share: order within a key, retries, verdicts, and the thread that dead-letters."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from virtbus.errors import RecordRefused, VirtbusError
from virtbus.model import Message
from virtbus.retry import Backoff
from virtbus.telemetry import DeadLetterStored, DeadLetterWaits, Notice, Trouble, emit

REASON_BYTES = 1024
SMALLEST = 2  # how often a dead letter is made smaller at most
_CEILING_SECONDS = 30.0
_IDLE_SECONDS = 10.0  # without a dead letter the connection is closed
_BEAT_SECONDS = 0.25  # between two looks at an idle connection
_JOIN_SECONDS = 5.0


@dataclass(eq=False, slots=True)
class Item:
    """A message without a verdict: the `handle` of its message."""

    lane: Hashable  # order is kept within it: a key, or a value of its own for a message without one
    number: int  # its place in the lane
    origin: Any  # what the adapter needs for the verdict
    message: Message = field(init=False)
    due: float = 0.0  # a retry is not delivered before, on the monotonic clock


class Line:
    """The messages that have come and have no verdict. Pure: times are passed in.

    Guarantees: at most `prefetch` are with the caller; a message that waits for its retry holds back what
    stands behind it in its lane, and nothing else.
    """

    def __init__(self, prefetch: int) -> None:
        self._prefetch = prefetch
        self._ready: deque[Item] = deque()
        self._held: dict[Hashable, list[Item]] = {}  # by lane, in order: the first waits for its time
        self._wakes: list[tuple[float, int, Hashable]] = []  # a heap of the times at which to look at a lane
        self._counter = itertools.count()
        self.out: set[Item] = set()  # with the caller
        self.aside: set[Item] = set()  # on their way into the dead letters

    def arrived(self, item: Item) -> None:
        """A message came; one whose `due` is set goes on waiting for its retry."""
        if item.due:
            self.retry(item, item.due)
        elif item.lane in self._held:
            self._held[item.lane].append(item)
        else:
            self._ready.append(item)

    def next(self, now: float) -> Message | None:
        """The next message for the caller, if there is one."""
        while self._wakes and self._wakes[0][0] <= now:
            self._release(heapq.heappop(self._wakes)[2], now)
        if not self._ready or len(self.out) >= self._prefetch:
            return None
        item = self._ready.popleft()
        self.out.add(item)
        return item.message

    def verdict(self, message: Message) -> Item | None:
        """The caller's verdict: the item, once, and only while its connection or partition is ours."""
        item = message.handle
        if item not in self.out:
            return None
        assert isinstance(item, Item)
        self.out.discard(item)
        return item

    def retry(self, item: Item, due: float) -> None:
        """Deliver it again, not before `due`, and nothing that stands behind it in its lane before it."""
        item.due, item.message = due, replace(item.message, redelivered=True)
        behind = [one for one in self._ready if one.lane == item.lane]
        if behind:
            self._ready = deque(one for one in self._ready if one.lane != item.lane)
        line = [*self._held.get(item.lane, ()), item, *behind]
        self._held[item.lane] = sorted(line, key=lambda one: one.number)
        self._wake(due, item.lane)

    def _release(self, lane: Hashable, now: float) -> None:
        line = self._held.pop(lane, [])
        free = next((n for n, item in enumerate(line) if item.due > now), len(line))
        self._ready.extend(line[:free])  # behind what is ready: retries keep nothing new away
        if line[free:]:
            self._held[lane] = line[free:]
            self._wake(line[free].due, lane)

    def _wake(self, due: float, lane: Hashable) -> None:
        heapq.heappush(self._wakes, (due, next(self._counter), lane))

    def due(self) -> float:
        """When the next retry may be delivered; infinity when none waits."""
        return self._wakes[0][0] if self._wakes else float("inf")

    @property
    def ready(self) -> int:
        """Messages that could be handed out."""
        return len(self._ready)

    @property
    def held(self) -> int:
        """Messages that wait for a retry, or to be dead-lettered."""
        return sum(map(len, self._held.values())) + len(self.aside)

    def forget(self, gone: Callable[[Item], bool] = lambda item: True) -> None:
        """The connection or partition is gone, and with it these messages: they come again."""
        self._ready = deque(item for item in self._ready if not gone(item))
        held = {lane: [item for item in line if not gone(item)] for lane, line in self._held.items()}
        self._held = {lane: line for lane, line in held.items() if line}
        self._wakes = [wake for wake in self._wakes if wake[2] in self._held]
        heapq.heapify(self._wakes)
        self.out = {item for item in self.out if not gone(item)}
        self.aside = {item for item in self.aside if not gone(item)}


class LineSubscription:
    """The verdicts of a `virtbus.bus.Subscription`; an adapter adds `receive`, `close` and `_done`."""

    def __init__(self, group: str | None, prefetch: int, store: LetterStore | None = None) -> None:
        """`store` takes the group's dead letters."""
        self._group = group
        self._lock = threading.RLock()
        self._line = Line(max(1, prefetch))
        self._letters = DeadLetterWriter(store, self._wake) if store is not None else None

    def ack(self, message: Message) -> None:
        """See virtbus.bus.Subscription."""
        with self._lock:
            item = self._line.verdict(message)
            if item is not None:
                self._done(item)

    def retry(self, message: Message, after: float) -> None:
        """See virtbus.bus.Subscription. It stays unacknowledged here: nobody else gets it meanwhile."""
        with self._lock:
            item = self._line.verdict(message)
            if item is not None:
                self._line.retry(item, time.monotonic() + max(0.0, after))

    def dead_letter(self, message: Message, reason: str) -> None:
        """See virtbus.bus.Subscription."""
        with self._lock:
            item = self._line.verdict(message)
            if item is not None:
                self._dead_letter(item, reason)

    def _dead_letter(self, item: Item, reason: str) -> None:
        reason = cut_text(reason, REASON_BYTES)
        if self._group is None:
            told = f"{item.message.position}: no group keeps dead letters, so this is only logged: {reason}"
            emit(Notice(told))
            self._done(item)
        else:
            self._put_aside(item, reason)

    def _put_aside(self, item: Item, reason: str) -> None:
        assert self._letters is not None
        self._line.aside.add(item)
        self._letters.put(item, reason)

    def _collect(self) -> None:
        """Acknowledge what the dead letters have confirmed by now."""
        if self._letters is None:
            return
        while (item := self._letters.stored()) is not None:
            if item in self._line.aside:
                self._line.aside.discard(item)
                self._done(item)

    def _done(self, item: Item) -> None:
        """Acknowledge it. Raises nothing for a broker's fault."""
        raise NotImplementedError

    def _wake(self) -> None:
        """End a wait for messages: there is something to collect. Called from another thread."""


def cut_text(text: object, size: int) -> str:
    """One line of at most `size` bytes of UTF-8."""
    return " ".join(str(text).split()).encode("utf-8", "replace")[:size].decode("utf-8", "ignore")


# ------------------------------------------------------------------------------------- dead-lettering


class LetterStore(Protocol):
    """A group's dead letters at the broker. All but `abort` is called by one thread."""

    name: str  # of the queue or topic

    def store(self, item: Item, reason: str, smaller: int) -> str | None:
        """Store it, confirmed; what was cut of it. `smaller` is 0 to SMALLEST: how much has to go.

        Raises RecordRefused when it has to be smaller, BusUnavailable, BusDenied.
        """

    def keep_alive(self) -> None:
        """Serve the idle connection."""

    def disconnect(self) -> None:
        """Close the connection; the next `store` opens one."""

    def abort(self) -> None:
        """End a `store` that is under way. From another thread."""


@dataclass(order=True, slots=True)
class _Letter:
    due: float
    number: int
    item: Item = field(compare=False)
    reason: str = field(compare=False)
    backoff: Backoff = field(compare=False)
    smaller: int = field(compare=False, default=0)


class DeadLetterWriter:
    """Stores messages in a thread of its own, each until the broker has confirmed it.

    An alarm, a full queue or a message that breaks its channel costs nothing but that message: it waits
    with backoff, the others go on. Guarantee: `stored` gives a message only after its confirm.
    """

    def __init__(self, store: LetterStore, wake: Callable[[], None]) -> None:
        """`wake` is called when `stored` has something new."""
        self._store, self._wake = store, wake
        self._changed = threading.Condition()
        self._waiting: list[_Letter] = []  # a heap
        self._writing: _Letter | None = None
        self._stored: SimpleQueue[Item] = SimpleQueue()
        self._numbers = itertools.count()
        self._closed = False
        self._thread: threading.Thread | None = None

    def put(self, item: Item, reason: str) -> None:
        """Take it on; returns at once."""
        backoff = Backoff("dead_letter", ceiling=_CEILING_SECONDS, hook=lambda _: None)
        with self._changed:
            heapq.heappush(self._waiting, _Letter(0.0, next(self._numbers), item, reason, backoff))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="virtbus-dead-letters", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def stored(self) -> Item | None:
        """The next one that was confirmed."""
        try:
            return self._stored.get_nowait()
        except Empty:
            return None

    def close(self, timeout: float) -> None:
        """Wait up to `timeout` seconds until everything is confirmed or has failed once; then let go."""
        with self._changed:
            self._changed.wait_for(
                lambda: not self._writing and all(one.due for one in self._waiting), timeout
            )
            self._closed = True
            self._changed.notify_all()
        self._store.abort()
        if self._thread is not None:
            self._thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        connected, since = False, time.monotonic()
        while not self._closed:
            letter = self._next(_BEAT_SECONDS if connected else None)
            if letter is not None:
                self._write(letter)
                connected, since = True, time.monotonic()
            elif connected and time.monotonic() - since > _IDLE_SECONDS:
                self._store.disconnect()
                connected = False
            elif connected:
                self._store.keep_alive()
        self._store.disconnect()

    def _next(self, wait: float | None) -> _Letter | None:
        with self._changed:
            left = self._waiting[0].due - time.monotonic() if self._waiting else None
            if not self._closed and (left is None or left > 0):
                self._changed.wait(min((each for each in (wait, left) if each is not None), default=None))
            if self._waiting and self._waiting[0].due <= time.monotonic() and not self._closed:
                self._writing = heapq.heappop(self._waiting)
                return self._writing
            return None

    def _write(self, letter: _Letter) -> None:
        item = letter.item
        try:
            cut = self._store.store(item, letter.reason, letter.smaller)
        except Exception as error:  # noqa: BLE001 - this thread must outlive everything
            self._again(letter, error)
            return
        with self._changed:
            if self._writing is letter:  # else it was forgotten, and comes again
                self._stored.put(item)
            self._writing = None
            self._changed.notify_all()
        emit(DeadLetterStored(self._store.name, item.message.position, letter.reason[:200], cut))
        self._wake()

    def _again(self, letter: _Letter, error: Exception) -> None:
        smaller = isinstance(error, RecordRefused) and letter.smaller < SMALLEST
        with self._changed:
            if self._writing is not letter:  # forgotten
                return
            self._writing = None
            letter.smaller += smaller
            if not smaller:
                letter.due = time.monotonic() + letter.backoff.next_wait()
            heapq.heappush(self._waiting, letter)
            waiting = len(self._waiting)
            self._changed.notify_all()
        if not isinstance(error, VirtbusError):
            emit(Trouble("storing a dead letter", error))
        elif not smaller and not self._closed:
            emit(DeadLetterWaits(self._store.name, letter.item.message.position, waiting, error))

    def forget(self, gone: Callable[[Item], bool] = lambda item: True) -> None:
        """These come again by themselves: nothing more is tried for them."""
        with self._changed:
            self._waiting = [letter for letter in self._waiting if not gone(letter.item)]
            heapq.heapify(self._waiting)
            if self._writing is not None and gone(self._writing.item):
                self._writing = None
