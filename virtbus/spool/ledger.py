"""The ledger of sequences: which numbers of a run are settled, and so which ones are missing.

A sequence is *settled* once nobody has to answer for it any more: the broker confirmed its event, or
confirmed the gap event that names it. Until then either its row is in the spool, or a pending gap
event's row names it, or it waits to be named. Whatever is none of these has been lost to damage: that
sum is what `holes` computes, and it needs no memory of what went wrong. Pure; no I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field

from virtbus.model import SequenceRange

CHUNK = 4096  # sequences a bitmap speaks for: 512 bytes, rewritten when one of them is settled
CHUNK_BYTES = CHUNK // 8
FULL = b"\xff" * CHUNK_BYTES


def merge_ranges(ranges: Iterable[SequenceRange]) -> tuple[SequenceRange, ...]:
    """Sort by epoch and first number, and join what touches or overlaps."""
    merged: list[SequenceRange] = []
    for item in sorted(ranges, key=lambda each: (each.epoch, each.first, each.last)):
        if merged and merged[-1].epoch == item.epoch and item.first <= merged[-1].last + 1:
            if item.last > merged[-1].last:
                merged[-1] = SequenceRange(item.epoch, merged[-1].first, item.last)
        else:
            merged.append(item)
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


def spans(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """The (first, last) of each run of successive numbers, ascending; `numbers` differ, in any order."""
    first = last = None
    for number in sorted(numbers):
        if last is not None and number == last + 1:
            last = number
            continue
        if first is not None and last is not None:
            yield first, last
        first = last = number
    if first is not None and last is not None:
        yield first, last


def _fill(bitmap: bytearray, first: int, end: int) -> None:
    """Set the bits from `first` up to, and without, `end`."""
    low, high = first >> 3, (end - 1) >> 3
    head, tail = 0xFF << (first & 7) & 0xFF, 0xFF >> (7 - (end - 1 & 7))
    if low == high:
        bitmap[low] |= head & tail
        return
    bitmap[low] |= head
    bitmap[low + 1 : high] = b"\xff" * (high - low - 1)
    bitmap[high] |= tail


def mark(bitmaps: MutableMapping[int, bytearray], first: int, last: int) -> bool:
    """Set the bits of `first` to `last` in bitmaps by chunk. False when one of them was set already."""
    fresh = True
    for number in range(first - 1, last):
        chunk, bit = divmod(number, CHUNK)
        bitmap = bitmaps.get(chunk)
        if bitmap is None:
            bitmap = bitmaps[chunk] = bytearray(CHUNK_BYTES)
        mask = 1 << (bit & 7)
        if bitmap[bit >> 3] & mask:
            fresh = False
        bitmap[bit >> 3] |= mask
    return fresh


@dataclass(slots=True)
class Account:
    """One run's sequences, 1 to `last`, as settled or not.

    All numbers in the first `below` chunks are settled and need no bitmap; a chunk without a bitmap
    above that has nothing settled; a chunk that filled up out of order is kept as `FULL`.
    """

    run: int
    epoch: str
    started_ns: int
    alive_ns: int
    last: int = 0
    below: int = 0
    bitmaps: dict[int, bytearray | bytes] = field(default_factory=dict)
    # What has to be written to the file: chunks that changed, chunks whose bitmap is no longer needed.
    touched: set[int] = field(default_factory=set)
    finished: set[int] = field(default_factory=set)

    def settle(self, first: int, last: int) -> None:
        """Mark `first` to `last` as settled; numbers that are settled already stay so."""
        begin, end = max(first - 1, self.below * CHUNK), min(last, self.last)
        while begin < end:
            chunk, bit = divmod(begin, CHUNK)
            size = min(CHUNK - bit, end - begin)
            begin += size
            bitmap = self.bitmaps.get(chunk)
            if bitmap is None:
                bitmap = self.bitmaps[chunk] = bytearray(CHUNK_BYTES)
            elif isinstance(bitmap, bytes):
                continue
            _fill(bitmap, bit, bit + size)
            self.touched.add(chunk)
            if bitmap == FULL:
                self.bitmaps[chunk] = FULL
        while self.bitmaps.get(self.below) is FULL:
            del self.bitmaps[self.below]
            self.touched.discard(self.below)
            self.finished.add(self.below)
            self.below += 1

    @property
    def settled_through(self) -> int:
        """The highest number up to which everything is settled."""
        number = self.below * CHUNK
        bitmap = self.bitmaps.get(self.below)
        if bitmap is None:
            return min(number, self.last)
        rest = bytes(bitmap).lstrip(b"\xff")
        number += (CHUNK_BYTES - len(rest)) * 8
        if rest:
            ones = ~rest[0] & (rest[0] + 1)  # the lowest bit that is not set
            number += ones.bit_length() - 1
        return min(number, self.last)

    @property
    def complete(self) -> bool:
        """Nothing of this run is left to answer for."""
        return self.settled_through >= self.last

    def holes(self, present: Mapping[int, bytearray]) -> tuple[SequenceRange, ...]:
        """What is neither settled nor marked in `present` (rows, and what is named or about to be)."""
        return merge_ranges(SequenceRange(self.epoch, first, last) for first, last in self._holes(present))

    def _holes(self, present: Mapping[int, bytearray]) -> Iterator[tuple[int, int]]:
        for chunk in range(self.below, (self.last + CHUNK - 1) // CHUNK):
            known = int.from_bytes(self.bitmaps.get(chunk, b""), "little")
            known |= int.from_bytes(present.get(chunk, b""), "little")
            size = min(CHUNK, self.last - chunk * CHUNK)
            unknown = ~known & ((1 << size) - 1)
            offset = chunk * CHUNK + 1
            while unknown:
                skip = (unknown & -unknown).bit_length() - 1
                unknown >>= skip
                offset += skip
                length = (~unknown & (unknown + 1)).bit_length() - 1
                yield offset, offset + length - 1
                unknown >>= length
                offset += length
