"""`virtbus schema` and `virtbus validate`: the bundled schemas, and what events do not fit them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import click
import msgspec

from virtbus import schema
from virtbus.commands.common import as_json, progress
from virtbus.errors import InputMissing, SchemaError
from virtbus.schema import Problem

MAX_BYTES = 1024 * 1024  # of one event, as everywhere
_LONG_BYTES = 16 << 20  # less is checked within a second
_NOT_JSON = (msgspec.MsgspecError, UnicodeError, ValueError, RecursionError)


@click.group("schema")
def command() -> None:
    """Show and hand out the events' JSON schemas.

    \b
    Example: virtbus schema list
    """


@command.command("list")
@as_json
def list_command(as_json: bool) -> None:
    """List the schemas of this release: id, status and how the SHA-256 begins (all of it with --json).

    \b
    Example: virtbus schema list --json
    """
    if as_json:
        click.echo(json.dumps([asdict(entry) for entry in schema.entries()], indent=2))
        return
    for entry in schema.entries():
        click.echo(f"{entry.id:<62} {entry.status:<8} {entry.sha256[:8]}")


@command.command("show")
@click.argument("name", metavar="URN|TYPE")
def show_command(name: str) -> None:
    """Print a schema; an event type prints its newest.

    \b
    Example: virtbus schema show io.virtbus.domain.io_error.v1
    """
    entry = schema.resolve(name)
    if schema.parse_urn(name) is not None and entry.id != name:
        raise SchemaError(f"no schema {name!r}: the newest of its major is {entry.id}")
    click.echo(schema.text(entry.id), nl=False)


@command.command("export")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def export_command(folder: Path) -> None:
    """Write all schemas below FOLDER, for other languages and registries.

    \b
    Example: virtbus schema export schemas
    """
    click.echo(f"{len(schema.export(folder))} files written to {folder}")


@click.command("validate")
@click.argument("files", nargs=-1, required=True, metavar="FILE…|-")
@click.option("--schema", "schema_name", metavar="URN|TYPE",
              help="The input is data of this schema, not whole events.")  # fmt: skip
@click.option("--format", "fmt", type=click.Choice(["text", "json"]), default="text", help="Output format.")
def validate_command(files: tuple[str, ...], schema_name: str | None, fmt: str) -> None:
    """Check events against their schemas: structured CloudEvents, one document or JSON lines.

    Reports all problems at once, each with its JSON pointer, what was expected and what was found. Exits with
    0 when everything is valid, 65 when something is not (or there was nothing to check), 66 when a file can't
    be read.

    \b
    Example: virtbus consume --count 10 | virtbus validate -
    """
    sys.exit(validate(files, sys.stdout, fmt=fmt, schema_name=schema_name))


def validate(
    files: Sequence[str],
    out: TextIO,
    *,
    fmt: str = "text",
    schema_name: str | None = None,
    stdin: BinaryIO | None = None,
) -> int:
    """Check every event of `files` ("-" is standard input), write each problem to `out`; the exit code.

    Streams in flat memory. `fmt` "json" gives one object an invalid event, then a summary. Raises SchemaError
    for an unknown `schema_name` (a urn or an event type).
    """
    name = schema.resolve(schema_name).id if schema_name else None
    checked = invalid = unreadable = 0

    def report(file: str, line: int, problems: Sequence[Problem]) -> None:
        bar.make_way(out)
        if fmt == "json":
            data = {"file": file, "line": line or None, "problems": [one._asdict() for one in problems]}
            out.write(json.dumps(data) + "\n")
        else:
            out.writelines(f"{file}:{line}: {one}\n" if line else f"{one.message}\n" for one in problems)

    size = sum(map(_size, files))
    with progress(size if size >= _LONG_BYTES else 0, "checking", sys.stderr) as bar:
        for file in files:
            try:
                with (
                    Path(file).open("rb") if file != "-" else nullcontext(stdin or sys.stdin.buffer) as stream
                ):
                    for line, raw in _documents(stream):
                        checked += 1
                        if problems := _check_text(raw, name):
                            invalid += 1
                            report(file, line, problems)
                        bar.update(len(raw) + 1)
            except OSError as error:
                unreadable += 1
                why = error.strerror or str(error)
                report(file, 0, [Problem("", "a readable file", why, f"can't read {file}: {why}")])
    if fmt == "json":
        summary = {"checked": checked, "invalid": invalid, "unreadable": unreadable}
        out.write(json.dumps({"summary": summary}) + "\n")
    elif not checked and not unreadable:
        out.write("nothing to check: no event was found\n")
    else:
        out.write(f"{checked} checked, {invalid} invalid\n")
    if unreadable:
        return InputMissing.exit_code
    return SchemaError.exit_code if invalid or not checked else 0


def _check_text(raw: bytes, schema_id: str | None) -> list[Problem]:
    """All problems of one JSON text: a structured event, or with `schema_id` the data of that schema."""
    if len(raw) > MAX_BYTES:
        return [Problem("", f"at most {MAX_BYTES} bytes", f"more than {MAX_BYTES}", "too large")]
    try:
        document = msgspec.json.decode(raw)
    except _NOT_JSON as error:
        return [Problem("", "JSON", schema.clip(raw[:80].decode("utf-8", "replace")), str(error))]
    return schema.validate(schema_id, document) if schema_id is not None else _check_event(document)


def _check_event(event: Any) -> list[Problem]:
    problems = schema.validate(schema.ENVELOPE, event)
    if not isinstance(event, dict) or not isinstance(event.get("data"), dict):
        return problems
    type_, dataschema = event.get("type"), event.get("dataschema")
    if not isinstance(type_, str) or not isinstance(dataschema, str):
        return problems
    urn, shown = schema.parse_urn(dataschema), schema.clip(dataschema)
    if urn is None or urn[0] != type_:
        expected = f"{schema.PREFIX}{type_}:<major>.<minor>"
        return [*problems, Problem("/dataschema", expected, shown, "not the schema of this type")]
    try:
        inner = schema.validate(dataschema, event["data"])
    except SchemaError as error:
        return [*problems, Problem("/dataschema", "a schema of this release", shown, str(error))]
    return [*problems, *(p._replace(pointer="/data" + p.pointer) for p in inner)]


def _size(file: str) -> int:
    """Bytes of a file; a pipe, or what can't be looked at, adds nothing."""
    try:
        return os.fstat(sys.stdin.fileno()).st_size if file == "-" else Path(file).stat().st_size
    except (OSError, ValueError):
        return 0


