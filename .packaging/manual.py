"""Write the manual pages, one a command, from the command line's own help: manual.py FOLDER VERSION."""

from __future__ import annotations

import gzip
import os
import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import click

from virtbus.cli import cli as program


def main() -> None:
    """Write virtbus.1.gz, virtbus-run.1.gz, virtbus-spool-list.1.gz …"""
    folder, version = Path(sys.argv[1]), sys.argv[2]
    moment = datetime.fromtimestamp(int(os.environ.get("SOURCE_DATE_EPOCH", "0")), UTC).strftime("%Y-%m-%d")
    for path, command, context in commands("virtbus", program, None):
        name = path.replace(" ", "-")
        text = page(path, command, context, version, moment)
        # Without a time: the same text gives the same bytes.
        (folder / f"{name}.1.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def commands(
    path: str, command: click.Command, parent: click.Context | None
) -> Iterator[tuple[str, click.Command, click.Context]]:
    """Every command with its whole name, outermost first."""
    context = click.Context(command, info_name=path.rpartition(" ")[2], parent=parent)
    yield path, command, context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            if found is not None and not found.hidden:
                yield from commands(f"{path} {name}", found, context)


def page(path: str, command: click.Command, context: click.Context, version: str, moment: str) -> str:
    """One page in man(7)."""
    name = path.replace(" ", "-")
    said = re.sub(r"\n*\x08\n", "\n\n", command.help or "").strip()
    synopsis = " ".join(command.collect_usage_pieces(context))
    lines = [
        f'.TH "{name.upper()}" "1" "{moment}" "virtbus {version}" "virtbus"',
        ".SH NAME",
        f"{escaped(name)} \\- {escaped(command.get_short_help_str(200).rstrip('.'))}",
        ".SH SYNOPSIS",
        f".B {escaped(path)}\n{escaped(synopsis)}",
    ]
    if said:
        lines += [
            ".SH DESCRIPTION",
            *(escaped(line) if line.strip() else ".PP" for line in said.splitlines()),
        ]
    options = [record for each in command.get_params(context) if (record := each.get_help_record(context))]
    if options:
        lines.append(".SH OPTIONS")
        for flags, meaning in options:
            lines += [".TP", f"\\fB{escaped(flags)}\\fP", escaped(meaning)]
    if isinstance(command, click.Group):
        lines.append(".SH COMMANDS")
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            if found is not None and not found.hidden:
                lines += [
                    ".TP",
                    f"\\fB{escaped(name)}\\-{escaped(child)}\\fP(1)",
                    escaped(found.get_short_help_str(200)),
                ]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Text as roff reads it literally."""
    plain = text.replace("\\", "\\e").replace("-", "\\-").strip()
    return f"\\&{plain}" if plain.startswith((".", "'")) else plain


if __name__ == "__main__":
    main()
