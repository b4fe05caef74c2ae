"""`virtbus validate`: check events, or data of a named schema, and tell all that is wrong at once.

Reads files or standard input as a stream, in flat memory: JSON lines, or one document over many lines.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import click
import msgspec

from virtbus import schema
from virtbus.commands.terminal import progress
from virtbus.errors import InputMissing, SchemaError
from virtbus.schema import Problem

_MAX_BYTES = 1024 * 1024  # of one event, as everywhere
_LONG_BYTES = 16 << 20  # less is checked within a second
_decode = msgspec.json.Decoder().decode


@dataclass(slots=True)
class _Tally:
    checked: int = 0
    invalid: int = 0
    unreadable: int = 0

    @property
    def exit_code(self) -> int:
        if self.unreadable:
            return InputMissing.exit_code
        return SchemaError.exit_code if self.invalid or not self.checked else 0


def run(
    files: Sequence[str],
    out: TextIO,
    *,
    fmt: str = "text",
    schema_name: str | None = None,
    stdin: BinaryIO | None = None,
    notices: TextIO = sys.stderr,
) -> int:
    """Check every event of `files` ("-" is standard input) and write each problem to `out`.

    Without `schema_name` (a urn or an event type) the input is CloudEvents in structured mode; with it, data.
    `fmt` is "text" or "json" (one object an invalid event, then a summary). Returns 0, 65 when something is
    invalid or there is nothing to check, 66 when a file can't be read. Raises SchemaError for an unknown
    `schema_name`.
    """
    name = schema.resolve(schema_name).id if schema_name else None
    report = _as_json if fmt == "json" else _as_text
    tally = _Tally()
    size = sum(map(_size, files))
    with progress(size if size >= _LONG_BYTES else 0, "checking", notices) as bar:
        for file in files:
            try:
                with _open(file, stdin) as stream:
                    for line, raw in _documents(stream):
                        tally.checked += 1
                        problems = check_text(raw, name)
                        if problems:
                            tally.invalid += 1
                            bar.make_way(out)
                            report(out, file, line, problems)
                        bar.update(len(raw) + 1)
            except OSError as error:
                tally.unreadable += 1
                why = error.strerror or str(error)
                bar.make_way(out)
                report(out, file, 0, [Problem("", "a readable file", why, f"can't read {file}: {why}")])
    summary = {"checked": tally.checked, "invalid": tally.invalid, "unreadable": tally.unreadable}
    if fmt == "json":
        out.write(json.dumps({"summary": summary}) + "\n")
    elif not tally.checked and not tally.unreadable:
        out.write("nothing to check: no event was found\n")
    else:
        out.write(f"{tally.checked} checked, {tally.invalid} invalid\n")
    return tally.exit_code


def check_text(raw: bytes, schema_id: str | None) -> list[Problem]:
    """All problems of one JSON text: a structured event, or with `schema_id` the data of that schema."""
    if len(raw) > _MAX_BYTES:
        return [Problem("", f"at most {_MAX_BYTES} bytes", f"more than {_MAX_BYTES}", "too large")]
    try:
        document = _decode(raw)
    except (msgspec.MsgspecError, UnicodeError, ValueError, RecursionError) as error:
        return [Problem("", "JSON", schema.clip(raw[:80].decode("utf-8", "replace")), str(error))]
    if schema_id is not None:
        return schema.validate(schema_id, document)
    return _check_event(document)


def _check_event(event: Any) -> list[Problem]:
    problems = schema.validate(schema.ENVELOPE, event)
    if not isinstance(event, dict) or not isinstance(event.get("data"), dict):
        return problems
    type_, dataschema = event.get("type"), event.get("dataschema")
    if not isinstance(type_, str) or not isinstance(dataschema, str):
        return problems
    urn = schema.parse_urn(dataschema)
    if urn is None or urn[0] != type_:
        expected = f"{schema.PREFIX}{type_}:<major>.<minor>"
        shown = schema.clip(dataschema)
        return [*problems, Problem("/dataschema", expected, shown, "not the schema of this type")]
    try:
        inner = schema.validate(dataschema, event["data"])
    except SchemaError as error:
        return [
            *problems,
            Problem("/dataschema", "a schema of this release", schema.clip(dataschema), str(error)),
        ]
    return [*problems, *(p._replace(pointer="/data" + p.pointer) for p in inner)]


def _size(file: str) -> int:
    """Bytes of a file; a pipe, or what can't be looked at, adds nothing."""
    try:
        return os.fstat(sys.stdin.fileno()).st_size if file == "-" else Path(file).stat().st_size
    except (OSError, ValueError):
        return 0


