"""What is known of each domain, so that an event is described without asking anybody.

Reading never waits. An entry stays for a while after its domain is gone: the events about its end
are still to come.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from virtbus import redaction
from virtbus.model import Device, DeviceSource, Domain
from virtbus.observations import Description, RawIoError
from virtbus.sources.domain_xml import DomainXml
from virtbus.sources.evidence import disks_by_target
from virtbus.sources.link import ACTION_PAUSE
from virtbus.words import GuestState

GONE_KEPT = 1024  # entries of domains that are gone
STRANGE_KEPT = 16  # paths of a domain that its XML does not explain
FRESH_SECONDS = 1.0  # a copy begins without an event: so long a description shows all that run
ASK_AGAIN_SECONDS = 10.0  # between two look-ups of a domain whose description lacks something


@dataclass(frozen=True, slots=True)
class Entry:
    """One domain: `xml` is None until it was read, `refused` when it can't be."""

    uuid: str
    name: str
    number: int | None
    state: str
    xml: DomainXml | None = None
    refused: bool = False
    asked_at: float = float("-inf")
    read_at: float = float("-inf")  # when its XML was asked for (monotonic), and when it last changed since
    changed_at: float = float("-inf")
    jobs: frozenset[str] = frozenset()  # the disks that had a block job, and when that was asked last
    jobs_at: float = float("-inf")
    strange: frozenset[tuple[str, str]] = frozenset()  # (alias, path) that its XML was read again for
    description: Description | None = field(default=None, compare=False)

    @property
    def devices(self) -> Mapping[str, Device]:
        """The devices by alias, as far as they are known."""
        return {} if self.xml is None else self.xml.devices

    def is_new_path(self, alias: str, path: str) -> bool:
        """Whether a path is of no image that is known of a disk, and was not read about before."""
        if self.xml is None or not path or not self.xml.images.get(alias):
            return False
        return not self.xml.has_image(alias, path) and (alias, path) not in self.strange


