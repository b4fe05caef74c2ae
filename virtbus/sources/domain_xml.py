"""Reads a domain's XML: its devices by alias and its owner, without trusting a byte of it.

A domain's XML is written by others: names, paths and metadata are whatever a tenant or a tool put there.
Guarantees:

1. no DTD, no entities, no external access, bounded size, depth and number of elements: refused otherwise;
2. no secret leaves: `<auth>`, cookies and queries are not read, names pass virtbus.redaction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from xml.etree.ElementTree import Element, TreeBuilder  # only the tree; the parser is expat, set up below
from xml.parsers import expat

from virtbus import redaction
from virtbus.config import OwnerRule
from virtbus.errors import SchemaError
from virtbus.model import Device, DeviceSource, ErrorPolicy, Owner
from virtbus.words import Platform

MAX_BYTES = 4 << 20  # libvirt's own limit of a string on the wire (REMOTE_STRING_MAX)
MAX_DEPTH = 512  # a backing chain nests one level per image, and libvirt allows 200 images
MAX_ELEMENTS = 100_000

# It may hold disks that libvirt does not know.
COMMANDLINE = "{http://libvirt.org/schemas/domain/qemu/1.0}commandline"
# All that is read of a <domain>.
_KEPT = ("name", "uuid", "metadata", "devices", COMMANDLINE.removeprefix("{"))

NOVA = "http://openstack.org/xmlns/libvirt/nova/"  # followed by the version
KUBEVIRT = "http://kubevirt.io"
_DISKS = ("disk", "cdrom", "floppy", "lun")  # virDomainDiskDevice
OVIRT = "http://ovirt.org/vm/"  # followed by the version, or "tune/" and the version


@dataclass(frozen=True, slots=True)
class DomainXml:
    """What a domain's XML says; devices without an alias (of a domain that does not run) are left out."""

    uuid: str | None
    name: str | None
    id: int | None
    owner: Owner | None
    devices: Mapping[str, Device]
    # Disk → hashes of the names that libvirt may give its images: names may hold secrets.
    images: Mapping[str, frozenset[int]] = field(default_factory=dict)
    complete: bool = True  # False: QEMU may have disks that libvirt does not know

    def has_image(self, alias: str, path: str) -> bool:
        """Whether a path, as an event gives it, is of one of the disk's images."""
        return hash(path) in self.images.get(alias, ())

    def owners(self, path: str) -> list[str]:
        """The disks that have an image of this name, as an event gives it."""
        return [alias for alias in self.images if self.has_image(alias, path)]

    @property
    def only_disk(self) -> str:
        """The alias of the only disk; "" where there are several, or may be."""
        return next(iter(self.images)) if len(self.images) == 1 and self.complete else ""


def parse(
    xml: str | bytes, *, owner_rules: Sequence[OwnerRule] = (), max_bytes: int = MAX_BYTES
) -> DomainXml:
    """The XML of one domain, as virDomainGetXMLDesc gives it.

    Raises SchemaError when it is too large, holds a DTD, is not well-formed, or is not a domain's.
    """
    root = _tree(xml, max_bytes)
    if root.tag != "domain":
        raise SchemaError(f"domain XML: the root element is <{root.tag[:40]}>, expected <domain>")
    uuid, name = root.findtext("uuid"), root.findtext("name")
    number = root.get("id", "")
    devices: dict[str, Device] = {}
    images: dict[str, frozenset[int]] = {}
    for element in root.iterfind("devices/*"):
        device = _device(element)
        if device is None or device.alias is None:
            continue
        devices.setdefault(device.alias, device)  # a <console> bears its <serial>'s alias, after it
        if element.tag == "disk" and element.find("source") is not None:
            images[device.alias] = frozenset(map(hash, _names(element)))
    if root.find(f"metadata/{{{KUBEVIRT}}}kubevirt") is not None:
        devices = {alias: _kubevirt_volume(device) for alias, device in devices.items()}
    return DomainXml(
        uuid=uuid.strip() if uuid else None,
        name=name,
        id=_number(number),
        owner=_owner(root, uuid, name, owner_rules),
        devices=devices,
        images=images,
        complete=root.find(COMMANDLINE) is None,
    )


def host_uuid(capabilities: str) -> str | None:
    """/capabilities/host/uuid (virConnectGetCapabilities). Raises SchemaError as `parse` does."""
    return _tree(capabilities, MAX_BYTES, kept=("host",)).findtext("host/uuid")


# ------------------------------------------------------------------------------------------- parsing


