"""The bundled JSON schemas: which there are, whether data fits one, and whether a change of one is allowed.

A schema is named by its urn, `urn:virtbus:schema:<type>:<major>.<minor>`; no network is needed to resolve
it. The files stand in `schemas/` of a checkout and in `virtbus/_schemas` of an installed package.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from virtbus.errors import InputMissing, SchemaError

if TYPE_CHECKING:
    from jsonschema_rs import ValidationError

PREFIX = "urn:virtbus:schema:"
ENVELOPE = "urn:virtbus:schema:envelope:1.0"

_URN = re.compile(re.escape(PREFIX) + r"([a-z0-9_.]+):([0-9]{1,9})\.([0-9]{1,9})")
_FOUND_CHARS = 120
_MAX_PROBLEMS = 1000


@dataclass(frozen=True, slots=True)
class Entry:
    """One schema of the index. `type` is the event's type, or "envelope"."""

    id: str
    type: str
    version: str
    file: str  # below the schemas' folder
    sha256: str
    status: str  # "released": its file never changes again; "draft": not yet in any release

    @property
    def order(self) -> tuple[int, int]:
        """(major, minor), to sort by."""
        major, _, minor = self.version.partition(".")
        return int(major), int(minor)


class Problem(NamedTuple):
    """One way in which data does not fit its schema."""

    pointer: str  # JSON pointer (RFC 6901) of the place in the data; "" is the whole
    expected: str
    found: str
    message: str

    def __str__(self) -> str:
        return f"{self.pointer or '/'}: expected {self.expected}, found {self.found}"


def location() -> Path:
    """The folder of the bundled schemas: inside an installed package, else beside it in a checkout."""
    inside = Path(str(resources.files("virtbus"))) / "_schemas"
    if (inside / "index.json").is_file():
        return inside
    beside = Path(__file__).resolve().parent.parent / "schemas"
    if (beside / "index.json").is_file():
        return beside
    raise InputMissing("the schemas are missing from this installation: reinstall virtbus")


@cache
def entries() -> tuple[Entry, ...]:
    """All bundled schemas, sorted by type and version."""
    return _read_index(location())


def _read_index(folder: Path) -> tuple[Entry, ...]:
    try:
        listed = json.loads(folder.joinpath("index.json").read_bytes())
        return tuple(sorted((Entry(**item) for item in listed), key=lambda e: (e.type, e.order)))
    except OSError as error:
        raise InputMissing(f"no schema index at {folder}/index.json: {error.strerror or error}") from error
    except (ValueError, TypeError) as error:
        raise SchemaError(f"{folder}/index.json is not an index of schemas: {error}") from error


def parse_urn(dataschema: str) -> tuple[str, int, int] | None:
    """(type, major, minor) of one of our urns, or None for anything else."""
    match = _URN.fullmatch(dataschema)
    return (match[1], int(match[2]), int(match[3])) if match else None


@cache
def latest(type_: str) -> Entry:
    """The newest bundled schema of an event type; raises SchemaError when the type is unknown."""
    found = [entry for entry in entries() if entry.type == type_]
    if not found:
        known = ", ".join(sorted({entry.type for entry in entries()}))
        raise SchemaError(f"no schema for type {clip(type_)}: known are {known}")
    return found[-1]


def resolve(dataschema_or_type: str) -> Entry:
    """The schema to check against, by urn or by event type.

    A minor version later than all we know is checked by the newest we know of its major: every later minor
    fits it. Raises SchemaError for an unknown type or major.
    """
    urn = parse_urn(dataschema_or_type)
    if urn is None:
        return latest(dataschema_or_type)
    type_, major, minor = urn
    same_major = [e for e in entries() if e.type == type_ and e.order[0] == major]
    if not same_major:
        raise SchemaError(
            f"no schema {clip(dataschema_or_type)}: `virtbus schema list` shows those of this release"
        )
    for entry in same_major:
        if entry.order[1] == minor:
            return entry
    return same_major[-1]