class Cache:
    """Entries by UUID. One thread writes states, any thread reads and adds descriptions."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._gone: OrderedDict[str, Entry] = OrderedDict()
        self._unread: set[str] = set()  # whose XML is from before this connection, if there is any
        self._wanted: set[str] = set()  # whose aliases were asked for before their XML was read
        self._missing: dict[str, frozenset[str]] = {}  # aliases that were in that one, and are no more

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, uuid: str) -> Entry | None:
        """The entry, also of a domain that left a short while ago."""
        return self._entries.get(uuid) or self._gone.get(uuid)

    def present(self, uuid: str) -> Entry | None:
        """The entry of a domain that is there."""
        return self._entries.get(uuid)

    def active(self) -> list[Entry]:
        """The entries of the domains that are there."""
        with self._lock:
            return list(self._entries.values())

    def knows(self, uuid: str, alias: str) -> bool:
        """Whether the domain's description has this device."""
        entry = self._entries.get(uuid)
        return entry is not None and entry.xml is not None and alias in entry.xml.devices

    def shown(self, raw: RawIoError) -> RawIoError:
        """The error without what may be a secret in its words; a name that the description shows stays."""
        path, reason = redaction.path(raw.path), redaction.text(raw.reason)
        if path != raw.path and (entry := self._entries.get(raw.domain_uuid)) is not None:
            sources = [device.source for device in entry.devices.values() if device.source is not None]
            if any(raw.path in (each.path, each.data_file, *each.backing) for each in sources):
                path = raw.path
        if path == raw.path and reason == raw.reason:
            return raw
        return raw._replace(path=path, reason=reason)

    def aliases(self, uuid: str) -> frozenset[str] | None:
        """The aliases of a domain's devices; None when its XML was not read on this connection."""
        entry = self._entries.get(uuid)
        if entry is None or entry.xml is None or uuid in self._unread:
            self._wanted.add(uuid)
            return None
        return frozenset(entry.xml.devices)

    def doubt(self, now: float) -> None:
        """Nobody listens: from now on disks may be plugged and unplugged without a word."""
        with self._lock:
            self._entries = {uuid: replace(entry, changed_at=now) for uuid, entry in self._entries.items()}
            self._unread, self._wanted, self._missing = set(self._entries), set(), {}

    def late(self, uuid: str) -> tuple[frozenset[str], frozenset[str] | None]:
        """What an XML that was just read shows after the look around; each is given once.

        The aliases of devices that were unplugged while nobody listened; and those of all its devices, if
        `aliases` did not know them when it was asked.
        """
        aliases = self.aliases(uuid)
        with self._lock:
            missing, waiting = self._missing.pop(uuid, frozenset()), uuid in self._wanted
            if aliases is not None:
                self._wanted.discard(uuid)
        return missing, aliases if waiting else None

    def resolve(self, raw: RawIoError, now: float) -> str:
        """The alias of the disk that an event without one speaks of; "" when that is unclear.

        By its path; else the only disk; else, of an error without a pause, as libvirt gives no alias during a
        block job, the only one that has one. A pause's disk is found by the look. `now` is monotonic.
        """
        entry = self._entries.get(raw.domain_uuid)
        if entry is None or entry.xml is None:
            return ""
        owners = entry.xml.owners(raw.path) if raw.path else []
        if owners:
            return owners[0] if len(owners) == 1 else ""
        if entry.read_at < entry.changed_at:
            return ""  # a disk may have been plugged in
        is_fresh = entry.jobs_at >= entry.changed_at and now - entry.jobs_at <= FRESH_SECONDS
        may_be_copied = is_fresh and raw.action_code != ACTION_PAUSE
        copied = next(iter(entry.jobs)) if may_be_copied and len(entry.jobs) == 1 else ""
        return entry.xml.only_disk or copied

    def only_disk(self, uuid: str) -> str:
        """The alias of a domain's only disk; "" where there are several, or may be."""
        entry = self._entries.get(uuid)
        known = entry is not None and entry.read_at >= entry.changed_at
        return entry.xml.only_disk if entry is not None and entry.xml is not None and known else ""

    def jobs(self, uuid: str) -> frozenset[str] | None:
        """The disks that had a block job at the last reading ("": nobody knows); None: not asked then."""
        entry = self._entries.get(uuid)
        return None if entry is None or entry.jobs_at < entry.read_at else entry.jobs

    def disk(self, uuid: str, name: str) -> str:
        """The alias of the disk that a block job's event names by its target or path; "" when unknown."""
        entry = self._entries.get(uuid)
        if entry is None or entry.xml is None:
            return ""
        owners = entry.xml.owners(name)
        return disks_by_target(entry.devices).get(name) or (owners[0] if len(owners) == 1 else "")

    def stale(self, uuid: str, alias: str, path: str) -> bool:
        """Whether an event's path shows that the disk has another source by now than its XML had.

        No event reports a snapshot. Until the XML is read again only the path is known of the source.
        """
        old = self._entries.get(uuid)  # without the lock: this is every callback's way
        if old is None or not old.is_new_path(alias, path):
            return False
        with self._lock:
            old = self._entries.get(uuid)
            if old is None or old.xml is None or not old.is_new_path(alias, path):
                return False
            source = DeviceSource("unknown", path=redaction.path(path))
            devices = {**old.xml.devices, alias: replace(old.xml.devices[alias], source=source)}
            strange = frozenset([*old.strange, (alias, path)][-STRANGE_KEPT:])
            xml = replace(old.xml, devices=devices)
            self._entries[uuid] = _described(replace(old, xml=xml, strange=strange))
            return True

    def saw(self, uuid: str, name: str, number: int | None, state: str) -> bool:
        """A domain is there, in this state; True when it is new, or (another number) another run."""
        with self._lock:
            old = self._entries.get(uuid)
            fresh = old is None or (old.number is not None and number is not None and old.number != number)
            if old is None or fresh:
                old = Entry(uuid, name, number, state)
            self._gone.pop(uuid, None)
            number = old.number if number is None else number
            self._entries[uuid] = _described(replace(old, name=name, number=number, state=state))
            return fresh

    def outdate(self, uuid: str, now: float) -> None:
        """Its XML is another one by now."""
        with self._lock:
            old = self._entries.get(uuid)
            if old is not None:
                self._entries[uuid] = replace(old, changed_at=now)

    def read(
        self,
        uuid: str,
        xml: DomainXml | None,
        asked_at: float = float("inf"),
        jobs: frozenset[str] | None = None,
    ) -> None:
        """Its XML was read, or (None) refused; `jobs`: the disks that have a block job, where that was asked.

        Of a domain that is gone it is of no use.
        """
        with self._lock:
            old = self._entries.get(uuid)
            if old is None:
                return
            if uuid in self._unread and xml is not None and asked_at >= old.changed_at:
                self._unread.discard(uuid)
                self._missing[uuid] = frozenset(old.devices) - frozenset(xml.devices)
            read = replace(old, xml=xml, refused=xml is None, read_at=asked_at)
            if jobs is not None:
                read = replace(read, jobs=jobs, jobs_at=asked_at)
            self._entries[uuid] = _described(read)

    def may_ask(self, uuid: str, now: float) -> bool:
        """Whether it is worth to ask for what an entry lacks; True counts as asked."""
        with self._lock:
            old = self._entries.get(uuid)
            if old is None or old.refused or now - old.asked_at < ASK_AGAIN_SECONDS:
                return False
            self._entries[uuid] = replace(old, asked_at=now)
            return True

    def gone(self, uuid: str) -> None:
        """The domain left."""
        with self._lock:
            entry = self._entries.pop(uuid, None)
            if entry is not None:
                self._gone[uuid] = _described(replace(entry, state=GuestState.SHUT_OFF))
                if len(self._gone) > GONE_KEPT:
                    self._gone.popitem(last=False)


def _described(entry: Entry) -> Entry:
    if entry.xml is None:
        return entry if entry.description is None else replace(entry, description=None)
    domain = Domain(entry.uuid, entry.name, entry.number, GuestState(entry.state), entry.xml.owner)
    return replace(entry, description=Description(domain, entry.xml.devices))
