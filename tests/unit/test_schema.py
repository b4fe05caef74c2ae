"""The schemas say what the model says, and no change may break a consumer."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import shutil
import types
import typing
from collections.abc import Callable, Iterator
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from schemas.check import check, incompatibilities
from schemas.new import add_next, rehash, release
from virtbus import schema
from virtbus.envelope import ROUTING_WORDS
from virtbus.errors import InputMissing, SchemaError
from virtbus.model import Gap, Heartbeat, IoError, IoErrorResolved
from virtbus.words import Phase, Word

IO_ERROR = "io.virtbus.domain.io_error.v1"
TYPES = {cls.TYPE: cls for cls in (IoError, IoErrorResolved, Gap, Heartbeat)}

# Append only, from the first release on. A hash that stands here was released: its file never changes again.
RELEASED: dict[str, str] = {
    "urn:virtbus:schema:envelope:1.0":
        "448e626e291f6f6d71c505bd743d78a646d6d82a74af1147af2ce5c72784ec8f",
    "urn:virtbus:schema:io.virtbus.agent.gap.v1:1.0":
        "6243be2a5b319f824267aba2031b33cbb9a07f891a57569cbf963f2bd20f5cd8",
    "urn:virtbus:schema:io.virtbus.agent.heartbeat.v1:1.0":
        "b7c0b2a440fc888dc2d4f95baf82abb82b42ec68989f6b3119468fb8786e1bf0",
    "urn:virtbus:schema:io.virtbus.domain.io_error.v1:1.0":
        "8ac15e6973b1ae96b759699181ed82c7b04b5af05698c72fc806390dbd885182",
    "urn:virtbus:schema:io.virtbus.domain.io_error_resolved.v1:1.0":
        "23b0e7b7b76187f212381aa1854ce9c64ac164f097db4a6ae470f35ae0e61262",
}  # fmt: skip


# ------------------------------------------------------------------------------------- what is bundled


def test_every_event_type_has_a_schema_and_an_envelope_stands_beside_them() -> None:
    assert {entry.type for entry in schema.entries()} == {*TYPES, "envelope"}


def test_a_released_schema_file_never_changes() -> None:
    folder = schema.location()
    now = {e.id: hashlib.sha256((folder / e.file).read_bytes()).hexdigest() for e in schema.entries()}
    assert {id_: now.get(id_) for id_ in RELEASED} == RELEASED


def test_every_released_schema_is_pinned_here() -> None:
    assert {entry.id for entry in schema.entries() if entry.status == "released"} == set(RELEASED)


def test_the_bundled_schemas_pass_their_own_gate() -> None:
    assert check(schema.location()) == []


@pytest.mark.parametrize("entry", schema.entries(), ids=lambda entry: entry.id)
def test_every_schema_has_examples_that_fit_it(entry: schema.SchemaFile) -> None:
    examples = schema.load(entry.id)["examples"]
    assert examples
    for example in examples:
        assert schema.validate(entry.id, example) == []


@pytest.mark.parametrize("entry", schema.entries(), ids=lambda entry: entry.id)
def test_every_property_has_a_title_a_description_and_an_example(entry: schema.SchemaFile) -> None:
    document = schema.load(entry.id)
    for path, node in properties(document):
        assert node.get("title"), path
        assert node.get("description", "").strip().endswith("."), path
        if not is_composite(node) and path != "data":
            assert node.get("examples"), path


@pytest.mark.parametrize("entry", schema.entries(), ids=lambda entry: entry.id)
def test_every_example_of_a_property_fits_the_property(entry: schema.SchemaFile) -> None:
    document = schema.load(entry.id)
    for path, node in properties(document):
        validator = jsonschema_rs.Draft202012Validator({**node, "$defs": document.get("$defs", {})})
        for example in node.get("examples", []):
            assert validator.is_valid(example), (path, example)


@pytest.mark.parametrize("entry", schema.entries(), ids=lambda entry: entry.id)
def test_durations_and_sizes_tell_their_unit_in_name_and_description(entry: schema.SchemaFile) -> None:
    for path, node in properties(schema.load(entry.id)):
        name = path.rpartition(".")[2]
        for suffix, word in (("_seconds", "seconds"), ("_bytes", "bytes"), ("_per_minute", "per minute")):
            if name.endswith(suffix):
                assert word in node["description"], path


@pytest.mark.parametrize("entry", schema.entries(), ids=lambda entry: entry.id)
def test_unknown_fields_are_allowed_everywhere(entry: schema.SchemaFile) -> None:
    document = schema.load(entry.id)
    example = copy.deepcopy(document["examples"][0])

    def add(node: Any) -> None:
        if isinstance(node, dict):
            for value in list(node.values()):
                add(value)
            node["afterthought"] = "x"
        elif isinstance(node, list):
            for value in node:
                add(value)

    add(example)
    assert schema.validate(entry.id, example) == []


def properties(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every property of a schema and of its definitions."""
    for name, child in node.get("properties", {}).items():
        here = f"{path}.{name}" if path else name
        yield here, child
        yield from properties(child, here)
    for name, definition in node.get("$defs", {}).items():
        yield from properties(definition, name)


