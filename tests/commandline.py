"""The command line as click sees it, for tests that look at every command."""

from __future__ import annotations

import click

from virtbus.cli import cli


def commands_of(group: click.Group) -> dict[str, click.Command]:
    """The commands of a group by name; the lazy ones are imported."""
    context = click.Context(group)
    found = {name: group.get_command(context, name) for name in group.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None}


__all__ = ["cli", "commands_of"]
