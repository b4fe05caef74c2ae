"""`virtbus config`: the settings in force, their schema, a commented sample file, and an offline check."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import click

from virtbus import loading
from virtbus.commands.common import as_json, common, libvirt, load, on_bus, open_bus, state_dir
from virtbus.config import json_schema
from virtbus.errors import ConfigError


@click.group("config")
def command() -> None:
    """Show and check the settings.

    \b
    Example: virtbus config check
    """


@command.command("show")
@common
@on_bus
@libvirt
@state_dir
@as_json
def show_command(as_json: bool, **options: Any) -> None:
    """Print the effective settings, without secrets, and where each one comes from.

    \b
    Example: virtbus config show --json
    """
    loaded = load(options)
    shown = loading.effective(loaded.config)
    if as_json:
        data = {"settings": shown, "origins": dict(loaded.origins)}
        click.echo(json.dumps(data, indent=2, sort_keys=True))
        return
    for key, value in loading.leaves(shown):
        click.echo(f"{key} = {json.dumps(value, ensure_ascii=False)}  # {loaded.origins.get(key, 'default')}")


@command.command("schema")
def schema_command() -> None:
    """Print the settings' JSON schema.

    \b
    Example: virtbus config schema > virtbus.schema.json
    """
    click.echo(json.dumps(json_schema(), indent=2))


@command.command("sample")
def sample_command() -> None:
    """Print a configuration file with every setting, commented out, and its default.

    \b
    Example: virtbus config sample > /etc/virtbus/virtbus.toml
    """
    click.echo("\n".join(sample()))


@command.command("check")
@common
def check_command(**options: Any) -> None:
    """Check the settings without connecting to anything.

    \b
    Example: virtbus config check --config virtbus.toml
    """
    loaded = load(options)
    bus = loaded.config.bus
    named = {
        "bus.url_file": bus.url_file,
        "bus.password_file": bus.password_file,
        "bus.tls.ca_file": bus.tls.ca_file,
        "bus.tls.cert_file": bus.tls.cert_file,
        "bus.tls.key_file": bus.tls.key_file,
        "bus.kafka.oauth_token_file": bus.kafka.oauth_token_file,
    }
    problems = [
        f"{key} = {path}: can't be read; check path and rights"
        for key, path in named.items()
        if path is not None and not os.access(path, os.R_OK)
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    open_bus(loaded.config).close()
    click.echo(f"settings are good ({loaded.file or 'no file: defaults, environment and flags'})")


# -------------------------------------------------------------------------------- the settings, for people


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting, from the settings' JSON schema."""

    section: str  # dotted: "bus.kafka", empty for the top level
    purpose: str  # what its section is for
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


def settings() -> Iterator[Setting]:
    """Every setting, in the order of the model: the top level first, then section by section."""
    schema = json_schema()
    yield from _section("", "", loading.resolved(schema, schema), schema)


def _section(
    section: str, purpose: str, found: Mapping[str, Any], schema: Mapping[str, Any]
) -> Iterator[Setting]:
    inner: list[tuple[str, str, Mapping[str, Any]]] = []
    for name, each in found["properties"].items():
        node = loading.resolved(schema, each)
        says = str(each.get("description") or node.get("description", ""))
        if "properties" in node:
            inner.append((f"{section}.{name}".lstrip("."), says, node))
            continue
        wanted = [one for one in each.get("anyOf", [each]) if one.get("type") != "null"]
        examples = each.get("examples") or [x for one in wanted for x in one.get("examples", [])]
        yield Setting(
            section, purpose, name,
            type=" or ".join(map(_words, wanted)),
            bounds=" or ".join(filter(None, map(_bounds, wanted))),
            default=each.get("default"),
            says=says or next((one["description"] for one in wanted if "description" in one), ""),
            example=next(iter(examples), None),
        )  # fmt: skip
    for dotted, says, node in inner:
        yield from _section(dotted, says, node, schema)


_TYPES = {"integer": "whole number", "number": "number", "boolean": "true or false", "array": "list",
          "object": "table"}  # fmt: skip


def _words(node: Mapping[str, Any]) -> str:
    if "enum" in node:
        return "one of " + ", ".join(map(json.dumps, node["enum"]))
    return _TYPES.get(str(node.get("type")), "text")


def _bounds(node: Mapping[str, Any]) -> str:
    if "minimum" in node and "maximum" in node:
        return f"{node['minimum']:g} to {node['maximum']:g}"
    words = (("exclusiveMinimum", "more than"), ("minimum", "at least"), ("maximum", "at most"))
    return ", ".join(f"{word} {node[key]:g}" for key, word in words if key in node)


def sample() -> Iterator[str]:
    """A TOML file of all settings, each commented out with its default: lines without their ends."""
    yield "# virtbus: every setting with its default. A flag wins over the environment (VIRTBUS_BUS__URL),"
    yield "# that over this file. Check a change with `virtbus config check`; `virtbus config show` says"
    yield "# what is in force."
    section = ""
    for each in settings():
        if each.section != section:
            section = each.section
            yield from ("", f"# {each.purpose}", f"[{section}]")
        limits = f" ({each.bounds})" if each.bounds else ""
        yield from ("", f"# {each.says}: {each.type}{limits}")
        if each.default is None:
            shown = "…" if each.example is None else each.example
            yield f"# {each.name} = {toml(shown)}   # not set by default"
        else:
            yield f"# {each.name} = {toml(each.default)}"


def toml(value: Any) -> str:
    """A JSON value as TOML writes it (no null: TOML has none)."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        items = ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items())
        return f"{{ {items} }}" if items else "{}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
