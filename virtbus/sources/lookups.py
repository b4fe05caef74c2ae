"""Asks about domains on connections of its own, so that a guest that hangs never blinds the agent.

A call into libvirt can't be cancelled, and a guest whose QEMU hangs holds it for ever. Guarantees:

1. at most `in_flight` calls run at a time, at most one per domain, each on a connection that no other call
   uses meanwhile, never on the event connection;
2. a call that outlives its deadline is given up by whoever waits; its late answer is still used;
3. when calls that hang take all places, there are as many places once more, and no others: no more than
   twice `in_flight` of the daemon's workers are ever held by us, also when every guest hangs;
4. a domain that hangs is not asked again before its call has come back;
5. a question is closed by its answer, or because its subject is gone or the hypervisor is away; never by a
   failure, a timeout or an answer that belongs to an earlier connection;
6. what was answered in vain is asked again after a wait that doubles from FIRST_WAIT to LONGEST_WAIT seconds.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field, replace
from enum import Flag, auto
from functools import partial
from pathlib import Path
from typing import NamedTuple

from virtbus.config import OwnerRule
from virtbus.errors import SchemaError, SourceUnavailable, VirtbusError
from virtbus.sources import domain_xml
from virtbus.sources.crew import Crew
from virtbus.sources.evidence import STAMP_SLACK_NS, FreeSpace, Look, disks_by_target, read_messages
from virtbus.sources.link import (
    DISK_ERROR_NO_SPACE,
    PAUSED,
    Connector,
    HostFacts,
    Link,
    NoSuchDomain,
    Space,
    Unsupported,
)
from virtbus.sources.session import Baseline, Described, HostAnswered, Looked, Session, Shared
from virtbus.telemetry import DomainUnreadable, LookupFinished, LookupsReplaced, Trouble, emit

HOST = ""  # the look-up key of what is not a domain's
NOBODY_KNOWS = frozenset({""})
FIRST_WAIT = 1.0
LONGEST_WAIT = 60.0


class Want(Flag):
    """What is asked about a domain."""

    NOTHING = 0
    DESCRIPTION = auto()
    TROUBLE = auto()
    BASELINE = auto()  # the disk errors that a running guest has left over
    HOST = auto()  # the host's UUID; this and the next are asked under the key "", which is not a domain's
    VERSION = auto()  # its hypervisor's


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
    """The questions that are open, one entry a subject. Pure and not thread-safe; times are monotonic."""

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
                if failed.due <= now:
                    self.open(subject, Want.NOTHING)
            waits = [failed.due for subject, failed in self._failed.items() if subject not in self._due]
            self._next = min(waits, default=math.inf)
        return next((subject for subject in self._due if subject not in busy), None)

    def take(self, now: float, busy: Container[str]) -> Asked | None:
        """The questions to ask next, all of one subject."""
        subject = self.ready(now, busy)
        if subject is None:
            return None
        want = self._due.pop(subject)
        failed = self._failed.pop(subject, None)
        self._asked[subject] = 0 if failed is None else failed.attempts
        return Asked(subject, want if failed is None else want | failed.want, self._era)

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


Job = Callable[[Link, str, Want], Want]
"""Asks what is wanted of one domain on a link and delivers it; returns what could not be answered."""


@dataclass(slots=True, eq=False)
class _Places:
    """Where calls run: `in_flight` of them at a time, each on a connection of its own."""

    resting: Link | None = None  # one connection is kept for the next call
    running: dict[str, float] = field(default_factory=dict)  # uuid → when its call began
    used_at: float = math.inf  # when the last call came back


class Lookups:
    """Asks what is open, on a crew's threads. Thread-safe."""

    def __init__(
        self,
        connector: Connector,
        job: Job,
        crew: Crew,
        *,
        in_flight: int,
        deadline: float,
        clock: Callable[[], float] = time.monotonic,
        idle: float = math.inf,
    ) -> None:
        """After `idle` seconds without a question the last connection is closed."""
        self._connector, self._job, self._crew = connector, job, crew
        self._limit, self._deadline, self._idle, self._clock = in_flight, deadline, idle, clock
        self._lock = threading.Lock()
        self._questions = Questions()
        self._current = _Places()
        self._abandoned: list[_Places] = []
        self._late: set[str] = set()
        self._paused = True

    def request(self, uuid: str, want: Want) -> None:
        """Ask; wants of one domain are put together. Never blocks for longer than a lock."""
        with self._lock:
            self._questions.open(uuid, want)
            self._dispatch()

    def forget(self, uuid: str) -> None:
        """The domain is gone: don't ask about it any more."""
        with self._lock:
            self._questions.forget(uuid)

    def pause(self) -> None:
        """The hypervisor is away: drop the connection and the questions; calls that hang are left to fail."""
        with self._lock:
            self._paused = True
            self._questions.clear()
            self._abandon()

    def resume(self) -> None:
        """The hypervisor is back."""
        with self._lock:
            self._paused = False
            self._dispatch()

    def busy(self) -> bool:
        """Whether anything is due that can be asked, or is being asked within its deadline."""
        with self._lock:
            now, running = self._clock(), self._current.running
            if any(now - began < self._deadline for began in running.values()):
                return True
            return (
                len(running) < self._limit and self._questions.ready(now, self._busy_subjects()) is not None
            )

    def check(self) -> float | None:
        """Note calls beyond their deadline, replace places that are all taken by them, ask again what is due.

        Returns when to check again (monotonic), or None.
        """
        running, rest_at = self._current.running, self._current.used_at + self._idle
        if not running and self._questions.next_due() is None and rest_at == math.inf:
            return None  # without the lock: the observer asks after each note
        with self._lock:
            self._crew.check()
            now = self._clock()
            hanging = {uuid for uuid, began in running.items() if now - began >= self._deadline}
            for uuid in hanging - self._late:
                emit(LookupFinished("late", uuid))
            self._late |= hanging
            if len(hanging) >= self._limit and not any(old.running for old in self._abandoned):
                self._abandon()
                emit(LookupsReplaced(len(hanging)))
            elif not running and now >= rest_at:
                self._abandon()
            self._dispatch()
            due = None if self._paused else self._questions.next_due()
            moments = [began + self._deadline for uuid, began in running.items() if uuid not in hanging]
            moments += [] if due is None else [due]
            moments += [rest_at] if now < rest_at < math.inf else []
            return min(moments, default=None)

    # ---- inside; the lock is held

    def _abandon(self) -> None:
        old, self._current = self._current, _Places()
        if old.running:
            self._abandoned.append(old)
        if old.resting is not None:
            old.resting.close()

    def _busy_subjects(self) -> set[str]:
        return {uuid for each in (self._current, *self._abandoned) for uuid in each.running}

    def _dispatch(self) -> None:
        places, now = self._current, self._clock()
        while not self._paused and len(places.running) < self._limit:
            asked = self._questions.take(now, self._busy_subjects())
            if asked is None:
                return
            places.running[asked.subject] = now
            link, places.resting = places.resting, None
            self._crew.run(partial(self._work, places, link, asked))

    def _work(self, places: _Places, link: Link | None, asked: Asked) -> None:
        unanswered = asked.want
        try:
            if places is self._current:
                places.running[asked.subject] = self._clock()
                link = link or self._connector.open(None)
                unanswered = self._job(link, asked.subject, asked.want)
        except VirtbusError as error:
            emit(LookupFinished("failed", asked.subject, error))
        except Exception as error:  # noqa: BLE001 - one strange domain must not cost the others their answers
            emit(Trouble("look-up", error))
        finally:
            self._finished(places, link, asked, unanswered)

    def _finished(self, places: _Places, link: Link | None, asked: Asked, unanswered: Want) -> None:
        with self._lock:
            places.running.pop(asked.subject, None)
            self._late.discard(asked.subject)
            places.used_at = now = self._clock()
            is_current, is_lost = places is self._current, link is not None and not link.alive()
            if is_current and unanswered and is_lost:
                self._questions.again(asked)  # the domain is not to blame: on another connection
            else:
                self._questions.answered(asked, unanswered, now)
            if not places.running and places in self._abandoned:
                self._abandoned.remove(places)
            if link is not None and is_current and not is_lost and places.resting is None:
                places.resting = link
            elif link is not None:
                link.close()
            self._dispatch()
        if not unanswered:
            emit(LookupFinished("found", asked.subject))