def is_composite(node: dict[str, Any]) -> bool:
    return "$ref" in node or "anyOf" in node


# ------------------------------------------------------------------------------ the schemas and the model


@pytest.mark.parametrize("type_", TYPES)
def test_the_newest_schema_says_exactly_what_the_model_says(type_: str) -> None:
    document = schema.load(schema.latest(type_).id)
    compare(document, document, TYPES[type_], type_)


def compare(document: dict[str, Any], node: dict[str, Any], cls: Any, where: str) -> None:
    """Fields, their order, their types and what may be null, in all depths."""
    hints = typing.get_type_hints(cls)
    names = [item.name for item in dataclasses.fields(cls)]
    assert list(node["properties"]) == names, where
    assert sorted(node["required"]) == sorted(names), where
    for name in names:
        same(document, node["properties"][name], hints[name], f"{where}.{name}")


def same(document: dict[str, Any], node: dict[str, Any], hint: Any, where: str) -> None:
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    nullable = types.NoneType in options
    (hint,) = [option for option in options if option is not types.NoneType]
    if dataclasses.is_dataclass(hint):
        branches = node.get("anyOf", [node])
        assert nullable == ({"type": "null"} in branches), where
        name = branches[0]["$ref"].rpartition("/")[2]
        compare(document, document["$defs"][name], hint, where)
        return
    declared = node["type"] if isinstance(node["type"], list) else [node["type"]]
    assert nullable == ("null" in declared), where
    if typing.get_origin(hint) is tuple:
        assert declared == ["array"], where
        item = typing.get_args(hint)[0]
        if dataclasses.is_dataclass(item):
            compare(document, document["$defs"][node["items"]["$ref"].rpartition("/")[2]], item, where)
        else:
            same(document, node["items"], item, where + "[]")
        return
    (plain,) = [word for word in declared if word != "null"]
    if issubclass(hint, Enum):
        words = node.get("enum") if hint is Phase else node.get("x-known-values")
        assert words is not None, where
        assert issubclass(hint, Word) == ("x-known-values" in node), where
        assert words == [member.value for member in hint], where
        return
    if hint is datetime:
        assert node["format"] == "date-time", where
    assert not {"x-known-values", "enum"} & node.keys(), f"{where}: its words stand in no enum"
    assert (
        plain == {str: "string", int: "integer", float: "number", bool: "boolean", datetime: "string"}[hint]
    )


# ------------------------------------------------------------------------------------------- validation


def example() -> dict[str, Any]:
    loaded: dict[str, Any] = schema.load(schema.latest(IO_ERROR).id)["examples"][0]
    return loaded


