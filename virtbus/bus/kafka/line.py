"""Which of a group's Kafka records may be handed out, which wait, and which offset may be committed. Pure."""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

from virtbus.bus.kafka.records import Headers
from virtbus.model import Message

# Messages of a key that waits for a retry are held back; at most this many times `prefetch` in all.
_HELD_FACTOR = 10
# Offsets kept in mind behind one that has no verdict for long: so much comes again after a kill.
_SPAN = 100_000


class Track:
    """One assigned partition: which offsets were taken and not yet acknowledged, in order.

    Guarantee: `done` gives an offset to commit only when every message before it is acknowledged.
    """

    def __init__(self, following: int | None = None) -> None:
        self.following = following  # the offset that comes next in an unbroken log; None: not known yet
        self.sure = following  # `position` when the topic was last known to be the same
        self._open: deque[int] = deque()  # taken, in order; an acknowledged one goes when it is the first
        self._acknowledged: set[int] = set()

    def __len__(self) -> int:
        """Messages taken and not acknowledged."""
        return len(self._open) - len(self._acknowledged)

    @property
    def span(self) -> int:
        """Offsets kept in mind, acknowledged or not."""
        return len(self._open)

    @property
    def position(self) -> int | None:
        """The offset to go on from after a restart; None when nothing came yet."""
        return self._open[0] if self._open else self.following

    def took(self, offset: int) -> tuple[int, int] | None:
        """A message came: the offsets (first, last) that were passed over before it, if any were.

        Offsets rise, with holes where the log was compacted; (`following`, -1) when it went back.
        """
        expected, self.following = self.following, offset + 1
        self._open.append(offset)
        if expected is None or offset == expected:
            return None
        return (expected, offset - 1) if offset > expected else (expected, -1)

    def done(self, offset: int) -> int | None:
        """A message is acknowledged: the offset to go on from after a restart, if it moved."""
        self._acknowledged.add(offset)
        watermark = None
        while self._open and self._open[0] in self._acknowledged:
            watermark = self._open.popleft() + 1
            self._acknowledged.discard(watermark - 1)
        return watermark


@dataclass(slots=True)
class Handle:
    """What a message needs for its verdict; a partition taken away makes it worthless."""

    track: Track
    topic: str
    partition: int
    offset: int
    key: bytes | None
    headers: Headers
    settled: bool = False


@dataclass(slots=True)
class _Held:
    """A key whose first message is to come again: its later ones stand in line behind it."""

    line: deque[Message]
    out: int | None = None  # the offset of the one that is with the caller again
    times: dict[int, float] = field(default_factory=dict)  # by offset: not before this


@dataclass(order=True, slots=True)
class _Due:
    at: float
    number: int
    key: Any = field(compare=False)
    held: _Held = field(compare=False)


