"""`virtbus config`: the effective settings, their schema, and an offline check."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

import click

from virtbus import config
from virtbus.commands import sample, wiring
from virtbus.commands.options import (
    bus,
    common,
    libvirt,
    load,
    state_dir,
)
from virtbus.errors import ConfigError


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def show(loaded: config.Loaded, *, as_json: bool, out: TextIO) -> None:
    """Print all settings, redacted, with their origins."""
    effective = config.effective(loaded.config)
    if as_json:
        json.dump({"settings": effective, "origins": dict(loaded.origins)}, out, indent=2, sort_keys=True)
        out.write("\n")
        return
    for key, value in _flat(effective):
        origin = loaded.origins.get(key, "default")
        out.write(f"{key} = {json.dumps(value, ensure_ascii=False)}  # {origin}\n")


def schema(out: TextIO) -> None:
    """Print the JSON schema of the settings."""
    json.dump(config.json_schema(), out, indent=2)
    out.write("\n")


def check(loaded: config.Loaded, out: TextIO) -> None:
    """Check what can be checked offline. Raises ConfigError with all problems."""
    settings = loaded.config
    named = {
        "bus.url_file": settings.bus.url_file,
        "bus.password_file": settings.bus.password_file,
        "bus.tls.ca_file": settings.bus.tls.ca_file,
        "bus.tls.cert_file": settings.bus.tls.cert_file,
        "bus.tls.key_file": settings.bus.tls.key_file,
        "bus.kafka.oauth_token_file": settings.bus.kafka.oauth_token_file,
    }
    problems = [
        f"{key} = {path}: can't be read; check path and rights"
        for key, path in named.items()
        if path is not None and not os.access(path, os.R_OK)
    ]
    if not problems:
        try:
            wiring.open_bus(settings).close()
        except ConfigError as error:
            problems += str(error).splitlines()
    if problems:
        raise ConfigError("\n".join(problems))
    out.write(f"settings are good ({loaded.file or 'no file: defaults, environment and flags'})\n")


# ------------------------------------------------------------------------------- the command line


@click.group("config")
def command() -> None:
    """Show and check the settings.

    \b
    Example: virtbus config check
    """


@command.command("show")
@common
@bus
@libvirt
@state_dir
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def show_command(as_json: bool, **options: Any) -> None:
    """Print the effective settings, without secrets, and where each one comes from.

    \b
    Example: virtbus config show --json
    """
    show(load(options), as_json=as_json, out=sys.stdout)


@command.command("schema")
def schema_command() -> None:
    """Print the settings' JSON schema.

    \b
    Example: virtbus config schema > virtbus.schema.json
    """
    schema(sys.stdout)


@command.command("sample")
def sample_command() -> None:
    """Print a configuration file with every setting, commented out, and its default.

    \b
    Example: virtbus config sample > /etc/virtbus/virtbus.toml
    """
    print("\n".join(sample.sample()))


@command.command("reference")
def reference_command() -> None:
    """Print the reference page of all settings, in Markdown.

    \b
    Example: virtbus config reference > docs/configuration.md
    """
    print("\n".join(sample.reference()))


@command.command("check")
@common
def check_command(**options: Any) -> None:
    """Check the settings without connecting to anything.

    \b
    Example: virtbus config check --config virtbus.toml
    """
    check(load(options), sys.stdout)
