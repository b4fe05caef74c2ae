"""What tells a control plane: the contract of an integration, and how one is found by its name.

An integration says what should be done (`wants`, `condition`, `holds`) and does one stored action at a time
(`execute`). All else is common (`reactor`): which events are believed, hysteresis, limits, storing before
acting, retries, one instance at a time, the audit line.

Migration and reboot are no actions here: a guest that is paused by an I/O error often can't be migrated,
and an error that was reported to the guest never justifies a restart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from virtbus import plugins
from virtbus.config import React
from virtbus.consumer import Delivery
from virtbus.errors import ConfigError, VirtbusError
from virtbus.fleet import HostHealth
from virtbus.model import Check

ENTRY_POINT_GROUP = "virtbus.integrations"

HOLD, RELEASE, REPORT, EVENT = "hold", "release", "report", "event"


class TargetUnavailable(VirtbusError):
    """The control plane can't be reached or is not able to answer now: the action is tried again."""

    retryable = True
    exit_code = 69


class ActionRefused(VirtbusError):
    """The control plane will never take this action: it is given up, and an operator is told."""

    exit_code = 65


class NotOurs(ActionRefused):
    """Somebody else already holds the host, or changed what we did: it is left to them."""


@dataclass(frozen=True, slots=True)
class Action:
    """One thing to do, stored before it is done; `key` is its identity: a key is stored once."""

    key: str
    target: str  # actions of one target are done in order
    verb: str  # HOLD, RELEASE, REPORT or EVENT
    why: str
    body: Mapping[str, Any] = field(default_factory=dict)  # plain JSON: what `execute` needs
    topic: str = ""  # a newer action of the same target and topic replaces one that still waits


class Integration:
    """Base of all integrations. Made once; `execute` is called from one thread, all else from another."""

    name: ClassVar[str]
    holds: ClassVar[bool] = False  # whether it can keep new guests off a host (HOLD and RELEASE)

    def wants(self, delivery: Delivery) -> Action | None:
        """What to do about one event; None for nothing. Pure, quick, and the same for the same event."""
        return None

    def condition(self, host: HostHealth) -> Mapping[str, str] | None:
        """What to show of a host; a REPORT follows whenever it changes. None: nothing is shown."""
        return None

    def execute(self, action: Action) -> str:
        """Do it, once more if need be (idempotent); what was done, for the audit.

        Raises TargetUnavailable (again later), NotOurs, ActionRefused (never again).
        """
        raise NotImplementedError

    def probe(self) -> Sequence[Check]:
        """Whether the control plane can be reached and lets us; changes nothing."""
        return ()

    def close(self) -> None:
        """Let go of connections."""


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
