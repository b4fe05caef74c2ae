"""What the spool's tests share: events to commit, a clock to turn, a crash, and the book of obligations."""

from __future__ import annotations

import json
import shutil
import uuid
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from virtbus.model import (
    Confirmed,
    Device,
    DeviceSource,
    Domain,
    ErrorFacts,
    Gap,
    Host,
    Incident,
    IoError,
    IoErrorResolved,
    Now,
    Occurrences,
    Record,
    Resolution,
    ResolvedOccurrences,
    SequenceRange,
    Stamp,
    to_datetime,
)
from virtbus.spool import Spool, SpoolLimits
from virtbus.words import Action, Origin, Phase

AGENT = "6f2c3a30-9f5e-4c3e-8a40-0c1d2e3f4a5b"
START_NS = 1_767_225_600_000_000_000  # 2026-01-01
ROOMY = SpoolLimits(max_bytes=64 << 20)


class HandClock:
    """A clock that moves only when it is told to; wall and monotonic time are turned apart."""

    def __init__(self) -> None:
        self.wall_ns = START_NS
        self.monotonic = 1000.0

    def __call__(self) -> Now:
        return Now(self.wall_ns, self.monotonic)

    def pass_time(self, seconds: float) -> None:
        self.monotonic += seconds
        self.wall_ns += int(seconds * 1e9)

    def jump(self, seconds: float) -> None:
        self.wall_ns += int(seconds * 1e9)


def domain_uuid(number: int) -> str:
    return str(uuid.UUID(int=0x5000_0000_0000_4000_8000_0000_0000_0000 + number))


def io_error(
    domain: int = 1,
    *,
    phase: Phase = Phase.OPENED,
    count: int = 1,
    origin: Origin = Origin.EVENT,
    padding: int = 0,
    action_code: int | None = 1,
) -> IoError:
    at = to_datetime(START_NS)
    return IoError(
        host=Host("host-1"),
        domain=Domain(domain_uuid(domain), f"guest-{domain}", 3, "paused"),
        device=Device(
            "virtio-disk0", "vda", "virtio", "disk", source=DeviceSource("network", "nbd", "disk0")
        ),
        error=ErrorFacts(Action.PAUSE, action_code, "", "disk0", "x" * padding or None, None, at),
        occurrences=Occurrences(count, count, at, at),
        incident=Incident(str(uuid.UUID(int=domain)), phase, at),
        origin=origin,
        enriched=True,
    )


def resolved(domain: int = 1) -> IoErrorResolved:
    at = to_datetime(START_NS)
    return IoErrorResolved(
        host=Host("host-1"),
        domain=Domain(domain_uuid(domain), f"guest-{domain}", 3, "running"),
        device=Device("virtio-disk0"),
        occurrences=ResolvedOccurrences(1, at, at),
        incident=Incident(str(uuid.UUID(int=domain)), Phase.RESOLVED, at),
        resolution=Resolution("resumed", at + timedelta(seconds=1), 1.0),
    )


def gap(reason: str = "agent_down", *, missing: tuple[SequenceRange, ...] = (), occurrences: int = 0) -> Gap:
    return Gap(
        host=Host("host-1"),
        agent_id=AGENT,
        reason=reason,
        detail=None,
        started_at=None,
        ended_at=to_datetime(START_NS),
        missing=missing,
        missing_events=sum(item.last - item.first + 1 for item in missing),
        missing_occurrences=occurrences,
    )


def invalid() -> IoError:
    """An event that breaks its own schema, as a bug of ours would make it."""
    return io_error(9, action_code="one")  # type: ignore[arg-type]


def open_spool(
    folder: Path, *, limits: SpoolLimits = ROOMY, clock: HandClock | None = None, agent_id: str = AGENT
) -> Spool:
    return Spool.open(folder, limits=limits, agent_id=agent_id, clock=clock or HandClock())  # type: ignore[arg-type]


def crash(folder: Path, into: Path) -> Path:
    """What a SIGKILL leaves: the files as they are now, without SQLite's shared memory."""
    into.mkdir(mode=0o700)
    for name in ("spool.db", "spool.db-wal", "lock"):
        if (folder / name).exists():
            shutil.copy(folder / name, into / name)
    return into


def records(spool: Spool, limit: int = 1000) -> list[Record]:
    """Everything that can be taken now; each is confirmed, so that keys go on."""
    found: list[Record] = []
    while batch := spool.take(limit, frozenset()):
        spool.settle([(record, Confirmed()) for record in batch])
        found += batch
    return found


def gaps_of(found: list[Record]) -> list[dict]:
    """The data of the gap events among records."""
    return [json.loads(item.body) for item in found if item.attributes["type"] == Gap.TYPE]


def ranges_of(data: dict) -> list[tuple[str, int, int]]:
    return [(item["epoch"], item["first"], item["last"]) for item in data["missing"]]


@dataclass
class Book:
    """Obligations as the caller of commit was told them, against what arrived. Never reads the spool."""

    owed: dict[tuple[str, int], str] = field(default_factory=dict)  # (epoch, sequence) → id
    sent: dict[str, tuple[str, int, bytes]] = field(default_factory=dict)  # id → what went out
    places: dict[tuple[str, int], str] = field(default_factory=dict)
    confirmed: set[str] = field(default_factory=set)
    named: set[tuple[str, int]] = field(default_factory=set)
    tails: dict[str, int] = field(default_factory=dict)  # epoch → after this sequence a start's gap speaks
    problems: list[str] = field(default_factory=list)

    def promise(self, stamps: list[Stamp]) -> None:
        for stamp in stamps:
            assert stamp.sequence is not None
            self.owed[stamp.epoch, stamp.sequence] = stamp.id
            self._place(stamp.epoch, stamp.sequence, stamp.id)

    def _place(self, epoch: str, sequence: int, id_: str) -> None:
        if self.places.setdefault((epoch, sequence), id_) != id_:
            self.problems.append(f"sequence {sequence} of {epoch} has two ids")

    def went_out(self, record: Record) -> None:
        """A record was handed to the broker: from now on its bytes are fixed."""
        what = (record.epoch, record.seq, record.body)
        if self.sent.setdefault(record.id, what) != what:
            self.problems.append(f"{record.id} went out with two different contents")
        self._place(record.epoch, record.seq, record.id)
        attributes = record.attributes
        if (
            attributes["id"],
            attributes["epoch"],
            int(attributes["sequence"]),
            attributes["partitionkey"],
        ) != (
            record.id,
            record.epoch,
            record.seq,
            record.key,
        ):
            self.problems.append(f"{record.id} says something else than its row")

    def arrived(self, record: Record) -> None:
        self.confirmed.add(record.id)
        if record.attributes["type"] == Gap.TYPE:
            data = json.loads(record.body)
            for epoch, first, last in ranges_of(data):
                self.named |= {(epoch, number) for number in range(first, last + 1)}
            if data["previous"] is not None:
                epoch, last = data["previous"]["epoch"], data["previous"]["last_sequence"]
                self.tails[epoch] = min(last, self.tails.get(epoch, last))

    def unaccounted(self, *, tails: bool = False) -> list[tuple[str, int]]:
        """What neither arrived nor is named; `tails`: a start's gap may speak for the end of a run."""
        return [
            place
            for place, id_ in self.owed.items()
            if id_ not in self.confirmed
            and place not in self.named
            and not (tails and place[0] in self.tails and place[1] > self.tails[place[0]])
        ]
