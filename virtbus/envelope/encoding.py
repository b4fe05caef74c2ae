"""Events of the model as attributes and canonical data, and those in the form that each binding takes.

Nothing is in them that JSON or a header can't hold, and they are small enough.
"""

from __future__ import annotations

import base64
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from enum import Enum
from functools import cache, lru_cache
from operator import attrgetter
from typing import Any, NamedTuple
from urllib.parse import quote
from uuid import UUID

import msgspec
from cloudevents.core.exceptions import CloudEventValidationError
from cloudevents.core.v1.event import CloudEvent

from virtbus import schema
from virtbus.errors import SchemaError
from virtbus.model import Event, Gap, Heartbeat, IoError, IoErrorResolved, Record, Stamp, to_datetime
from virtbus.words import Action, Severity

CONTENT_TYPE = "application/json"
STRUCTURED_CONTENT_TYPE = "application/cloudevents+json"

# First word of the routing key by event type.
ROUTING_WORDS = {
    IoError.TYPE: "io_error",
    IoErrorResolved.TYPE: "resolved",
    Gap.TYPE: "gap",
    Heartbeat.TYPE: "heartbeat",
}
_SEVERITIES = {Action.PAUSE: (Severity.ERROR.value, "17"), Action.REPORT: (Severity.WARN.value, "13")}
_INFO, _WARN, _DEBUG = (Severity.INFO.value, "9"), (Severity.WARN.value, "13"), (Severity.DEBUG.value, "5")
# CloudEvents attributes of type Integer: numbers in structured JSON, decimal text in headers.
_INTEGERS = frozenset({"severitynumber"})
_JSON = re.compile(r"(application|text)/([a-z0-9.-]+\+)?json")

# 64 KiB on the wire is safe with every broker and receiver. The attributes are bounded (14 of at most 256
# characters, the subject a little more), so this leaves room for them in either mode.
MAX_WIRE_BYTES = 64 * 1024
MAX_DATA_BYTES = 58_000
_MAX_ATTRIBUTE_CHARS = 256
_MAX_POINTERS = 50
_SHORTEST = 40  # what has a form of its own (a UUID has 36 characters, a time 27) is never cut

_PLAIN_TEXT = re.compile(rf"[\x20-\x7e]{{1,{_MAX_ATTRIBUTE_CHARS}}}")
_SURROGATES = re.compile("[\ud800-\udfff]")
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


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
    """What a Kafka record takes: headers in a fixed order (the client writes UTF-8), key, value."""

    headers: list[tuple[str, str]]
    key: bytes
    value: bytes


_uuid_lock = threading.Lock()
_last_tick = 0


def uuid7(wall_ns: int, *, above: Iterable[str] = ()) -> str:
    """A UUIDv7 (RFC 9562) of a wall time in ns since the Unix epoch; later calls give greater ones, also
    within a millisecond and when the clock steps back. It is greater than all of `above`, which earlier
    processes made, perhaps by a clock that was ahead.
    """
    global _last_tick
    # 48 bits of milliseconds, then 12 bits of the fraction (RFC 9562, 6.2, method 3).
    millis, rest = divmod(wall_ns, 1_000_000)
    tick = millis << 12 | (rest << 12) // 1_000_000
    with _uuid_lock:
        _last_tick = tick = max([tick, _last_tick + 1, *(_tick_of(uuid) + 1 for uuid in above)])
    random = int.from_bytes(os.urandom(8), "big") & 0x3FFF_FFFF_FFFF_FFFF
    value = (tick >> 12) << 80 | 0x7 << 76 | (tick & 0xFFF) << 64 | 0x2 << 62 | random
    text = f"{value:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def _tick_of(uuid: str) -> int:
    """The time of a UUIDv7 as `_last_tick` counts it; 0 for anything else."""
    try:
        value = UUID(uuid)
    except ValueError:
        return 0
    return value.int >> 80 << 12 | value.int >> 64 & 0xFFF if value.version == 7 else 0


