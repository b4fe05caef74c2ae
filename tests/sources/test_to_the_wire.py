"""What a source can observe that is not ordinary arrives on the wire, valid."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sources.simulated import Seen, SimulatedHost
from virtbus import envelope, schema
from virtbus.agent.incidents import IncidentLimits, Incidents
from virtbus.model import Clock, Event, IoError, Stamp
from virtbus.observations import Observation
from virtbus.retry import no_waiting
from virtbus.sources import SourceOptions
from virtbus.sources.link import ACTION_REPORT
from virtbus.sources.observer import Observer

SERIAL = (
    "<domain id='1'><name>g</name><uuid>u</uuid><devices><serial type='file'><source path='/var/log/s.log'/>"
    "<target port='0'/><alias name='serial0'/></serial></devices></domain>"
)


class Wire:
    """A simulated host, observed, its observations turned into encoded events."""

    def __init__(self, host: SimulatedHost) -> None:
        self.host = host
        self.observer = Observer(host, options=SourceOptions(grace_seconds=0.2))
        self.seen = Seen()
        self._incidents = Incidents(IncidentLimits(), new_id=lambda: envelope.uuid7(Clock()().wall_ns))

    def bodies(self) -> list[dict[str, object]]:
        """The data of every I/O-error event so far, each valid by its schema."""
        events: list[Event] = []
        for item in self.seen.all:
            events += self._incidents.apply(item, Clock()(), self.observer.describe)
        out = []
        for event in events:
            if isinstance(event, IoError):
                id_ = envelope.uuid7(Clock()().wall_ns)
                encoded = envelope.encode(event, Stamp(id_, id_, id_, 1, Clock()().wall_ns))
                body = json.loads(encoded.body)
                assert schema.validate(encoded.attributes["dataschema"], body) == []
                out.append(body)
        return out


@pytest.fixture
def wire() -> Iterator[Wire]:
    made, stop = Wire(SimulatedHost()), threading.Event()
    with no_waiting():
        thread = threading.Thread(target=made.observer.run, args=(made.seen, stop))
        thread.start()
        made.seen.wait(lambda item: True)
        yield made
        stop.set()
        thread.join(10)


def start(wire: Wire, **more: object) -> object:
    guest = wire.host.add(**more)
    wire.host.lifecycle(guest, 2)
    for _ in range(200):
        entry = wire.observer.cache.get(guest.uuid)
        if entry is not None and (entry.refused or entry.xml is not None):
            break
        threading.Event().wait(0.01)
    return guest


def is_error(item: Observation) -> bool:
    return hasattr(item, "alias") or hasattr(item, "count")


@pytest.mark.parametrize(
    ("alias", "action", "xml", "action_word", "kind", "enriched"),
    [
        ("serial0", ACTION_REPORT, SERIAL, "report", "serial", True),
        ("virtio-disk0", 0, "", "none", "disk", True),
        ("virtio-disk0", 99, "", "unknown", "disk", True),
        ("never-heard-of", ACTION_REPORT, "", "report", None, False),
        ("virtio-disk0", ACTION_REPORT, "<domain>" + "x" * (10 << 20), "report", None, False),
        ("virtio-disk0", ACTION_REPORT, "<!DOCTYPE d [<!ENTITY e 'x'>]><domain/>", "report", None, False),
        ("virtio-disk0", ACTION_REPORT, "<domain>&e;</domain>", "report", None, False),
        ("virtio-disk0", ACTION_REPORT, "<domain><devices>", "report", None, False),
    ],
)
def test_an_unusual_error_arrives_valid_and_says_whether_it_is_described(
    wire: Wire, alias: str, action: int, xml: str, action_word: str, kind: str | None, enriched: bool
) -> None:
    guest = start(wire, xml=xml) if xml else start(wire)
    wire.host.io_error(guest, alias, action)  # type: ignore[arg-type]
    (body,) = wire.bodies()
    assert body["enriched"] is enriched
    assert body["error"]["action"] == action_word  # type: ignore[index]
    assert body["error"]["action_code"] == action  # type: ignore[index]
    assert body["device"]["kind"] == kind  # type: ignore[index]
    assert body["device"]["alias"] == (alias or None)  # type: ignore[index]


@pytest.mark.parametrize("name", ["база", "データ", "قاعدة", "a b\tc", "🦀", "quote\"'<&>", "x" * 300])
def test_a_name_in_any_script_arrives_as_it_is(wire: Wire, name: str) -> None:
    guest = start(wire)
    guest.name = name  # type: ignore[attr-defined]
    wire.host.lifecycle(guest, 4)  # type: ignore[arg-type] # resumed: told under its present name
    wire.host.io_error(guest)  # type: ignore[arg-type]
    for _ in range(200):
        entry = wire.observer.cache.get(guest.uuid)  # type: ignore[attr-defined]
        if entry is not None and entry.name == name:
            break
        threading.Event().wait(0.01)
    (body,) = wire.bodies()
    assert body["domain"]["name"] == name  # type: ignore[index]


KUBEVIRT = Path(__file__).parents[1] / "data" / "guests" / "kubevirt.xml"


@pytest.mark.parametrize(
    ("volume", "kind", "source", "path"),
    [
        ("containerdisk", "disk", "file",
         "/var/run/kubevirt-ephemeral-disks/disk-data/containerdisk/disk.qcow2"),
        ("rootdisk", "disk", "file", "/var/run/kubevirt-private/vmi-disks/rootdisk/disk.img"),
        ("database", "disk", "block", "/dev/database"),
        ("hotplugged-file", "disk", "file", "/var/run/kubevirt/hotplug-disks/hotplugged-file.img"),
        ("hotplugged-block", "lun", "block", "/var/run/kubevirt/hotplug-disks/hotplugged-block"),
    ],
)  # fmt: skip
def test_each_kind_of_kubevirts_volumes_arrives_with_its_vmi(
    wire: Wire, volume: str, kind: str, source: str, path: str
) -> None:
    guest = start(wire, xml=KUBEVIRT.read_text())
    guest.name = "shop_web-1.blue"  # type: ignore[attr-defined]
    wire.host.io_error(guest, f"ua-{volume}", path=path)  # type: ignore[arg-type]
    (body,) = wire.bodies()
    domain, device = body["domain"], body["device"]
    assert isinstance(domain, dict)
    assert isinstance(device, dict)
    owner = {name: value for name, value in domain["owner"].items() if value is not None}
    assert owner == {
        "platform": "kubevirt", "id": "9a1f7c52-6b6e-4c3e-9b0e-1f2a3b4c5d6e", "name": "web-1.blue",
        "project_id": "shop", "project_name": "shop",
    }  # fmt: skip
    assert (device["kind"], device["source"]["type"], device["source"]["path"]) == (kind, source, path)
    assert device["source"]["volume"] == volume
    assert device["policy"]["write"] == "stop"


def test_a_volume_that_is_plugged_while_the_guest_runs_is_named_when_it_fails(wire: Wire) -> None:
    whole = KUBEVIRT.read_text()
    first = whole.index("<disk", whole.index("ua-database"))
    without = whole[:first] + whole[whole.index("</disk>", first) + len("</disk>") :]
    assert "hotplugged-file" not in without
    guest = start(wire, xml=without)
    guest.xml = whole  # type: ignore[attr-defined]
    for handler in wire.host.handlers():
        handler.changed(guest.uuid)  # type: ignore[attr-defined] # libvirt's DEVICE_ADDED
    entry = wire.observer.cache.get
    for _ in range(500):
        if "ua-hotplugged-file" in (found := entry(guest.uuid)).devices:  # type: ignore[attr-defined, union-attr]
            break
        threading.Event().wait(0.01)
    assert "ua-hotplugged-file" in found.devices  # type: ignore[union-attr]
    wire.host.io_error(guest, "ua-hotplugged-file", path="")  # type: ignore[arg-type]
    (body,) = wire.bodies()
    assert body["device"]["source"]["volume"] == "hotplugged-file"  # type: ignore[index]
