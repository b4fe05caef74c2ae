"""Events of the model as CloudEvents on the wire and back: AMQP 0-9-1 and Kafka, binary and structured mode.

What leaves here is valid, canonical (sorted keys, no spaces, UTF-8), under 64 KiB and free of control
characters in its attributes. What comes in is trusted in nothing: it ends as an `Envelope` or a SchemaError.

Sources: CloudEvents 1.0.2 with its JSON format and Kafka binding, the partitioning, sequence, recordedtime
and severity extensions, and the RabbitMQ binding that Knative uses; RFC 3339, 6901 and 9562.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from datetime import UTC, datetime
from enum import Enum
from functools import cache
from operator import attrgetter
from typing import Any, NamedTuple
from urllib.parse import quote

import msgspec

from virtbus import schema
from virtbus.errors import SchemaError
from virtbus.model import (
    Action,
    Binding,
    Event,
    Gap,
    Heartbeat,
    IoError,
    IoErrorResolved,
    Message,
    Record,
    Stamp,
    to_datetime,
)

CONTENT_TYPE = "application/json"
STRUCTURED_CONTENT_TYPE = "application/cloudevents+json"

# 64 KiB on the wire is safe with every broker and receiver. The attributes are bounded below (14 of at most
# 256 characters, the subject a little more), so this leaves room for them in either mode.
MAX_WIRE_BYTES = 64 * 1024
MAX_DATA_BYTES = 58_000
MAX_DECODE_BYTES = 1024 * 1024
_MAX_ATTRIBUTE_CHARS = 256
_MAX_POINTERS = 50

_TYPES: dict[str, type[Any]] = {cls.TYPE: cls for cls in (IoError, IoErrorResolved, Gap, Heartbeat)}
# First word of the routing key by event type.
ROUTING_WORDS = {
    IoError.TYPE: "io_error",
    IoErrorResolved.TYPE: "resolved",
    Gap.TYPE: "gap",
    Heartbeat.TYPE: "heartbeat",
}
_SEVERITIES = {Action.PAUSE: ("ERROR", "17"), Action.REPORT: ("WARN", "13")}
_INFO, _WARN, _DEBUG = ("INFO", "9"), ("WARN", "13"), ("DEBUG", "5")
# CloudEvents attributes of type Integer: numbers in structured JSON, decimal text in headers.
_INTEGERS = frozenset({"severitynumber"})


class Encoded(NamedTuple):
    """An event ready for any binding: attributes as plain strings, and the data's canonical bytes."""

    attributes: dict[str, str]
    body: bytes


class InvalidEvent(SchemaError):
    """An event of ours that breaks its own schema: a bug; `encoded` is what would have gone out."""

    def __init__(self, message: str, encoded: Encoded) -> None:
        super().__init__(message)
        self.encoded = encoded


class AmqpWire(NamedTuple):
    """What an AMQP 0-9-1 message takes: headers, the content-type property, the body."""

    headers: dict[str, str]
    content_type: str
    body: bytes


class KafkaWire(NamedTuple):
    """What a Kafka record takes: headers in a fixed order, key, value."""

    headers: list[tuple[str, bytes]]
    key: bytes
    value: bytes


@dataclass(frozen=True, slots=True)
class Envelope:
    """A message that is a CloudEvent with a JSON object as its data; nothing is said of its schema yet."""

    attributes: dict[str, str]
    body: bytes
    data: dict[str, Any]


# --------------------------------------------------------------------------------------------- identity

_uuid_lock = threading.Lock()
_last_tick = 0


def uuid7(wall_ns: int) -> str:
    """A UUIDv7 (RFC 9562) of a wall time in ns since the Unix epoch; later calls give greater ones, also
    within a millisecond and when the clock steps back.
    """
    global _last_tick
    # 48 bits of milliseconds, then 12 bits of the fraction (RFC 9562, 6.2, method 3).
    millis, rest = divmod(wall_ns, 1_000_000)
    tick = millis << 12 | (rest << 12) // 1_000_000
    with _uuid_lock:
        _last_tick = tick = max(tick, _last_tick + 1)
    random = int.from_bytes(os.urandom(8), "big") & 0x3FFF_FFFF_FFFF_FFFF
    value = (tick >> 12) << 80 | 0x7 << 76 | (tick & 0xFFF) << 64 | 0x2 << 62 | random
    text = f"{value:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def partition_key(event: Event) -> str:
    """Order is kept within this key: the domain's UUID; for a gap or heartbeat the agent's id."""
    if isinstance(event, IoError | IoErrorResolved):
        return event.domain.uuid
    return event.agent_id