def encode(event: Event, stamp: Stamp) -> Encoded:
    """The event's attributes and data, checked against its schema.

    Raises InvalidEvent, which carries what was encoded, when the event breaks its schema. Data that is too
    large is cut, and `truncated` lists where. A gap of more than about 500 ranges would be cut: make two.
    """
    data: dict[str, Any] = plain(event)
    try:
        body = dump(data)
    except (UnicodeEncodeError, ValueError):
        data = scrub(data)
        body = dump(data)
    if len(body) > MAX_DATA_BYTES:
        body = fit(data)
    dataschema = _dataschema(event.TYPE)
    encoded = Encoded(_attributes(event, stamp, dataschema), body)
    try:
        sdk_event(encoded.attributes, body)
    except (CloudEventValidationError, ValueError) as error:
        raise InvalidEvent(
            f"event {stamp.id} of type {event.TYPE} is not a CloudEvent: {error}", encoded
        ) from error
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
    agent = clean(stamp.agent_id)
    if isinstance(event, IoError):
        happened = event.occurrences.last
        severity = _SEVERITIES.get(event.error.action, _INFO)
    elif isinstance(event, IoErrorResolved):
        happened, severity = event.resolution.resolved_at, _INFO
    elif isinstance(event, Gap):
        happened, severity = event.ended_at, _WARN
    else:
        happened, severity = event.sent_at, _DEBUG
    # Order is kept within the key: the domain, or the agent.
    if isinstance(event, IoError | IoErrorResolved):
        key = clean(event.domain.uuid)
        subject = f"{key}/{_quoted(event.device.alias)}"
    else:
        key = subject = clean(event.agent_id)
    attributes = {
        "specversion": "1.0",
        "id": clean(stamp.id),
        "source": f"/virtbus/agents/{agent}",
        "type": event.TYPE,
        "subject": subject,
        "time": timestamp(happened),
        "datacontenttype": CONTENT_TYPE,
        "dataschema": dataschema,
        "partitionkey": key,
        "epoch": clean(stamp.epoch),
        "recordedtime": timestamp(to_datetime(stamp.recorded_ns)),
        "severitytext": severity[0],
        "severitynumber": severity[1],
    }
    if stamp.sequence is not None:
        attributes["sequence"] = f"{stamp.sequence:012d}"
    return attributes


def _quoted(alias: str | None) -> str:
    if not alias:
        return "-"
    cut = alias[:80] + "…" if len(alias) > 80 else alias
    return quote(_SURROGATES.sub("\ufffd", cut), safe="")


def routing_key(attributes: Mapping[str, str]) -> str:
    """`<io_error|resolved|gap|heartbeat>.<agent-id>.<domain uuid|->` for the topic exchange."""
    type_ = attributes["type"]
    agent = attributes["source"].rpartition("/")[2]
    domain = attributes["partitionkey"] if type_ in (IoError.TYPE, IoErrorResolved.TYPE) else "-"
    # A dot would be another word of the key: none of the three may hold one.
    word = ROUTING_WORDS.get(type_) or type_.replace(".", "_")
    return f"{word}.{agent.replace('.', '_')}.{domain.replace('.', '_')}"[:255]


