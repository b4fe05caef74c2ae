"""The scenarios of the CloudEvents Kafka protocol binding's conformance feature, for our decoder and encoder.

Binary content mode, and structured content mode with each content type that the feature names. The events are
our own and the steps are plain Python; https://github.com/cloudevents/conformance has the feature's text.
"""

from __future__ import annotations

import json

import pytest
from cloudevents.core.bindings import kafka as sdk
from cloudevents.core.formats.json import JSONFormat

from virtbus import envelope
from virtbus.model import Binding, Message

ATTRIBUTES = {
    "specversion": "1.0",
    "id": "7-7-7",
    "type": "org.example.moved",
    "source": "/shelf/3",
    "time": "2019-06-07T08:09:10Z",
    "datacontenttype": "application/json",
}
DATA = {"text": "Grüße"}
BINARY = {
    "ce_specversion": b"1.0",
    "ce_id": b"7-7-7",
    "ce_type": b"org.example.moved",
    "ce_source": b"/shelf/3",
    "ce_time": b"2019-06-07T08:09:10Z",
    "content-type": b"application/json",
}
STRUCTURED_TYPES = ["application/cloudevents+json", "application/cloudevents+json; charset=utf-8"]


def on_the_wire(wire: envelope.KafkaWire) -> dict[str, bytes]:
    """The headers as the client writes them."""
    return {name: value.encode() for name, value in wire.headers}


def read(headers: dict[str, bytes], value: bytes) -> envelope.Envelope:
    return envelope.decode(Message(Binding.KAFKA, headers, None, value, None, False, None, "topic[0]@1"))


def test_binary_content_mode_is_read() -> None:
    event = read(BINARY, json.dumps(DATA).encode())
    assert event.attributes == ATTRIBUTES
    assert event.data == DATA


@pytest.mark.parametrize("content_type", STRUCTURED_TYPES)
def test_structured_content_mode_is_read(content_type: str) -> None:
    value = json.dumps({**ATTRIBUTES, "data": DATA}, indent=4).encode()
    event = read({"content-type": content_type.encode()}, value)
    assert event.attributes == ATTRIBUTES
    assert event.data == DATA


def test_binary_content_mode_is_written() -> None:
    wire = envelope.to_kafka({**ATTRIBUTES, "partitionkey": "k"}, json.dumps(DATA).encode())
    assert on_the_wire(wire) == {**BINARY, "ce_partitionkey": b"k"}
    assert (wire.key, json.loads(wire.value)) == (b"k", DATA)


def test_structured_content_mode_is_written() -> None:
    wire = envelope.to_kafka({**ATTRIBUTES, "partitionkey": "k"}, json.dumps(DATA).encode(), structured=True)
    assert on_the_wire(wire) == {"content-type": b"application/cloudevents+json"}
    assert json.loads(wire.value) == {**ATTRIBUTES, "partitionkey": "k", "data": DATA}


@pytest.mark.parametrize("structured", [False, True])
def test_the_python_sdk_reads_what_we_write(structured: bool) -> None:
    wire = envelope.to_kafka(
        {**ATTRIBUTES, "partitionkey": "k"}, json.dumps(DATA).encode(), structured=structured
    )
    event = sdk.from_kafka(sdk.KafkaMessage(on_the_wire(wire), wire.key, wire.value), JSONFormat())
    assert (event.get_id(), event.get_source(), event.get_type()) == (
        "7-7-7",
        "/shelf/3",
        "org.example.moved",
    )
    assert event.get_extension("partitionkey") == "k"
    assert event.get_data() == DATA
