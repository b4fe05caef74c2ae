"""The bundled JSON schemas: which there are, and whether data fits one.

A schema is named by its urn, `urn:virtbus:schema:<type>:<major>.<minor>`; no network is needed to resolve
it. The files stand in `schemas/` of a checkout and in `virtbus/_schemas` of an installed package.
"""

from __future__ import annotations

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
class SchemaFile:
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
def entries() -> tuple[SchemaFile, ...]:
    """All bundled schemas, sorted by type and version."""
    return read_index(location())


def read_index(folder: Path) -> tuple[SchemaFile, ...]:
    """The schemas that a folder's index.json lists. Raises InputMissing, SchemaError."""
    try:
        listed = json.loads(folder.joinpath("index.json").read_bytes())
        return tuple(sorted((SchemaFile(**item) for item in listed), key=lambda e: (e.type, e.order)))
    except OSError as error:
        raise InputMissing(f"no schema index at {folder}/index.json: {error.strerror or error}") from error
    except (ValueError, TypeError) as error:
        raise SchemaError(f"{folder}/index.json is not an index of schemas: {error}") from error


def parse_urn(dataschema: str) -> tuple[str, int, int] | None:
    """(type, major, minor) of one of our urns, or None for anything else."""
    match = _URN.fullmatch(dataschema)
    return (match[1], int(match[2]), int(match[3])) if match else None


@cache
def latest(type_: str) -> SchemaFile:
    """The newest bundled schema of an event type; raises SchemaError when the type is unknown."""
    found = [entry for entry in entries() if entry.type == type_]
    if not found:
        known = ", ".join(sorted({entry.type for entry in entries()}))
        raise SchemaError(f"no schema for type {clip(type_)}: known are {known}")
    return found[-1]


def resolve(dataschema_or_type: str) -> SchemaFile:
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
    """The problems behind one error; for "object or null", those inside the object."""
    if error.kind.name == "anyOf":
        branches: list[list[ValidationError]] = error.kind.as_dict().get("context", [])
        for branch in branches:
            if all(
                inner.kind.name != "type" or inner.instance_path != error.instance_path for inner in branch
            ):
                return [one for inner in branch for one in _problems(inner)]
        types = [t for branch in branches for inner in branch for t in inner.kind.as_dict().get("types", ())]
        return [problem(error)._replace(expected=" or ".join(types))]
    return [problem(error)]


def problem(error: ValidationError) -> Problem:
    """One error of jsonschema-rs as a place, what was expected there and what was found."""
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
    return Problem(pointer(path), _expected(keyword, facts), found, clip_text(error.message, 400))


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
    return clip_text(shown, _FOUND_CHARS)


def clip_text(shown: str, limit: int) -> str:
    """Text of at most `limit` characters."""
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


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