def _documents(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(line number, JSON text) of each document: a line each, or all the lines together when only that is
    JSON. Nothing much larger than one event is ever held.
    """
    lines = _lines(stream, 0)
    number, first = next(lines, (0, b""))
    if not first:
        return
    if not _is_json(first):
        rest = stream.read(MAX_BYTES)
        whole = first + b"\n" + rest
        if len(whole) <= MAX_BYTES and _is_json(whole):
            yield number, whole
            return
        more = rest
        while more and not more.endswith(b"\n"):  # to the end of its last line
            more = stream.readline(MAX_BYTES)
            rest += more if len(rest) <= 2 * MAX_BYTES else b""
        lines = chain(_lines(BytesIO(rest), number), _lines(stream, number + rest.count(b"\n")))
    yield number, first
    yield from lines


def _is_json(text: bytes) -> bool:
    try:
        msgspec.json.decode(text)
    except _NOT_JSON:
        return False
    return True


def _lines(stream: BinaryIO, number: int) -> Iterator[tuple[int, bytes]]:
    """Each line after the first `number` that is not blank, without its end; a too long one is cut."""
    while line := stream.readline(MAX_BYTES + 2):
        number, tail = number + 1, line
        while len(tail) > MAX_BYTES and not tail.endswith(b"\n"):
            tail = stream.readline(MAX_BYTES + 2)  # read past the rest, hold none of it
        if line := line.strip():
            yield number, line