class Line:
    """The messages of the assigned partitions. Times are those of one monotonic clock, passed in."""

    def __init__(self, prefetch: int) -> None:
        """At most `prefetch` messages are with the caller at a time."""
        self.tracks: dict[int, Track] = {}
        self._prefetch = prefetch
        self._held: dict[tuple[int, bytes], _Held] = {}
        self._due: list[_Due] = []
        self._ready: deque[Message] = deque()
        self._aside = 0  # messages that have their verdict, and wait to be put aside
        self._counter = 0

    # ---- partitions

    def assign(self, partition: int, following: int | None = None) -> Track:
        """A partition is ours; what came from it before means nothing any more."""
        self.forget([partition])
        track = self.tracks[partition] = Track(following)
        return track

    def forget(self, partitions: list[int]) -> None:
        """Partitions are gone, and with them what came from them."""
        for partition in partitions:
            self.tracks.pop(partition, None)
        gone = set(partitions)
        self._held = {name: held for name, held in self._held.items() if name[0] not in gone}

    def owns(self, handle: Handle) -> bool:
        """Whether a message's partition is still ours, without a break since it came."""
        return self.tracks.get(handle.partition) is handle.track

    # ---- messages

    def took(self, message: Message, handle: Handle) -> Message | None:
        """A message came: itself, unless it has to wait."""
        held = self._held.get(_name(handle)) if handle.key is not None else None
        if held is not None:
            held.line.append(message)
            return None
        if self.handed > self._prefetch:  # came while the pause was on its way
            self._ready.append(message)
            return None
        return message

    def ready(self, now: float) -> Message | None:
        """What waited and may go now."""
        while self.due(now):
            due = heapq.heappop(self._due)
            held = due.held
            if self._held.get(due.key) is not held or not held.line or held.out is not None:
                continue
            first = _offset(held.line[0])
            if held.times.get(first, 0.0) > now:  # a later one's time: it waits behind this
                self._wait(due.key, held, held.times[first])
                continue
            held.times.pop(first, None)
            held.out = first
            return held.line.popleft()
        while self._ready and self.handed < self._prefetch:
            message = self._ready.popleft()
            handle: Handle = message.handle  # type: ignore[assignment]
            if not self.owns(handle):
                continue
            waits = self._held.get(_name(handle))
            if waits is None:
                return message
            waits.line.append(message)
        return None

    def due(self, now: float) -> bool:
        """Whether a retry's time has come."""
        return bool(self._due) and self._due[0].at <= now

    def wait(self, now: float) -> float | None:
        """How long until the next retry; None when there is none."""
        return max(0.0, self._due[0].at - now) if self._due else None

    def settle(self, message: Message) -> Handle | None:
        """The handle, once, and only while its partition is ours."""
        handle: Handle = message.handle  # type: ignore[assignment]
        if handle.settled:
            return None
        handle.settled = True
        return handle if self.owns(handle) else None

    def done(self, handle: Handle) -> int | None:
        """Acknowledge a settled message: the offset to commit, if it moved. The next of its key may go."""
        watermark = handle.track.done(handle.offset)
        name = _name(handle)
        held = self._held.get(name)
        if held is not None and held.out == handle.offset:
            held.out = None
            if held.line:
                self._wait(name, held, 0.0)
            else:
                del self._held[name]
        return watermark

    def retry(self, message: Message, handle: Handle, at: float) -> None:
        """A settled message comes again, not before `at`, and nothing of its key before it."""
        handle = replace(handle, settled=False)
        again = replace(message, redelivered=True, handle=handle)
        name = _name(handle)
        held = self._held.setdefault(name, _Held(deque()))
        if held.out == handle.offset:
            held.out = None
        # Others that the caller had before the first of their key came back take their places in line.
        held.line = deque(sorted([*held.line, again], key=_offset))
        held.times[handle.offset] = at
        self._wait(name, held, at)

    def set_aside(self, count: int) -> None:
        """So many messages wait to be put aside: they are not with the caller."""
        self._aside = count

    # ---- flow control

    @property
    def outstanding(self) -> int:
        """Messages without a verdict, or not put aside yet."""
        return sum(map(len, self.tracks.values()))

    @property
    def waiting(self) -> int:
        """Messages that are kept here."""
        return len(self._ready) + sum(len(held.line) for held in self._held.values()) + self._aside

    @property
    def handed(self) -> int:
        """Messages that are with the caller."""
        return self.outstanding - self.waiting

    @property
    def full(self) -> bool:
        """Whether no more may be fetched now."""
        spans = sum(track.span for track in self.tracks.values())
        most = self._prefetch * _HELD_FACTOR
        return self.handed >= self._prefetch or self.waiting >= most or spans >= max(_SPAN, most)

    def _wait(self, name: tuple[int, bytes], held: _Held, at: float) -> None:
        self._counter += 1
        heapq.heappush(self._due, _Due(at, self._counter, name, held))


def _name(handle: Handle) -> tuple[int, bytes]:
    """A message without a key is a key of its own."""
    return handle.partition, handle.key if handle.key is not None else b"@%d" % handle.offset


def _offset(message: Message) -> int:
    handle: Handle = message.handle  # type: ignore[assignment]
    return handle.offset
