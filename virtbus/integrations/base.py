"""What acts on a control plane: the contract of an integration, and how one is found by its name.

An integration says what should be done (`wants`, `condition`, `holds`), does one stored action at a time
(`execute`), and reads what is held under our mark (`look`): the control plane is the truth of that. All else
is common (`reactor`): which events are believed, hysteresis, limits, storing before acting, retries, one
instance at a time, the audit line.

Migration and reboot are not among the actions: a guest that is paused by an I/O error often can't be
migrated, and an error that was reported to the guest never justifies a restart.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, ClassVar

from virtbus import plugins
from virtbus.config import React
from virtbus.consumer import Delivery
from virtbus.errors import ConfigError, VirtbusError
from virtbus.fleet import HostHealth
from virtbus.model import Check

ENTRY_POINT_GROUP = "virtbus.integrations"


class Verb(StrEnum):
    """What an action does."""

    HOLD = "hold"  # keep new guests off a host
    RELEASE = "release"  # undo it
    REPORT = "report"  # show a host's condition
    EVENT = "event"  # hand over one event


# HTTP: what we send is what a server does not want; once more would change nothing. All else is a matter of
# time, or an operator's to fix (401, 403, 404), or a gateway's bad day.
REFUSED_STATUS = frozenset({400, 413, 415, 422, 431})

HOLD, RELEASE, REPORT, EVENT = Verb.HOLD, Verb.RELEASE, Verb.REPORT, Verb.EVENT


class TargetUnavailable(VirtbusError):
    """The control plane can't be reached or is not able to answer now: the action is tried again."""

    retryable = True
    exit_code = 69


class TargetDenied(TargetUnavailable):
    """The control plane refuses our account (401, 403): tried again, for an operator can grant it."""

    exit_code = 77


class ActionRefused(VirtbusError):
    """The control plane refuses this action: a hold or an event is given up and an operator is notified."""

    exit_code = 65


class NotOurs(ActionRefused):
    """Somebody else already holds the host, or changed what we did: it is left to them."""


class TargetMissing(NotOurs):
    """The control plane does not know the host (yet): a report waits for it, a hold is decided again."""


@dataclass(frozen=True, slots=True)
class Action:
    """One thing to do, stored before it is done; `key` is its identity: a key is stored once."""

    key: str
    target: str  # actions of one target are done in order
    verb: str  # a Verb
    why: str
    # Plain JSON: what `execute` needs. Of a hold or release: "target", the control plane's name of the host
    # where it is known, and of a hold "since" (Unix seconds), "times" and "by", for its mark.
    body: Mapping[str, Any] = field(default_factory=dict)
    topic: str = ""  # a newer action of the same target and topic replaces one that still waits


@dataclass(frozen=True, slots=True)
class Hold:
    """A host that is held under our mark, as it stands in the control plane."""

    host: str  # libvirt's name of the host, as far as the mark says, else `target`
    target: str  # the control plane's name of it
    why: str
    since: float | None = None  # Unix seconds
    times: int = 1  # how often in a row it was held
    by: str = ""  # which reactor set it
    uid: str = ""  # the control plane's identity of the object: another one was created later
    intact: bool = True  # False: our mark stands, but what it marks was wiped


@dataclass(frozen=True, slots=True)
class Found:
    """What a look at the control plane found."""

    holds: Sequence[Hold]
    uids: Mapping[str, str]  # of the hosts that were asked for: those that exist, with their identity
    shown: Mapping[str, str | None] = field(default_factory=dict)  # host asked for → its condition's status

    @property
    def bare(self) -> Collection[str]:
        """Hosts that show no condition of ours."""
        return [host for host, status in self.shown.items() if status is None]


