"""A model object as canonical JSON: nothing in it that JSON or a header can't hold, and small enough."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from enum import Enum
from functools import cache
from operator import attrgetter
from typing import Any

import msgspec

from virtbus import schema

# 64 KiB on the wire is safe with every broker and receiver. The attributes are bounded (14 of at most 256
# characters, the subject a little more), so this leaves room for them in either mode.
MAX_WIRE_BYTES = 64 * 1024
MAX_DATA_BYTES = 58_000
_MAX_ATTRIBUTE_CHARS = 256
_MAX_POINTERS = 50
_SHORTEST = 40  # what has a form of its own (a UUID has 36 characters, a time 27) is never cut

_PLAIN_TEXT = re.compile(rf"[\x20-\x7e]{{1,{_MAX_ATTRIBUTE_CHARS}}}")
SURROGATES = re.compile("[\ud800-\udfff]")
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


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
        return SURROGATES.sub("\ufffd", value)
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
