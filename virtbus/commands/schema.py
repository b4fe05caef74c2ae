"""`virtbus schema`: show, check and hand out the bundled schemas."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from virtbus import schema
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