def test_all_problems_are_told_at_once_each_with_its_place() -> None:
    data = example()
    data["host"]["name"] = None
    del data["error"]["reason"]
    data["incident"]["phase"] = "gone"
    data["device"]["policy"]["write"] = 3
    data["device"]["source"] = 7
    told = {problem.pointer: (problem.expected, problem.found) for problem in schema.validate(IO_ERROR, data)}
    assert told == {
        "/host/name": ("string", "null"),
        "/error/reason": ("a value (null when unknown)", "nothing"),
        "/incident/phase": ('one of ["opened", "updated", "resolved"]', '"gone"'),
        "/device/policy/write": ("null or string", "3"),
        "/device/source": ("object or null", "7"),
    }


def test_a_pointer_escapes_slash_and_tilde() -> None:
    assert schema.pointer(["a/b", "~", 0]) == "/a~1b/~0/0"


def test_a_huge_wrong_value_is_told_in_short() -> None:
    (problem,) = schema.validate(IO_ERROR, {**example(), "origin": ["x" * 100_000]})
    assert len(str(problem)) < 300


def test_a_later_minor_is_checked_by_the_newest_that_is_known() -> None:
    assert schema.resolve(f"urn:virtbus:schema:{IO_ERROR}:1.999") == schema.latest(IO_ERROR)


@pytest.mark.parametrize(
    "name", [f"urn:virtbus:schema:{IO_ERROR}:9.0", "io.virtbus.nothing.v1", "urn:other:x:1.0", ""]
)
def test_an_unknown_schema_is_an_error_that_says_so(name: str) -> None:
    with pytest.raises(SchemaError, match="no schema"):
        schema.validate(name, {})


@pytest.mark.parametrize("value", [object(), {1: 2}, float("nan"), {"a": {1, 2}}])
def test_what_is_not_json_is_a_problem_and_no_crash(value: object) -> None:
    assert schema.validate(IO_ERROR, value)


# ----------------------------------------------------------------------------------------------- the gate


def mutate(change: Callable[[dict[str, Any]], object]) -> list[str]:
    old = schema.load(schema.latest(IO_ERROR).id)
    new = copy.deepcopy(old)
    change(new)
    return incompatibilities(old, new)


