"""What one commit is going to do, before any of it is done: its events, what is evicted to make room for them
(the least important first), and what gap events have to name.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import islice, takewhile

import msgspec

from virtbus import envelope
from virtbus.model import (
    Event,
    Gap,
    Heartbeat,
    Host,
    IoError,
    IoErrorResolved,
    SequenceRange,
    Stamp,
    to_datetime,
    to_ns,
)
from virtbus.spool import files
from virtbus.spool.files import EventRow
from virtbus.spool.mirror import SIZE, Mirror
from virtbus.spool.missing import Missing, count_events, join, merge_ranges, subtract_ranges
from virtbus.telemetry import Trouble, emit
from virtbus.words import GapReason, Origin, Phase

UPDATED, RESOLVED, OPENED, GAP = range(4)  # classes, in the order in which they are evicted
STEP = 100  # a full spool makes room for a hundredth of its size at once
MANY_GAPS = 32  # so many gap events become one before anything else is evicted
MERGE_AT_ONCE = 256
MAX_RANGES = 400  # in one gap event: about 42 KB of JSON, and 64 KiB must hold the whole message
_GAP_RESERVE = 2048  # bytes of a gap event


def disk_bytes(payload: int) -> int:
    """Bytes of 4096-byte pages that a row of so many bytes takes (SQLite file format, 1.6 and 1.7)."""
    local, overflow = payload, 0
    if payload > 4061:
        local = 489 + (payload - 489) % 4092
        local = local if local <= 4061 else 489
        overflow = -(-(payload - local) // 4092)
    return 4096 // max(1, 4084 // (local + 12)) + 4096 * overflow


@dataclass(slots=True)
class Draft:
    """Everything one commit is about to do."""

    seq: int
    wall_ns: int
    new: list[EventRow] = field(default_factory=list)  # in their order; positions come when they are written
    invalid: list[tuple[EventRow, Exception]] = field(default_factory=list)  # they break their schema
    claims: list[Missing] = field(default_factory=list)  # what gap events of this commit have to name
    victims: list[EventRow] = field(default_factory=list)  # what leaves the file; reserved in the index
    dead_dropped: list[int] = field(default_factory=list)  # positions
    dead_left: tuple[int, int] | None = None  # how many stay and their bytes, where some do not
    named_losses: list[int] = field(default_factory=list)
    gap_reasons: list[GapReason] = field(default_factory=list)  # of the gap events of the spool's own
    evicted: int = 0
    tells_opening: bool = False


def _rank_of(event: Event) -> int:
    if isinstance(event, Gap):
        return GAP
    if isinstance(event, IoErrorResolved):
        return RESOLVED
    assert isinstance(event, IoError)
    return OPENED if event.incident.phase is Phase.OPENED else UPDATED


def _count_of(event: Event) -> int:
    """Errors that the event alone accounts for: callbacks, live or replayed, never what was inferred."""
    if isinstance(event, IoError) and event.origin in (Origin.EVENT, Origin.REPLAY):
        return event.occurrences.count
    return 0


def _ns(moment: datetime | None) -> int | None:
    return None if moment is None else to_ns(moment)


class Scribe:
    """Writes the events of a run: stamps and encodes them, and words the gap events of the spool itself."""

    def __init__(self, epoch: str, agent_id: str) -> None:
        """Of one run of one agent."""
        self.epoch = epoch
        self.agent_id = agent_id
        self.host: Host | None = None

    def event(self, draft: Draft, event: Event) -> Stamp:
        """Stamp and encode one event of the caller's; one that breaks its schema becomes a dead letter."""
        if isinstance(event, Heartbeat):
            raise TypeError("a heartbeat is never spooled")
        missing: Missing | None = None
        if isinstance(event, Gap):
            draft.tells_opening = True
            missing = Missing(
                event.missing,
                event.reason,
                event.missing_occurrences,
                _ns(event.started_at),
                event.detail,
                event.found,
                event.previous,
            )
            if len(event.missing) > MAX_RANGES:
                # Encoding would cut what does not fit: the rest goes into gap events of ours.
                kept, rest = event.missing[:MAX_RANGES], event.missing[MAX_RANGES:]
                draft.claims.append(replace(missing, ranges=rest, occurrences=0, found=0, previous=None))
                missing = replace(missing, ranges=kept)
                event = replace(event, missing=kept, missing_events=count_events(kept))
        stamp = self._stamp(draft)
        row, error = self._encode(event, stamp, missing)
        if error is None:
            draft.new.append(row)
            return stamp
        draft.invalid.append((row, error))
        mine = (SequenceRange(self.epoch, row.seq, row.seq),)
        claim = Missing(mine, GapReason.DEAD_LETTER, row.occurrences, draft.wall_ns, str(error)[:200])
        draft.claims.append(claim)
        if missing is not None:  # what it was going to name is still to be named
            draft.claims.append(replace(missing, reason=claim.reason, detail=claim.detail, previous=None))
        return stamp

    def _stamp(self, draft: Draft) -> Stamp:
        draft.seq += 1
        return Stamp(envelope.uuid7(draft.wall_ns), self.agent_id, self.epoch, draft.seq, draft.wall_ns)

    def _encode(
        self, event: Event, stamp: Stamp, missing: Missing | None
    ) -> tuple[EventRow, Exception | None]:
        error: Exception | None = None
        try:
            encoded = envelope.encode(event, stamp)
        except envelope.InvalidEvent as invalid:
            encoded, error = invalid.encoded, invalid
        attributes = msgspec.json.encode(encoded.attributes).decode()
        names = None if missing is None else missing.dump()
        assert stamp.sequence is not None
        row = EventRow(
            position=0,
            epoch=stamp.epoch,
            seq=stamp.sequence,
            id=stamp.id,
            key=encoded.attributes["partitionkey"],
            rank=_rank_of(event),
            occurrences=_count_of(event),
            size=disk_bytes(len(attributes) + len(encoded.body) + len(names or "") + 190),
            created_ns=stamp.recorded_ns,
            attempts=0,
            checksum=b"",
            names=names,
            attributes=attributes,
            body=encoded.body,
        )
        return row._replace(checksum=files.checksum("events", row)), error

    def claim_losses(self, draft: Draft, losses: Mapping[int, Missing], events: Sequence[Event]) -> None:
        """Claim the losses that wait; what the caller's own gap events name needs no other."""
        named = [item for event in events if isinstance(event, Gap) for item in event.missing]
        for number, loss in losses.items():
            draft.named_losses.append(number)
            if left := subtract_ranges(loss.ranges, named):
                draft.claims.append(replace(loss, ranges=left))

    def name_claims(self, draft: Draft) -> None:
        """Turn the claims into gap events, one per reason (or several, when one can't hold all ranges).

        Each is an event of its own and never changes: a file that loses its last commits may bring an
        event back as it was before, and the same id must not have gone out with other words.
        """
        for reason in dict.fromkeys(claim.reason for claim in draft.claims):
            claim = join([each for each in draft.claims if each.reason == reason])
            if claim.started_ns is not None:
                claim = replace(claim, started_ns=min(claim.started_ns, draft.wall_ns))
            for at in range(0, max(1, len(claim.ranges)), MAX_RANGES):
                part = replace(claim, ranges=claim.ranges[at : at + MAX_RANGES])
                if at:
                    part = replace(part, occurrences=0, found=0)
                draft.new.append(self._gap(draft, part))
                draft.gap_reasons.append(reason)

    def _gap(self, draft: Draft, missing: Missing) -> EventRow:
        event = Gap(
            host=self.host,
            agent_id=self.agent_id,
            reason=missing.reason,
            detail=missing.detail,
            started_at=None if missing.started_ns is None else to_datetime(missing.started_ns),
            ended_at=to_datetime(draft.wall_ns),
            previous=missing.previous,
            missing=missing.ranges,
            missing_events=count_events(missing.ranges),
            missing_occurrences=missing.occurrences,
            found=missing.found,
        )
        row, error = self._encode(event, self._stamp(draft), missing)
        if error is not None:
            emit(Trouble("a gap event of the spool breaks its schema; sent as it is", error, row.id))
        return row


