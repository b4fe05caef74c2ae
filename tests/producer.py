"""From a domain's XML to what an agent really sends about it: for tests of those who act on events."""

from __future__ import annotations

from collections.abc import Callable
from xml.etree import ElementTree

from virtbus.agent.incidents import IncidentLimits, Incidents
from virtbus.envelope import uuid7
from virtbus.model import Domain, Event, Host, Now, Record
from virtbus.observations import Description, DomainResumed, RawIoError
from virtbus.sources import domain_xml
from virtbus.testing import a_host, a_record
from virtbus.words import GuestState

NOVA_XML = """<domain type='kvm' id='7'>
  <name>instance-0000002a</name>
  <uuid>6b6f2f4e-0b8c-4d7a-9a51-3d1f3a9f5c11</uuid>
  <metadata>
    <nova:instance xmlns:nova="http://openstack.org/xmlns/libvirt/nova/1.1">
      <nova:name>web-1</nova:name>
      <nova:owner>
        <nova:user uuid="77aa01">alice</nova:user>
        <nova:project uuid="9f3c2d">shop</nova:project>
      </nova:owner>
    </nova:instance>
  </metadata>
  <devices>
    <disk type='network' device='disk'>
      <driver name='qemu' type='raw' error_policy='stop'/>
      <source protocol='rbd' name='volumes/volume-1'><host name='10.20.0.11' port='6789'/></source>
      <target dev='vda' bus='virtio'/>
      <alias name='virtio-disk0'/>
    </disk>
  </devices>
</domain>"""

_START_NS = 1_800_000_000 * 10**9


class Producer:
    """An agent's own path from libvirt's callback to the event: the cache's parser and the incidents."""

    def __init__(self, xml: str = NOVA_XML, *, host: Host | None = None) -> None:
        """Of one guest on one host."""
        parsed = domain_xml.parse(xml)
        root = ElementTree.fromstring(xml)
        self.uuid, self.name = root.findtext("uuid", ""), root.findtext("name", "")
        self._description = Description(
            Domain(self.uuid, self.name, parsed.id, GuestState.RUNNING, parsed.owner), parsed.devices
        )
        self._now = Now(_START_NS, 0.0)
        new_id: Callable[[], str] = lambda: uuid7(self._now.wall_ns)  # noqa: E731
        self._incidents = Incidents(IncidentLimits(), new_id=new_id, host=host or a_host())
        self._sequence = 0

    def wait(self, seconds: float) -> None:
        """Time passes."""
        self._now = Now(self._now.wall_ns + int(seconds * 1e9), self._now.monotonic + seconds)

    def fails(
        self, *, action: int = 1, reason: str = "", alias: str = "virtio-disk0", known: bool = True
    ) -> list[Event]:
        """libvirt calls back; `known`: the domain's XML has been read by then."""
        at = self._now.wall_ns
        raw = RawIoError(self.uuid, self.name, 7, "", alias, action, reason, at)
        return self._incidents.apply(raw, self._now, lambda uuid: self._description if known else None)

    def resumes(self, after: float = 60.0) -> list[Event]:
        """The guest runs again, and stays well for `after` seconds."""
        observed = DomainResumed(self.uuid, self._now.wall_ns)
        events = self._incidents.apply(observed, self._now, lambda uuid: self._description)
        self.wait(after)
        return [*events, *self._incidents.tick(self._now, lambda uuid: self._description)]

    def record(self, event: Event) -> Record:
        """The event as it goes out."""
        self._sequence += 1
        return a_record(event, sequence=self._sequence)