class Asker:
    """What to ask, and where the answers go: the cache, and the present session's notes."""

    def __init__(self, shared: Shared, owner_rules: Sequence[OwnerRule]) -> None:
        self.session: Session | None = None
        self.local = False  # paths in domain XML are paths of this machine
        self.messages_offered = False
        self._shared = shared
        self._owner_rules = owner_rules

    def begin(self, session: Session, facts: HostFacts) -> None:
        """From now on answers belong to this session."""
        self.session = session
        self.local = facts.local
        self.messages_offered = facts.keeps_messages

    def ask(self, link: Link, uuid: str, want: Want) -> Want:
        """One look-up: what is wanted of a domain goes to the cache and to the session's notes.

        Returns what could not be answered and is worth asking again: one question's failure costs no other.
        """
        session = self.session  # an answer belongs to the session that asked
        unanswered = Want.NOTHING
        for each in Want:
            if each not in want:
                continue
            try:
                answered = self._answer(link, uuid, each, session)
            except NoSuchDomain:
                return Want.NOTHING  # its end is on its way to us
            except SchemaError as error:
                emit(DomainUnreadable(uuid or "the host", error))
                continue
            except SourceUnavailable as error:
                emit(LookupFinished("failed", uuid, error))
                answered = False
            unanswered |= Want.NOTHING if answered else each
        return unanswered

    def _answer(self, link: Link, uuid: str, want: Want, session: Session | None) -> bool:
        if want is Want.HOST:
            answer = HostAnswered(uuid=domain_xml.host_uuid(link.capabilities()))
            if session is not None:
                session.notes.put(answer)
        elif want is Want.VERSION:
            answer = HostAnswered(version=link.version())
            if session is not None:
                session.notes.put(answer)
        elif want is Want.DESCRIPTION:
            self._read(link, uuid)
            if session is not None:
                session.notes.put(Described(uuid))
        elif session is None:
            return True
        elif want is Want.TROUBLE:
            look = self._look(link, uuid)
            session.notes.put(Looked(uuid, look))
            return look.complete
        elif want is Want.BASELINE:
            wrong = link.disk_errors(uuid)
            if wrong and self._lacks_description(uuid):
                return False
            session.notes.put(Baseline(uuid, wrong))
        return True

    def _read(self, link: Link, uuid: str) -> None:
        asked_at = self._shared.clock().monotonic
        try:
            xml = domain_xml.parse(link.xml(uuid), owner_rules=self._owner_rules)
        except SchemaError as error:
            self._shared.cache.read(uuid, None, asked_at)
            emit(DomainUnreadable(uuid, error))
        else:
            self._shared.cache.read(uuid, xml, asked_at)
            with self._shared.lock:
                is_wanted = self._shared.check.has_nameless(uuid)
            if is_wanted and not xml.only_disk:
                self._shared.cache.read(uuid, xml, asked_at, self._jobs(link, uuid, xml))

    def _jobs(self, link: Link, uuid: str, xml: domain_xml.DomainXml) -> frozenset[str]:
        """The disks with a block job, whose errors libvirt reports without a name; "": nobody knows."""
        if not xml.complete:
            return NOBODY_KNOWS
        disks = disks_by_target({alias: xml.devices[alias] for alias in xml.images})
        try:
            return frozenset(alias for target, alias in disks.items() if link.has_job(uuid, target))
        except NoSuchDomain:
            raise
        except SourceUnavailable as error:
            emit(LookupFinished("failed", uuid, error))
            return NOBODY_KNOWS

    def _look(self, link: Link, uuid: str) -> Look:
        asked_at = self._shared.clock().monotonic
        state, reason = link.state(uuid)
        look = Look(state, reason, asked_at=asked_at)
        if self.messages_offered:
            try:
                now_ns = self._shared.clock().wall_ns + (0 if self.local else STAMP_SLACK_NS)
                look = replace(look, messages=read_messages(link.messages(uuid), now_ns))
            except Unsupported:
                self.messages_offered = False
            except NoSuchDomain:
                raise
            except SourceUnavailable as error:
                look = replace(look, complete=False)
                emit(LookupFinished("failed", uuid, error))
            if look.messages and self._lacks_description(uuid):
                look = replace(look, messages=None, complete=False)
        if state == PAUSED:
            # Only of a paused guest: of one that runs it shows what is over.
            try:
                look = replace(look, disk_errors=link.disk_errors(uuid))
            except NoSuchDomain:
                raise
            except SourceUnavailable as error:
                look = replace(look, complete=look.complete and isinstance(error, Unsupported))
                emit(LookupFinished("failed", uuid, error))
        return self._with_space(link, uuid, look)

    def _lacks_description(self, uuid: str) -> bool:
        """Disks are named by target: whose errors they are is only known with the XML, which is to come."""
        entry = self._shared.cache.get(uuid)
        return entry is not None and entry.xml is None and not entry.refused

    def _with_space(self, link: Link, uuid: str, look: Look) -> Look:
        """For devices that report no space: what their images and file systems have."""
        entry = self._shared.cache.get(uuid)
        devices = {} if entry is None else entry.devices
        with self._shared.lock:
            aliases = self._shared.check.out_of_space(uuid)
        disks = disks_by_target(devices)
        targets = {target for target, alias in disks.items() if alias in aliases}
        targets |= {t for t, code in (look.disk_errors or {}).items() if code == DISK_ERROR_NO_SPACE}
        spaces: dict[str, Space] = {}
        free: dict[str, FreeSpace] = {}
        for target in targets:
            try:
                spaces[target] = link.space(uuid, target)
            except SourceUnavailable:
                continue
            source = devices[disks[target]].source if target in disks else None
            if source is not None and source.type == "file" and self.local:
                left = _free_space(source.path or "", spaces[target])
                if left is not None:
                    free[target] = left
        return replace(look, spaces=spaces, free=free)


def _free_space(path: str, space: Space) -> FreeSpace | None:
    """What the file system of an image has left, if the path means the same file here as for the guest.

    In a container the same path may be another file, or none.
    """
    if not path.startswith("/"):
        return None
    try:
        image = Path(path).stat()
        if space.physical not in (image.st_size, image.st_blocks * 512):
            return None
        found = os.statvfs(path)
    except OSError:
        return None
    return FreeSpace(found.f_bavail * found.f_frsize, path)