def _tree(xml: str | bytes, max_bytes: int, kept: Sequence[str] = _KEPT) -> Element:
    data = xml.encode("utf-8", "replace") if isinstance(xml, str) else xml
    if len(data) > max_bytes:
        raise SchemaError(f"domain XML: {len(data)} bytes, more than the limit of {max_bytes}")
    # The encoding is fixed: what a declaration in the text says is not ours to follow.
    parser = expat.ParserCreate("utf-8", "}")
    parser.buffer_text = True
    builder = TreeBuilder()
    depth = elements = 0
    skip_below: int | None = None  # the depth of an element that is not kept, while inside it

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth, elements, skip_below
        depth += 1
        elements += 1
        if depth > MAX_DEPTH or elements > MAX_ELEMENTS:
            raise SchemaError(
                f"domain XML: more than {MAX_DEPTH} levels deep or {MAX_ELEMENTS} elements: refused"
            )
        if skip_below is None and depth == 2 and tag not in kept:
            skip_below = depth
        if skip_below is None:
            builder.start("{" + tag if "}" in tag else tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth, skip_below
        if skip_below is None:
            builder.end("{" + tag if "}" in tag else tag)
        elif depth == skip_below:
            skip_below = None
        depth -= 1

    def text(data: str) -> None:
        if skip_below is None:
            builder.data(data)

    def refuse(*_: object) -> None:
        raise SchemaError("domain XML: it holds a document type declaration: refused")

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = text
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    parser.ExternalEntityRefHandler = refuse  # type: ignore[assignment] # it never returns
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise SchemaError(f"domain XML is not well-formed: {error}") from error
    return builder.close()


# ------------------------------------------------------------------------------------------- devices


def _device(element: Element) -> Device | None:
    alias, target, driver = (element.find(tag) for tag in ("alias", "target", "driver"))
    if alias is None or not alias.get("name"):
        return None
    at = {} if target is None else target.attrib
    device = Device(alias.get("name"), at.get("dev"), at.get("bus"), element.tag)
    if element.tag != "disk":
        return replace(device, source=_plain_source(element))
    policy = None
    if driver is not None:
        write, read = driver.get("error_policy"), driver.get("rerror_policy")
        if read is None and write != "enospace":  # which is not valid for reads: these keep QEMU's default
            read = write
        policy = ErrorPolicy(write, read) if write or read else None
    return replace(
        device,
        kind=element.get("device", "disk"),
        serial=_text(element.findtext("serial")),
        source=_disk_source(element, None if driver is None else driver.get("type")),
        policy=policy,
    )


def _plain_source(element: Element) -> DeviceSource | None:
    """Of a character device, file system, …: its type and path, when it has them."""
    source = element.find("source")
    kind = element.get("type")
    if kind is None or source is None:
        return None if kind is None else DeviceSource(type=kind)
    path = next((source.get(key) for key in ("path", "dev", "dir", "file", "name") if source.get(key)), None)
    host = source.get("host")
    return DeviceSource(
        type=kind,
        path=None if path is None else redaction.path(path, local=True),
        hosts=() if host is None else (_host(host, source.get("service")),),
    )


def _disk_source(disk: Element, image_format: str | None) -> DeviceSource:
    source = disk.find("source")
    kind = disk.get("type", "unknown")
    backing = tuple(_image(below) for below in _chain(disk))
    if source is None:  # an empty drive
        return DeviceSource(type=kind, format=image_format, backing=backing)
    return DeviceSource(
        type=kind,
        protocol=source.get("protocol"),
        path=_path(kind, source),
        namespace=_number(source.get("namespace")) if kind == "nvme" else None,
        data_file=_data_file(source),
        pool=_text(source.get("pool")),
        volume=_text(source.get("volume")),
        hosts=tuple(_hosts(source)),
        format=image_format,
        backing=backing,
    )


def _kubevirt_volume(device: Device) -> Device:
    """A disk of KubeVirt with the name of its volume, which its user alias holds (`ua-<volume>`).

    The name of a claim (PVC) is not in the XML: paths hold the volume's name too.
    """
    alias, source = device.alias or "", device.source
    if device.kind not in _DISKS or source is None or source.path is None or not alias.startswith("ua-"):
        return device
    return replace(device, source=replace(source, volume=alias.removeprefix("ua-")))


def _chain(disk: Element) -> Iterator[Element]:
    """The <backingStore> elements below a disk, nearest first; an empty one ends the chain."""
    below = disk.find("backingStore")
    while below is not None and below.find("source") is not None:
        yield below
        below = below.find("backingStore")


def _image(element: Element) -> str:
    source = element.find("source")
    assert source is not None
    if source.get("pool") or source.get("volume"):
        return f"{source.get('pool', '')}/{source.get('volume', '')}"
    path = _path(element.get("type", "unknown"), source) or ""
    protocol, hosts = source.get("protocol"), ",".join(_hosts(source))
    return f"{protocol}://{hosts}/{path.removeprefix('/')}" if protocol else path


def _data_file(source: Element) -> str | None:
    """The external data file of a qcow2 image (libvirt 10.10 and later)."""
    store = source.find("dataStore")
    inner = None if store is None else store.find("source")
    return None if store is None or inner is None else _path(store.get("type", "unknown"), inner)


_NAMES = ("file", "dev", "dir", "name", "path")


def _names(disk: Element) -> Iterator[str]:
    """What libvirt may call a disk's images in an error's event; they never leave this process."""
    for image in (disk, *_chain(disk), *disk.iterfind("mirror")):
        for source in (*image.iterfind("source"), *image.iterfind("source/dataStore/source")):
            yield from (source.attrib[key] for key in _NAMES if source.get(key))


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() and len(text) < 10 else None


_PATH_ATTRIBUTE = {
    "file": "file",
    "block": "dev",
    "dir": "dir",
    "network": "name",
    "vhostuser": "path",
    "vhostvdpa": "dev",
}


def _path(kind: str, source: Element) -> str | None:
    if kind == "nvme":
        address = source.find("address")
        if address is None:
            return None
        domain, bus, slot, function = (
            address.get(key, "0").removeprefix("0x") for key in ("domain", "bus", "slot", "function")
        )
        return f"{domain}:{bus}:{slot}.{function}"
    path = source.get(_PATH_ATTRIBUTE.get(kind, ""))
    return None if path is None else redaction.path(path, local=kind != "network")


def _hosts(source: Element) -> Iterator[str]:
    for host in source.iterfind("host"):
        if host.get("socket"):
            yield f"unix:{host.get('socket')}"
        elif host.get("name"):
            yield _host(host.get("name", ""), host.get("port"))


def _host(name: str, port: str | None) -> str:
    name = redaction.host(name)
    if ":" in name and not name.startswith("["):
        name = f"[{name}]"
    return f"{name}:{port}" if port else name


# --------------------------------------------------------------------------------------------- owner


def _owner(root: Element, uuid: str | None, name: str | None, rules: Sequence[OwnerRule]) -> Owner | None:
    found = [(e.tag.removeprefix("{").rpartition("}")[0], e) for e in root.iterfind("metadata/*")]
    for rule in rules:
        for namespace, element in found:
            if namespace == rule.namespace:
                names = ("id", "name", "project_id", "project_name", "user_id", "user_name")
                texts = {name: _at(element, getattr(rule, name)) for name in names}
                return Owner(Platform(rule.platform), **texts)
    for namespace, element in found:
        if namespace.startswith(NOVA):
            return Owner(
                platform=Platform.OPENSTACK,
                id=uuid,  # Nova gives the domain the instance's UUID
                name=_at(element, "name"),
                project_id=_at(element, "owner/project/@uuid"),
                project_name=_at(element, "owner/project"),
                user_id=_at(element, "owner/user/@uuid"),
                user_name=_at(element, "owner/user"),
            )
        if namespace == KUBEVIRT:
            # The domain is called <namespace>_<name>; a Kubernetes name holds no underscore.
            project, _, vm = (name or "").partition("_")
            return Owner(
                platform=Platform.KUBEVIRT,
                id=_at(element, "uid"),
                name=vm or None,
                project_id=project or None,
                project_name=project or None,
            )
        if namespace.startswith(OVIRT):
            return Owner(platform=Platform.OVIRT, id=uuid, name=name)
    return None


def _at(element: Element, path: str | None) -> str | None:
    """The text at `path` below `element`: local names by "/", an attribute by "@", "." for itself."""
    if path is None:
        return None
    found: Element | None = element
    for step in path.split("/"):
        if found is None:
            return None
        if step.startswith("@"):
            wanted = step[1:]
            return next((v for k, v in found.attrib.items() if k.rpartition("}")[2] == wanted), None)
        if step not in ("", "."):
            found = next((child for child in found if child.tag.rpartition("}")[2] == step), None)
    text = None if found is None or found.text is None else found.text.strip()
    return _text(text) or None


def _text(words: str | None) -> str | None:
    return words and redaction.text(words)