# --------------------------------------------------------------------------------------------- encoding


def encode(event: Event, stamp: Stamp) -> Encoded:
    """The event's attributes and data, checked against its schema.

    Raises InvalidEvent, which carries what was encoded, when the event breaks its schema. Too large data is
    cut visibly and `truncated` names the places. A gap of more than about 500 ranges would be cut: make two.
    """
    data: dict[str, Any] = _plain(event)
    try:
        body = _json(data)
    except (UnicodeEncodeError, ValueError):
        data = _scrub(data)
        body = _json(data)
    if len(body) > MAX_DATA_BYTES:
        body = _fit(data)
    dataschema = _dataschema(event.TYPE)
    encoded = Encoded(_attributes(event, stamp, dataschema), body)
    problems = schema.validate(dataschema, data)
    if problems:
        shown = "; ".join(str(problem) for problem in problems[:3])
        raise InvalidEvent(f"event {stamp.id} of type {event.TYPE} breaks its schema: {shown}", encoded)
    return encoded


def record(encoded: Encoded, stamp: Stamp, row: int = 0) -> Record:
    """The record a bus publishes; `row` is the spool's handle."""
    return Record(
        row=row,
        epoch=stamp.epoch,
        seq=stamp.sequence or 0,
        id=stamp.id,
        key=encoded.attributes["partitionkey"],
        attributes=encoded.attributes,
        body=encoded.body,
        created_ns=stamp.recorded_ns,
    )


@cache
def _dataschema(type_: str) -> str:
    return schema.latest(type_).id


def _attributes(event: Event, stamp: Stamp, dataschema: str) -> dict[str, str]:
    agent = _clean(stamp.agent_id)
    if isinstance(event, IoError):
        happened = event.occurrences.last
        severity = _SEVERITIES.get(event.error.action, _INFO)
    elif isinstance(event, IoErrorResolved):
        happened, severity = event.resolution.resolved_at, _INFO
    elif isinstance(event, Gap):
        happened, severity = event.ended_at, _WARN
    else:
        happened, severity = event.sent_at, _DEBUG
    if isinstance(event, IoError | IoErrorResolved):
        key = _clean(event.domain.uuid)
        subject = f"{key}/{_quoted(event.device.alias)}"
    else:
        key = subject = _clean(event.agent_id)
    attributes = {
        "specversion": "1.0",
        "id": _clean(stamp.id),
        "source": f"/virtbus/agents/{agent}",
        "type": event.TYPE,
        "subject": subject,
        "time": _time(happened),
        "datacontenttype": CONTENT_TYPE,
        "dataschema": dataschema,
        "partitionkey": key,
        "epoch": _clean(stamp.epoch),
        "recordedtime": _time(to_datetime(stamp.recorded_ns)),
        "severitytext": severity[0],
        "severitynumber": severity[1],
    }
    if stamp.sequence is not None:
        attributes["sequence"] = f"{stamp.sequence:012d}"
    return attributes


_PLAIN_TEXT = re.compile(rf"[\x20-\x7e]{{1,{_MAX_ATTRIBUTE_CHARS}}}")
_SURROGATES = re.compile("[\ud800-\udfff]")
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def _clean(value: str) -> str:
    """Text that is allowed as an attribute (CloudEvents 1.0.2, String): unsafe characters become U+FFFD."""
    if _PLAIN_TEXT.fullmatch(value):
        return value
    return _UNSAFE.sub("\ufffd", value[:_MAX_ATTRIBUTE_CHARS]) or "-"


def _quoted(alias: str | None) -> str:
    if not alias:
        return "-"
    cut = alias[:80] + "…" if len(alias) > 80 else alias
    return quote(_SURROGATES.sub("\ufffd", cut), safe="")


def _time(moment: datetime) -> str:
    """RFC 3339, UTC, always six digits, Z."""
    if moment.tzinfo is not UTC:
        moment = moment.astimezone(UTC)
    return moment.isoformat(timespec="microseconds")[:26] + "Z"


_SCALARS = frozenset({str, int, bool, type(None)})


def _plain(value: Any) -> Any:
    """A model object as JSON's own types: keys are the field names, times and enums become text."""
    cls = value.__class__
    if cls in _SCALARS:
        return value
    if cls is tuple or cls is list:
        return [_plain(item) for item in value]
    if cls is datetime:
        return _time(value)
    if cls is float:
        # JSON has no NaN or infinity: unknown is null, and the schema says where that is allowed.
        return value if value - value == 0 else None
    if isinstance(value, Enum):
        return value.value
    getters = _getters(cls)
    if getters is None:
        # Never a crash over one event: no schema takes this, so it ends among the dead letters.
        return {"not_json": repr(value)}
    names, get = getters
    plain = dict(zip(names, get(value), strict=True))
    for name, item in plain.items():
        if item.__class__ not in _SCALARS:
            plain[name] = _plain(item)
    return plain


