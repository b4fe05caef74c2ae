"""Events about a guest of KubeVirt, its domain and devices read from the XML that KubeVirt makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from virtbus.consumer import Delivery
from virtbus.model import Device, Domain, Event, Owner
from virtbus.sources import domain_xml
from virtbus.testing import a_record

XML = domain_xml.parse((Path(__file__).parents[1] / "data" / "guests" / "kubevirt.xml").read_text())
assert XML.owner is not None
OWNER: Owner = XML.owner


def kubevirt_domain() -> Domain:
    """The guest "web-1.blue" of the namespace "shop"."""
    assert XML.uuid is not None
    assert XML.name is not None
    return Domain(XML.uuid, XML.name, XML.id, owner=OWNER)


def kubevirt_device(volume: str) -> Device:
    """Its disk on a volume."""
    return XML.devices[f"ua-{volume}"]


def delivered(event: Event, **stamp: Any) -> Delivery:
    """The event as a consumer gets it."""
    record = a_record(event, **stamp)
    return Delivery(
        event=event, attributes=record.attributes, data={}, body=record.body, publisher=None,
        redelivered=False, attempts=1, _consumer=None, _message=record,  # type: ignore[arg-type]
    )  # fmt: skip
