"""What the contract's tests need of each bus: a place of its own, and a look at its dead letters."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import kombu

from virtbus.bus import Bus, BusOptions, open_bus
from virtbus.model import Binding, Message


class Rig(Protocol):
    """One broker, with nothing else on it."""

    name: str
    quiet: float  # seconds in which a subscription stands, and in which nothing that is to come has come

    def open(self, **options: Any) -> Bus:
        """A new bus on the broker."""

    def unreachable(self) -> Bus:
        """A bus whose broker is not there."""

    def dead_letters(self, group: str, count: int) -> Sequence[Message]:
        """The dead letters of a group, at least `count` of them."""


@dataclass
class AmqpRig:
    """A virtual host of a real RabbitMQ."""

    url: str
    name: str = "amqp"
    quiet: float = 0.3

    def open(self, **options: Any) -> Bus:
        return open_bus(self.url, BusOptions(**options))

    def unreachable(self) -> Bus:
        return open_bus("amqp://127.0.0.1:1//", BusOptions(connect_timeout=0.5))

    def dead_letters(self, group: str, count: int) -> Sequence[Message]:
        found: list[Message] = []
        with kombu.Connection(self.url) as connection:
            channel = connection.channel()
            while len(found) < count:
                raw = channel.basic_get(f"virtbus.{group}.dead", no_ack=True)
                if raw is None:
                    break
                found.append(
                    Message(
                        binding=Binding.AMQP,
                        headers=raw.properties.get("application_headers", {}),
                        content_type=raw.properties.get("content_type"),
                        body=raw.body.encode() if isinstance(raw.body, str) else raw.body,
                        key=None,
                        redelivered=False,
                        user_id=raw.properties.get("user_id"),
                        position="",
                    )
                )
        return found


@dataclass
class EmbeddedRig:
    """A file of its own."""

    folder: Path
    name: str = "embedded"
    quiet: float = 0.3

    def open(self, **options: Any) -> Bus:
        return open_bus("embedded:", BusOptions(state_dir=self.folder, **options))

    def unreachable(self) -> Bus:
        (self.folder / "a-file").touch()
        return open_bus(f"embedded://{self.folder}/a-file/bus.db", BusOptions())

    def dead_letters(self, group: str, count: int) -> Sequence[Message]:
        with self.open().dead_letters(group) as letters:
            return [letter.message for letter in letters.read()]


@dataclass
class KafkaRig:
    """A topic of its own on a real Apache Kafka."""

    url: str
    topic: str
    name: str = "kafka"
    quiet: float = 2.0

    def open(self, **options: Any) -> Bus:
        return open_bus(self.url, BusOptions(topic=self.topic, topic_partitions=3, **options))

    def unreachable(self) -> Bus:
        return open_bus("kafka://127.0.0.1:1", BusOptions(topic=self.topic, connect_timeout=1.0))

    def dead_letters(self, group: str, count: int) -> Sequence[Message]:
        from confluent_kafka import Consumer

        consumer = Consumer(
            {
                "bootstrap.servers": self.url.removeprefix("kafka://").rstrip("/"),
                "group.id": f"look-{time.time_ns()}",
                "auto.offset.reset": "earliest",
            }
        )
        consumer.subscribe([f"{self.topic}.dead"])
        found: list[Message] = []
        limit = time.monotonic() + 20
        while len(found) < count and time.monotonic() < limit:
            raw = consumer.poll(0.2)
            if raw is None or raw.error():
                continue
            headers = {name: (value or b"").decode() for name, value in raw.headers() or ()}
            found.append(
                Message(
                    binding=Binding.KAFKA,
                    headers=headers,
                    content_type=headers.get("content-type"),
                    body=raw.value(),
                    key=None,
                    redelivered=False,
                    user_id=None,
                    position="",
                )
            )
        consumer.close()
        return found
