"""`virtbus print unit`: a hardened systemd unit for hosts without Kubernetes."""

from __future__ import annotations

import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any, TextIO

import click

from virtbus.commands.options import (
    common,
    load,
)
from virtbus.errors import ConfigError

WATCHDOG_SECONDS = 5  # libvirtd 9.0 bears a listener that is frozen for so long at 4,000 errors a second

# systemd.exec(5), systemd.service(5). Not set, and why: PrivateUsers= would hide libvirt's group from us;
# ProcSubset=pid would hide the boot id; PrivateNetwork= would hide the broker.
_BY_HAND = """\
# A system user of its own, whom libvirtd must know, and the broker's URL in a file for root alone:
#   useradd --system --user-group --no-create-home --shell /usr/sbin/nologin {user}
#   install -m 0600 /dev/stdin /etc/virtbus/bus-url <<< 'amqps://virtbus:password@broker:5671//'
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
ConfigurationDirectory=virtbus
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
        raise ConfigError(f"{user!r} is not the name of a user; name one with --user")
    stop = math.ceil(drain_seconds) + 20
    credential = "" if packaged else _CREDENTIAL
    if not packaged:
        out.write(_BY_HAND.format(user=user))
    out.write(
        _UNIT.format(
            user=user,
            command=path,
            drain=drain_seconds,
            stop=stop,
            credential=credential,
            watchdog=WATCHDOG_SECONDS,
        )
    )


def _this_program() -> str:
    found = Path(sys.argv[0])
    if found.name == "virtbus" and found.exists():
        return str(found.absolute())
    return shutil.which("virtbus") or "/usr/bin/virtbus"


# ------------------------------------------------------------------------------- the command line


@click.group("print")
def command() -> None:
    """Print files for the host that virtbus runs on.

    \b
    Example: virtbus print unit > /etc/systemd/system/virtbus.service
    """


@command.command("unit")
@common
@click.option("--user", default="virtbus", show_default=True, help="The user it runs as.")
@click.option("--command", "program", metavar="PATH", help="The program [default: this one].")
def unit_command(user: str, program: str | None, **options: Any) -> None:
    """Print a hardened systemd unit for `virtbus run`; its head says how to install it.

    \b
    Example: virtbus print unit > /etc/systemd/system/virtbus.service
    """
    drain = load(options).config.drain_seconds
    unit(sys.stdout, user=user, command=program, drain_seconds=drain)
