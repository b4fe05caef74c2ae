"""Receivers nobody here wrote read our events from a real Apache Kafka, in either content mode."""

from __future__ import annotations

import time

import confluent_kafka
import pytest
from cloudevents.core.bindings import kafka as sdk
from cloudevents.core.formats.json import JSONFormat

from tests.conftest import need
from tests.interop import events
from tests.interop.receivers import ALL, Receiver, Understood
from virtbus.bus import BusOptions, open_bus
from virtbus.model import Record

pytestmark = pytest.mark.kafka


def send(url: str, topic: str, *, structured: bool) -> list[Record]:
    """Publish all events as an agent does; they are returned."""
    records = events.records()
    bus = open_bus(url, BusOptions(topic=topic, structured=structured))
    try:
        events.publish(bus, records)
    finally:
        bus.close()
    return records


def brokers(url: str) -> str:
    return url.removeprefix("kafka://").rstrip("/")


@pytest.mark.parametrize("structured", [False, True], ids=["binary", "structured"])
@pytest.mark.parametrize("receiver", ALL, ids=lambda receiver: receiver.name)
def test_another_languages_sdk_understands_every_event(
    kafka_url: str, kafka_topic: str, receiver: Receiver, structured: bool
) -> None:
    need(receiver.missing())
    sent = send(kafka_url, kafka_topic, structured=structured)
    understood = receiver.read("kafka", brokers(kafka_url), kafka_topic, len(sent))
    assert events.differences(understood, sent) == []


@pytest.mark.parametrize("structured", [False, True], ids=["binary", "structured"])
def test_the_python_sdks_own_decoder_understands_every_event(
    kafka_url: str, kafka_topic: str, structured: bool
) -> None:
    sent = send(kafka_url, kafka_topic, structured=structured)
    consumer = confluent_kafka.Consumer(
        {"bootstrap.servers": brokers(kafka_url), "group.id": "interop", "auto.offset.reset": "earliest"}
    )
    consumer.subscribe([kafka_topic])
    understood = []
    deadline = time.monotonic() + 60
    try:
        while len(understood) < len(sent) and time.monotonic() < deadline:
            got = consumer.poll(0.2)
            if got is None or got.error() is not None:
                continue
            message = sdk.KafkaMessage(dict(got.headers()), got.key(), got.value())
            event = sdk.from_kafka(message, JSONFormat())
            attributes = {name: str(value) for name, value in event.get_attributes().items()}
            understood.append(Understood(attributes, event.get_data()))
    finally:
        consumer.close()
    assert events.differences(understood, sent) == []
