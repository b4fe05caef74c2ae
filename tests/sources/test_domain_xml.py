"""A domain's XML is somebody else's text: what is read of it, what is refused, and what never leaves."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtbus.config import OwnerRule
from virtbus.errors import SchemaError
from virtbus.model import DeviceSource, ErrorPolicy, Owner
from virtbus.sources.domain_xml import MAX_BYTES, host_uuid, parse

UUID = "4a1e599b-c22b-493a-85b4-40a340b65693"


def domain(devices: str = "", metadata: str = "", name: str = "db1") -> str:
    return (
        f"<domain type='qemu' id='7'><name>{name}</name><uuid>{UUID}</uuid>"
        f"<metadata>{metadata}</metadata><os><type>hvm</type></os><devices>{devices}</devices></domain>"
    )


def disk(source: str, kind: str = "file", more: str = "") -> str:
    return (
        f"<disk type='{kind}' device='disk'><driver name='qemu' type='qcow2'/>{source}{more}"
        "<target dev='vda' bus='virtio'/><alias name='virtio-disk0'/></disk>"
    )


def source_of(xml: str) -> DeviceSource:
    found = parse(xml).devices["virtio-disk0"].source
    assert found is not None
    return found


# ---------------------------------------------------------------------------------------- what is read


def test_a_file_disk_is_described_with_its_policies_serial_and_backing_chain() -> None:
    chain = (
        "<backingStore type='file'><format type='qcow2'/><source file='/img/base1'/>"
        "<backingStore type='file'><source file='/img/base0'/><backingStore/></backingStore></backingStore>"
    )
    xml = domain(
        "<disk type='file' device='disk'>"
        "<driver name='qemu' type='qcow2' error_policy='enospace' rerror_policy='report'/>"
        f"<source file='/img/top' index='1'/>{chain}<target dev='sda' bus='scsi'/>"
        "<serial>abc</serial><alias name='scsi0-0-0-0'/></disk>"
    )
    device = parse(xml).devices["scsi0-0-0-0"]
    assert (device.target, device.bus, device.kind, device.serial) == ("sda", "scsi", "disk", "abc")
    assert device.policy == ErrorPolicy(write="enospace", read="report")
    assert device.source == DeviceSource(
        type="file", path="/img/top", format="qcow2", backing=("/img/base1", "/img/base0")
    )


@pytest.mark.parametrize(
    ("kind", "source", "expected"),
    [
        ("block", "<source dev='/dev/vg/lv'/>", {"path": "/dev/vg/lv"}),
        ("volume", "<source pool='ssd' volume='db1'/>", {"pool": "ssd", "volume": "db1"}),
        (
            "network",
            "<source protocol='rbd' name='vms/db1'><host name='mon1' port='6789'/>"
            "<host name='::1' port='6789'/></source>",
            {"protocol": "rbd", "path": "vms/db1", "hosts": ("mon1:6789", "[::1]:6789")},
        ),
        (
            "network",
            "<source protocol='nbd' name=''><host transport='unix' socket='/run/nbd'/></source>",
            {"protocol": "nbd", "path": "", "hosts": ("unix:/run/nbd",)},
        ),
        ("network", "<source protocol='nbd'><host name='h'/></source>", {"protocol": "nbd", "hosts": ("h",)}),
        (
            "nvme",
            "<source type='pci'><address domain='0x0000' bus='0x01' slot='0x00' function='0x0'/></source>",
            {"path": "0000:01:00.0"},
        ),
        ("vhostuser", "<source type='unix' path='/run/vhost.sock'/>", {"path": "/run/vhost.sock"}),
    ],
)  # fmt: skip
def test_each_kind_of_source_says_where_the_data_lives(
    kind: str, source: str, expected: dict[str, object]
) -> None:
    assert source_of(domain(disk(source, kind))) == DeviceSource(type=kind, format="qcow2", **expected)  # type: ignore[arg-type]


def test_an_empty_cdrom_has_a_device_and_no_path() -> None:
    xml = domain("<disk type='file' device='cdrom'><target dev='hda' bus='ide'/><alias name='ide0'/></disk>")
    device = parse(xml).devices["ide0"]
    assert device.kind == "cdrom"
    assert device.source == DeviceSource(type="file")


def test_a_device_that_is_no_disk_is_described_too() -> None:
    xml = domain(
        "<serial type='file'><source path='/var/log/db1.log'/><target port='0'/>"
        "<alias name='serial0'/></serial>"
    )
    device = parse(xml).devices["serial0"]
    assert device.kind == "serial"
    assert device.target is None
    assert device.source == DeviceSource(type="file", path="/var/log/db1.log")


def test_a_device_without_an_alias_is_left_out() -> None:
    assert parse(domain("<disk type='file'><target dev='vda'/></disk>")).devices == {}


@pytest.mark.parametrize(
    "name", ["база-данных", "データベース", "قاعدة", "a&amp;b &lt;c&gt;", "🦀", "x" * 5000]
)
def test_names_in_any_script_come_through(name: str) -> None:
    read = parse(domain(name=name))
    assert read.name == name.replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
    assert (read.uuid, read.id) == (UUID, 7)


def test_the_hosts_uuid_is_read_from_capabilities() -> None:
    assert host_uuid(f"<capabilities><host><uuid>{UUID}</uuid><cpu/></host><guest/></capabilities>") == UUID


# ---------------------------------------------------------------------------------------------- owner

NOVA = """
<nova:instance xmlns:nova="http://openstack.org/xmlns/libvirt/nova/1.1">
  <nova:package version="28.0.0"/><nova:name>web-1</nova:name>
  <nova:owner><nova:user uuid="u1">alice</nova:user><nova:project uuid="p1">shop</nova:project></nova:owner>
