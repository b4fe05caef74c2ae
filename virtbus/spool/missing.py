"""What went missing, and the accounts by which that is known.

A sequence is *settled* once nobody has to answer for it any more: the broker confirmed its event, or the gap
event that names it. Until then its row is in the spool, or a pending gap event's row names it, or it waits to
be named. Whatever is none of these was lost to damage: that sum is what `Account.holes` computes.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field

from virtbus.model import PreviousRun, SequenceRange
from virtbus.spool import files
from virtbus.words import GapReason

CHUNK = 4096  # sequences a bitmap speaks for: 512 bytes, rewritten when one of them is settled
FULL = (1 << CHUNK) - 1


# ------------------------------------------------------------------------------- ranges of sequences


def merge_ranges(ranges: Iterable[SequenceRange]) -> tuple[SequenceRange, ...]:
    """Sort by epoch and first number, and join what touches or overlaps."""
    merged: list[SequenceRange] = []
    for item in sorted(ranges, key=lambda each: (each.epoch, each.first, each.last)):
        last = merged[-1] if merged else None
        if last is None or last.epoch != item.epoch or item.first > last.last + 1:
            merged.append(item)
        elif item.last > last.last:
            merged[-1] = SequenceRange(item.epoch, last.first, item.last)
    return tuple(merged)


def subtract_ranges(
    ranges: Iterable[SequenceRange], taken: Iterable[SequenceRange]
) -> tuple[SequenceRange, ...]:
    """What is in `ranges` and not in `taken`."""
    away = merge_ranges(taken)
    left: list[SequenceRange] = []
    for item in merge_ranges(ranges):
        first = item.first
        for cut in away:
            if cut.epoch != item.epoch or cut.last < first or cut.first > item.last:
                continue
            if cut.first > first:
                left.append(SequenceRange(item.epoch, first, cut.first - 1))
            first = cut.last + 1
        if first <= item.last:
            left.append(SequenceRange(item.epoch, first, item.last))
    return tuple(left)


def count_events(ranges: Iterable[SequenceRange]) -> int:
    """How many sequences the (disjoint) ranges hold."""
    return sum(item.last - item.first + 1 for item in ranges)


# ------------------------------------------------------------------------------- what a gap event names


@dataclass(frozen=True, slots=True)
class Missing:
    """What a gap event names, or has to: numbers, and what went with them."""

    ranges: tuple[SequenceRange, ...]
    reason: GapReason
    occurrences: int = 0  # counted errors that went with them
    started_ns: int | None = None  # of the gap: None is unknown
    detail: str | None = None
    found: int = 0
    previous: PreviousRun | None = None

    def dump(self) -> str:
        """The text of a row's `names` column, independent of any schema version."""
        data = {
            "ranges": [[item.epoch, item.first, item.last] for item in self.ranges],
            "occurrences": self.occurrences,
            "found": self.found,
            "started_ns": self.started_ns,
            "previous": self.previous and [self.previous.epoch, self.previous.last_sequence],
        }
        return json.dumps(data, separators=(",", ":"))

    @classmethod
    def parse(cls, text: str) -> Missing:
        """That text again, as what a merged gap event says; what a later release adds is ignored."""
        data = json.loads(text)
        return cls(
            tuple(SequenceRange(*item) for item in data["ranges"]),
            GapReason.SPOOL_FULL,
            data.get("occurrences", 0),
            data.get("started_ns"),
            found=data.get("found", 0),
            previous=PreviousRun(*data["previous"]) if data.get("previous") else None,
        )


def put_loss(db: sqlite3.Connection, number: int, loss: Missing) -> None:
    """Write what no gap event names yet into table losses: there each has one range."""
    (item,) = loss.ranges
    counts = (loss.reason, loss.occurrences, loss.started_ns, loss.detail)
    files.put(db, "losses", number, item.epoch, item.first, item.last, *counts)


