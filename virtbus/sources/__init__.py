"""The contract of a source of observations (`libvirt`, `replay`, or a third party's entry point)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Event as StopEvent
from typing import Protocol, TypeAlias

from virtbus.config import OwnerRule
from virtbus.model import Check, Host
from virtbus.observations import Description, Observation, SourceReady

Sink: TypeAlias = Callable[[Observation], None]
"""Takes an observation in about a microsecond, from any thread, without blocking or raising."""


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """How a hypervisor is observed; times in seconds.

    `since_ns`: up to when the last run saw everything (wall clock, the earliest that it can be). Errors that
    the hypervisor remembers from after it are findings; None asks for none of them.
    """

    lookup_deadline_seconds: float = 0.5  # then a look-up is late; no event waits for it
    lookups_in_flight: int = 4
    keepalive_interval_seconds: int = 5
    keepalive_count: int = 3  # unanswered ones that end the connection
    grace_seconds: float = 1.0  # how long a pause by I/O error waits for its own event
    owner_rules: tuple[OwnerRule, ...] = ()
    since_ns: int | None = None
    # Of one hypervisor among many on its host:
    host: Host | None = None  # whose guests these are, whatever the connection says; None: what it says
    quiet_seconds: float | None = None  # between two questions where nothing happens
    idle_seconds: float | None = None  # then the connection of the look-ups is closed; None: never


class Source(Protocol):
    """Observes one hypervisor."""

    def run(self, sink: Sink, stop: StopEvent) -> None:
        """Observe until `stop` is set; called on a thread of its own; reconnects for ever.

        Order to the sink: `SourceReady` after each (re)connect, registered before looked at; errors and
        lifecycle as they come; `SourceLost` once when cut off. Raises SourceDenied only before the
        first `SourceReady`.
        """

    def describe(self, domain_uuid: str) -> Description | None:
        """What is known of a domain, from the cache, at once; a miss is None and starts a look-up."""

    def snapshot(self) -> SourceReady:
        """Connect, look at everything once, and disconnect (for `doctor` and one-shot commands)."""

    def probe(self) -> Sequence[Check]:
        """Look at socket, rights, version and event registration; changes nothing."""


class SourceFactory(Protocol):
    """What an entry point of the group `virtbus.sources` names; its name is the URI scheme that it serves.

    Raises ConfigError when the URI can't be used. It opens no connection.
    """

    def __call__(self, uri: str, *, options: SourceOptions) -> Source:
        """Make the source of `uri`."""