@cache
def _getters(cls: Any) -> tuple[tuple[str, ...], Callable[[Any], tuple[Any, ...]]] | None:
    """A dataclass's field names and what reads them all at once (they are several in each)."""
    if not is_dataclass(cls):
        return None
    names = tuple(item.name for item in fields(cls))
    return names, attrgetter(*names)


def _json(data: Any) -> bytes:
    return msgspec.json.encode(data, order="sorted")


def _scrub(value: Any) -> Any:
    """Lone surrogates (a name that is not UTF-8) become U+FFFD: they can't be written as UTF-8."""
    if isinstance(value, str):
        return _SURROGATES.sub("\ufffd", value)
    if isinstance(value, list):
        return [_scrub(item) for item in value]
    if isinstance(value, dict):
        return {key: _scrub(item) for key, item in value.items()}
    return value


def _fit(data: dict[str, Any]) -> bytes:
    """Cut `data` in place until it fits: long strings first, then long lists, each ever shorter."""
    cut: dict[str, None] = dict.fromkeys(data["truncated"])
    for string_limit, list_limit in (
        (8192, 1000),
        (1024, 500),
        (256, 200),
        (128, 100),
        (64, 50),
        (64, 20),
        (32, 5),
        (16, 0),
    ):
        for key, value in data.items():
            if key != "truncated":
                data[key] = _cut(value, [key], string_limit, list_limit, cut)
        data["truncated"] = _pointers(cut)
        body = _json(data)
        if len(body) <= MAX_DATA_BYTES:
            return body
    return body  # not reached with the model's fields; a bus that refuses it dead-letters it


def _cut(value: Any, path: list[str | int], string_limit: int, list_limit: int, cut: dict[str, None]) -> Any:
    if isinstance(value, str):
        if len(value) <= string_limit:
            return value
        cut[schema.pointer(path)] = None
        return value[: string_limit - 1] + "…"
    if isinstance(value, list):
        if len(value) > list_limit:
            cut[schema.pointer(path)] = None
            value = value[:list_limit]
        return [_cut(item, [*path, i], string_limit, list_limit, cut) for i, item in enumerate(value)]
    if isinstance(value, dict):
        return {key: _cut(item, [*path, key], string_limit, list_limit, cut) for key, item in value.items()}
    return value


def _pointers(cut: Mapping[str, None]) -> list[str]:
    """The places that were cut; too many become the places they stand in."""
    pointers = list(cut)
    depth = max((pointer.count("/") for pointer in pointers), default=0)
    while len(pointers) > _MAX_POINTERS and depth > 1:
        depth -= 1
        pointers = list(dict.fromkeys("/".join(pointer.split("/")[: depth + 1]) for pointer in pointers))
    return pointers


# ---------------------------------------------------------------------------------------------- the wire


def routing_key(attributes: Mapping[str, str]) -> str:
    """`<io_error|resolved|gap|heartbeat>.<agent-id>.<domain uuid|->` for the topic exchange."""
    type_ = attributes["type"]
    agent = attributes["source"].rpartition("/")[2]
    domain = attributes["partitionkey"] if type_ in (IoError.TYPE, IoErrorResolved.TYPE) else "-"
    # A dot would be another word of the key: none of the three may hold one.
    word = ROUTING_WORDS.get(type_) or type_.replace(".", "_")
    return f"{word}.{agent.replace('.', '_')}.{domain.replace('.', '_')}"[:255]


def to_amqp(attributes: Mapping[str, str], body: bytes, *, structured: bool = False) -> AmqpWire:
    """The AMQP 0-9-1 form. The content type is a `content-type` header too: Knative's receiver reads that."""
    if structured:
        return AmqpWire(
            {"content-type": STRUCTURED_CONTENT_TYPE},
            STRUCTURED_CONTENT_TYPE,
            structured_json(attributes, body),
        )
    from cloudevents.core.bindings import rabbitmq

    message = rabbitmq.to_binary(_sdk_event(attributes, body), _sdk_format())
    headers = dict(message.headers)
    headers["ce-time"] = attributes["time"]  # the SDK leaves out microseconds that are zero
    content_type = message.content_type or CONTENT_TYPE
    headers["content-type"] = content_type
    return AmqpWire(headers, content_type, message.body)


