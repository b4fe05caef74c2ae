"""What one commit is going to do, before any of it is done: its events, and what gap events have to name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

import msgspec

from virtbus import envelope
from virtbus.model import (
    Event,
    Gap,
    Heartbeat,
    Host,
    IoError,
    IoErrorResolved,
    PreviousRun,
    SequenceRange,
    Stamp,
    to_datetime,
    to_ns,
)
from virtbus.spool import files
from virtbus.spool.contents import GapFacts, Loss
from virtbus.spool.files import sealed
from virtbus.spool.ledger import count_events, merge_ranges, subtract_ranges
from virtbus.telemetry import Trouble, emit
from virtbus.words import GapReason, Origin, Phase

UPDATED, RESOLVED, OPENED, GAP = range(4)  # classes, in the order in which they give way
MAX_RANGES = 400  # in one gap event: about 42 KB of JSON, and 64 KiB must hold the whole message


def disk_bytes(payload: int) -> int:
    """Bytes of 4096-byte pages that a row of so many bytes takes (SQLite file format, 1.6 and 1.7)."""
    local, overflow = payload, 0
    if payload > 4061:
        local = 489 + (payload - 489) % 4092
        local = local if local <= 4061 else 489
        overflow = -(-(payload - local) // 4092)
    return 4096 // max(1, 4084 // (local + 12)) + 4096 * overflow


@dataclass(slots=True, eq=False)
class New:
    """An event that is about to get a row."""

    seq: int
    id: str
    key: str
    rank: int
    count: int
    size: int
    created_ns: int
    names: str | None
    attributes: str
    body: bytes
    epoch: str
    error: Exception | None = None  # it breaks its schema: a dead letter

    def row(self, position: int) -> tuple[files.SqlValue, ...]:
        """The values of table events."""
        return sealed(
            "events",
            (
                position,
                self.epoch,
                self.seq,
                self.id,
                self.key,
                self.rank,
                self.count,
                self.size,
                self.created_ns,
                0,
                b"",
                self.names,
                self.attributes,
                self.body,
            ),
        )


@dataclass(frozen=True, slots=True)
class Claim:
    """Something a gap event has to name."""

    reason: GapReason
    ranges: tuple[SequenceRange, ...]
    occurrences: int
    started_ns: int | None
    detail: str | None = None
    found: int = 0
    previous: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True)
class Victim:
    """A row that gives way."""

    position: int
    key: str
    size: int


@dataclass(frozen=True, slots=True)
class Fallen:
    """An event that gave way, as its gap event has to count it."""

    epoch: str
    seq: int
    count: int
    created_ns: int


@dataclass(slots=True)
class Draft:
    """Everything one commit is about to do."""

    seq: int
    wall_ns: int
    new: list[New] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    victims: list[Victim] = field(default_factory=list)
    named_losses: list[int] = field(default_factory=list)
    held: list[tuple[int, str]] = field(default_factory=list)
    dead_dropped: list[tuple[int, int]] = field(default_factory=list)  # (position, bytes)
    gap_reasons: list[GapReason] = field(default_factory=list)  # of the gap events of the spool's own
    gave_way: int = 0
    tells_opening: bool = False


def rank_of(event: Event) -> int:
    """The event's class: lower gives way earlier."""
    if isinstance(event, Gap):
        return GAP
    if isinstance(event, IoErrorResolved):
        return RESOLVED
    assert isinstance(event, IoError)
    return OPENED if event.incident.phase is Phase.OPENED else UPDATED


def count_of(event: Event) -> int:
    """Errors that the event alone accounts for: callbacks, live or replayed, never what was inferred."""
    if isinstance(event, IoError) and event.origin in (Origin.EVENT, Origin.REPLAY):
        return event.occurrences.count
    return 0


def _ns(moment: datetime | None) -> int | None:
    return None if moment is None else to_ns(moment)


