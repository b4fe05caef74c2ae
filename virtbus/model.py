"""Facts as frozen dataclasses: what every other module talks in. The words in them stand in `words`.

No I/O and no third-party import. Inside the agent wall time is an integer of nanoseconds since the
Unix epoch (`*_ns`), as the callback reads it; in events it is an aware UTC `datetime`. Durations are
seconds. Unknown is `None`, never absent.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import ClassVar, NamedTuple, TypeAlias

from virtbus.words import (
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
    Scope,
    SourceState,
)

# ----------------------------------------------------------------------------------------- clocks


class Now(NamedTuple):
    """One reading of the clocks: wall time stamps, monotonic time measures what this host was awake for."""

    wall_ns: int
    monotonic: float
    suspended: float = 0.0  # seconds that the host slept since its boot, which monotonic leaves out

    @property
    def boot(self) -> float:
        """Seconds since the host's boot, a suspend included (CLOCK_BOOTTIME)."""
        return self.monotonic + self.suspended


class Clock:
    """The system's clocks; tests pass their own object with the same call."""

    def __call__(self) -> Now:
        """Read the clocks at once."""
        monotonic = time.monotonic()
        return Now(time.time_ns(), monotonic, time.clock_gettime(time.CLOCK_BOOTTIME) - monotonic)


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# The bounds of the schemas: what lies outside is the clock of a host that was never set, or an attack.
EARLIEST = datetime(2000, 1, 1, tzinfo=UTC)
LATEST = datetime(2200, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)
MAX_COUNT = 2**53  # of counts, sizes and numbers: beyond it JSON readers lose whole numbers


