"""In whose name the agent speaks: its id, and the host that it is tied to. Makes its gap events."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from virtbus.errors import RestartNeeded, SpoolFull
from virtbus.model import Gap, Host, PreviousRun, SequenceRange
from virtbus.spool import Spool
from virtbus.telemetry import Trouble, emit
from virtbus.words import GapReason


class Speaker:
    """The agent's id may turn out to be another host's: then this run ends, or begins, under a new one."""

    def __init__(
        self,
        agent_id: str,
        spool: Spool,
        *,
        previous_id: str | None = None,
        identify: Callable[[Host], str | None] = lambda host: None,
    ) -> None:
        """`identify` takes the host that libvirt names → a new agent id when the present one is another's."""
        self.agent_id = agent_id
        self.previous_id = previous_id  # what was in the state folder, where that was not ours
        self.identify = identify
        self.host: Host | None = None
        self.unidentified: Host | None = None  # of whom it is not known whether our id is another host's
        self._spool = spool

    def is_on(self, host: Host) -> None:
        """The source named the host."""
        self.host = self._spool.host = host

    def _changed(self, host: Host) -> str | None:
        """The id to speak under, where ours is another host's; asked again when the disk refuses it."""
        try:
            new = self.identify(host)
        except SpoolFull as error:
            self.unidentified = host
            emit(Trouble("agent-id", error))
            return None
        self.unidentified = None
        return new

    def begin_on(self, host: Host) -> None:
        """Before this run's first event: speak under an id of our own where ours is another host's."""
        new = self._changed(host)
        if new is not None:
            self.previous_id, self.agent_id = self.agent_id, new
            self._spool.agent_id = new

    def is_anothers(self, host: Host) -> RestartNeeded | None:
        """Later: our id is another host's. This run began under it and ends so; the next has a new one."""
        new = self._changed(host)
        if new is None:
            return None
        why = f"this is another machine (a copied state folder?); the agent starts again as {new}"
        return RestartNeeded(f"{why}; its id was {self.agent_id}")

    def gap(
        self,
        reason: GapReason,
        detail: str | None = None,
        *,
        ended_at: datetime,
        started_at: datetime | None = None,
        previous: PreviousRun | None = None,
        missing: tuple[SequenceRange, ...] = (),
        missing_occurrences: int = 0,
        found: int = 0,
    ) -> Gap:
        """A gap event; it never ends before it began."""
        return Gap(
            host=self.host,
            agent_id=self.agent_id,
            reason=reason,
            detail=detail,
            started_at=None if started_at is None else min(started_at, ended_at),
            ended_at=ended_at,
            previous=previous,
            missing=missing,
            missing_events=sum(item.last - item.first + 1 for item in missing),
            missing_occurrences=missing_occurrences,
            found=found,
        )