def join(claims: Sequence[Claim]) -> Claim:
    """One claim that says what all of them say."""
    starts = [claim.started_ns for claim in claims]
    details = list(dict.fromkeys(claim.detail for claim in claims if claim.detail))
    return Claim(
        claims[0].reason,
        merge_ranges(item for claim in claims for item in claim.ranges),
        sum(claim.occurrences for claim in claims),
        None if None in starts else min(start for start in starts if start is not None),
        "; ".join(details[:3]) + ("; …" if len(details) > 3 else "") if details else None,
        sum(claim.found for claim in claims),
        next((claim.previous for claim in reversed(claims) if claim.previous), None),
    )


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
        facts: GapFacts | None = None
        if isinstance(event, Gap):
            draft.tells_opening = True
            rest = event.missing[MAX_RANGES:]
            if rest:
                # Encoding would cut what does not fit: the rest goes into gap events of ours.
                draft.claims.append(Claim(event.reason, rest, 0, _ns(event.started_at), event.detail))
                kept = event.missing[:MAX_RANGES]
                event = replace(event, missing=kept, missing_events=count_events(kept))
            facts = GapFacts(
                event.missing,
                event.missing_occurrences,
                event.found,
                _ns(event.started_at),
                to_ns(event.ended_at),
                (event.previous.epoch, event.previous.last_sequence) if event.previous else None,
            )
        stamp = self._stamp(draft)
        item = self._encode(event, stamp, facts)
        draft.new.append(item)
        if item.error is not None:
            mine = (SequenceRange(self.epoch, item.seq, item.seq),)
            claim = Claim(GapReason.DEAD_LETTER, mine, item.count, draft.wall_ns, str(item.error)[:200])
            draft.claims.append(claim)
            if facts is not None:  # what it was going to name is still to be named
                draft.claims.append(
                    replace(
                        claim,
                        ranges=facts.ranges,
                        occurrences=facts.occurrences,
                        started_ns=facts.started_ns,
                        found=facts.found,
                    )
                )
        return stamp

    def _stamp(self, draft: Draft) -> Stamp:
        draft.seq += 1
        return Stamp(envelope.uuid7(draft.wall_ns), self.agent_id, self.epoch, draft.seq, draft.wall_ns)

    def _encode(self, event: Event, stamp: Stamp, facts: GapFacts | None) -> New:
        error: Exception | None = None
        try:
            encoded = envelope.encode(event, stamp)
        except envelope.InvalidEvent as invalid:
            encoded, error = invalid.encoded, invalid
        attributes = msgspec.json.encode(encoded.attributes).decode()
        names = facts.dump() if facts is not None else None
        payload = len(attributes) + len(encoded.body) + len(names or "") + 190
        assert stamp.sequence is not None
        return New(
            seq=stamp.sequence,
            id=stamp.id,
            key=encoded.attributes["partitionkey"],
            rank=rank_of(event),
            count=count_of(event),
            size=disk_bytes(payload),
            created_ns=stamp.recorded_ns,
            names=names,
            attributes=attributes,
            body=encoded.body,
            epoch=stamp.epoch,
            error=error,
        )

    def claim_losses(self, draft: Draft, losses: Sequence[Loss], events: Sequence[Event]) -> None:
        """Claim the losses that wait; what the caller's own gap events name needs no other."""
        if not losses:
            return
        named = [item for event in events if isinstance(event, Gap) for item in event.missing]
        for loss in losses:
            draft.named_losses.append(loss.number)
            left = subtract_ranges(loss.ranges, named)
            if left:
                claim = Claim(loss.reason, left, loss.occurrences, loss.started_ns, loss.detail)
                draft.claims.append(claim)

    def name_claims(self, draft: Draft) -> None:
        """Turn the claims into gap events, one a reason (or several, when one can't hold all ranges).

        Each is an event of its own and never changes: a file that loses its last commits may bring an
        event back as it was before, and the same id must not have gone out with other words.
        """
        for reason in dict.fromkeys(claim.reason for claim in draft.claims):
            claim = join([each for each in draft.claims if each.reason == reason])
            for at in range(0, max(1, len(claim.ranges)), MAX_RANGES):
                part = replace(claim, ranges=claim.ranges[at : at + MAX_RANGES])
                if at:
                    part = replace(part, occurrences=0, found=0)
                draft.new.append(self._gap(draft, self._stamp(draft), part))
                draft.gap_reasons.append(reason)

    def _gap(self, draft: Draft, stamp: Stamp, claim: Claim) -> New:
        started_ns = None if claim.started_ns is None else min(claim.started_ns, draft.wall_ns)
        event = Gap(
            host=self.host,
            agent_id=self.agent_id,
            reason=claim.reason,
            detail=claim.detail,
            started_at=None if started_ns is None else to_datetime(started_ns),
            ended_at=to_datetime(draft.wall_ns),
            previous=PreviousRun(*claim.previous) if claim.previous else None,
            missing=claim.ranges,
            missing_events=count_events(claim.ranges),
            missing_occurrences=claim.occurrences,
            found=claim.found,
        )
        facts = GapFacts(
            claim.ranges, claim.occurrences, claim.found, started_ns, draft.wall_ns, claim.previous
        )
        item = self._encode(event, stamp, facts)
        if item.error is not None:
            emit(Trouble("a gap event of the spool breaks its schema; sent as it is", item.error, item.id))
            item.error = None
        return item
