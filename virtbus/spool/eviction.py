"""Makes room for a commit: what is evicted, the least important first, and named in its gap events."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice, takewhile

from virtbus.model import SequenceRange
from virtbus.spool import files
from virtbus.spool.draft import GAP, MAX_RANGES, OPENED, RESOLVED, UPDATED, Draft
from virtbus.spool.files import EventRow
from virtbus.spool.mirror import Mirror
from virtbus.spool.missing import Missing, join, merge_ranges
from virtbus.words import GapReason

STEP = 100  # a full spool makes room for a hundredth of its size at once
MANY_GAPS = 32  # so many gap events become one before anything else is evicted
MERGE_AT_ONCE = 256

_ORDER = (UPDATED, RESOLVED, OPENED)
_GAP_RESERVE = 2048


class Eviction:
    """Of one commit: decides, and holds in the index what it chose; the commit deletes it."""

    def __init__(self, mirror: Mirror, db: sqlite3.Connection, draft: Draft) -> None:
        """`db` is the connection that commits, in its transaction."""
        self._mirror, self._db, self._draft = mirror, db, draft

    def expire(self, born_before: float) -> None:
        """Evict what is older than the spool keeps (monotonic), so much a commit."""
        births, index = self._mirror.births, self._mirror.index

        def is_old(position: int) -> bool:
            born = births.of(position)
            return born is not None and born <= born_before

        expired: list[EventRow] = []
        for rank in _ORDER:
            with self._mirror.memory:
                rows = list(islice(takewhile(is_old, index.oldest(rank)), 1000))
            expired += self._hold(rows, 1 << 62)
        self._claim(expired, GapReason.SPOOL_EXPIRED)

    def make_room(self) -> None:
        """Evict until the commit fits into the spool."""
        mirror, draft, limit = self._mirror, self._draft, self._mirror.limits.max_bytes
        with mirror.memory:
            used = mirror.bytes + mirror.dead_bytes
        used += sum(row.size for row in (*draft.new, *(row for row, _ in draft.invalid)))
        need = used - sum(row.size for row in draft.victims) - limit + (_GAP_RESERVE if draft.claims else 0)
        if need <= 0:
            return
        # In steps, so that each step is one gap event and not each commit.
        need += limit // STEP + (0 if draft.claims else _GAP_RESERVE)
        need = self._drop_dead(need)
        need = self._merge_gaps(need, MANY_GAPS)
        evicted: list[EventRow] = []
        for rank in _ORDER:
            while need > 0:
                with mirror.memory:
                    rows = list(islice(mirror.index.oldest(rank), 256))
                held = self._hold(rows, need)
                if not held:
                    break
                need -= sum(row.size for row in held)
                evicted += held
            for row in [row for row in draft.new if row.rank == rank]:
                if need > 0:
                    draft.new.remove(row)
                    need -= row.size
                    evicted.append(row)
        self._merge_gaps(need, 2)
        self._claim(evicted, GapReason.SPOOL_FULL)

    def _hold(self, positions: Sequence[int], need: int) -> list[EventRow]:
        """Hold rows that are whole and not taken, until they are `need` bytes together."""
        held: list[EventRow] = []
        for row in files.whole_events(self._db, positions):
            if need <= 0:
                break
            with self._mirror.memory:
                free = self._mirror.index.hold(row.position)
            if free:
                held.append(row)
                need -= row.size
        self._draft.victims += held
        return held

    def _claim(self, evicted: Sequence[EventRow], reason: GapReason) -> None:
        if evicted:
            self._draft.evicted += len(evicted)
            ranges = merge_ranges(SequenceRange(row.epoch, row.seq, row.seq) for row in evicted)
            count, since = sum(row.occurrences for row in evicted), min(row.created_ns for row in evicted)
            self._draft.claims.append(Missing(ranges, reason, count, since))

    def _drop_dead(self, need: int) -> int:
        """Dead letters go first, oldest first: a gap event has named them already."""
        for position, size in self._db.execute("SELECT position, bytes FROM dead ORDER BY position"):
            if need <= 0:
                break
            self._draft.dead_dropped.append((position, size))
            need -= size
        return need

    def _merge_gaps(self, need: int, least: int) -> int:
        """Make one gap event of `least` or more of the oldest, which says what they all said."""
        if need <= 0:
            return need
        with self._mirror.memory:
            positions = list(islice(self._mirror.index.oldest(GAP), MERGE_AT_ONCE))
        if len(positions) < least:
            return need
        said: list[Missing] = []
        ranges: tuple[SequenceRange, ...] = ()
        chosen: list[EventRow] = []
        for row in files.whole_events(self._db, positions):
            one = Missing.parse(row.names or "")
            wider = merge_ranges([*ranges, SequenceRange(row.epoch, row.seq, row.seq), *one.ranges])
            if len(wider) > MAX_RANGES:
                break
            ranges = wider
            chosen.append(row)
            said.append(one)
        if len(chosen) < least:
            return need
        with self._mirror.memory:
            held = [row for row in chosen if self._mirror.index.hold(row.position)]
            if len(held) < len(chosen):  # the publisher took one meanwhile; there will be another commit
                for row in held:
                    self._mirror.index.release(row.position, row.key)
                return need
        self._draft.victims += chosen
        detail = f"{len(chosen)} gap events were merged into this one"
        self._draft.claims.append(replace(join(said), ranges=ranges, detail=detail))
        return need - sum(row.size for row in chosen) + _GAP_RESERVE