def domain(new: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = new["$defs"]["domain"]
    return found


REFUSED: dict[str, Callable[[dict[str, Any]], object]] = {
    "a required field is removed": lambda new: new["properties"].pop("origin"),
    "a field of a definition is removed": lambda new: domain(new)["properties"].pop("name"),
    "a field is no longer required": lambda new: domain(new)["required"].remove("name"),
    "a field is renamed": lambda new: new["properties"].update(source=new["properties"].pop("origin")),
    "a type is narrowed": lambda new: domain(new)["properties"]["id"].update(type="integer"),
    "a type is widened": lambda new: domain(new)["properties"]["name"].update(type=["string", "null"]),
    "an open enum is closed": lambda new: new["properties"]["origin"].update(enum=["event"]),
    "a closed enum is opened": lambda new: new["$defs"]["incident"]["properties"]["phase"].pop("enum"),
    "a closed enum grows": lambda new: new["$defs"]["incident"]["properties"]["phase"]["enum"].append("x"),
    "a known word goes": lambda new: new["properties"]["origin"]["x-known-values"].remove("replay"),
    "a title changes": lambda new: domain(new)["properties"]["name"].update(title="Guest"),
    "a description changes": lambda new: domain(new)["properties"]["name"].update(description="Other."),
    "a unit changes": lambda new: new["$defs"]["evidence"]["properties"]["capacity_bytes"].update(
        description="Size that the guest sees, in KiB; null when not looked at."
    ),
    "a pattern is added": lambda new: domain(new)["properties"]["name"].update(pattern="^a"),
    "a length is bounded": lambda new: domain(new)["properties"]["name"].update(maxLength=10),
    "a bound moves": lambda new: new["$defs"]["occurrences"]["properties"]["count"].update(minimum=-1),
    "an object is closed": lambda new: domain(new).update(additionalProperties=False),
    "what an array holds changes": lambda new: new["properties"]["truncated"]["items"].update(type="integer"),
    "an object may be null": lambda new: new["properties"].update(host={"anyOf": [{"type": "null"}]}),
    "a definition is removed": lambda new: new["$defs"].pop("policy"),
}
ALLOWED: dict[str, Callable[[dict[str, Any]], object]] = {
    "nothing changes": lambda new: None,
    "a field is added": lambda new: new["properties"].update(extra={"type": "string"}),
    "a required field is added": lambda new: (
        domain(new)["properties"].update(extra={"type": "string"}),
        domain(new)["required"].append("extra"),
    ),
    "an example is added": lambda new: new["examples"].append(example()),
    "an open enum gets a word": lambda new: new["properties"]["origin"]["x-known-values"].append("guess"),
    "a definition is added": lambda new: new["$defs"].update(extra={"type": "object"}),
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_a_minor_version_is_refused_when(change: Callable[[dict[str, Any]], object]) -> None:
    assert mutate(change)


@pytest.mark.parametrize("change", ALLOWED.values(), ids=ALLOWED)
def test_a_minor_version_is_allowed_when(change: Callable[[dict[str, Any]], object]) -> None:
    assert mutate(change) == []


def test_a_field_added_to_a_closed_object_is_refused() -> None:
    old = {"type": "object", "properties": {}, "additionalProperties": False}
    assert incompatibilities(old, {**old, "properties": {"a": {"type": "string"}}})


def test_an_attribute_added_to_the_envelope_must_be_one_that_older_readers_take() -> None:
    old = schema.load(schema.ENVELOPE)
    text, list_ = copy.deepcopy(old), copy.deepcopy(old)
    text["properties"]["traceparent"] = {"type": "string"}
    list_["properties"]["tags"] = {"type": "array"}
    assert incompatibilities(old, text) == []
    assert incompatibilities(old, list_)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The bundled schemas as a release has them, to be spoilt."""
    return as_released(tmp_path / "schemas")


def as_released(folder: Path) -> Path:
    """A copy of the bundled schemas, all of them released."""
    shutil.copytree(schema.location(), folder)
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps([{**item, "status": "released"} for item in index]))
    return folder


def add_minor(folder: Path, document: dict[str, Any], version: str = "1.1") -> None:
    """Put a new minor version of io_error beside the old ones, as its author would."""
    urn = f"{schema.PREFIX}{IO_ERROR}:{version}"
    document = {**document, "$id": urn}
    raw = json.dumps(document).encode()
    name = f"{IO_ERROR}/{version}.json"
    (folder / name).write_bytes(raw)
    index = json.loads((folder / "index.json").read_text())
    index.append(
        {
            "id": urn,
            "type": IO_ERROR,
            "version": version,
            "file": name,
            "sha256": hashlib.sha256(raw).hexdigest(),
            "status": "draft",
        }
    )
    (folder / "index.json").write_text(json.dumps(index))


def test_a_new_minor_is_made_changed_and_released_by_a_command(copied: Path, tmp_path: Path) -> None:
    made = add_next(copied, IO_ERROR)
    assert made == copied / IO_ERROR / "1.1.json"
    assert check(copied) == []
    with pytest.raises(SystemExit, match="is a draft"):
        add_next(copied, IO_ERROR)
    document = json.loads(made.read_text())
    document["properties"]["extra"] = {"type": "string"}
    made.write_text(json.dumps(document))
    assert [line for line in check(copied) if "1.1.json" in line and "stale" in line]
    assert rehash(copied) == [f"{IO_ERROR}/1.1.json"]
    assert check(copied) == []
    pins = tmp_path / "test_pins.py"
    pins.write_text("import os\n\nRELEASED: dict[str, str] = {}\n\nOTHER = {}\n")
    id_ = f"{schema.PREFIX}{IO_ERROR}:1.1"
    assert release(copied, pins) == [id_]
    pinned: dict[str, Any] = {}
    exec(pins.read_text(), pinned)
    assert pinned["RELEASED"] == {id_: hashlib.sha256(made.read_bytes()).hexdigest()}
    assert pinned["OTHER"] == {}
    add_next(copied, "envelope")
    assert release(copied, pins) == [f"{schema.PREFIX}envelope:1.1"]
    exec(pins.read_text(), pinned)
    assert len(pinned["RELEASED"]) == 2
    assert release(copied, pins) == []
    assert check(copied) == []


def test_a_type_that_nobody_knows_has_no_next_minor(copied: Path) -> None:
    with pytest.raises(SystemExit, match=r"known: envelope, io\.virtbus"):
        add_next(copied, "io.virtbus.domain.io_eror.v1")


def test_a_compatible_minor_passes_the_gate(copied: Path) -> None:
    document = schema.load(schema.latest(IO_ERROR).id)
    document["properties"]["extra"] = {"type": "string"}
    add_minor(copied, document)
    assert check(copied) == []


def test_a_minor_is_checked_against_every_older_one_not_only_the_last(copied: Path) -> None:
    document = schema.load(schema.latest(IO_ERROR).id)
    document["properties"]["extra"] = {"type": "string"}
    add_minor(copied, document, "1.1")
    document["properties"]["extra"] = {"type": "integer"}
    add_minor(copied, document, "1.2")
    (reason,) = check(copied)
    assert "breaks readers of 1.1" in reason


def test_a_breaking_minor_is_stopped_by_the_gate(copied: Path) -> None:
    document = schema.load(schema.latest(IO_ERROR).id)
    document["properties"]["origin"]["type"] = ["string", "null"]
    add_minor(copied, document)
    assert any("breaks readers of 1.0" in reason and "type changed" in reason for reason in check(copied))


def test_a_skipped_minor_is_stopped(copied: Path) -> None:
    add_minor(copied, schema.load(schema.latest(IO_ERROR).id), "1.3")
    assert any("follow each other" in reason for reason in check(copied))


def test_an_example_that_does_not_fit_is_stopped(copied: Path) -> None:
    document = schema.load(schema.latest(IO_ERROR).id)
    document["examples"].append({})
    add_minor(copied, document)
    assert any("example 2: /origin" in reason for reason in check(copied))


def test_an_invalid_schema_is_stopped(copied: Path) -> None:
    document = schema.load(schema.latest(IO_ERROR).id)
    document["properties"]["extra"] = {"type": "nonsense", "description": "x"}
    add_minor(copied, document)
    assert any("not a valid JSON Schema" in reason for reason in check(copied))


def test_a_changed_released_file_is_stopped(copied: Path) -> None:
    file = copied / IO_ERROR / "1.0.json"
    file.write_bytes(file.read_bytes() + b"\n")
    assert any("a released file never changes" in reason for reason in check(copied))


def test_a_released_file_that_changed_together_with_the_index_is_stopped(
    copied: Path, tmp_path: Path
) -> None:
    file = copied / IO_ERROR / "1.0.json"
    file.write_bytes(file.read_bytes() + b"\n")
    index = json.loads((copied / "index.json").read_text())
    for item in index:
        if item["type"] == IO_ERROR:
            item["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (copied / "index.json").write_text(json.dumps(index))
    assert check(copied) == []
    released = as_released(tmp_path / "released")
    assert any("was changed" in line for line in check(copied, released=released))


def test_a_released_file_that_is_gone_is_stopped(copied: Path, tmp_path: Path) -> None:
    (copied / IO_ERROR / "1.0.json").unlink()
    assert any("can't be read" in line for line in check(copied))
    released = as_released(tmp_path / "released")
    assert any("is gone" in line for line in check(copied, released=released))


def test_a_file_that_is_not_in_the_index_is_stopped(copied: Path) -> None:
    (copied / IO_ERROR / "1.1.json").write_text("{}")
    assert any("not in index.json" in line for line in check(copied))


def test_an_exported_copy_is_the_same_and_passes_the_gate(tmp_path: Path) -> None:
    schema.export(tmp_path)
    assert check(tmp_path, released=schema.location()) == []


def test_a_folder_without_an_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match=str(tmp_path)):
        check(tmp_path)


def test_every_routing_word_has_a_schema() -> None:
    assert {schema.latest(type_).type for type_ in ROUTING_WORDS} == set(TYPES)