@cache
def text(schema_id: str) -> bytes:
    """The file of a bundled schema, byte for byte; raises SchemaError when there is none of this id."""
    for entry in entries():
        if entry.id == schema_id:
            return location().joinpath(entry.file).read_bytes()
    raise SchemaError(f"no schema {clip(schema_id)}: `virtbus schema list` shows those of this release")


def load(schema_id: str) -> dict[str, Any]:
    """A bundled schema as a new object."""
    loaded: dict[str, Any] = json.loads(text(schema_id))
    return loaded


@cache
def _validator(schema_id: str) -> Any:
    import jsonschema_rs  # 26 ms and 8 MiB: only where something is validated

    return jsonschema_rs.Draft202012Validator(load(schema_id))


# By what the caller passed in: the hot path is one look-up and one call.
_validators: dict[str, Any] = {}


def validate(dataschema_or_type: str, data: object) -> list[Problem]:
    """All problems of `data` (as JSON gives it) under a schema, sorted by place; empty when it fits.

    Raises SchemaError for a schema we do not know.
    """
    validator = _validators.get(dataschema_or_type)
    if validator is None:
        validator = _validator(resolve(dataschema_or_type).id)
        if len(_validators) < 256:  # what a stranger sends must not grow us for ever
            _validators[dataschema_or_type] = validator
    try:
        if validator.is_valid(data):
            return []
        problems = {}
        for error in validator.iter_errors(data):
            for problem in _problems(error):
                problems[problem.pointer, problem.expected] = problem
            if len(problems) >= _MAX_PROBLEMS:
                break
    except (ValueError, TypeError, RecursionError) as error:
        return [Problem("", "JSON data", type(data).__name__, f"this is not JSON data: {error}")]
    return sorted(problems.values())


def pointer(path: list[str | int]) -> str:
    """The JSON pointer (RFC 6901) of a path of keys and indexes."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in path)


def _problems(error: ValidationError) -> list[Problem]:
    """One error's problems: an object where an object or null may stand is told by its own faults."""
    if error.kind.name == "anyOf":
        branches: list[list[ValidationError]] = error.kind.as_dict().get("context", [])
        for branch in branches:
            if all(
                inner.kind.name != "type" or inner.instance_path != error.instance_path for inner in branch
            ):
                return [problem for inner in branch for problem in _problems(inner)]
        types = [t for branch in branches for inner in branch for t in inner.kind.as_dict().get("types", ())]
        return [_problem(error)._replace(expected=" or ".join(types))]
    return [_problem(error)]


def _problem(error: ValidationError) -> Problem:
    kind = error.kind
    facts: dict[str, Any] = kind.as_dict()
    keyword = str(error.schema_path[-1]) if error.schema_path else ""
    path = list(error.instance_path)
    found = clip(error.instance)
    if kind.name == "propertyNames":
        name = str(facts["error"].instance)
        return Problem(pointer([*path, name]), "no property of this name", clip(name), "not a legal name")
    if kind.name == "required":
        missing = str(facts.get("property", ""))
        return Problem(
            pointer([*path, missing]), "a value (null when unknown)", "nothing", f"{missing!r} is required"
        )
    return Problem(pointer(path), _expected(keyword, facts), found, _clip_text(error.message, 400))


def _expected(keyword: str, facts: Mapping[str, Any]) -> str:
    match keyword:
        case "type":
            return " or ".join(sorted(facts.get("types", ())))
        case "enum":
            return "one of " + clip(facts.get("options"))
        case "const":
            return clip(facts.get("expected_value"))
        case "pattern":
            return f"text that matches {facts.get('pattern')}"
        case "minimum":
            return f"at least {facts.get('limit')}"
        case "maximum":
            return f"at most {facts.get('limit')}"
        case "minLength":
            return f"at least {facts.get('limit')} characters"
    return f"what {keyword!r} of the schema allows"


