"""What a source observes, from a callback to a look around: facts that the agent turns into events.

As in `model`: frozen, wall time in nanoseconds since the Unix epoch, durations in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from virtbus.model import Device, Domain, Evidence, Host, Hypervisor, Now
from virtbus.words import DiskError, GapReason, GuestState, Origin, ResolutionCause


@dataclass(frozen=True, slots=True)
class Description:
    """What the cache knows of one domain: itself and its devices by alias."""

    domain: Domain
    devices: Mapping[str, Device]
    connection: str = ""  # that has the domain, where a source has several
    hypervisor: Hypervisor | None = None  # of that connection; None: the host's


class RawIoError(NamedTuple):
    """One call of libvirt's I/O-error callback, as it came (a tuple: made thousands of times a second)."""

    domain_uuid: str
    domain_name: str
    domain_id: int | None
    path: str
    alias: str
    action_code: int
    reason: str
    observed_at: int  # wall clock, ns


LATE_SECONDS = 10.0  # an event that comes later than this after its finding is an error of its own


@dataclass(frozen=True, slots=True)
class Burst:
    """Equal errors (all but the time) that were drained together: counts are exact, times are the edges."""

    raw: RawIoError  # the first of them
    count: int
    first_ns: int
    last_ns: int
    origin: Origin = Origin.EVENT
    message: str | None = None  # the hypervisor's text, for people
    disk_error: DiskError | None = None
    evidence: tuple[Evidence, ...] = ()
    stamp_ns: int | None = None  # the hypervisor's own time of the last of them, where it kept one
    rivals: frozenset[str] = frozenset()  # aliases that the same look found in error beside it
    late: bool = False  # the event of an error that a look alone has found before it; see LATE_SECONDS


@dataclass(frozen=True, slots=True)
class DomainResumed:
    """The guest runs again."""

    domain_uuid: str
    at_ns: int


@dataclass(frozen=True, slots=True)
class DomainHalted:
    """The guest is there and does not run, for whatever reason: its devices' silence proves nothing."""

    domain_uuid: str
    at_ns: int
    state: GuestState  # paused, suspended to memory, or crashed and preserved


@dataclass(frozen=True, slots=True)
class HostKnown:
    """What was not known of the host when it was first looked at."""

    host: Host
    at_ns: int


@dataclass(frozen=True, slots=True)
class DomainGone:
    """The guest left this host."""

    domain_uuid: str
    at_ns: int
    cause: ResolutionCause
    connection: str = ""  # that had it, where a source has several: another one may have it by now


@dataclass(frozen=True, slots=True)
class DeviceRemoved:
    """A device was unplugged."""

    domain_uuid: str
    alias: str
    at_ns: int


@dataclass(frozen=True, slots=True)
class DevicesKnown:
    """The devices that a guest has: its XML could be read only after the look around."""

    domain_uuid: str
    aliases: frozenset[str]
    at_ns: int


@dataclass(frozen=True, slots=True)
class DomainState:
    """One domain of a snapshot; a pause of unknown reason with a disk error is `paused_by_io_error` too."""

    uuid: str
    name: str
    state: str
    paused_by_io_error: bool
    aliases: frozenset[str] | None = None  # the devices it has; None: not read yet on this connection
    number: int | None = None  # libvirt's id of this run of it: another one is another run


@dataclass(frozen=True, slots=True)
class SourceReady:
    """Callbacks are registered, and then everything was looked at once.

    `findings` are errors that the look found and no event reported, as far as the source knows; the
    incidents know more (they outlive a restart) and may already have them.
    """

    host: Host
    at_ns: int
    domains: tuple[DomainState, ...]
    findings: tuple[Burst, ...] = ()
    throttles: bool = False  # errors are merged (Hypervisor.merges), whatever the host's hypervisor is
    connection: str = ""  # of whose guests this speaks, where a source has several
    proves: bool = False  # `SourceSeen` follows: without it nothing counts as seen
    whole: bool = True  # these are all guests of the host; else the others' connections speak for them
    # Since when its guests may run: its socket came then, by the clock of `at_ns`; None: not known.
    appeared_ns: int | None = None
    booted_ns: int | None = None  # what the clock of `at_ns` said at the boot (seen.Moment)


@dataclass(frozen=True, slots=True)
class SourceLost:
    """The source can't observe since `at_ns`, when it was last heard."""

    at_ns: int
    why: str
    connection: str = ""
    reason: GapReason = GapReason.SOURCE_LOST
    domains: frozenset[str] | None = None  # the guests that are not seen; None: all of the host
    booted_ns: int | None = None  # as in SourceReady


@dataclass(frozen=True, slots=True)
class SourceGone:
    """A connection ended for good, with its daemon; each of `domains` is reported gone after this."""

    at_ns: int
    connection: str
    domains: frozenset[str] = frozenset()  # guests whose end the daemon did not report


@dataclass(frozen=True, slots=True)
class Surveyed:
    """Every connection that was there at the start has been looked at: what none of them has is gone.

    Those that have not answered in time are `unreached`, and so are folders that can't be read: of their
    guests nothing is known yet. Another survey follows when one of them was looked at, or has ended.
    """

    at_ns: int
    host: Host
    domains: frozenset[str]
    unreached: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class StoodStill:
    """The process did not run from `since` to `at_ns`.

    Of a source of many connections each reports its own loss; guests of others may have come, failed and gone
    meanwhile.
    """

    at_ns: int
    why: str
    since: Now


class SourceSeen(NamedTuple):
    """The connection answered: whatever it reported before `asked` stands before this in the queue.

    But for what happened in the last `undecided` seconds before that: it waits for a decision who reports it.
    """

    asked: Now
    connection: str = ""
    undecided: float = 0.0


@dataclass(frozen=True, slots=True)
class CallbackLost:
    """A callback came and could not be read: which guest it spoke of, and of what, nobody knows."""

    at_ns: int
    why: str


Observation: TypeAlias = (
    RawIoError
    | Burst
    | DomainResumed
    | DomainHalted
    | DomainGone
    | DeviceRemoved
    | DevicesKnown
    | HostKnown
    | SourceReady
    | SourceLost
    | SourceGone
    | SourceSeen
    | Surveyed
    | StoodStill
    | CallbackLost
)