class Integration:
    """Base of all integrations. Made once; one thread calls `execute` and `look`, another one all else."""

    name: ClassVar[str]  # the entry point's name, too
    holds: ClassVar[bool] = False  # whether it can keep new guests off a host (HOLD and RELEASE)

    def wants(self, delivery: Delivery) -> Action | None:
        """What to do about one event; None for nothing. Pure, quick, and the same for the same event."""
        return None

    def condition(self, host: HostHealth) -> Mapping[str, str] | None:
        """What to show of a host; a REPORT follows whenever it changes. None: nothing is shown."""
        return None

    def execute(self, action: Action) -> str:
        """Do it, once more if need be (idempotent); what was done, for the audit.

        Raises TargetUnavailable (again later), TargetMissing, NotOurs, ActionRefused (never again). A release
        of what is not held any more raises NotOurs, which counts as released.
        """
        raise NotImplementedError

    def look(self, hosts: Mapping[str, str | None], *, everything: bool) -> Found | None:
        """Read what is held under our mark: of `hosts`, or of all that the control plane knows.

        `hosts` has the control plane's name for each of libvirt's, where that is known.

        Called from the thread that executes. None: this control plane can't be asked, and the local store
        is all that is known. Raises TargetUnavailable.
        """
        return None

    def probe(self) -> Sequence[Check]:
        """Whether the control plane can be reached and lets us; changes nothing."""
        return ()

    def close(self) -> None:
        """Let go of connections."""


@contextmanager
def code_of_others() -> Iterator[None]:
    """Around what an integration does: a library that ends its own program (sys.exit) must not end ours."""
    try:
        yield
    except SystemExit as error:
        raise RuntimeError(f"sys.exit({error.code!r}) was called") from error


Factory = Callable[[React], Integration]


def open_integration(name: str, settings: React) -> Integration:
    """The integration of that name: an entry point of ENTRY_POINT_GROUP.

    Raises ConfigError that names the known ones, or the package that is missing, or the bad setting.
    """
    point = plugins.find(ENTRY_POINT_GROUP, name)
    if point is None:
        known = ", ".join(plugins.names(ENTRY_POINT_GROUP))
        raise ConfigError(f'no integration is called "{name}"; known are {known}')
    what = f'integration "{name}"'
    factory: Factory = plugins.load(point, what)
    try:
        return factory(settings)
    except ModuleNotFoundError as error:  # its client library is imported when it is made
        raise plugins.missing(error, what) from error


def may_hold(name: str) -> bool:
    """Whether the integration of that name is there and may hold hosts; it is not made for that."""
    point = plugins.find(ENTRY_POINT_GROUP, name)
    return point is not None and bool(getattr(plugins.load(point, f'integration "{name}"'), "holds", True))


def short(name: str) -> str:
    """A host's name without its domain."""
    return name.partition(".")[0]


def target_of(host: str, names: Mapping[str, Collection[str]]) -> str | None:
    """The control plane's name of a host, by libvirt's name or its short form; None: it is unknown.

    `names` has each target's other names; one that two of them bear identifies neither. `compute-1.a.org` and
    `compute-1.b.org` are two hosts, whatever else they are called.
    """
    if "." in host:
        names = {name: others for name, others in names.items() if name == host or not _elsewhere(name, host)}
    for wanted in dict.fromkeys((host, short(host))):
        if wanted in names:
            return wanted
        matches = [name for name, others in names.items() if wanted in others]
        if len(matches) == 1:
            return matches[0]
    longer = [name for name in names if short(name) == host]  # it bears the name with its domain
    return longer[0] if len(longer) == 1 else None


def _elsewhere(name: str, host: str) -> bool:
    """Whether it is a host's name with another domain."""
    return "." in name and short(name) == short(host)


def seconds_of(text: object) -> float | None:
    """Unix seconds of what `utc` wrote; None for anything else."""
    try:
        moment = datetime.fromisoformat(str(text))
        return moment.timestamp() if moment.tzinfo is not None else None
    except (ValueError, OverflowError):
        return None


def utc(seconds: float) -> str:
    """Unix seconds as ISO 8601 in UTC, whole seconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
