"""Golden events: recorded errors of real guests, and every other kind, byte for byte as they go out.

Each case becomes `tests/data/golden/<type>/<major>.<minor>/<case>.json`, with the whole wire form in both
bindings. `python -m tests.golden` writes the files that are missing, as for a new minor version, and never
touches one that is there: what a released version puts on the wire does not change.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from virtbus import envelope, schema
from virtbus.model import (
    Backlog,
    Device,
    DeviceSource,
    Domain,
    ErrorFacts,
    ErrorPolicy,
    Event,
    Evidence,
    Gap,
    Heartbeat,
    Host,
    Hypervisor,
    Incident,
    IoError,
    IoErrorResolved,
    Occurrences,
    OpenIncident,
    OpenIncidents,
    Owner,
    PreviousRun,
    Resolution,
    ResolvedOccurrences,
    SequenceRange,
    SourceHealth,
    Stamp,
    to_datetime,
    to_ns,
)
from virtbus.words import (
    ENOSPC,
    Action,
    DiskError,
    EvidenceCheck,
    EvidenceVerdict,
    GapReason,
    GuestState,
    Origin,
    Phase,
    Platform,
    ResolutionCause,
    SourceState,
)

DATA = Path(__file__).parent / "data"
RECORDINGS = DATA / "recordings"
GOLDEN = DATA / "golden"

AGENT = "0e7f7a3e-5a0c-4f0e-8a43-9f0f6f1f2b77"
EPOCH = "0193512a-7c1e-7f3a-8d2b-5e6f7a8b9c0d"
INCIDENT = "0193512b-0d4e-7a11-9c1d-2f3a4b5c6d7e"
DOMAIN = "6b6f2f4e-0b8c-4d7a-9a51-3d1f3a9f5c11"
T0 = datetime(2026, 11, 22, 13, 2, 37, 494238, UTC)
T1 = datetime(2026, 11, 22, 13, 2, 38, 0, UTC)
T2 = datetime(2026, 11, 22, 13, 7, 41, 1, UTC)


class Case(NamedTuple):
    """An event and the stamp it is sent with."""

    name: str
    event: Event
    stamp: Stamp


def stamp(number: int, *, sequence: bool = True) -> Stamp:
    """A stamp with fixed ids."""
    return Stamp(
        id=f"0193512b-1111-7222-8333-{number:012d}",
        agent_id=AGENT,
        epoch=EPOCH,
        sequence=number if sequence else None,
        recorded_ns=to_ns(T2) + number * 1000,
    )


def recorded() -> Iterator[tuple[str, IoError]]:
    """The event of every recorded IO_ERROR_REASON callback, each as an incident of its own."""
    for file in sorted(RECORDINGS.glob("*.jsonl")):
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        scenario = lines[0]
        host = Host(
            f"{scenario['debian']}.example",
            None,
            None,
            Hypervisor("QEMU", scenario["qemu"], scenario["libvirt"]),
        )
        callbacks = [line for line in lines if line.get("cb") == "IO_ERROR_REASON"]
        for number, callback in enumerate(callbacks):
            seen = to_datetime(round(callback["t"] * 1e6) * 1000)
            yield (
                f"{file.stem}-{number}",
                IoError(
                    host=host,
                    domain=Domain(DOMAIN, callback["name"]),
                    device=Device(callback["devAlias"]),
                    error=ErrorFacts(
                        action=Action.from_code(callback["action"]),
                        action_code=callback["action"],
                        reason=callback["reason"],
                        path=callback["srcPath"],
                        message=None,
                        disk_error=None,
                        occurred_at=seen,
                    ),
                    occurrences=Occurrences(1, number + 1, seen, seen),
                    incident=Incident(INCIDENT, Phase.UPDATED if number else Phase.OPENED, seen),
                    origin=Origin.EVENT,
                    enriched=False,
                ),
            )


HOST = Host(
    "compute-17.example",
    "4c4c4544-0043-4d10-8051-b7c04f4c3332",
    "f2e1c1a0-3f5b-4a46-9f0e-2d9a6b1f7c55",
    Hypervisor("QEMU", "7.2.22", "9.0.0"),
)
OWNER = Owner(
    Platform.OPENSTACK, "a1b2c3d4-0000-4000-8000-000000000001", "web-1", "9f3c2d", "shop", "77aa01", "alice"
)
DEVICE = Device(
    "virtio-disk0",
    "vda",
    "virtio",
    "disk",
    "volume-1",
    DeviceSource(
        "network", "rbd", "pool/volume-1", None, None, ("10.0.0.5:6789", "10.0.0.6:6789"), "raw", ("base",)
    ),
    ErrorPolicy("stop", "report"),
    0,
)
FULL = IoError(
    host=HOST,
    domain=Domain(DOMAIN, 'tab\t "quote" naïve ☃', 7, GuestState.PAUSED, OWNER),
    device=DEVICE,
    error=ErrorFacts(
        Action.PAUSE,
        1,
        ENOSPC,
        "/a/path",
        "No space left on device",
        DiskError.NO_SPACE,
        T0,
        (
            Evidence(EvidenceCheck.BLOCK_INFO, EvidenceVerdict.CONFIRMS, "full", 10, 10, 10),
            Evidence(EvidenceCheck.STATE, EvidenceVerdict.UNAVAILABLE),
        ),
    ),
    occurrences=Occurrences(3, 12, T0, T1, lower_bound=True),
    incident=Incident(INCIDENT, Phase.UPDATED, T0, 2, True, 6.5),
    origin=Origin.RECONCILE,
    enriched=True,
)
RESOLVED = IoErrorResolved(
    host=HOST,
    domain=Domain(DOMAIN, "web-1", 7, GuestState.RUNNING, OWNER),
    device=Device("ua-data/1 %"),
    occurrences=ResolvedOccurrences(12, T0, T1),
    incident=Incident(INCIDENT, Phase.RESOLVED, T0, 1),
    resolution=Resolution(ResolutionCause.RESUMED, T2, 303.5),
)
AGENT_DOWN = Gap(None, AGENT, GapReason.AGENT_DOWN, None, T0, T2, PreviousRun(EPOCH, 41), found=1)
SPOOL_FULL = Gap(
    HOST,
    AGENT,
    GapReason.SPOOL_FULL,
    "limit reached",
    None,
    T2,
    None,
    (SequenceRange(EPOCH, 17, 21),),
    5,
    230,
)
HEARTBEAT = Heartbeat(
    host=HOST,
    agent_id=AGENT,
    agent_version="1.2.3",
    epoch=EPOCH,
    started_at=T0,
    sent_at=T2,
    interval_seconds=60.0,
    source=SourceHealth(SourceState.CONNECTED, T1),
    backlog=Backlog(2, 4096, 1.25),
    committed_sequence=42,
    confirmed_sequence=40,
    incidents=OpenIncidents(
        1,
        (OpenIncident(INCIDENT, DOMAIN, "web-1", DEVICE, Action.PAUSE, ENOSPC, T0, T1, 12, 1, True, False),),
    ),
)


def cases() -> list[Case]:
    """All golden cases."""
    made = [("full", FULL), ("resolved", RESOLVED), ("agent_down", AGENT_DOWN), ("spool_full", SPOOL_FULL)]
    named: list[tuple[str, Event]] = [*recorded(), *made]
    # Numbered by name, so that a new case does not change the others.
    numbered = [Case(name, event, stamp(zlib.crc32(name.encode()) % 1_000_000)) for name, event in named]
    return [*numbered, Case("heartbeat", HEARTBEAT, stamp(999, sequence=False))]


def place(case: Case) -> Path:
    """Where the case's golden file stands for the version that is sent today."""
    type_ = case.event.TYPE
    return GOLDEN / type_ / schema.latest(type_).version / f"{case.name}.json"


def wire(case: Case) -> str:
    """Everything that would go out, as one readable document."""
    encoded = envelope.encode(case.event, case.stamp)
    amqp = envelope.to_amqp(*encoded)
    kafka = envelope.to_kafka(*encoded)
    document = {
        "routing_key": envelope.routing_key(encoded.attributes),
        "body": encoded.body.decode(),
        "amqp_headers": dict(sorted(amqp.headers.items())),
        "amqp_content_type": amqp.content_type,
        "kafka_headers": [[name, value] for name, value in kafka.headers],
        "kafka_key": kafka.key.decode(),
        "structured": envelope.structured_json(*encoded).decode(),
    }
    assert amqp.body == kafka.value == encoded.body
    return json.dumps(document, indent=1, ensure_ascii=True) + "\n"


def accept() -> list[Path]:
    """Write the golden files that are missing; never one that is there."""
    written = []
    for case in cases():
        file = place(case)
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(wire(case), encoding="utf-8")
            written.append(file)
    return written


if __name__ == "__main__":
    for path in accept():
        sys.stdout.write(f"{path}\n")