def join(items: Sequence[Missing]) -> Missing:
    """One that says what all of them say."""
    starts = [each.started_ns for each in items if each.started_ns is not None]
    details = list(dict.fromkeys(each.detail for each in items if each.detail))
    return Missing(
        merge_ranges(item for each in items for item in each.ranges),
        items[0].reason,
        sum(each.occurrences for each in items),
        min(starts) if len(starts) == len(items) else None,
        "; ".join(details[:3] + ["…"] * (len(details) > 3)) or None,
        sum(each.found for each in items),
        next((each.previous for each in reversed(items) if each.previous), None),
    )


# ------------------------------------------------------------------------------- accounts


def _bits(first: int, last: int) -> Iterator[tuple[int, int]]:
    """(chunk, mask) of the sequences `first` to `last`."""
    begin = first - 1
    while begin < last:
        chunk, bit = divmod(begin, CHUNK)
        size = min(CHUNK - bit, last - begin)
        yield chunk, ((1 << size) - 1) << bit
        begin += size


def mark(bitmaps: MutableMapping[int, int], first: int, last: int) -> bool:
    """Set the bits of `first` to `last` in bitmaps by chunk. False when one of them was set already."""
    fresh = True
    for chunk, mask in _bits(first, last):
        known = bitmaps.get(chunk, 0)
        fresh = fresh and not known & mask
        bitmaps[chunk] = known | mask
    return fresh


@dataclass(slots=True)
class Account:
    """One run's sequences, 1 to `last`, as settled or not.

    All numbers in the first `below` chunks are settled and need no bitmap; a chunk without a bitmap above
    that has nothing settled.
    """

    run: int
    epoch: str
    started_ns: int
    alive_ns: int
    last: int = 0
    below: int = 0
    bitmaps: dict[int, int] = field(default_factory=dict)
    # What has to be written to the file: chunks that changed, chunks whose bitmap is no longer needed.
    touched: set[int] = field(default_factory=set)
    finished: set[int] = field(default_factory=set)

    def settle(self, first: int, last: int) -> None:
        """Mark `first` to `last` as settled; numbers that are settled already stay so."""
        first, last = max(first, self.below * CHUNK + 1), min(last, self.last)
        one = ((first - 1) // CHUNK, 1 << (first - 1) % CHUNK)  # nearly all are settled one by one
        for chunk, mask in (one,) if first == last else _bits(first, last):
            bitmap = self.bitmaps.get(chunk, 0) | mask
            self.bitmaps[chunk] = FULL if bitmap == FULL else bitmap  # one object for all that are full
            self.touched.add(chunk)
        while self.bitmaps.get(self.below) == FULL:
            del self.bitmaps[self.below]
            self.touched.discard(self.below)
            self.finished.add(self.below)
            self.below += 1

    @property
    def settled_through(self) -> int:
        """The highest number up to which everything is settled."""
        return min(self.below * CHUNK + _ones(self.bitmaps.get(self.below, 0)), self.last)

    @property
    def complete(self) -> bool:
        """Nothing of this run is left to answer for."""
        return self.settled_through >= self.last

    def holes(self, present: Mapping[int, int]) -> tuple[SequenceRange, ...]:
        """What is neither settled nor marked in `present` (rows, and what is named or about to be)."""
        holes = []
        for chunk in range(self.below, (self.last + CHUNK - 1) // CHUNK):
            size = min(CHUNK, self.last - chunk * CHUNK)
            unknown = ~(self.bitmaps.get(chunk, 0) | present.get(chunk, 0)) & ((1 << size) - 1)
            number = chunk * CHUNK + 1
            while unknown:
                known = (unknown & -unknown).bit_length() - 1
                length = _ones(unknown >> known)
                number += known + length
                holes.append(SequenceRange(self.epoch, number - length, number - 1))
                unknown >>= known + length
        return merge_ranges(holes)


def put_run(
    db: sqlite3.Connection, run: Account, *, last: int | None = None, alive_ns: int | None = None
) -> None:
    """Write a run's record; `last` and `alive_ns` where they are not yet those of the account."""
    alive_ns = run.alive_ns if alive_ns is None else alive_ns
    last = run.last if last is None else last
    files.put(db, "runs", run.run, run.epoch, run.started_ns, alive_ns, last, run.below)


def _ones(bitmap: int) -> int:
    """How many of its lowest bits are set, without a hole."""
    return (~bitmap & (bitmap + 1)).bit_length() - 1
