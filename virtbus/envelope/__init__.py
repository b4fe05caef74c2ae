"""Events of the model as CloudEvents on the wire and back: AMQP 0-9-1 and Kafka, binary and structured mode.

What leaves here is valid, canonical (sorted keys, no spaces, UTF-8), under 64 KiB and free of control
characters in its attributes. What comes in is trusted in nothing: it ends as an `Envelope` or a SchemaError.

Sources: CloudEvents 1.0.2 with its JSON format and Kafka binding, the partitioning, sequence, recordedtime
and severity extensions, and the RabbitMQ binding that Knative uses; RFC 3339, 6901 and 9562.
"""

from __future__ import annotations

from virtbus.envelope.decoding import MAX_DECODE_BYTES, Envelope, decode, decode_structured, to_event
from virtbus.envelope.encoding import (
    CONTENT_TYPE,
    MAX_DATA_BYTES,
    MAX_WIRE_BYTES,
    ROUTING_WORDS,
    STRUCTURED_CONTENT_TYPE,
    AmqpWire,
    Encoded,
    InvalidEvent,
    KafkaWire,
    encode,
    record,
    routing_key,
    structured_json,
    to_amqp,
    to_kafka,
    uuid7,
)  # fmt: skip

__all__ = [
    "CONTENT_TYPE", "MAX_DATA_BYTES", "MAX_DECODE_BYTES", "MAX_WIRE_BYTES", "ROUTING_WORDS",
    "STRUCTURED_CONTENT_TYPE", "AmqpWire", "Encoded", "Envelope", "InvalidEvent", "KafkaWire", "decode",
    "decode_structured", "encode", "record", "routing_key", "structured_json", "to_amqp",
    "to_event", "to_kafka", "uuid7",
]  # fmt: skip