def _open(file: str, stdin: BinaryIO | None) -> AbstractContextManager[BinaryIO]:
    if file == "-":
        return nullcontext(stdin if stdin is not None else sys.stdin.buffer)
    return Path(file).open("rb")


def _documents(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(line number, JSON text) of each document: a line each, or all the lines together when only that is
    JSON. Nothing larger than one event is ever held.
    """
    number, first = _next_line(stream, 0)
    while first == b"":
        number, first = _next_line(stream, number)
    if first is None:
        return
    if not _is_json(first):
        rest = stream.read(_MAX_BYTES)
        whole = first + b"\n" + rest
        if len(whole) <= _MAX_BYTES and _is_json(whole):
            yield number, whole
            return
        yield number, first
        yield from _lines(_Rest(rest, stream), number)
        return
    yield number, first
    yield from _lines(stream, number)


def _is_json(text: bytes) -> bool:
    try:
        _decode(text)
    except (msgspec.MsgspecError, UnicodeError, ValueError, RecursionError):
        return False
    return True


def _lines(stream: Any, number: int) -> Iterator[tuple[int, bytes]]:
    while True:
        number, line = _next_line(stream, number)
        if line is None:
            return
        if line:
            yield number, line


def _next_line(stream: Any, number: int) -> tuple[int, bytes | None]:
    """The next line without its end and blanks; None at the end of the stream; a too long one is cut."""
    line: bytes = stream.readline(_MAX_BYTES + 2)
    if not line:
        return number, None
    tail = line
    while len(tail) > _MAX_BYTES and not tail.endswith(b"\n"):
        tail = stream.readline(_MAX_BYTES + 2)  # read past the rest, hold none of it
    return number + 1, line.strip()


class _Rest:
    """A stream that gives back what was read ahead, first."""

    def __init__(self, head: bytes, stream: BinaryIO) -> None:
        self._head = head
        self._stream = stream

    def readline(self, limit: int) -> bytes:
        """As BinaryIO.readline."""
        if not self._head:
            return self._stream.readline(limit)
        end = self._head.find(b"\n") + 1
        if end:
            line, self._head = self._head[:end], self._head[end:]
            return line
        line, self._head = self._head, b""
        return line + self._stream.readline(limit)


def _as_text(out: TextIO, file: str, line: int, problems: Sequence[Problem]) -> None:
    for problem in problems:
        out.write(f"{file}:{line}: {problem}\n" if line else f"{problem.message}\n")


def _as_json(out: TextIO, file: str, line: int, problems: Sequence[Problem]) -> None:
    told = {"file": file, "line": line or None, "problems": [problem._asdict() for problem in problems]}
    out.write(json.dumps(told) + "\n")


# ------------------------------------------------------------------------------- the command line


@click.command("validate")
@click.argument("files", nargs=-1, required=True, metavar="FILE…|-")
@click.option(
    "--schema", "schema_name", metavar="URN|TYPE", help="The input is data of this schema, not whole events."
)
@click.option("--format", "fmt", type=click.Choice(["text", "json"]), default="text", help="How to tell.")
def command(files: tuple[str, ...], schema_name: str | None, fmt: str) -> None:
    """Check events against their schemas: structured CloudEvents, one document or JSON lines.

    Tells all problems at once, each with its JSON pointer, what was expected and what was found. Ends with
    0 when all is valid, 65 when something is not (or there was nothing to check), 66 when a file can't be
    read.

    \b
    Example: virtbus consume --count 10 | virtbus validate -
    """
    sys.exit(run(files, sys.stdout, fmt=fmt, schema_name=schema_name))
