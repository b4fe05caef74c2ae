"""The contract of a source of observations (`libvirt`, `replay`, or a third party's entry point)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Event as StopEvent
from typing import Protocol, TypeAlias

from virtbus.model import Check, Description, Observation, SourceReady

Sink: TypeAlias = Callable[[Observation], None]
"""Takes an observation in about a microsecond, from any thread, without blocking or raising."""


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
