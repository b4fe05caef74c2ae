"""What the observer needs of a hypervisor's connection, and libvirt's numbers for what it says.

`libvirt.py` is the real one; tests put a simulated host behind the same words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from virtbus.errors import SourceUnavailable
from virtbus.model import Hypervisor
from virtbus.observations import RawIoError
from virtbus.words import DiskError, GuestState, ResolutionCause

# virDomainState
RUNNING, PAUSED, SHUTDOWN, SHUTOFF, CRASHED = 1, 3, 4, 5, 6
STATES = {
    0: GuestState.NO_STATE,
    1: GuestState.RUNNING,
    2: GuestState.BLOCKED,
    3: GuestState.PAUSED,
    4: GuestState.SHUTTING_DOWN,
    5: GuestState.SHUT_OFF,
    6: GuestState.CRASHED,
    7: GuestState.PM_SUSPENDED,
}
# virDomainPausedReason
PAUSED_UNKNOWN, PAUSED_IOERROR = 0, 5
# virDomainEventType
DEFINED, UNDEFINED, STARTED, SUSPENDED, RESUMED, STOPPED = 0, 1, 2, 3, 4, 5
PMSUSPENDED_EVENT, CRASHED_EVENT = 7, 8
# virDomainEventStartedDetailType
STARTED_WAKEUP = 4
# virDomainEventSuspendedDetailType
SUSPENDED_PAUSED, SUSPENDED_IOERROR = 0, 2
PAUSES = (SUSPENDED_IOERROR, SUSPENDED_PAUSED)
# virDomainEventStoppedDetailType
STOPPED_MIGRATED = 3
# virDomainEventType → virDomainState's word
STATE_AFTER = {
    STARTED: GuestState.RUNNING,
    SUSPENDED: GuestState.PAUSED,
    RESUMED: GuestState.RUNNING,
    STOPPED: GuestState.SHUT_OFF,
    6: GuestState.SHUTTING_DOWN,
    PMSUSPENDED_EVENT: GuestState.PM_SUSPENDED,
    CRASHED_EVENT: GuestState.CRASHED,
}


def runs_again(event: int, detail: int) -> bool:
    """Whether a lifecycle event says that a guest goes on where it stood."""
    return event == RESUMED or (event == STARTED and detail == STARTED_WAKEUP)


def left_by(detail: object) -> ResolutionCause:
    """Why a guest left the host, by virDomainEventStoppedDetailType."""
    return ResolutionCause.MIGRATED if detail == STOPPED_MIGRATED else ResolutionCause.DOMAIN_STOPPED


# virDomainDiskErrorCode
DISK_ERROR_UNSPECIFIED, DISK_ERROR_NO_SPACE = 1, 2
DISK_ERRORS = {DISK_ERROR_UNSPECIFIED: DiskError.UNSPECIFIED, DISK_ERROR_NO_SPACE: DiskError.NO_SPACE}
# virDomainEventIOErrorAction
ACTION_PAUSE, ACTION_REPORT = 1, 2


class NoSuchDomain(SourceUnavailable):
    """The domain is not there (any more): nothing to look at."""

    retryable = False


class NobodyListens(SourceUnavailable):
    """The socket is there, and its daemon is not."""


class Unsupported(SourceUnavailable):
    """The libvirt or hypervisor at hand does not have the call: don't ask again."""

    retryable = False


class DomainAt(NamedTuple):
    """One active domain in a listing: state and reason are libvirt's numbers."""

    uuid: str
    name: str
    id: int | None
    state: int
    reason: int


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What a connection says about its host at once; asking never blocks on a guest."""

    name: str
    hypervisor: Hypervisor  # its version is asked for by itself
    keeps_messages: bool  # virDomainGetMessages reports I/O errors (libvirt 11.1 and later)
    local: bool  # paths in domain XML are paths of the machine we run on


class Space(NamedTuple):
    """Sizes of one disk in bytes (virDomainGetBlockInfo)."""

    capacity: int
    allocation: int
    physical: int


class Handler(Protocol):
    """Takes what the connection reports, on libvirt's thread: every call ends within microseconds."""

    def io_error(self, raw: RawIoError) -> None:
        """One I/O-error callback."""

    def lifecycle(self, uuid: str, name: str, number: int | None, event: int, detail: int) -> None:
        """One lifecycle callback (virDomainEventType and its detail)."""

    def device_removed(self, uuid: str, alias: str) -> None:
        """A device is gone."""

    def changed(self, uuid: str) -> None:
        """The domain's XML is not what it was."""

    def job_ended(self, uuid: str, disk: str, *, failed: bool) -> None:
        """A block job (copy, commit, pull) of a disk ended; `disk` is its target or path."""

    def undecodable(self) -> None:
        """A callback was lost: its text is not UTF-8, and nobody knows which domain it spoke of."""

    def closed(self, why: str, silent_seconds: float) -> None:
        """The connection is gone; it may have been deaf for `silent_seconds` before."""


class Link(Protocol):
    """One connection, one call at a time. Calls may block for ever and raise SourceUnavailable."""

    def facts(self) -> HostFacts:
        """The host; the daemon probes nothing for it."""

    def version(self) -> str:
        """The hypervisor's version, dotted; the daemon may probe it for seconds."""

    def capabilities(self) -> str:
        """The capabilities XML; the daemon may probe for seconds."""

    def domains(self) -> Sequence[DomainAt]:
        """All active domains, in one call to the hypervisor where it has one."""

    def state(self, uuid: str) -> tuple[int, int]:
        """State and reason of one domain."""

    def xml(self, uuid: str) -> str:
        """The live XML of one domain."""

    def has_job(self, uuid: str, target: str) -> bool:
        """Whether a disk has a block job (a copy or backup, say); asks the guest's QEMU, which may hang."""

    def disk_errors(self, uuid: str) -> Mapping[str, int]:
        """Disk errors by target (virDomainGetDiskErrors); asks the guest's QEMU, which may hang."""

    def messages(self, uuid: str) -> Sequence[str]:
        """What virDomainGetMessages says. Raises Unsupported where libvirt is older than 7.1."""

    def space(self, uuid: str, target: str) -> Space:
        """Sizes of one disk; asks the guest's QEMU, which may hang."""

    def heard(self, then: Callable[[], None]) -> None:
        """Ask the daemon something, and have `then` called behind every callback it had sent before.

        The answer follows them on the one ordered stream, and `then` follows them through the event loop
        that calls them. May block for ever. Raises SourceUnavailable: then nothing is called.
        """

    def alive(self) -> bool:
        """Whether it is still connected, as far as it knows; never blocks."""

    def close(self) -> None:
        """Let go of it; never blocks."""


class Connector(Protocol):
    """Makes links; `open` blocks."""

    uri: str
    appeared_ns: int | None  # since when the daemon may have been there (wall ns), where that is known

    def open(self, handler: Handler | None) -> Link:
        """Connect read-only, keepalive set, and with a handler register every callback.

        Raises SourceUnavailable, SourceDenied, or ConfigError for a URI that nobody can open.
        """
