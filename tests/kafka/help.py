"""What the Kafka tests share: buses on the test's topic, and a bare look at what a topic holds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient, ConfigResource

from virtbus.bus import BusOptions, open_bus
from virtbus.bus.kafka.bus import KafkaBus
from virtbus.model import Record
from virtbus.testing import a_record


@contextmanager
def opened(url: str, topic: str, **options: Any) -> Iterator[KafkaBus]:
    """A bus on a topic of three partitions unless said otherwise."""
    bus = open_bus(url, BusOptions(**({"topic": topic, "topic_partitions": 3} | options)))
    assert isinstance(bus, KafkaBus)
    try:
        yield bus
    finally:
        bus.close()


def hosts(url: str) -> str:
    """The bootstrap servers of a plain URL."""
    return url.partition("://")[2]


def read(url: str, topic: str, count: int, *, seconds: float = 20.0, quiet: float = 0.5) -> list[Any]:
    """What a bare confluent-kafka consumer finds: `count` messages, and what else comes within `quiet`."""
    consumer = Consumer(
        {
            "bootstrap.servers": hosts(url),
            "group.id": f"look-{time.time_ns()}",
            "auto.offset.reset": "earliest",
            "log_level": 0,
        }
    )
    consumer.subscribe([topic])
    found: list[Any] = []
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        message = consumer.poll(0.1)
        if message is not None and message.error() is None:
            found.append(message)
            if len(found) == count:
                limit = min(limit, time.monotonic() + quiet)
    consumer.close()
    return found


def headers(message: Any) -> dict[str, str]:
    """A bare message's headers as text."""
    return {name: (value or b"").decode() for name, value in message.headers() or ()}


def sized(number: int, size: int) -> Record:
    """A record of a key of its own, with a body of `size` bytes."""
    made = a_record(row=number)
    key = f"key-{number}"
    attributes = {**made.attributes, "partitionkey": key}
    return made._replace(key=key, attributes=attributes, body=b'"' + b"x" * (size - 2) + b'"')


def admin(url: str) -> Any:
    """A bare admin client."""
    return AdminClient({"bootstrap.servers": hosts(url), "log_level": 0})


def topic_settings(url: str, topic: str) -> dict[str, str]:
    """A topic's settings as the broker tells them."""
    resource = ConfigResource(ConfigResource.Type.TOPIC, topic)
    client = admin(url)  # kept: a client that goes takes its requests along
    entries = client.describe_configs([resource])[resource].result(10)
    return {name: entry.value for name, entry in entries.items()}


def bare_producer(url: str, **options: Any) -> Any:
    """A bare producer."""
    return Producer({"bootstrap.servers": hosts(url), "log_level": 0, **options})
