"""The settings, written out for people: a commented sample file, and the rows of the reference page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from virtbus import config


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting, from the settings' JSON schema."""

    section: str  # dotted: "bus.kafka", empty for the top level
    name: str
    type: str  # for people: "whole number", "text", "one of …"
    bounds: str  # "1 to 16", "more than 0"; empty when there are none
    default: Any  # as JSON
    says: str
    example: Any = None

    @property
    def key(self) -> str:
        """The whole dotted name."""
        return f"{self.section}.{self.name}".lstrip(".")

    @property
    def variable(self) -> str:
        """The environment variable that sets it."""
        return config.ENVIRONMENT_PREFIX + self.key.replace(".", "__").upper()


_TYPES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "array": "list",
    "object": "table",
}


def settings() -> Iterator[Setting]:
    """Every setting, in the order of the model: the top level first, then section by section."""
    schema = config.json_schema()
    definitions = schema["$defs"]
    yield from _section("", _resolved(schema, definitions), definitions)


def sections() -> dict[str, str]:
    """What each section is for, by its dotted name."""
    schema = config.json_schema()
    definitions = schema["$defs"]
    found: dict[str, str] = {}

    def walk(prefix: str, section: Mapping[str, Any]) -> None:
        for name, each in section["properties"].items():
            inner = _resolved(each, definitions)
            if "properties" in inner:
                dotted = f"{prefix}.{name}".lstrip(".")
                found[dotted] = str(each.get("description") or inner.get("description", ""))
                walk(dotted, inner)

    walk("", _resolved(schema, definitions))
    return found


def _section(prefix: str, section: Mapping[str, Any], definitions: Mapping[str, Any]) -> Iterator[Setting]:
    inner: list[tuple[str, Mapping[str, Any]]] = []
    for name, each in section["properties"].items():
        found = _resolved(each, definitions)
        if "properties" in found:
            inner.append((f"{prefix}.{name}".lstrip("."), found))
            continue
        plain = [_resolved(one, definitions) for one in each.get("anyOf", [each])]
        wanted = [one for one in plain if one.get("type") != "null"]
        yield Setting(
            section=prefix,
            name=name,
            type=" or ".join(_words(one) for one in wanted),
            bounds=" or ".join(filter(None, map(_bounds, wanted))),
            default=each.get("default"),
            says=str(
                each.get("description")
                or next((one["description"] for one in wanted if "description" in one), "")
            ),
            example=next(
                iter(each.get("examples") or [x for one in wanted for x in one.get("examples", [])]), None
            ),
        )
    for dotted, found in inner:
        yield from _section(dotted, found, definitions)


def _resolved(each: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = each.get("$ref") or next(
        (one["$ref"] for one in each.get("allOf", ()) if "$ref" in one), None
    )
    return each if reference is None else definitions[reference.rpartition("/")[2]]


def _words(each: Mapping[str, Any]) -> str:
    if "enum" in each:
        return "one of " + ", ".join(json.dumps(word) for word in each["enum"])
    return _TYPES.get(str(each.get("type")), "text")


def _bounds(each: Mapping[str, Any]) -> str:
    low, high, above = each.get("minimum"), each.get("maximum"), each.get("exclusiveMinimum")
    if low is not None and high is not None:
        return f"{low:g} to {high:g}"
    words = []
    if above is not None:
        words.append(f"more than {above:g}")
    if low is not None:
        words.append(f"at least {low:g}")
    if high is not None:
        words.append(f"at most {high:g}")
    return ", ".join(words)


def sample() -> Iterator[str]:
    """A TOML file of all settings, each commented out with its default: lines without their ends."""
    yield "# virtbus: every setting with its default. A flag wins over the environment (VIRTBUS_BUS__URL),"
    yield "# that over this file. Check a change with `virtbus config check`; `virtbus config show` tells"
    yield "# what is in force."
    purposes, section = sections(), ""
    for each in settings():
        if each.section != section:
            section = each.section
            yield ""
            yield f"# {purposes[section]}"
            yield f"[{section}]"
        yield ""
        limits = f" ({each.bounds})" if each.bounds else ""
        yield f"# {each.says}: {each.type}{limits}"
        if each.default is None:
            shown = "…" if each.example is None else each.example
            yield f"# {each.name} = {toml(shown)}   # not set by default"
        else:
            yield f"# {each.name} = {toml(each.default)}"


def reference() -> Iterator[str]:
    """The page docs/configuration.md: a table a section, a row a setting."""
    yield "# Configuration reference"
    yield ""
    yield "Written by `virtbus config reference`; do not edit. A flag wins over the environment, that over"
    yield "the file `/etc/virtbus/virtbus.toml`, that over the default. `virtbus config sample` prints all"
    yield "of this as a commented file, `virtbus config show` what is in force and where each value comes"
    yield "from, and `virtbus config check` every problem with its place. In the environment `bus.url` is"
    yield "`VIRTBUS_BUS__URL`: two underscores for each dot."
    purposes, section = sections(), None
    for each in settings():
        if each.section != section:
            section = each.section
            yield ""
            yield f"## {f'[{section}]' if section else 'Top level'}"
            yield ""
            if section:
                yield f"{purposes[section].rstrip('.')}."
                yield ""
            yield "| setting | takes | default | |"
            yield "|---|---|---|---|"
        takes = each.type + (f", {each.bounds}" if each.bounds else "")
        default = "" if each.default is None else f"`{toml(each.default)}`"
        says = each.says if each.example is None else f"{each.says}; for example `{toml(each.example)}`"
        yield f"| `{each.name}` | {_cell(takes)} | {_cell(default)} | {_cell(says)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def toml(value: Any) -> str:
    """A JSON value as TOML writes it (no null: TOML has none)."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return (
            "{ " + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + " }"
            if value
            else "{}"
        )
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
