"""Where a Kafka group goes on in each partition, and which records it will never get.

Pure. Kafka itself moves a group silently: to the oldest record that is left when retention has overtaken it,
to any record of the same number when the topic was recreated. Hence every commit carries the topic's id as
its metadata, and the same is noted beside the dedupe marks, for a deleted topic takes the commits along.
A replaced topic is noticed some seconds late, and until then its records are taken for the old one's: so each
place also says how far the group had read when the topic was last known to be that one.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Container
from dataclasses import dataclass

from virtbus.bus import Memory
from virtbus.sequences import Cause, MissingEvents


class Track:
    """One assigned partition: which offsets were taken and not yet acknowledged, in order.

    Guarantee: `done` gives an offset to commit only when every message before it is acknowledged.
    """

    def __init__(self, following: int | None = None) -> None:
        self.following = following  # the offset that comes next in an unbroken log; None: not known yet
        self.sure = following  # `position` when the topic was last known to be the same
        self._open: deque[int] = deque()  # taken, in order; an acknowledged one goes when it is the first
        self._acknowledged: set[int] = set()

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


@dataclass(frozen=True, slots=True)
class Place:
    """How far a group has read one partition."""

    topic_id: str  # "" where the broker gives none (before Kafka 3.1)
    next: int  # the offset to go on from
    sure: int | None = None  # `next` when the topic was last known to be this one; None: as `next`

    def note(self) -> str:
        """As it is kept."""
        return json.dumps([self.topic_id, self.next, self.sure])

    def metadata(self) -> str:
        """What a commit of `next` carries: "<topic id> <sure>"."""
        return f"{self.topic_id} {self.next if self.sure is None else self.sure}"

    @classmethod
    def committed(cls, offset: int, metadata: str) -> Place:
        """What `metadata` wrote; a commit by another tool says nothing of the topic."""
        topic_id, _, sure = metadata.partition(" ")
        if not (sure.isascii() and sure.isdigit()):
            return cls("", offset)
        return cls(topic_id, offset, int(sure))

    @classmethod
    def read(cls, note: str | None) -> Place | None:
        """What `note` wrote; None when there is none that can be read."""
        try:
            topic_id, following, *sure = json.loads(note or "")
            return cls(str(topic_id), int(following), sure[0] if sure and sure[0] is not None else None)
        except (ValueError, TypeError):
            return None


@dataclass(frozen=True, slots=True)
class Log:
    """A partition as it is now."""

    name: str  # "topic[partition]"
    topic_id: str
    low: int  # the oldest offset that is left
    high: int  # the offset that the next record gets


def resume(
    committed: Place | None, noted: Place | None, log: Log
) -> tuple[int | None, tuple[MissingEvents, ...]]:
    """Where to go on (None: where the commit says), and what is lost on the way.

    `committed` is what the broker keeps for the group, `noted` what we kept. The commit decides, for an
    operator may have moved it; the note only says what was read where the broker has forgotten it. Without
    either the group is new, and misses nothing.
    """
    places = [place for place in (committed, noted) if place is not None]
    same = [place for place in places if _same(place.topic_id, log.topic_id)]
    if not places:
        return log.low, ()
    read = max(same or places, key=lambda place: place.next)
    if not same:  # all of the new topic is from after the group began
        return log.low, (replaced(log.name, read), *_expired(log, 0))
    start = committed if committed in same and committed is not None else read
    if start.next > log.high:  # cut short, or another topic of a broker that gives no ids
        return log.low, (replaced(log.name, read), *_expired(log, 0))
    if start.next < log.low or committed is not start:
        return log.low, _expired(log, read.next)
    return None, ()


def _expired(log: Log, following: int) -> tuple[MissingEvents, ...]:
    """What retention took of what was to come next."""
    if following >= log.low:
        return ()
    return (MissingEvents(log.name, log.topic_id, following, log.low - 1, Cause.RETENTION),)


def replaced(name: str, old: Place) -> MissingEvents:
    """What was not read of a partition that is another one now; nobody knows how far it went."""
    first = old.next if old.sure is None else min(old.sure, old.next)
    return MissingEvents(name, old.topic_id, first, None, Cause.REPLACED)


def _same(one: str, other: str) -> bool:
    """Whether two ids may be of one topic: an unknown one may be any."""
    return not one or not other or one == other


class Losses:
    """What one subscription's group has read and will never get; reports each loss once."""

    def __init__(self, topic: str, memory: Memory) -> None:
        self._topic, self._memory = topic, memory
        self.topic_id = ""  # of the topic that is read now
        self._told: set[tuple[str, str, int]] = set()

    def read(self, partition: int, following: int, sure: int | None = None) -> Place:
        """The group goes on from `following`; `sure` as in `Place`."""
        place = Place(self.topic_id, following, sure)
        self._memory.keep(self._name(partition), place.note())
        return place

    def resume(
        self, partition: int, committed: Place | None, low: int, high: int
    ) -> tuple[int | None, Place | None]:
        """Where to go on in a partition that was assigned (None: where the commit says), and that place."""
        name = self._name(partition)
        noted = Place.read(self._memory.recall(name))
        start, lost = resume(committed, noted, Log(name, self.topic_id, low, high))
        for each in lost:
            self._tell(each)
        if start is not None:
            return start, self.read(partition, start)
        return None, committed and self.read(partition, committed.next, committed.sure)

    def without(self, partitions: Container[int]) -> None:
        """The topic has only these partitions: what was not read of others, of the one before, is lost."""
        for name in self._memory.names():
            of, _, number = name.removesuffix("]").rpartition("[")
            noted = Place.read(self._memory.recall(name))
            gone = of == self._topic and number.isdigit() and int(number) not in partitions
            told = Place(self.topic_id, 0)
            if gone and noted is not None and noted != told:  # partitions never go but with their topic
                self._tell(replaced(name, noted))
                self._memory.keep(name, told.note())

    def passed_over(self, partition: int, first: int, last: int, ends: tuple[int, int] | None) -> None:
        """Offsets that did not come: compacted away, or lost if they are older than the oldest that is left.

        Lost too when the broker does not say, or speaks of another log that is shorter by now.
        """
        low, high = ends if ends is not None else (last + 1, last + 1)
        lost = last if high <= last else min(last, low - 1)
        if lost >= first:
            self._tell(MissingEvents(self._name(partition), self.topic_id, first, lost, Cause.RETENTION))

    def replaced(self, partition: int, track: Track) -> None:
        """A partition is another one now; since it was last known to be the same, nobody knows which."""
        if track.sure is not None:
            self._tell(replaced(self._name(partition), Place(self.topic_id, track.sure)))

    def _name(self, partition: int) -> str:
        return f"{self._topic}[{partition}]"

    def _tell(self, lost: MissingEvents) -> None:
        told = (lost.source, lost.epoch, -1 if lost.cause is Cause.REPLACED else lost.first)
        if told not in self._told:
            self._told.add(told)
            self._memory.missing(lost)
