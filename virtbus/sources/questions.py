"""What libvirt was asked and has not answered yet: every question stays open until it is. Pure.

Guarantees:
1. a question is closed by its answer, or because its subject is gone or the hypervisor is away; never by a
   failure, a timeout or an answer that belongs to an earlier connection;
2. what was answered in vain is asked again after a wait that doubles from FIRST_WAIT to LONGEST_WAIT seconds;
3. one entry a subject, whatever is asked of it: memory is bounded by the host's domains.
"""

from __future__ import annotations

import math
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
class _Failed:
    """Questions that were answered in vain, and when they are due again."""

    want: Want
    due: float
    attempts: int


class Questions:
    """The table. Not thread-safe; times are monotonic seconds."""

    def __init__(self) -> None:
        self._due: dict[str, Want] = {}  # to be asked now, oldest first
        self._asked: dict[str, int] = {}  # being asked → failures in a row before
        self._failed: dict[str, _Failed] = {}
        self._next = math.inf  # not later than the first of `_failed` is due
        self._era = 0

    def __len__(self) -> int:
        return len(self._due.keys() | self._asked.keys() | self._failed.keys())

    def open(self, subject: str, want: Want) -> None:
        """Ask; what waits after a failure is asked at once, too: something new has happened."""
        failed = self._failed.get(subject)
        if failed is not None:
            want |= failed.want
            failed.want = Want.NOTHING  # its count of failures goes on
        self._due[subject] = self._due.get(subject, Want.NOTHING) | want

    def forget(self, subject: str) -> None:
        """Its subject is gone."""
        for table in (self._due, self._asked, self._failed):
            table.pop(subject, None)

    def clear(self) -> None:
        """The hypervisor is away: the next connection asks its own questions."""
        self._due, self._asked, self._failed = {}, {}, {}
        self._next = math.inf
        self._era += 1

    def ready(self, now: float, busy: Container[str]) -> str | None:
        """The subject to ask next: one that is not being asked already."""
        if now >= self._next:
            for subject, failed in self._failed.items():
                if failed.due <= now and failed.want:
                    self.open(subject, Want.NOTHING)
            waits = [failed.due for failed in self._failed.values() if failed.want]
            self._next = min(waits, default=math.inf)
        return next((subject for subject in self._due if subject not in busy), None)

    def take(self, now: float, busy: Container[str]) -> Asked | None:
        """The questions to ask next, all of one subject."""
        subject = self.ready(now, busy)
        if subject is None:
            return None
        failed = self._failed.pop(subject, None)
        self._asked[subject] = 0 if failed is None else failed.attempts
        return Asked(subject, self._due.pop(subject), self._era)

    def answered(self, asked: Asked, unanswered: Want, now: float) -> None:
        """What became of it: `unanswered` is asked again, later."""
        attempts = self._asked.pop(asked.subject, None) if asked.era == self._era else None
        if attempts is None or not unanswered:
            return
        due = now + min(FIRST_WAIT * 2**attempts, LONGEST_WAIT)
        self._failed[asked.subject] = _Failed(unanswered, due, min(attempts + 1, 16))
        self._next = min(self._next, due)

    def again(self, asked: Asked) -> None:
        """Ask it at once: the connection was to blame, not the subject."""
        if asked.era == self._era and self._asked.pop(asked.subject, None) is not None:
            self.open(asked.subject, asked.want)

    def next_due(self) -> float | None:
        """When a question that waits becomes due, or None; may be early, never late."""
        return None if self._next == math.inf else self._next