def to_kafka(attributes: Mapping[str, str], body: bytes, *, structured: bool = False) -> KafkaWire:
    """The Kafka form; the key is the partition key."""
    key = attributes["partitionkey"].encode()
    if structured:
        headers = [("content-type", STRUCTURED_CONTENT_TYPE.encode())]
        return KafkaWire(headers, key, structured_json(attributes, body))
    from cloudevents.core.bindings import kafka

    message = kafka.to_binary(_sdk_event(attributes, body), _sdk_format())
    named = {**message.headers, "ce_time": attributes["time"].encode()}
    return KafkaWire(sorted(named.items()), key, message.value)


def _sdk_event(attributes: Mapping[str, str], body: bytes) -> Any:
    from cloudevents.core.v1.event import CloudEvent

    # A dict of its own: the SDK keeps and changes the one it is given.
    own: dict[str, Any] = dict(attributes)
    own["time"] = datetime.fromisoformat(own["time"])
    return CloudEvent(own, body)


@cache
def _sdk_format() -> Any:
    from cloudevents.core.formats.json import JSONFormat

    return JSONFormat()


def structured_json(attributes: Mapping[str, str], body: bytes) -> bytes:
    """The whole event as one line of JSON, keys sorted, the data spliced in byte for byte."""
    if b"\n" in body or b"\r" in body:
        body = _json(msgspec.json.decode(body))
    event: dict[str, Any] = dict(attributes)
    for name in _INTEGERS & event.keys():
        if re.fullmatch("-?[0-9]{1,9}", event[name]):
            event[name] = int(event[name])
    event["data"] = msgspec.Raw(body)
    return _json(event)


# --------------------------------------------------------------------------------------------- decoding


def decode(message: Message) -> Envelope:
    """The CloudEvent in a message of either binding and content mode; raises SchemaError for all else."""
    _check_size(message.body, message.position)
    headers = _headers(message)
    content_type = message.content_type or headers.get("content-type") or ""
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type.startswith("application/cloudevents"):
        if media_type != STRUCTURED_CONTENT_TYPE:
            raise SchemaError(
                f"{message.position}: can't read {content_type[:80]!r}: only {STRUCTURED_CONTENT_TYPE}"
            )
        return _structured(message.body, message.position)
    prefix = "ce-" if message.binding is Binding.AMQP else "ce_"
    attributes = {name[3:]: value for name, value in headers.items() if name.startswith(prefix)}
    if not attributes:
        raise SchemaError(
            f"{message.position}: not a CloudEvent: no {prefix}* headers and no {STRUCTURED_CONTENT_TYPE}"
        )
    if content_type:
        attributes["datacontenttype"] = content_type
    _check_attributes(attributes, message.position)
    return Envelope(attributes, message.body, _object(message.body, message.position))


def decode_structured(line: bytes) -> Envelope:
    """The CloudEvent in one structured JSON text; raises SchemaError."""
    _check_size(line, "event")
    return _structured(line, "event")


def to_event(envelope: Envelope) -> Event | None:
    """The typed event; None for a type or major version that this release does not know.

    A later minor version is read as the newest we know. Raises SchemaError when the data breaks its schema.
    """
    type_ = envelope.attributes["type"]
    cls = _TYPES.get(type_)
    if cls is None:
        return None
    dataschema = envelope.attributes.get("dataschema", type_)
    urn = schema.parse_urn(dataschema)
    if urn is not None and (urn[0] != type_ or urn[1] != schema.latest(type_).order[0]):
        return None
    problems = schema.validate(dataschema if urn else type_, envelope.data)
    if problems:
        shown = "; ".join(str(problem) for problem in problems[:3])
        raise SchemaError(
            f"event {envelope.attributes['id'][:80]!r} of type {type_} breaks its schema: {shown}"
        )
    try:
        try:
            event: Event = msgspec.convert(envelope.data, cls)
        except msgspec.ValidationError:
            event = msgspec.convert(_whole_numbers(envelope.data), cls)
    except (msgspec.ValidationError, ValueError, OverflowError, RecursionError) as error:
        raise SchemaError(
            f"event {envelope.attributes['id'][:80]!r} of type {type_} can't be read: {error}"
        ) from error
    return event


