"""Asks about one domain, on a look-up's thread: its description, or what is known about its trouble."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from virtbus.config import OwnerRule
from virtbus.errors import SchemaError, SourceUnavailable
from virtbus.sources import domain_xml
from virtbus.sources.evidence import FreeSpace, Look, disks_by_target, read_messages
from virtbus.sources.link import (
    DISK_ERROR_NO_SPACE,
    PAUSED,
    HostFacts,
    Link,
    NoSuchDomain,
    Space,
    Unsupported,
)
from virtbus.sources.lookups import Want
from virtbus.sources.session import Baseline, Described, HostAnswered, Looked, Session, Shared
from virtbus.telemetry import DomainUnreadable, LookupFinished, emit

HOST = ""  # the look-up key of what is no domain's


class Asker:
    """What to ask, and where the answers go: the cache, and the present session's notes."""

    def __init__(self, shared: Shared, owner_rules: Sequence[OwnerRule]) -> None:
        self.session: Session | None = None
        self.host_uuid: str | None = None
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
            self.host_uuid = domain_xml.host_uuid(link.capabilities())
            if session is not None:
                session.notes.put(HostAnswered())
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
            session.notes.put(Baseline(uuid, link.disk_errors(uuid)))
        return True

    def _read(self, link: Link, uuid: str) -> None:
        try:
            xml = domain_xml.parse(link.xml(uuid), owner_rules=self._owner_rules)
        except SchemaError as error:
            self._shared.cache.read(uuid, None)
            emit(DomainUnreadable(uuid, error))
        else:
            self._shared.cache.read(uuid, xml)

    def _look(self, link: Link, uuid: str) -> Look:
        asked_at = self._shared.clock().monotonic
        state, reason = link.state(uuid)
        look = Look(state, reason, asked_at=asked_at)
        if self.messages_offered:
            try:
                look = replace(look, messages=read_messages(link.messages(uuid)))
            except Unsupported:
                self.messages_offered = False
            except NoSuchDomain:
                raise
            except SourceUnavailable as error:
                look = replace(look, complete=False)
                emit(LookupFinished("failed", uuid, error))
        if state == PAUSED:
            # Only of a paused guest: of one that runs it tells of what is over.
            try:
                look = replace(look, disk_errors=link.disk_errors(uuid))
            except NoSuchDomain:
                raise
            except SourceUnavailable as error:
                look = replace(look, complete=isinstance(error, Unsupported))
                emit(LookupFinished("failed", uuid, error))
        return self._with_space(link, uuid, look)

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
