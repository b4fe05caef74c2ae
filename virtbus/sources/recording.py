"""The lines that `virtbus watch --json` prints and the replay source reads: one JSON object each.

`kind` says what a line is; unknown kinds and keys are ignored, `t` is Unix time in seconds:

- `host`: name, uuid, hypervisor, hypervisor_version, libvirt_version;
- `domain`: uuid, name, id, state, owner, devices (as in events): what was known from here on;
- `callback`: `cb` is libvirt's name of the event, the rest its arguments under libvirt's names:
  uuid, name, id; IO_ERROR_REASON: srcPath, devAlias, action, reason; LIFECYCLE: event, detail;
  DEVICE_REMOVED: devAlias;
- `scenario`, `state_while_failing`: of a lab's recording: the disk that failed, and what a look said.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import msgspec

from virtbus.errors import SchemaError
from virtbus.model import Device, DeviceSource, Domain, ErrorPolicy, Host, Hypervisor, Owner
from virtbus.observations import Description, RawIoError
from virtbus.words import GuestState

_NAMESPACE = uuid.UUID("6fa459ea-ee8a-3ca4-894e-db77e160355e")  # for recordings without UUIDs


def host_line(host: Host) -> str:
    """A `host` line."""
    return _line(
        kind="host",
        name=host.name,
        uuid=host.uuid,
        hypervisor=host.hypervisor.kind,
        hypervisor_version=host.hypervisor.version,
        libvirt_version=host.hypervisor.libvirt_version,
    )


def domain_line(description: Description) -> str:
    """A `domain` line; sources are redacted as in events."""
    domain = asdict(description.domain)
    return _line(kind="domain", **domain, devices=[asdict(d) for d in description.devices.values()])


def io_error_line(raw: RawIoError) -> str:
    """A `callback` line of IO_ERROR_REASON."""
    return _line(
        kind="callback",
        cb="IO_ERROR_REASON",
        uuid=raw.domain_uuid,
        name=raw.domain_name,
        id=raw.domain_id,
        srcPath=raw.path,
        devAlias=raw.alias,
        action=raw.action_code,
        reason=raw.reason,
        t=round(raw.observed_at / 1e9, 6),
    )


def lifecycle_line(domain: str, name: str, number: int | None, *, event: int, detail: int, ns: int) -> str:
    """A `callback` line of LIFECYCLE; `domain` is the UUID, `ns` the wall clock."""
    return _line(
        kind="callback",
        cb="LIFECYCLE",
        uuid=domain,
        name=name,
        id=number,
        event=event,
        detail=detail,
        t=round(ns / 1e9, 6),
    )


def device_removed_line(domain: str, alias: str, ns: int) -> str:
    """A `callback` line of DEVICE_REMOVED."""
    return _line(kind="callback", cb="DEVICE_REMOVED", uuid=domain, devAlias=alias, t=round(ns / 1e9, 6))


def problem_line(text: str) -> str:
    """A `problem` line: something that could not be had, for people."""
    return _line(kind="problem", text=text)


def _line(**values: object) -> str:
    return json.dumps(values, ensure_ascii=False)


def read(lines: Iterable[str], name: str) -> Iterator[Mapping[str, Any]]:
    """The objects of a recording. Raises SchemaError naming the line that is none."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SchemaError(f"{name}:{number}: not a JSON object: {error}") from error
        if not isinstance(record, dict):
            raise SchemaError(f"{name}:{number}: a {type(record).__name__}, expected a JSON object")
        yield record


def domain_uuid(record: Mapping[str, Any]) -> str:
    """The domain's UUID; of a recording that has only names, one made from the name."""
    given = record.get("uuid")
    return str(given) if given else str(uuid.uuid5(_NAMESPACE, str(record.get("name", ""))))


def host_of(record: Mapping[str, Any]) -> Host:
    """The host of a `host` line."""
    return Host(
        name=str(record.get("name", "unknown")),
        uuid=record.get("uuid"),
        hypervisor=Hypervisor(
            record.get("hypervisor"), record.get("hypervisor_version"), record.get("libvirt_version")
        ),
    )


class _DomainRecord(msgspec.Struct):
    """A `domain` line."""

    uuid: str
    name: str
    id: int | None = None
    state: str | None = None
    owner: Owner | None = None
    devices: list[Device] = []


def description_of(record: Mapping[str, Any], name: str) -> Description:
    """The description of a `domain` line. Raises SchemaError."""
    try:
        read = msgspec.convert(record, _DomainRecord)
    except msgspec.ValidationError as error:
        raise SchemaError(f"{name}: domain {record.get('name')!r}: {error}") from error
    domain = Domain(
        read.uuid, read.name, read.id, None if read.state is None else GuestState(read.state), read.owner
    )
    return Description(domain, {d.alias: d for d in read.devices if d.alias is not None})


# The guest that ran the lab's scenarios had one NBD disk: bus → (alias, target).
_LAB_DISKS = {"virtio": ("virtio-disk0", "vda"), "ide": ("ide0-0-0", "hda")}


def description_of_scenario(scenario: Mapping[str, Any], name: str) -> Description | None:
    """The one domain of a lab's recording, from its `scenario` line."""
    bus = str(scenario.get("bus"))
    if bus not in _LAB_DISKS:
        return None
    alias, target = _LAB_DISKS[bus]
    device = Device(
        alias=alias,
        target=target,
        bus=bus,
        kind="disk",
        source=DeviceSource(
            type="network", protocol="nbd", path=scenario.get("nbd_source_name") or None, format="raw"
        ),
        policy=ErrorPolicy(write=scenario.get("error_policy"), read="report"),
    )
    domain = Domain(domain_uuid({"name": name}), name, 1, GuestState.RUNNING)
    return Description(domain, {alias: device})