def _whole_numbers(value: Any) -> Any:
    """The same data with 3.0 as 3: one number in JSON, and some tools on the way write it so."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_whole_numbers(item) for item in value]
    if isinstance(value, dict):
        return {key: _whole_numbers(item) for key, item in value.items()}
    return value


_NAME = re.compile("[a-z0-9]{1,64}")
_RFC3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?([Zz]|[+-][0-9]{2}:[0-9]{2})"
)
_FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def _headers(message: Message) -> dict[str, str]:
    """The headers that matter, names in lower case, values as text."""
    prefix = "ce-" if message.binding is Binding.AMQP else "ce_"
    headers: dict[str, str] = {}
    for raw_name, raw_value in message.headers.items():
        name = _text(raw_name, message.position, "a header's name").lower()
        if not (name.startswith(prefix) or name == "content-type"):
            continue
        value = _text(raw_value, message.position, f"header {name[:40]!r}")
        if headers.setdefault(name, value) != value:
            raise SchemaError(
                f"{message.position}: header {name[:40]!r} is there twice with different values"
            )
    return headers


def _text(value: object, where: str, what: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        try:
            return bytes(value).decode()
        except UnicodeDecodeError as error:
            raise SchemaError(f"{where}: {what} is not UTF-8") from error
    if isinstance(value, datetime) and value.tzinfo is not None:
        return _time(value)
    raise SchemaError(f"{where}: {what} is a {type(value).__name__}, not text")


def _structured(text: bytes, where: str) -> Envelope:
    parts = _parse(text, where, _PARTS)
    data = parts.pop("data", None)
    encoded = parts.pop("data_base64", None)
    attributes: dict[str, str] = {}
    for name, raw in parts.items():
        value = _parse(bytes(raw), where, _ANY)
        if value is None:  # the JSON format lets an absent attribute be null
            continue
        if not isinstance(value, str | int):
            raise SchemaError(f"{where}: attribute {name[:40]!r} is not text, a number or a boolean")
        attributes[name] = _text(value, where, name)
    _check_attributes(attributes, where)
    if data is not None and encoded is not None:
        raise SchemaError(f"{where}: both data and data_base64")
    if data is not None:
        body = bytes(data)
    elif encoded is not None:
        body = _from_base64(_parse(bytes(encoded), where, _ANY), where)
    else:
        raise SchemaError(f"{where}: no data")
    return Envelope(attributes, body, _object(body, where))


def _from_base64(value: object, where: str) -> bytes:
    try:
        if isinstance(value, str):
            return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        pass
    raise SchemaError(f"{where}: data_base64 is not base64")


_PARTS: msgspec.json.Decoder[dict[str, msgspec.Raw]] = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ANY: msgspec.json.Decoder[Any] = msgspec.json.Decoder()


def _parse(text: bytes, where: str, decoder: msgspec.json.Decoder[Any]) -> Any:
    try:
        return decoder.decode(text)
    except (msgspec.MsgspecError, UnicodeError, ValueError, RecursionError) as error:
        raise SchemaError(f"{where}: not a JSON object: {error}") from error


def _object(body: bytes, where: str) -> dict[str, Any]:
    data = _parse(body, where, _ANY)
    if not isinstance(data, dict):
        raise SchemaError(f"{where}: the data is {type(data).__name__}, not a JSON object")
    return data


def _check_size(body: bytes, where: str) -> None:
    if len(body) > MAX_DECODE_BYTES:
        raise SchemaError(f"{where}: {len(body)} bytes are more than the {MAX_DECODE_BYTES} that are read")


def _check_attributes(attributes: Mapping[str, str], where: str) -> None:
    """The rules of CloudEvents 1.0 for attributes, and JSON as the content type."""
    if attributes.get("specversion") != "1.0":
        raise SchemaError(
            f"{where}: specversion is {attributes.get('specversion', 'absent')[:40]!r}, not '1.0'"
        )
    for name in ("id", "source", "type"):
        if not attributes.get(name):
            raise SchemaError(f"{where}: attribute {name!r} is required")
    for name, value in attributes.items():
        if not _NAME.fullmatch(name) or name == "data":
            raise SchemaError(f"{where}: {name[:40]!r} is no name for an attribute")
        if _FORBIDDEN.search(value):
            raise SchemaError(f"{where}: attribute {name!r} holds a control character")
    time = attributes.get("time")
    if time is not None and not _RFC3339.fullmatch(time):
        raise SchemaError(f"{where}: time {time[:40]!r} is not RFC 3339")
    content_type = attributes.get("datacontenttype", CONTENT_TYPE).partition(";")[0].strip().lower()
    if not re.fullmatch(r"(application|text)/([a-z0-9.-]+\+)?json", content_type):
        raise SchemaError(f"{where}: the data is {content_type[:80]!r}, not JSON")
