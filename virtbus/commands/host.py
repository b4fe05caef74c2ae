"""`virtbus print unit` and `virtbus agent-id`: what a host needs before the agent's first start."""

from __future__ import annotations

import math
import os
import pwd
import re
import shutil
import sys
from pathlib import Path
from typing import Any, TextIO

import click

from virtbus.agent.identity import is_of_another_machine, load_agent_id, read_agent_id
from virtbus.commands.common import common, load, state_dir
from virtbus.errors import ConfigError, InputMissing, SpoolFull

WATCHDOG_SECONDS = 5  # libvirtd 9.0 bears a listener that is frozen for so long at 4,000 errors a second

# systemd.exec(5), systemd.service(5). Not set, and why: PrivateUsers= would hide libvirt's group from us;
# ProcSubset=pid would hide the boot id; PrivateNetwork= would hide the broker.
_BY_HAND = """\
# A system user of its own, whom libvirtd must know, and the broker's URL in a file for root alone:
#   useradd --system --user-group --no-create-home --shell /usr/sbin/nologin {user}
#   install -D -m 0600 /dev/stdin /etc/virtbus/bus-url <<< 'amqps://virtbus:password@broker:5671//'
#   virtbus print unit > /etc/systemd/system/virtbus.service
#   systemctl daemon-reload && systemctl enable --now virtbus
# Without the file: take LoadCredential and the line after it out, and set bus.url in the configuration.

"""
_CREDENTIAL = """\
LoadCredential=bus-url:/etc/virtbus/bus-url
Environment=VIRTBUS_BUS__URL_FILE=%d/bus-url
"""
_UNIT = """\
[Unit]
Description=virtbus: guest I/O errors as durable events
Wants=network-online.target
After=network-online.target libvirtd.service virtqemud.service
# It waits for libvirt and the broker itself; if it ends all the same, it is started again for ever.
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStart={command} run
ExecReload=/bin/kill -HUP $MAINPID
{credential}Restart=on-failure
RestartSec=5
# 78: the settings are wrong. Starting again with the same ones would help nobody.
RestartPreventExitStatus=78
# A process that hears libvirt's events and stands still (frozen, swapped out) makes libvirtd pile them up and
# answer nobody: docs/libvirt.md. SIGKILL, because one that stands still takes no other signal.
WatchdogSec={watchdog}
WatchdogSignal=SIGKILL
# SIGTERM drains for at most {drain:g} s.
TimeoutStopSec={stop}

User={user}
Group={user}
StateDirectory=virtbus
StateDirectoryMode=0700
RuntimeDirectory=virtbus
RuntimeDirectoryMode=0700
UMask=0077

MemoryMax=256M
TasksMax=64
LimitCORE=0

NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
PrivateMounts=yes
DevicePolicy=closed
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
RemoveIPC=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
"""


def unit(
    out: TextIO, *, user: str, command: str | None, drain_seconds: float, packaged: bool = False
) -> None:
    """Print the unit; `command` is the program's absolute path, by default that of the one that runs now.

    `packaged`: the unit of a package, which brings the user, and whose broker stands in the configuration.
    Raises ConfigError when that has no absolute path, or for words that systemd would read differently.
    """
    path = command or _this_program()
    if not re.fullmatch(r"/[^\s%\"'\\$]*", path):
        raise ConfigError(f"{path!r} is not a plain absolute path; name the program with --command")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]{0,30}", user):  # systemd.exec(5), User=
        raise ConfigError(f"{user!r} is not a user name; name one with --user")
    if not packaged:
        out.write(_BY_HAND.format(user=user))
    out.write(_UNIT.format(
        user=user, command=path, drain=drain_seconds, stop=math.ceil(drain_seconds) + 20,
        credential="" if packaged else _CREDENTIAL, watchdog=WATCHDOG_SECONDS,
    ))  # fmt: skip


def _this_program() -> str:
    found = Path(sys.argv[0])
    if found.name == "virtbus" and found.exists():
        return str(found.absolute())
    return shutil.which("virtbus") or "/usr/bin/virtbus"


@click.group("print")
def print_group() -> None:
    """Print files for the host that virtbus runs on.

    \b
    Example: virtbus print unit > /etc/systemd/system/virtbus.service
    """


@print_group.command("unit")
@common
@click.option("--user", default="virtbus", show_default=True, help="The user it runs as.")
@click.option("--command", "program", metavar="PATH", help="The program [default: this one].")
def unit_command(user: str, program: str | None, **options: Any) -> None:
    """Print a hardened systemd unit for `virtbus run`; its head says how to install it.

    \b
    Example: virtbus print unit > /etc/systemd/system/virtbus.service
    """
    unit(sys.stdout, user=user, command=program, drain_seconds=load(options).config.drain_seconds)


@click.command("agent-id")
@common
@state_dir
@click.option("--create", is_flag=True, help="Make the id, and its folder, where there is none yet.")
@click.option("--user", default="virtbus", show_default=True,
              help="Owner of a folder that root makes with --create.")  # fmt: skip
def agent_id_command(create: bool, user: str, **options: Any) -> None:
    """Print the agent's id, which its routing keys and broker permissions name.

    With --create it is there before the agent's first start, so that its permissions can be, too.

    \b
    Example: virtbus agent-id --create
    """
    folder = Path(load(options).config.state_dir)
    if create and is_of_another_machine(folder):
        raise ConfigError(
            f"{folder}/agent-id was made on another machine (a cloned disk?), so the agent will not use it; "
            f"start the agent, which reports it in a gap event, or delete {folder} if nothing in it is needed"
        )
    found = read_agent_id(folder) or (_create(folder, user) if create else None)
    if found is None:
        raise InputMissing(f"{folder}/agent-id holds no id, or can't be read; make one with --create")
    click.echo(found)


def _create(folder: Path, user: str) -> str:
    """A new id in `folder`, which belongs to `user` when root makes it."""
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
