"""`virtbus schema`: show, check and hand out the bundled schemas."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import click

from virtbus import schema
from virtbus.commands.options import (
    FILE,
)
from virtbus.errors import InputMissing, SchemaError


def list_schemas(out: TextIO, *, as_json: bool = False) -> None:
    """One line a schema: its id, status and the beginning of its SHA-256; as JSON the whole index."""
    if as_json:
        out.write(json.dumps([asdict(entry) for entry in schema.entries()], indent=2) + "\n")
        return
    for entry in schema.entries():
        out.write(f"{entry.id:<62} {entry.status:<8} {entry.sha256[:8]}\n")


def show(name: str, out: TextIO) -> None:
    """Print one schema, named by its urn or, for the newest, by its event type."""
    entry = schema.resolve(name)
    if schema.parse_urn(name) is not None and entry.id != name:
        raise SchemaError(f"no schema {name!r}: the newest of its major is {entry.id}")
    out.write(schema.text(entry.id).decode())


def export(target: Path, out: TextIO) -> None:
    """Write all schemas and the index below `target`."""
    written = schema.export(target)
    out.write(f"{len(written)} files written to {target}\n")


def check(out: TextIO, *, folder: Path | None = None, released: Path | None = None) -> int:
    """Print all that is wrong with a folder of schemas (default: the bundled ones); 0 or 65.

    `released` is the folder of an earlier release (`virtbus schema export`), whose files must all be there
    unchanged.
    """
    for named in (folder, released):
        if named is not None and not named.is_dir():
            raise InputMissing(f"{named} is not a folder of schemas")
    wrong = schema.check(folder or schema.location(), released=released)
    for line in wrong:
        out.write(line + "\n")
    if wrong:
        return SchemaError.exit_code
    out.write("every schema is valid, unchanged and readable by consumers of every older minor\n")
    return 0


# ------------------------------------------------------------------------------- the command line


@click.group("schema")
def command() -> None:
    """Show, check and hand out the events' JSON schemas.

    \b
    Example: virtbus schema list
    """


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def list_command(as_json: bool) -> None:
    """List the schemas of this release: id, status and how the SHA-256 begins (all of it with --json).

    \b
    Example: virtbus schema list --json
    """
    list_schemas(sys.stdout, as_json=as_json)


@command.command("show")
@click.argument("name", metavar="URN|TYPE")
def show_command(name: str) -> None:
    """Print a schema; an event type prints its newest.

    \b
    Example: virtbus schema show io.virtbus.domain.io_error.v1
    """
    show(name, sys.stdout)


@command.command("export")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def export_command(folder: Path) -> None:
    """Write all schemas below FOLDER, for other languages and registries.

    \b
    Example: virtbus schema export schemas
    """
    export(folder, sys.stdout)


@command.command("check")
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option(
    "--released",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="An earlier release's schemas: each of its files must be here, unchanged.",
)
def check_command(folder: Path | None, released: Path | None) -> None:
    """Check FOLDER [default: this release's schemas] for what would break a consumer.

    A released file never changes, and every minor version must be readable by a consumer of every older
    one. Ends with 0 or 65.

    \b
    Example: virtbus schema check schemas --released older-schemas
    """
    sys.exit(check(sys.stdout, folder=folder, released=released))


@command.command("asyncapi")
def asyncapi_command() -> None:
    """Print the AsyncAPI 3 document: exchange, topic, keys, headers and payloads.

    \b
    Example: virtbus schema asyncapi > asyncapi.json
    """
    from virtbus.commands import contract

    contract.asyncapi(sys.stdout)


@command.command("reference")
@click.argument("page", required=False, type=FILE)
def reference_command(page: Path | None) -> None:
    """Print the tables of all fields; with PAGE renew what stands between its markers.

    \b
    Example: virtbus schema reference docs/events.md
    """
    from virtbus.commands import contract

    contract.reference(sys.stdout, page=page)
