"""What libvirt was asked and has not answered yet: every question stays open until it is. Pure.

Guarantees:
1. a question is closed by its answer, or because its subject is gone or the hypervisor is away; never by a
   failure, a timeout or an answer that belongs to an earlier connection;
2. what was answered in vain is asked again after a wait that doubles from FIRST_WAIT to LONGEST_WAIT seconds;
3. one entry a subject, whatever is asked of it: memory is bounded by the host's domains.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from enum import Flag, auto
from typing import NamedTuple

FIRST_WAIT = 1.0
LONGEST_WAIT = 60.0


class Want(Flag):
    """What is asked about a domain."""

    NOTHING = 0
    DESCRIPTION = auto()
    TROUBLE = auto()
    BASELINE = auto()  # the disk errors that a running guest has left over
    HOST = auto()  # asked under the key "", which is no domain's


class Asked(NamedTuple):
    """Questions that were taken to be asked now."""

    subject: str
    want: Want
    era: int  # of the hypervisor's connection


@dataclass(slots=True)
class _Open:
    want: Want
    due: float  # not before this (monotonic)
    attempts: int = 0  # that failed, in a row


class Questions:
    """The table. Not thread-safe; times are monotonic seconds."""

    def __init__(self) -> None:
        self._open: dict[str, _Open] = {}
        self._era = 0

    def __len__(self) -> int:
        return len(self._open)

    def open(self, subject: str, want: Want, now: float) -> None:
        """Ask; a question that waits after a failure becomes due at once: something new has happened."""
        entry = self._open.setdefault(subject, _Open(Want.NOTHING, now))
        entry.want |= want
        entry.due = min(entry.due, now)

    def forget(self, subject: str) -> None:
        """Its subject is gone."""
        self._open.pop(subject, None)

    def clear(self) -> None:
        """The hypervisor is away: the next connection asks its own questions."""
        self._open.clear()
        self._era += 1

    def take(self, now: float, busy: Container[str]) -> Asked | None:
        """The next question that is due and whose subject is not being asked already."""
        subject = self.ready(now, busy)
        if subject is None:
            return None
        entry = self._open[subject]
        want, entry.want = entry.want, Want.NOTHING
        return Asked(subject, want, self._era)

    def ready(self, now: float, busy: Container[str]) -> str | None:
        """Which subject `take` would take."""
        for subject, entry in self._open.items():
            if entry.want and entry.due <= now and subject not in busy:
                return subject
        return None

    def answered(self, asked: Asked, unanswered: Want, now: float) -> None:
        """What became of it: `unanswered` is asked again, later."""
        entry = self._open.get(asked.subject)
        if entry is None or asked.era != self._era:
            return
        if unanswered:
            entry.due = max(entry.due, now + min(FIRST_WAIT * 2**entry.attempts, LONGEST_WAIT))
            entry.attempts = min(entry.attempts + 1, 16)
            entry.want |= unanswered
        else:
            entry.attempts = 0
        if not entry.want:
            del self._open[asked.subject]

    def again(self, asked: Asked, now: float) -> None:
        """Ask it at once: the connection was to blame, not the subject."""
        if asked.era == self._era and asked.subject in self._open:
            self.open(asked.subject, asked.want, now)

    def next_due(self, now: float) -> float | None:
        """When a question that waits becomes due, or None."""
        waits = [entry.due for entry in self._open.values() if entry.want and entry.due > now]
        return min(waits, default=None)
