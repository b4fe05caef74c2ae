"""`virtbus agent-id`: the id that this host's agent publishes under, also before its first start."""

from __future__ import annotations

import os
import pwd
from pathlib import Path
from typing import Any

import click

from virtbus.agent.identity import is_of_another_machine, load_agent_id, read_agent_id
from virtbus.commands.options import common, load, state_dir
from virtbus.errors import ConfigError, InputMissing, SpoolFull


@click.command("agent-id")
@common
@state_dir
@click.option("--create", is_flag=True, help="Make the id, and its folder, where there is none yet.")
@click.option(
    "--user",
    default="virtbus",
    show_default=True,
    help="Owner of a folder that root makes with --create.",
)
def command(create: bool, user: str, **options: Any) -> None:
    """Print the agent's id, which its routing keys and broker permissions name.

    With --create it is there before the agent's first start, so that its permissions can be, too.

    \b
    Example: virtbus agent-id --create
    """
    folder = Path(load(options).config.state_dir)
    if create and is_of_another_machine(folder):
        raise ConfigError(
            f"{folder}/agent-id was made on another machine (a cloned disk?), so the agent will not use it; "
            f"start the agent, which tells so in a gap event, or delete {folder} if nothing in it is needed"
        )
    found = read_agent_id(folder)
    if found is None and create:
        found = _create(folder, user)
    if found is None:
        raise InputMissing(f"{folder}/agent-id holds no id, or can't be read; make one with --create")
    click.echo(found)


def _create(folder: Path, user: str) -> str:
    """A new id in `folder`, which belongs to `user` when root makes it. Raises ConfigError, SpoolFull."""
    os.umask(0o077)
    try:
        if not folder.exists():
            folder.mkdir(mode=0o700, parents=True)
            if os.geteuid() == 0:
                account = pwd.getpwnam(user)
                os.chown(folder, account.pw_uid, account.pw_gid)
        found, _ = load_agent_id(folder)
        if os.geteuid() == 0:
            owner = folder.stat()
            os.chown(folder / "agent-id", owner.st_uid, owner.st_gid, follow_symlinks=False)
    except KeyError:
        folder.rmdir()
        raise ConfigError(f"there is no user {user!r}; name the agent's user with --user") from None
    except OSError as error:
        raise SpoolFull(
            f"{folder} can't be written: {error.strerror}; run it as root, or as the agent's user"
        ) from error
    return found
