"""Options that several commands share, and how settings are read with them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from virtbus import config, telemetry
from virtbus.config import Loaded

F = TypeVar("F", bound=Callable[..., Any])
_YEAR = 366 * 86400


class Seconds(click.FloatRange):
    """Seconds up to a year: nan and infinity pass every comparison that would end a wait, more overflows."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See click.ParamType."""
        seconds = super().convert(value, param, ctx)
        if not seconds <= _YEAR:
            self.fail(f"{seconds} is not a number of seconds up to a year", param, ctx)
        return seconds


# A file that is missing or not ours to read: its reader says so, with the right exit code.
FILE = click.Path(readable=False, path_type=Path)


def common(command: F) -> F:
    """The options that every command with settings takes."""
    for option in reversed(
        [
            click.option("--config", "config_file", type=FILE, metavar="FILE",
                         help="Settings [default: /etc/virtbus/virtbus.toml if it is there]."),
            click.option("--debug", is_flag=True, help="Tracebacks, and the log at level debug."),
        ]
    ):  # fmt: skip
        command = option(command)
    return command


def setting(key: str, *names: str, help: str, **more: Any) -> Callable[[F], F]:
    """An option that overrides the setting `key`."""
    return click.option(*names, key.replace(".", "__"), help=help, **more)


bus = setting("bus.url", "--bus-url", "--bus", metavar="URL",
                help="amqp[s]://…, kafka[s]://…, embedded: or embedded:///FILE (bus.url).")  # fmt: skip
libvirt = setting("libvirt.uri", "--libvirt-uri", "--libvirt", metavar="URI",
                    help="Hypervisor, e.g. qemu:///system (libvirt.uri).")  # fmt: skip
patience = click.option("--timeout", "patience", type=Seconds(0), default=30.0,
                         show_default=True, metavar="S",
                         help="How long an agent may do nothing of it; 0: do not wait.")  # fmt: skip
state_dir = setting("state_dir", "--state-dir", metavar="DIR", help="Folder of the spool (state_dir).")


def load(options: Mapping[str, Any]) -> Loaded:
    """Settings from file, environment and this command's flags; the log is set up from them."""
    loaded = read(options)
    telemetry.configure(level=loaded.config.log.level, fmt=loaded.config.log.format)
    return loaded


def read(options: Mapping[str, Any]) -> Loaded:
    """Settings from file, environment and this command's flags."""
    flags = {
        key.replace("__", "."): value
        for key, value in options.items()
        if key not in ("config_file", "debug") and value is not None
    }
    if options.get("debug"):
        flags["log.level"] = "debug"
    named = options.get("config_file") or os.environ.get("VIRTBUS_CONFIG")
    return config.load(file=Path(named) if named else None, flags=flags)