</nova:instance>"""


def test_a_nova_instance_names_its_owner() -> None:
    assert parse(domain(metadata=NOVA)).owner == Owner(
        "openstack", UUID, "web-1", "p1", "shop", "u1", "alice"
    )


def test_a_kubevirt_machine_names_its_namespace_and_uid() -> None:
    metadata = "<kubevirt xmlns='http://kubevirt.io'><uid>11-22</uid></kubevirt>"
    owner = parse(domain(metadata=metadata, name="shop_web-1")).owner
    assert owner == Owner("kubevirt", "11-22", "web-1", "shop", "shop")


KUBEVIRT = Path(__file__).parents[1] / "data" / "guests" / "kubevirt.xml"


def test_a_kubevirt_machine_is_known_by_namespace_name_and_uid_whatever_else_is_in_its_metadata() -> None:
    read = parse(KUBEVIRT.read_text())
    assert read.name == "shop_web-1.blue"
    uid = "9a1f7c52-6b6e-4c3e-9b0e-1f2a3b4c5d6e"
    assert read.owner == Owner("kubevirt", uid, "web-1.blue", "shop", "shop")


@pytest.mark.parametrize(
    ("alias", "kind", "path", "backing"),
    [
        ("ua-containerdisk", "disk", "/var/run/kubevirt-ephemeral-disks/disk-data/containerdisk/disk.qcow2",
         ("/var/run/kubevirt/container-disks/disk_0.img",)),
        ("ua-rootdisk", "disk", "/var/run/kubevirt-private/vmi-disks/rootdisk/disk.img", ()),
        ("ua-database", "disk", "/dev/database", ()),
        ("ua-hotplugged-file", "disk", "/var/run/kubevirt/hotplug-disks/hotplugged-file.img", ()),
        ("ua-hotplugged-block", "lun", "/var/run/kubevirt/hotplug-disks/hotplugged-block", ()),
        ("ua-snapshotless", "disk", "/var/run/kubevirt-ephemeral-disks/disk-data/snapshotless/disk.qcow2",
         ("/var/run/kubevirt-private/vmi-disks/snapshotless/disk.img",)),
        ("ua-cloudinit", "cdrom",
         "/var/run/kubevirt-ephemeral-disks/cloud-init-data/shop/web-1.blue/noCloud.iso", ()),
    ],
)  # fmt: skip
def test_each_kind_of_kubevirts_volumes_is_named(
    alias: str, kind: str, path: str, backing: tuple[str, ...]
) -> None:
    device = parse(KUBEVIRT.read_text()).devices[alias]
    assert device.source is not None
    assert (device.kind, device.source.path, device.source.backing) == (kind, path, backing)
    assert device.source.volume == alias.removeprefix("ua-")
    assert device.policy is not None
    assert device.policy.write == "stop"


def test_an_empty_drive_an_interface_and_an_input_of_kubevirt_have_no_volume() -> None:
    devices = parse(KUBEVIRT.read_text()).devices
    for alias in ("ua-empty", "ua-default", "ua-tablet0"):
        source = devices[alias].source
        assert source is None or source.volume is None


def test_a_user_alias_is_no_volume_where_kubevirt_is_not() -> None:
    xml = KUBEVIRT.read_text().replace("http://kubevirt.io", "urn:other")
    assert all(d.source is None or d.source.volume is None for d in parse(xml).devices.values())


def test_an_ovirt_machine_is_known_by_its_metadata() -> None:
    metadata = "<ovirt-vm:vm xmlns:ovirt-vm='http://ovirt.org/vm/1.0'/>"
    assert parse(domain(metadata=metadata)).owner == Owner("ovirt", UUID, "db1")


def test_a_configured_rule_wins_over_the_known_platforms() -> None:
    rule = OwnerRule(
        platform="acme", namespace="urn:acme", id="owner/@id", name="owner/name", project_id="missing/@x"
    )
    mine = "<a:vm xmlns:a='urn:acme'><a:owner id='42'><a:name> Ann </a:name></a:owner></a:vm>"
    assert parse(domain(metadata=NOVA + mine), owner_rules=[rule]).owner == Owner("acme", "42", "Ann")


def test_metadata_of_nobody_gives_no_owner() -> None:
    assert parse(domain(metadata="<x xmlns='urn:x'/><y/>")).owner is None


# ------------------------------------------------------------------------------------------- refusals


def test_xml_of_ten_megabytes_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(SchemaError, match="more than the limit"):
        parse(domain(metadata="x" * (10 << 20)))
    assert MAX_BYTES == 4 << 20


@pytest.mark.parametrize(
    "text",
    [
        "<!DOCTYPE domain [<!ENTITY a 'b'>]>" + domain(),
        "<!DOCTYPE domain SYSTEM 'file:///etc/passwd'>" + domain(),
        "<!DOCTYPE lolz [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;&a;'>]><domain><name>&b;</name></domain>",
    ],
)
def test_a_document_type_declaration_is_refused(text: str) -> None:
    with pytest.raises(SchemaError, match="document type declaration"):
        parse(text)


def test_an_entity_that_nobody_declared_is_refused() -> None:
    with pytest.raises(SchemaError, match="not well-formed"):
        parse("<domain><name>&secret;</name></domain>")


@pytest.mark.parametrize(
    "text", ["", "<domain>", "<domain></x>", "\0", "plain", "<a/><b/>", "<domain a='1' a='2'/>"]
)
def test_what_is_not_well_formed_is_refused(text: str) -> None:
    with pytest.raises(SchemaError, match="not well-formed"):
        parse(text)


def test_another_root_element_is_refused() -> None:
    with pytest.raises(SchemaError, match="expected <domain>"):
        parse("<network/>")


def test_too_many_levels_are_refused() -> None:
    with pytest.raises(SchemaError, match="levels deep"):
        parse(domain(metadata="<a>" * 1000 + "</a>" * 1000))


def test_too_many_elements_are_refused() -> None:
    with pytest.raises(SchemaError, match="elements"):
        parse(domain(metadata="<a/>" * 800_000))


def test_an_encoding_declaration_does_not_change_how_bytes_are_read() -> None:
    assert parse("<?xml version='1.0' encoding='UTF-16'?>" + domain(name="é")).name == "é"


@given(st.text(max_size=300) | st.binary(max_size=300))
def test_any_text_is_either_read_or_refused(text: str | bytes) -> None:
    with contextlib.suppress(SchemaError):
        parse(text)


# -------------------------------------------------------------------------------------------- secrets


def test_no_secret_of_a_source_leaves_in_any_field() -> None:
    xml = domain(
        "<disk type='network' device='disk'>"
        "<auth username='hunter1'><secret type='ceph' uuid='hunter2'/></auth>"
        "<source protocol='https' name='p.iso?sig=hunter3' query='token=hunter4'>"
        "<host name='hunter5:hunter6@host' port='443'/><auth username='hunter7'/>"
        "<cookies><cookie name='a'>hunter8</cookie></cookies><initiator><iqn name='x'/></initiator></source>"
        "<backingStore type='file'><source file='https://hunter9:hunterA@h/b.img?hunterB=1'/><backingStore/>"
        "</backingStore><target dev='vda'/><alias name='virtio-disk0'/></disk>"
    )
    assert "hunter" not in repr(parse(xml))


# ----------------------------------------------------------------------------------- chains, data, policies


def test_a_qcow2_images_data_file_is_told_beside_it() -> None:
    store = "<dataStore type='block'><format type='raw'/><source dev='/dev/vg/root'/></dataStore>"
    xml = domain(disk(f"<source file='/meta/root.qcow2'>{store}</source>"))
    assert source_of(xml).data_file == "/dev/vg/root"
    assert parse(xml).owners("/dev/vg/root") == ["virtio-disk0"]


def test_namespaces_of_one_nvme_controller_are_told_apart() -> None:
    address = "<address domain='0x0000' bus='0x81' slot='0x00' function='0x0'/>"
    for namespace in (1, 2):
        source = source_of(
            domain(disk(f"<source type='pci' namespace='{namespace}'>{address}</source>", "nvme"))
        )
        assert (source.path, source.namespace) == ("0000:81:00.0", namespace)


def test_a_network_image_below_names_its_protocol_and_servers() -> None:
    hosts = "<host name='198.51.100.9' port='10809'/><host transport='unix' socket='/run/nbd'/>"
    below = f"<source protocol='nbd' name='base'>{hosts}</source>"
    xml = domain(
        disk("<source file='/img/top'/>", more=f"<backingStore type='network'>{below}</backingStore>")
    )
    assert source_of(xml).backing == ("nbd://198.51.100.9:10809,unix:/run/nbd/base",)
    assert parse(xml).owners("base") == ["virtio-disk0"]


@pytest.mark.parametrize(
    ("policies", "expected"),
    [
        ("error_policy='stop'", ErrorPolicy("stop", "stop")),
        ("error_policy='report' rerror_policy='stop'", ErrorPolicy("report", "stop")),
        ("error_policy='enospace'", ErrorPolicy("enospace", None)),  # not valid for reads: QEMU's default
        ("rerror_policy='ignore'", ErrorPolicy(None, "ignore")),
    ],
)
def test_the_policy_of_errors_covers_reads_that_have_none_of_their_own(
    policies: str, expected: ErrorPolicy
) -> None:
    driver = f"<driver name='qemu' type='raw' {policies}/>"
    xml = domain(f"<disk type='file' device='disk'>{driver}<source file='/a'/><alias name='d'/></disk>")
    assert parse(xml).devices["d"].policy == expected
