"""The vocabulary of the events: every word that producer, schemas and consumers share, once.

A closed set is a plain `StrEnum`. An open set derives from `Word`: a word that a later minor version adds is
read as it stands, equal to its text and to no member of ours, so that nothing is lost on the way through an
older consumer. The schemas list the members of the open sets under `x-known-values`; a test compares both.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Self


class Word(StrEnum):
    """An open set: `Origin("guess")` is the word "guess", though no member of this release."""

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        if not isinstance(value, str):
            return None
        word = str.__new__(cls, value)
        word._name_, word._value_ = "LATER", value
        return word

    @property
    def is_known(self) -> bool:
        """Whether this release knows the word."""
        return self._value_ in type(self)._value2member_map_


class Action(Word):
    """What the hypervisor did about the error (virDomainEventIOErrorAction), beside the raw code."""

    NONE = "none"
    PAUSE = "pause"
    REPORT = "report"
    UNKNOWN = "unknown"  # a code that nobody knows yet

    @classmethod
    def from_code(cls, code: int) -> Action:
        """0 none, 1 pause, 2 report; a code that nobody knows yet is UNKNOWN."""
        return _ACTIONS.get(code, cls.UNKNOWN)


_ACTIONS = {0: Action.NONE, 1: Action.PAUSE, 2: Action.REPORT}


class Origin(Word):
    """How we know of an error."""

    EVENT = "event"  # libvirt's I/O-error callback
    LIFECYCLE = "lifecycle"  # a pause by I/O error whose own event never came
    RECONCILE = "reconcile"  # found by looking, after we had been cut off
    REPLAY = "replay"  # a drill or a recording: never a live error


class Phase(StrEnum):
    """Where an incident stands (closed)."""

    OPENED = "opened"
    UPDATED = "updated"
    RESOLVED = "resolved"


class Scope(Word):
    """What one incident speaks for; wider than a device only when too many are open at once."""

    DEVICE = "device"
    DOMAIN = "domain"
    HOST = "host"


class GapReason(Word):
    """Why something may be missing."""

    AGENT_DOWN = "agent_down"  # between two runs of the agent
    AGENT_STANDSTILL = "agent_standstill"  # its process did not run: frozen, suspended or swapped out
    SOURCE_LOST = "source_lost"  # cut off from the hypervisor
    SPOOL_FULL = "spool_full"  # evicted to make room
    SPOOL_EXPIRED = "spool_expired"  # older than the spool keeps
    SPOOL_DAMAGED = "spool_damaged"
    SPOOL_UNWRITABLE = "spool_unwritable"
    DEAD_LETTER = "dead_letter"  # no broker will ever take it
    IDENTITY_CHANGED = "identity_changed"  # a copied agent got an id of its own
    OBSERVATIONS_DROPPED = "observations_dropped"  # seen, but could not be kept
    OPERATOR_DROPPED = "operator_dropped"  # given up by `virtbus spool drop`


class ResolutionCause(Word):
    """Why an incident ended."""

    RESUMED = "resumed"
    QUIET = "quiet"
    DEVICE_REMOVED = "device_removed"
    DOMAIN_STOPPED = "domain_stopped"
    MIGRATED = "migrated"


class EvidenceCheck(Word):
    """What was looked at."""

    LIFECYCLE = "lifecycle"
    STATE = "state"
    DISK_ERRORS = "disk_errors"
    MESSAGES = "messages"
    BLOCK_INFO = "block_info"
    FILE_SYSTEM = "file_system"


class EvidenceVerdict(Word):
    """What a look says about the error."""

    CONFIRMS = "confirms"
    INCONCLUSIVE = "inconclusive"
    UNAVAILABLE = "unavailable"


class DiskError(Word):
    """What libvirt keeps of a disk's error (virDomainDiskErrorCode)."""

    UNSPECIFIED = "unspecified"
    NO_SPACE = "no_space"


class SourceState(Word):
    """Whether the agent observes the hypervisor."""

    CONNECTED = "connected"
    DISCONNECTED = "disconnected"
    STARTING = "starting"


class Platform(Word):
    """Whose metadata names a guest's owner; an operator's own rule brings its own word."""

    OPENSTACK = "openstack"
    KUBEVIRT = "kubevirt"
    OVIRT = "ovirt"


class GuestState(Word):
    """libvirt's word for a domain's state (virDomainState)."""

    NO_STATE = "no state"
    RUNNING = "running"
    BLOCKED = "blocked"
    PAUSED = "paused"
    SHUTTING_DOWN = "shutting down"
    SHUT_OFF = "shut off"
    CRASHED = "crashed"
    PM_SUSPENDED = "pmsuspended"


class Severity(Word):
    """Severity in OpenTelemetry's words."""

    ERROR = "ERROR"
    WARN = "WARN"
    INFO = "INFO"
    DEBUG = "DEBUG"


# libvirt's reason (an open string of its own, passed on as it is) of an error for lack of space.
ENOSPC = "enospc"