class Eviction:
    """Eviction for one commit: chooses rows and reserves them in the index; the commit deletes them."""

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
        for rank in (UPDATED, RESOLVED, OPENED):
            with self._mirror.memory:
                rows = list(islice(takewhile(is_old, index.oldest(rank)), 1000))
            expired += self._reserve(rows, 1 << 62)
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
        for rank in (UPDATED, RESOLVED, OPENED):
            while need > 0:
                with mirror.memory:
                    rows = list(islice(mirror.index.oldest(rank), 256))
                reserved = self._reserve(rows, need)
                if not reserved:
                    break
                need -= sum(row.size for row in reserved)
                evicted += reserved
            for row in [row for row in draft.new if row.rank == rank]:
                if need > 0:
                    draft.new.remove(row)
                    need -= row.size
                    evicted.append(row)
        self._merge_gaps(need, 2)
        self._claim(evicted, GapReason.SPOOL_FULL)

    def _reserve(self, positions: Sequence[int], need: int) -> list[EventRow]:
        """Reserve rows that are whole and not taken, until they are `need` bytes together."""
        reserved: list[EventRow] = []
        for row in files.whole_events(self._db, positions):
            if need <= 0:
                break
            with self._mirror.memory:
                free = self._mirror.index.reserve(row.position)
            if free:
                reserved.append(row)
                need -= row.size
        self._draft.victims += reserved
        return reserved

    def _claim(self, evicted: Sequence[EventRow], reason: GapReason) -> None:
        if evicted:
            self._draft.evicted += len(evicted)
            ranges = merge_ranges(SequenceRange(row.epoch, row.seq, row.seq) for row in evicted)
            count, since = sum(row.occurrences for row in evicted), min(row.created_ns for row in evicted)
            self._draft.claims.append(Missing(ranges, reason, count, since))

    def _drop_dead(self, need: int) -> int:
        """Dead letters go first, oldest first: a gap event has named them already."""
        for position, size in self._db.execute(f"SELECT position, {SIZE} FROM dead ORDER BY position"):  # noqa: S608 - our own names
            if need <= 0:
                break
            self._draft.dead_dropped.append(position)
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
            reserved = [row for row in chosen if self._mirror.index.reserve(row.position)]
            if len(reserved) < len(chosen):  # the publisher took one meanwhile; there will be another commit
                for row in reserved:
                    self._mirror.index.release(row.position, row.key)
                return need
        self._draft.victims += chosen
        detail = f"{len(chosen)} gap events were merged into this one"
        self._draft.claims.append(replace(join(said), ranges=ranges, detail=detail))
        return need - sum(row.size for row in chosen) + _GAP_RESERVE