@lru_cache(maxsize=64)
def _headers(prefix: str, names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Each attribute's header and name, sorted; `content-type` is not among them, and comes after them."""
    return tuple(sorted((prefix + name, name) for name in names if name != "datacontenttype"))


def to_amqp(attributes: Mapping[str, str], body: bytes, *, structured: bool = False) -> AmqpWire:
    """The AMQP 0-9-1 form. The content type is a `content-type` header too: Knative's receiver reads that."""
    if structured:
        return AmqpWire(
            {"content-type": STRUCTURED_CONTENT_TYPE},
            STRUCTURED_CONTENT_TYPE,
            structured_json(attributes, body),
        )
    headers = {header: attributes[name] for header, name in _headers("ce-", tuple(attributes))}
    content_type = attributes.get("datacontenttype", CONTENT_TYPE)
    headers["content-type"] = content_type
    return AmqpWire(headers, content_type, body)


def to_kafka(attributes: Mapping[str, str], body: bytes, *, structured: bool = False) -> KafkaWire:
    """The Kafka form; the key is the partition key."""
    key = attributes["partitionkey"].encode()
    if structured:
        headers = [("content-type", STRUCTURED_CONTENT_TYPE)]
        return KafkaWire(headers, key, structured_json(attributes, body))
    headers = [(header, attributes[name]) for header, name in _headers("ce_", tuple(attributes))]
    headers.append(("content-type", attributes.get("datacontenttype", CONTENT_TYPE)))
    return KafkaWire(headers, key, body)


def sdk_event(attributes: Mapping[str, str], body: bytes) -> CloudEvent:
    """The CloudEvents SDK's own event, which checks the attributes; its traps are closed here.

    The headers of `to_amqp` and `to_kafka` are those of the SDK's bindings to the letter (a test compares
    them), written straight: through the SDK a record costs three times as much, on the path that drains a
    backlog.
    """
    # A dict of its own: the SDK keeps and changes the one it is given.
    own: dict[str, Any] = dict(attributes)
    own["time"] = datetime.fromisoformat(own["time"])
    return CloudEvent(own, body)


def is_json(datacontenttype: str | None) -> bool:
    """Whether data of this content type are JSON; without one they are."""
    return _JSON.fullmatch((datacontenttype or CONTENT_TYPE).partition(";")[0].strip().lower()) is not None


def structured_json(attributes: Mapping[str, str], body: bytes) -> bytes:
    """The whole event as one line of JSON, keys sorted, JSON data spliced in byte for byte.

    Other people's data may be anything: as the JSON format has it, text of another content type is a string,
    and what is neither text nor the JSON that it says it is stands in `data_base64`.
    """
    event: dict[str, Any] = dict(attributes)
    for name in _INTEGERS & event.keys():
        if re.fullmatch("-?[0-9]{1,9}", event[name]):
            event[name] = int(event[name])
    ours = attributes.get("type") in ROUTING_WORDS  # their data were read as JSON, or made by us
    if ours and b"\n" not in body and b"\r" not in body:
        event["data"] = msgspec.Raw(body)
    elif body:
        event |= _data_member(attributes.get("datacontenttype"), body)
    return dump(event)


def _data_member(datacontenttype: str | None, body: bytes) -> dict[str, Any]:
    try:
        if not is_json(datacontenttype):
            return {"data": body.decode()}
        value = msgspec.json.decode(body)
        return {"data": value if b"\n" in body or b"\r" in body else msgspec.Raw(body)}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {"data_base64": base64.b64encode(body).decode()}


# ------------------------------------------------------------------------------------- canonical JSON


def clean(value: str) -> str:
    """Text that is allowed as an attribute (CloudEvents 1.0.2, String): unsafe characters become U+FFFD."""
    if _PLAIN_TEXT.fullmatch(value):
        return value
    return _UNSAFE.sub("\ufffd", value[:_MAX_ATTRIBUTE_CHARS]) or "-"


def timestamp(moment: datetime) -> str:
    """RFC 3339, UTC, always six digits, Z."""
    if moment.tzinfo is not UTC:
        moment = moment.astimezone(UTC)
    return moment.isoformat(timespec="microseconds")[:26] + "Z"


_SCALARS = frozenset({str, int, bool, type(None)})


def plain(value: Any) -> Any:
    """A model object as JSON's own types: keys are the field names, times and enums become text."""
    cls = value.__class__
    if cls in _SCALARS:
        return value
    if cls is tuple or cls is list:
        return [plain(item) for item in value]
    if cls is datetime:
        return timestamp(value)
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
    made = dict(zip(names, get(value), strict=True))
    for name, item in made.items():
        if item.__class__ not in _SCALARS:
            made[name] = plain(item)
    return made


@cache
def _getters(cls: Any) -> tuple[tuple[str, ...], Callable[[Any], tuple[Any, ...]]] | None:
    """A dataclass's field names and what reads them all at once (they are several in each)."""
    if not is_dataclass(cls):
        return None
    names = tuple(item.name for item in fields(cls))
    return names, attrgetter(*names)


def dump(data: Any) -> bytes:
    """Canonical JSON: UTF-8, sorted keys, no spaces. Raises UnicodeEncodeError for a lone surrogate."""
    return msgspec.json.encode(data, order="sorted")


def scrub(value: Any) -> Any:
    """Lone surrogates (a name that is not UTF-8) become U+FFFD: they can't be written as UTF-8."""
    if isinstance(value, str):
        return _SURROGATES.sub("\ufffd", value)
    if isinstance(value, list):
        return [scrub(item) for item in value]
    if isinstance(value, dict):
        return {key: scrub(item) for key, item in value.items()}
    return value


def fit(data: dict[str, Any]) -> bytes:
    """Cut `data` in place until it fits: long strings first, then long lists, each ever shorter."""
    cut: dict[str, None] = dict.fromkeys(data["truncated"])
    for string_limit, list_limit in (
        (8192, 1000),
        (1024, 500),
        (256, 200),
        (128, 100),
        (64, 50),
        (64, 20),
        (_SHORTEST, 5),
        (_SHORTEST, 0),
    ):
        for key, value in data.items():
            if key != "truncated":
                data[key] = _cut(value, [key], string_limit, list_limit, cut)
        data["truncated"] = _pointers(cut)
        body = dump(data)
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
