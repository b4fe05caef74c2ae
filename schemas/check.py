"""Check a folder of schemas before a release: `python schemas/check.py [FOLDER] [--released OLD]`.

FOLDER is this one by default, OLD what `virtbus schema export` of an earlier release wrote. Ends with 0,
with 65 when something would break a consumer, with 66 when a folder can't be read.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema_rs

from virtbus.errors import VirtbusError
from virtbus.schema import PREFIX, SchemaFile, clip, clip_text, problem, read_index

HERE = Path(__file__).resolve().parent

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
    wrong: list[str] = []
    listed = read_index(folder)
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
            wrong.append(f"{entry.file}: not a valid JSON Schema: {clip_text(str(error), 300)}")
            continue
        examples = document.get("examples") or []
        if not examples:
            wrong.append(f"{entry.file}: no examples")
        for number, example in enumerate(examples):
            wrong.extend(
                f"{entry.file}: example {number}: {problem(error)}"
                for error in validator.iter_errors(example)
            )
        loaded[entry.id] = document
    wrong.extend(_check_rows(listed, loaded))
    if released is not None:
        wrong.extend(_check_released(folder, released))
    return wrong


def _check_rows(listed: tuple[SchemaFile, ...], loaded: Mapping[str, dict[str, Any]]) -> list[str]:
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
    for entry in read_index(released):
        if entry.status != "released":
            continue
        here, there = folder / entry.file, released / entry.file
        if not here.is_file():
            wrong.append(f"{entry.file}: was released, and is gone")
        elif here.read_bytes() != there.read_bytes():
            wrong.append(f"{entry.file}: was released, and was changed: make a new minor")
    return wrong


def main() -> int:
    """Print all that is wrong; the exit code."""
    parser = argparse.ArgumentParser(description="Check schemas for what would break a consumer.")
    parser.add_argument("folder", nargs="?", type=Path, default=HERE)
    parser.add_argument(
        "--released", type=Path, help="an earlier release's schemas: each must be here, unchanged"
    )
    given = parser.parse_args()
    try:
        wrong = check(given.folder, released=given.released)
    except VirtbusError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(
        "\n".join(wrong) or "every schema is valid, unchanged and readable by consumers of every older minor"
    )
    return 65 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
