"""Messages of either binding and mode as envelopes and typed events: what comes in is trusted in nothing.

Other people's CloudEvents pass in every shape that their specifications allow: without data, with data of any
content type, with times as AMQP timestamps. Only events of our own types must be JSON objects.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import msgspec

from virtbus import schema
from virtbus.envelope.encoding import STRUCTURED_CONTENT_TYPE, is_json, timestamp
from virtbus.errors import SchemaError
from virtbus.model import Binding, Event, Gap, Heartbeat, IoError, IoErrorResolved, Message

MAX_DECODE_BYTES = 1024 * 1024

_TYPES: dict[str, type[Any]] = {cls.TYPE: cls for cls in (IoError, IoErrorResolved, Gap, Heartbeat)}


@dataclass(frozen=True, slots=True)
class Envelope:
    """A message that is a CloudEvent; nothing is said of its schema yet."""

    attributes: dict[str, str]
    body: bytes
    data: dict[str, Any]  # empty where a foreign event's data is not a JSON object: see `body`


class _NotJson(SchemaError):
    """A text that should be JSON in UTF-8 and is not."""


def decode(message: Message) -> Envelope:
    """The CloudEvent in a message of either binding and content mode; raises SchemaError for all else."""
    _check_size(message.body, message.position)
    headers = _headers(message)
    content_type = message.content_type or headers.get("content-type") or ""
    try:
        return _decode(message, headers, content_type)
    except _NotJson as error:
        declared = _other_charset(content_type, message.content_encoding)
        if declared is None:
            raise
        raise SchemaError(f"{str(error).removesuffix(_WANTED)}; {declared}{_WANTED}") from error


def _decode(message: Message, headers: dict[str, str], content_type: str) -> Envelope:
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type.startswith("application/cloudevents"):
        if media_type != STRUCTURED_CONTENT_TYPE:
            raise SchemaError(
                f"{message.position}: can't read {content_type[:80]!r}: only {STRUCTURED_CONTENT_TYPE}"
            )
        return _structured(message.body, message.position)
    attributes = {name: value for name, value in headers.items() if name != "content-type"}
    if not attributes:
        prefix = _PREFIXES[message.binding][0]
        raise SchemaError(
            f"{message.position}: not a CloudEvent: no {prefix}* headers and no {STRUCTURED_CONTENT_TYPE}"
        )
    if content_type:
        attributes["datacontenttype"] = content_type
    _check_attributes(attributes, message.position)
    return Envelope(attributes, message.body, _data(attributes, message.body, message.position))


def decode_structured(line: bytes) -> Envelope:
    """The CloudEvent in one structured JSON text; raises SchemaError."""
    _check_size(line, "event")
    return _structured(line, "event")


def to_event(envelope: Envelope, *, validate: bool = True) -> Event | None:
    """The typed event; None for a type or major version that this release does not know.

    A later minor version is read as the newest we know. Raises SchemaError when the data breaks its schema;
    without `validate` nothing is checked, and what can't be read as its type is None too.
    """
    type_ = envelope.attributes["type"]
    cls = _TYPES.get(type_)
    if cls is None:
        return None
    dataschema = envelope.attributes.get("dataschema", type_)
    urn = schema.parse_urn(dataschema)
    if urn is not None and (urn[0] != type_ or urn[1] != schema.latest(type_).order[0]):
        return None
    if validate:
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
        if not validate:
            return None
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
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?([Zz]|[+-][0-9]{2}:[0-9]{2})"
)
# How attributes are named in headers: by the RabbitMQ binding that Knative uses, and by CloudEvents' own
# AMQP 1.0 binding, whose names a bridge (RabbitMQ's own AMQP 1.0 listener is one) carries over as they are.
_PREFIXES = {Binding.AMQP: ("ce-", "cloudevents:", "cloudevents_"), Binding.KAFKA: ("ce_",)}
_FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def _headers(message: Message) -> dict[str, str]:
    """The attributes by their names and `content-type`, names in lower case, values as text."""
    headers: dict[str, str] = {}
    for raw_name, raw_value in message.headers.items():
        name = _text(raw_name, message.position, "a header's name").lower()
        prefix = next((one for one in _PREFIXES[message.binding] if name.startswith(one)), None)
        if raw_value is None or (prefix is None and name != "content-type"):  # null: as if it were not there
            continue
        if isinstance(raw_value, list) and message.binding is Binding.KAFKA:
            raise SchemaError(
                f"{message.position}: header {name[:40]!r} is there twice with different values"
            )
        value = _text(raw_value, message.position, f"header {name[:40]!r}")
        if headers.setdefault(name[len(prefix or "") :], value) != value:
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
    if isinstance(value, datetime):  # an AMQP timestamp is in UTC
        return timestamp(value if value.tzinfo is not None else value.replace(tzinfo=UTC))
    if isinstance(value, float | Decimal):
        return str(value)
    raise SchemaError(f"{where}: {what} is a {type(value).__name__}, not text")


def _structured(text: bytes, where: str) -> Envelope:
    parts = _parse(text.removeprefix(b"\xef\xbb\xbf"), where, _PARTS)
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
        body = _content(bytes(data), attributes, where)
    elif encoded is not None:
        body = _from_base64(_parse(bytes(encoded), where, _ANY), where)
    else:
        body = b""
    return Envelope(attributes, body, _data(attributes, body, where))


def _content(data: bytes, attributes: Mapping[str, str], where: str) -> bytes:
    """What the member `data` stands for: a string is the text itself where the data are not JSON."""
    if data.startswith(b'"') and not is_json(attributes.get("datacontenttype")):
        return str(_parse(data, where, _ANY)).encode()
    return data


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
        found = _other_format(text) or _not_utf8(text) or error
        raise _NotJson(f"{where}: not a JSON object: {found}") from error


_WANTED = "; JSON is sent as UTF-8"
_CHARSET = re.compile(r";\s*charset\s*=\s*\"?([^\s;\"]*)", re.IGNORECASE)
# What says nothing against UTF-8; kombu names "binary" where its caller names nothing.
_PLAIN = frozenset({"", "utf-8", "utf8", "us-ascii", "ascii", "binary", "identity", "8bit"})


def _other_charset(content_type: str, content_encoding: object) -> str | None:
    """What the sender says that the body is, where that is not UTF-8."""
    charset = _CHARSET.search(content_type)
    for what, value in (("charset", charset and charset[1]), ("content encoding", content_encoding)):
        if isinstance(value, str) and value.lower() not in _PLAIN:
            return f"its {what} is {value[:40]!r}"
    return None


def _not_utf8(text: bytes) -> str | None:
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return f"byte 0x{text[error.start]:02x} is not UTF-8{_WANTED}"
    return None


def _other_format(text: bytes) -> str | None:
    """What a text that is not JSON is, where its first bytes show it."""
    if not text:
        return "it is empty"
    if text.startswith(b"\x1f\x8b"):
        return "it is compressed (gzip); send it as it is"
    if text.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return f"it is UTF-32{_WANTED}"
    if text.startswith((b"\xff\xfe", b"\xfe\xff", b"{\0", b"\0{")):
        return f"it is UTF-16{_WANTED}"
    if text.startswith(b"\0") and text[5:6] in (b"{", b"["):
        return "it begins with the id of a schema registry; use the plain JSON serializer"
    return None


def _data(attributes: Mapping[str, str], body: bytes, where: str) -> dict[str, Any]:
    """The JSON object that is an event's data; whatever else a foreign one has is in the body alone."""
    told = attributes.get("datacontenttype")
    foreign = attributes["type"] not in _TYPES
    if foreign and (not body or not is_json(told)):
        return {}
    if not is_json(told):
        raise SchemaError(f"{where}: the data is {(told or '')[:80]!r}, not JSON")
    try:
        data = _parse(body, where, _ANY)
    except SchemaError:
        if foreign and (told is None or _other_format(body)):  # it never said that this is plain JSON
            return {}
        raise
    if isinstance(data, dict):
        return data
    if foreign:
        return {}
    raise SchemaError(f"{where}: the data is {type(data).__name__}, not a JSON object")


def _check_size(body: bytes, where: str) -> None:
    if len(body) > MAX_DECODE_BYTES:
        raise SchemaError(f"{where}: {len(body)} bytes are more than the {MAX_DECODE_BYTES} that are read")


def _check_attributes(attributes: Mapping[str, str], where: str) -> None:
    """The rules of CloudEvents 1.0 for attributes."""
    if attributes.get("specversion") != "1.0":
        raise SchemaError(
            f"{where}: specversion is {attributes.get('specversion', 'absent')[:40]!r}, not '1.0'"
        )
    for name in ("id", "source", "type"):
        if not attributes.get(name):
            raise SchemaError(f"{where}: attribute {name!r} is required")
    for name, value in attributes.items():
        if not _NAME.fullmatch(name) or name == "data":
            raise SchemaError(f"{where}: {name[:40]!r} is not an attribute name: a-z and 0-9")
        if _FORBIDDEN.search(value):
            raise SchemaError(f"{where}: attribute {name!r} holds a control character")
    time = attributes.get("time")
    if time is not None and not _RFC3339.fullmatch(time):
        raise SchemaError(f"{where}: time {time[:40]!r} is not RFC 3339")