def clip(value: object) -> str:
    """A value as short ASCII JSON, for messages."""
    try:
        shown = json.dumps(value, ensure_ascii=True)
    except (ValueError, TypeError, RecursionError):
        shown = ascii(value)
    return _clip_text(shown, _FOUND_CHARS)


def _clip_text(shown: str, limit: int) -> str:
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


# --------------------------------------------------------------------------------- the compatibility gate

# What a new minor version may say differently about something that is already there.
_FREE = {"examples", "x-known-values", "$comment"}
_MAPS = {"properties", "$defs"}


def incompatibilities(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Why `new` can't be a later minor version of `old`: one line a reason, empty when it can.

    Forward-transitive: whatever fits `new` fits `old`, so that a consumer of any older minor reads it. All a
    new minor may do is add properties and definitions, require more, add examples and add known words to an
    open enum. Everything else about what exists (type, enum, bounds, title, description, unit) stays.
    """
    reasons: list[str] = []
    _compare(old, new, "", reasons, top=True)
    return reasons


def _compare(
    old: Mapping[str, Any], new: Mapping[str, Any], where: str, reasons: list[str], *, top: bool = False
) -> None:
    at = where or "/"
    for key in sorted(old.keys() | new.keys()):
        if key in _FREE and key != "x-known-values":
            continue
        if top and key == "$id":
            continue
        if key in _MAPS:
            before, after = old.get(key, {}), new.get(key, {})
            for name in sorted(before):
                if name not in after:
                    reasons.append(f"{at}: {key} {name!r} was removed")
                else:
                    _compare(before[name], after[name], f"{where}/{key}/{name}", reasons)
            if key == "properties":
                others = old.get("additionalProperties", True)
                reasons.extend(
                    f"{at}: {name!r} was added where older readers do not take it"
                    for name in sorted(after.keys() - before)
                    if not _admits(others, after[name])
                )
        elif key == "required":
            gone = set(old.get(key, ())) - set(new.get(key, ()))
            reasons.extend(f"{at}: {name!r} is no longer required" for name in sorted(gone))
        elif key == "x-known-values":
            gone = set(old.get(key, ())) - set(new.get(key, ()))
            reasons.extend(f"{at}: the known word {word!r} was removed" for word in sorted(gone))
            if (key in old) != (key in new):
                reasons.append(f"{at}: an open enum was {'closed or dropped' if key in old else 'made'}")
        elif key == "items" and isinstance(old.get(key), dict) and isinstance(new.get(key), dict):
            _compare(old[key], new[key], f"{where}/items", reasons)
        elif key == "anyOf" and _same_length(old.get(key), new.get(key)):
            for index, (before, after) in enumerate(zip(old[key], new[key], strict=True)):
                _compare(before, after, f"{where}/anyOf/{index}", reasons)
        elif old.get(key, _ABSENT) != new.get(key, _ABSENT):
            reasons.append(f"{at}: {key} changed from {_shown(old, key)} to {_shown(new, key)}")


def _admits(others: object, added: Mapping[str, Any]) -> bool:
    """Whether a schema of unknown properties (additionalProperties) takes all of a new property's types."""
    if not isinstance(others, dict):
        return others is True
    return "type" in added and _types(added) <= _types(others)


def _types(node: Mapping[str, Any]) -> set[str]:
    types = node.get("type", ())
    return {types} if isinstance(types, str) else set(types)


_ABSENT = object()


def _same_length(a: object, b: object) -> bool:
    return isinstance(a, list) and isinstance(b, list) and len(a) == len(b)


def _shown(schema: Mapping[str, Any], key: str) -> str:
    return clip(schema[key]) if key in schema else "nothing"


def check(folder: Path, *, released: Path | None = None) -> list[str]:
    """All that is wrong with a folder of schemas, one line each; empty when it may be released.

    Looks at: the index against the files and their hashes, `$id` and place of each, valid JSON Schema
    2020-12, examples that fit, an unbroken row of minors, and forward-transitive compatibility of each minor
    with every older one. With `released` (the folder of an earlier release) every released file of it must
    be here, byte for byte. Raises InputMissing or SchemaError when a folder has no readable index.
    """
    import jsonschema_rs

    wrong: list[str] = []
    listed = _read_index(folder)
    on_disk = {
        path.relative_to(folder).as_posix() for path in folder.glob("*/*.json") if path.name != "index.json"
    }
    wrong.extend(f"{name}: not in index.json" for name in sorted(on_disk - {e.file for e in listed}))
    loaded: dict[str, dict[str, Any]] = {}
    for entry in listed:
        try:
            raw = folder.joinpath(entry.file).read_bytes()
            document = json.loads(raw)
        except OSError as error:
            wrong.append(f"{entry.file}: in index.json, but can't be read: {error.strerror or error}")
            continue
        except ValueError as error:
            wrong.append(f"{entry.file}: not JSON: {error}")
            continue
        if hashlib.sha256(raw).hexdigest() != entry.sha256:
            hint = (
                "a released file never changes: make a new minor" if entry.status == "released" else "stale"
            )
            wrong.append(f"{entry.file}: not the file whose sha256 is in index.json ({hint})")
        if (entry.file, entry.id) != (
            f"{entry.type}/{entry.version}.json",
            f"{PREFIX}{entry.type}:{entry.version}",
        ):
            wrong.append(f"{entry.file}: type, version, file and id do not agree in index.json")
        if not isinstance(document, dict) or document.get("$id") != entry.id:
            wrong.append(f"{entry.file}: $id is not {entry.id}")
            continue
        try:
            jsonschema_rs.meta.validate(document)
            validator = jsonschema_rs.Draft202012Validator(document)
        except ValueError as error:
            wrong.append(f"{entry.file}: not a valid JSON Schema: {_clip_text(str(error), 300)}")
            continue
        examples = document.get("examples") or []
        if not examples:
            wrong.append(f"{entry.file}: no examples")
        for number, example in enumerate(examples):
            wrong.extend(
                f"{entry.file}: example {number}: {_problem(error)}"
                for error in validator.iter_errors(example)
            )
        loaded[entry.id] = document
    wrong.extend(_check_rows(listed, loaded))
    if released is not None:
        wrong.extend(_check_released(folder, released))
    return wrong


def _check_rows(listed: tuple[Entry, ...], loaded: Mapping[str, dict[str, Any]]) -> list[str]:
    wrong: list[str] = []
    for position, entry in enumerate(listed):
        older = [e for e in listed[:position] if e.type == entry.type and e.order[0] == entry.order[0]]
        if entry.order[1] != len(older):
            wrong.append(f"{entry.file}: minor versions must follow each other from 0")
        for before in older:
            if before.id in loaded and entry.id in loaded:
                wrong.extend(
                    f"{entry.file}: breaks readers of {before.version}: {reason}"
                    for reason in incompatibilities(loaded[before.id], loaded[entry.id])
                )
    return wrong


def _check_released(folder: Path, released: Path) -> list[str]:
    wrong: list[str] = []
    for entry in _read_index(released):
        if entry.status != "released":
            continue
        here, there = folder / entry.file, released / entry.file
        if not here.is_file():
            wrong.append(f"{entry.file}: was released, and is gone")
        elif here.read_bytes() != there.read_bytes():
            wrong.append(f"{entry.file}: was released, and was changed: make a new minor")
    return wrong


def export(target: Path) -> list[Path]:
    """Write every bundled schema and the index below `target`, for other languages and registries."""
    written: list[Path] = []
    source = location()
    try:
        for name in ["index.json", *(entry.file for entry in entries())]:
            place = target / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(source.joinpath(name).read_bytes())
            written.append(place)
    except OSError as error:
        raise InputMissing(f"can't write the schemas to {target}: {error.strerror or error}") from error
    return written
