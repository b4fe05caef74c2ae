"""Receivers nobody here wrote read our events from a real RabbitMQ, in either content mode."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pika
import pytest
from cloudevents.core.bindings import rabbitmq as sdk
from cloudevents.core.formats.json import JSONFormat

from tests.conftest import need
from tests.interop import events
from tests.interop.receivers import ALL, Receiver, Understood
from virtbus.bus import BusOptions, open_bus
from virtbus.model import Record

QUEUE = "interop"


@pytest.fixture
def channel(amqp_url: str) -> Iterator[pika.adapters.blocking_connection.BlockingChannel]:
    """A plain AMQP channel with a queue that gets every event."""
    connection = pika.BlockingConnection(pika.URLParameters(amqp_url))
    channel = connection.channel()
    channel.exchange_declare("virtbus.events", "topic", durable=True)
    channel.queue_declare(QUEUE, durable=True)
    channel.queue_bind(QUEUE, "virtbus.events", "#")
    yield channel
    connection.close()


def send(url: str, *, structured: bool) -> list[Record]:
    """Publish all events as an agent does; they are returned."""
    records = events.records()
    bus = open_bus(url, BusOptions(structured=structured))
    try:
        events.publish(bus, records)
    finally:
        bus.close()
    return records


@pytest.mark.parametrize("structured", [False, True], ids=["binary", "structured"])
@pytest.mark.parametrize("receiver", ALL, ids=lambda receiver: receiver.name)
def test_another_languages_sdk_understands_every_event(
    channel: object, amqp_url: str, receiver: Receiver, structured: bool
) -> None:
    need(receiver.missing())
    sent = send(amqp_url, structured=structured)
    understood = receiver.read("amqp", amqp_url, QUEUE, len(sent))
    assert events.differences(understood, sent) == []


@pytest.mark.parametrize("structured", [False, True], ids=["binary", "structured"])
def test_the_python_sdks_own_decoder_understands_every_event(
    channel: pika.adapters.blocking_connection.BlockingChannel, amqp_url: str, structured: bool
) -> None:
    sent = send(amqp_url, structured=structured)
    understood = []
    deadline = time.monotonic() + 30
    while len(understood) < len(sent) and time.monotonic() < deadline:
        method, properties, body = channel.basic_get(QUEUE, auto_ack=True)
        if method is None:
            time.sleep(0.02)
            continue
        message = sdk.RabbitMQMessage(properties.headers, properties.content_type, body)
        event = sdk.from_rabbitmq(message, JSONFormat())
        attributes = {name: str(value) for name, value in event.get_attributes().items()}
        understood.append(Understood(attributes, event.get_data()))
    assert events.differences(understood, sent) == []


def test_the_message_is_persistent_and_says_who_sent_it_and_what_it_is(
    channel: pika.adapters.blocking_connection.BlockingChannel, amqp_url: str
) -> None:
    send(amqp_url, structured=False)
    method, properties, _ = channel.basic_get(QUEUE, auto_ack=True)
    assert method.routing_key.split(".")[0] in {"io_error", "resolved", "gap", "heartbeat"}
    assert properties.delivery_mode == 2
    assert properties.content_type == properties.headers["content-type"] == "application/json"
    assert properties.message_id == properties.headers["ce-id"]
    assert properties.user_id == "guest"
