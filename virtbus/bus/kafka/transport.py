"""kombu's transport `virtbus-kafka`: native records over confluent-kafka, each with its delivery report.

kombu's stock Kafka transport wraps the body in base64 JSON and reports success for deliveries that failed;
tests/kafka documents both. This one hands over value, key and headers as they are. It publishes only:
kombu's consumer model (a tag a message, requeue) has no place for offsets and rebalances, so consuming
stands on the driver itself (kafka_consumer.py).
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from confluent_kafka import KafkaException, Producer
from kombu.transport import TRANSPORT_ALIASES, virtual

from virtbus.bus.kafka.client import Admin, make
from virtbus.bus.kafka.settings import KafkaSettings
from virtbus.errors import VirtbusError

TRANSPORT = "virtbus-kafka"
TRANSPORT_ALIASES.setdefault(TRANSPORT, f"{__name__}:Transport")

# kombu's classes carry no types: what comes from them is Any, on purpose and here only.
_VirtualChannel: Any = virtual.Channel
_VirtualTransport: Any = virtual.Transport

# How long a closing channel waits for the reports of what it purged, in seconds.
_REPORTS_SECONDS = 1.0


class Channel(_VirtualChannel):
    """One producer. `exchange` is the topic, `routing_key` the key; values and headers go as they are."""

    do_restore = False

    def __init__(self, connection: Any, **kwargs: Any) -> None:
        """Make the producer; the connection's transport options hold `settings`, `watch` and `batching`."""
        super().__init__(connection, **kwargs)
        options = connection.client.transport_options
        settings: KafkaSettings = options["settings"]
        config = settings.producer(options["watch"], batching=options.get("batching", True))
        self.producer: Any = make(Producer, config)

    def exchange_declare(
        self, exchange: str | None = None, type: str = "topic", passive: bool = False, **_: Any
    ) -> None:
        """Make sure that the topic is there; create it unless `passive`."""
        Admin(self.connection.client.transport_options["settings"]).ensure(
            exchange or "", declare=not passive
        )

    def prepare_message(
        self,
        body: bytes,
        priority: int | None = None,
        content_type: str | None = None,
        content_encoding: str | None = None,
        headers: Any = None,
        properties: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The message as `basic_publish` takes it: no wrapping, no encoding."""
        return {"body": body, "headers": headers, "on_delivery": (properties or {}).get("on_delivery")}

    def basic_publish(
        self, message: dict[str, Any], exchange: str = "", routing_key: bytes | str | None = None, **_: Any
    ) -> None:
        """Hand one record to the producer. `on_delivery(error, message)` is called from `drain_events`.

        Raises BufferError when the local queue is full (drain, then again), KafkaException when refused.
        """
        self.producer.produce(
            exchange,
            message["body"],
            routing_key,
            headers=message["headers"],
            on_delivery=message["on_delivery"],
        )

    def drain_events(self, timeout: float | None = None, callback: Any = None) -> int:
        """Serve delivery reports and errors for up to `timeout` seconds; the number of events served."""
        producer = self.producer
        return 0 if producer is None else int(producer.poll(0.0 if timeout is None else timeout))

    def close(self) -> None:
        """Let the producer go; what it still held is purged, never sent later behind our back."""
        producer, self.producer = self.producer, None
        if producer is not None:
            producer.purge()
            # A report that is not served keeps its callback, and with it whatever that refers to.
            limit = time.monotonic() + _REPORTS_SECONDS
            with suppress(KafkaException):  # a fatal error: it goes anyway
                while len(producer) and time.monotonic() < limit:
                    producer.poll(0.05)
        super().close()


class Transport(_VirtualTransport):
    """kombu's transport `virtbus-kafka`; publishing only."""

    Channel = Channel
    driver_type = "kafka"
    driver_name = "confluent-kafka"
    connection_errors = (KafkaException, VirtbusError, OSError)
    channel_errors = (BufferError,)
    recoverable_connection_errors = ()
    recoverable_channel_errors = (BufferError,)

    def driver_version(self) -> str:
        """The client's version and librdkafka's."""
        import confluent_kafka

        return f"{confluent_kafka.__version__} (librdkafka {confluent_kafka.libversion()[0]})"