def to_datetime(wall_ns: int) -> datetime:
    """Nanoseconds since the Unix epoch → aware UTC datetime, cut to whole microseconds.

    Outside the years that an event can show it is their first or last moment.
    """
    # Not fromtimestamp(): a float of this size is off by up to a microsecond.
    return _EPOCH + timedelta(microseconds=min(max(wall_ns // 1000, _EARLIEST_US), _LATEST_US))


def to_ns(moment: datetime) -> int:
    """Aware datetime → nanoseconds since the Unix epoch."""
    return (moment - _EPOCH) // timedelta(microseconds=1) * 1000


_EARLIEST_US, _LATEST_US = to_ns(EARLIEST) // 1000, to_ns(LATEST) // 1000


# ----------------------------------------------------------------------- the host and what runs on it


@dataclass(frozen=True, slots=True)
class Hypervisor:
    """The hypervisor and the libvirt in front of it; versions are dotted ("7.2.22")."""

    kind: str | None = None  # virConnectGetType: "QEMU"
    version: str | None = None
    libvirt_version: str | None = None

    @property
    def merges(self) -> bool | None:
        """Whether errors are merged before anybody sees them: counts are lower bounds; None: not known.

        QEMU does from 9.2 on: one BLOCK_IO_ERROR a second and device.
        """
        if self.kind not in (None, "QEMU"):
            return False
        major, _, rest = (self.version or "").partition(".")
        minor = rest.partition(".")[0]
        if self.kind is None or not (major.isdecimal() and minor.isdecimal()):
            return None
        return (int(major), int(minor)) >= (9, 2)


@dataclass(frozen=True, slots=True)
class Host:
    """The hypervisor's host as libvirt names it, also over a remote URI."""

    name: str  # virConnectGetHostname
    uuid: str | None = None  # /capabilities/host/uuid
    boot_id: str | None = None  # the kernel's; only of the local host
    hypervisor: Hypervisor = field(default_factory=Hypervisor)


@dataclass(frozen=True, slots=True)
class Owner:
    """Who owns a guest, from its metadata (Nova, KubeVirt, oVirt, or a configured rule)."""

    platform: Platform
    id: str | None = None
    name: str | None = None
    project_id: str | None = None
    project_name: str | None = None
    user_id: str | None = None
    user_name: str | None = None


@dataclass(frozen=True, slots=True)
class Domain:
    """A guest. `id` is libvirt's number while it runs."""

    uuid: str
    name: str
    id: int | None = None
    state: GuestState | None = None
    owner: Owner | None = None


@dataclass(frozen=True, slots=True)
class DeviceSource:
    """Where a device's data lives, free of secrets: user names, passwords and query strings are cut."""

    type: str  # "file", "block", "network", "volume", …
    protocol: str | None = None  # "nbd", "rbd", "iscsi", "nfs", …
    path: str | None = None  # file, device node, or the name of the export or image
    pool: str | None = None
    volume: str | None = None
    hosts: tuple[str, ...] = ()  # "host:port" or "unix:/path"
    format: str | None = None
    backing: tuple[str, ...] = ()  # the images below, nearest first: a path, or protocol://server/name
    namespace: int | None = None  # of an NVMe controller, whose address is the path
    data_file: str | None = None  # where a qcow2 image keeps its data, when not in itself


@dataclass(frozen=True, slots=True)
class ErrorPolicy:
    """What the domain asks the hypervisor to do on an error ("stop", "report", "ignore", "enospace")."""

    write: str | None = None
    read: str | None = None


@dataclass(frozen=True, slots=True)
class Device:
    """A device in trouble. The alias is its identity; all else is `None` when the XML does not say."""

    alias: str | None
    target: str | None = None
    bus: str | None = None
    kind: str | None = None  # "disk", "cdrom", "lun", "serial", …
    serial: str | None = None
    source: DeviceSource | None = None
    policy: ErrorPolicy | None = None
    chain_index: int | None = None  # of the backing image that the reported path names


@dataclass(frozen=True, slots=True)
class Evidence:
    """One thing that was looked at, and what it says about the error."""

    check: EvidenceCheck
    verdict: EvidenceVerdict
    found: str | None = None  # for people
    capacity_bytes: int | None = None
    allocation_bytes: int | None = None
    physical_bytes: int | None = None


# ------------------------------------------------------------------------------------- the events


@dataclass(frozen=True, slots=True)
class ErrorFacts:
    """The error itself, with libvirt's own words beside our reading of them."""

    action: Action
    action_code: int | None
    reason: str | None  # open: "", "enospc", "message", "eio", …
    path: str | None  # as libvirt gave it: may be a backing file, or empty
    message: str | None
    disk_error: DiskError | None
    occurred_at: datetime
    evidence: tuple[Evidence, ...] = ()


@dataclass(frozen=True, slots=True)
class Occurrences:
    """How often: `count` in this event, `total` since the incident opened, `first`/`last` of this event's."""

    count: int
    total: int
    first: datetime
    last: datetime
    lower_bound: bool = False


@dataclass(frozen=True, slots=True)
class Incident:
    """One (domain, device) in trouble; it paused its guest `pauses` times, in a loop if `flapping`."""

    id: str
    phase: Phase
    opened_at: datetime
    pauses: int = 0
    flapping: bool = False
    pauses_per_minute: float | None = None
    scope: Scope = Scope.DEVICE


@dataclass(frozen=True, slots=True)
class IoError:
    """An incident opens or goes on."""

    TYPE: ClassVar[str] = "io.virtbus.domain.io_error.v1"

    host: Host
    domain: Domain
    device: Device
    error: ErrorFacts
    occurrences: Occurrences
    incident: Incident
    origin: Origin
    enriched: bool
    truncated: tuple[str, ...] = ()  # JSON pointers of what was cut to fit


@dataclass(frozen=True, slots=True)
class Resolution:
    """Why and when an incident ended."""

    cause: ResolutionCause
    resolved_at: datetime
    duration_seconds: float


@dataclass(frozen=True, slots=True)
class ResolvedOccurrences:
    """All errors of the incident."""

    total: int
    first: datetime
    last: datetime
    lower_bound: bool = False


@dataclass(frozen=True, slots=True)
class IoErrorResolved:
    """An incident ended."""

    TYPE: ClassVar[str] = "io.virtbus.domain.io_error_resolved.v1"

    host: Host
    domain: Domain
    device: Device
    occurrences: ResolvedOccurrences
    incident: Incident
    resolution: Resolution
    truncated: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SequenceRange:
    """Events `first` to `last`, both included, of one epoch."""

    epoch: str
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class PreviousRun:
    """The agent's run before this one; `last_sequence` is what its spool still knows."""

    epoch: str
    last_sequence: int


@dataclass(frozen=True, slots=True)
class Gap:
    """Something may be missing between two times, or is known to be missing by number."""

    TYPE: ClassVar[str] = "io.virtbus.agent.gap.v1"

    host: Host | None
    agent_id: str
    reason: GapReason
    detail: str | None
    started_at: datetime | None  # of the interval: seen through, or the oldest lost event; None: unknown
    ended_at: datetime
    previous: PreviousRun | None = None
    missing: tuple[SequenceRange, ...] = ()
    missing_events: int = 0  # how many events the ranges hold
    missing_occurrences: int = 0  # how many counted errors went with them
    found: int = 0  # errors of the interval that were found afterwards
    truncated: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class OpenIncident:
    """An open incident as a heartbeat carries it."""

    id: str
    domain_uuid: str
    domain_name: str
    device: Device
    action: Action
    reason: str | None
    opened_at: datetime
    last: datetime
    total: int
    pauses: int
    paused: bool
    flapping: bool
    scope: Scope = Scope.DEVICE
    drill: bool = False  # of replayed errors: never a live one


@dataclass(frozen=True, slots=True)
class Backlog:
    """What waits in the spool."""

    events: int
    bytes: int
    oldest_seconds: float | None


@dataclass(frozen=True, slots=True)
class SourceHealth:
    """Whether the source observes."""

    state: SourceState
    since: datetime


@dataclass(frozen=True, slots=True)
class OpenIncidents:
    """How many are open, and the first hundred."""

    total: int
    items: tuple[OpenIncident, ...] = ()


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The agent lives; what it holds. Never spooled, no sequence of its own."""

    TYPE: ClassVar[str] = "io.virtbus.agent.heartbeat.v1"

    host: Host | None
    agent_id: str
    agent_version: str
    epoch: str
    started_at: datetime  # of the agent's run
    sent_at: datetime
    interval_seconds: float
    source: SourceHealth
    backlog: Backlog
    committed_sequence: int
    confirmed_sequence: int
    incidents: OpenIncidents
    truncated: tuple[str, ...] = ()


Event: TypeAlias = IoError | IoErrorResolved | Gap | Heartbeat


# ------------------------------------------------------------------------ records and what becomes of them


@dataclass(frozen=True, slots=True)
class Stamp:
    """What makes an event this event, minted once at commit and never changed."""

    id: str  # UUIDv7
    agent_id: str
    epoch: str  # UUIDv7 of the agent's run
    sequence: int | None  # from 1 in the epoch; None for a heartbeat
    recorded_ns: int  # commit time


class Record(NamedTuple):
    """One encoded event on its way out, for any bus.

    `attributes` are the CloudEvents attributes as strings, without a binding's prefix; `body` is the data.
    A tuple, because a backlog makes one per event: a frozen dataclass takes four times as long to make.
    """

    row: int  # the spool's handle; 0 for a heartbeat
    epoch: str
    seq: int  # 0 for a heartbeat
    id: str
    key: str  # the partition key
    attributes: Mapping[str, str]
    body: bytes
    created_ns: int
    attempts: int = 0


@dataclass(frozen=True, slots=True)
class Confirmed:
    """The broker has it."""


@dataclass(frozen=True, slots=True)
class Deferred:
    """Not confirmed, may or may not have arrived: send again, same id. `error` says why."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Unroutable:
    """No queue is bound for it, or its routing key is not allowed: park it and its key, try later."""

    reason: str = "no queue is bound"


@dataclass(frozen=True, slots=True)
class Nacked:
    """The broker did not take it: a queue is full, or failed. Park it and its key, try later."""

    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """The broker will never take it: dead letter."""

    error: Exception


Parked: TypeAlias = Unroutable | Nacked
Outcome: TypeAlias = Confirmed | Deferred | Parked | Refused


class Binding(Enum):
    """How CloudEvents attributes ride on a message."""

    AMQP = "amqp"  # "ce-" headers (RabbitMQ binding)
    KAFKA = "kafka"  # "ce_" headers


@dataclass(frozen=True, slots=True)
class Message:
    """One message as a bus received it; `handle` is the bus's own and means nothing to others."""

    binding: Binding
    headers: Mapping[str, object]
    content_type: str | None
    body: bytes
    key: str | None
    redelivered: bool
    user_id: str | None  # proven by the broker, or None
    position: str  # where it stood, for logs: "queue#tag" or "topic[partition]@offset"
    handle: object = field(compare=False, repr=False, default=None)
    attempts: int | None = None  # deliveries of it so far, this one too, where the broker counts them
    content_encoding: str | None = None  # what its sender says; read only to say why a body can't be


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one look at a part: status "ok", "warning", "failed" or "skipped"."""

    name: str
    status: str
    summary: str
    remedy: str | None = None
    exit_code: int = 0
    details: Mapping[str, object] = field(default_factory=dict)
