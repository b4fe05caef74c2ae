"""`virtbus doctor`: look at every part, print the findings."""

from __future__ import annotations

import json
import re
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any, TextIO

import click

from virtbus import doctor
from virtbus.agent.identity import read_agent_id
from virtbus.commands import wiring
from virtbus.commands.options import (
    Seconds,
    bus,
    common,
    libvirt,
    load,
    state_dir,
)
from virtbus.config import Config, Loaded, bus_url, exposed_secrets
from virtbus.errors import ConfigError
from virtbus.log import printable, takes_colour
from virtbus.model import Check

_MARKS = {"ok": ("ok  ", "32"), "warning": ("WARN", "33"), "failed": ("FAIL", "31"), "skipped": ("skip", "2")}


def run(loaded: Loaded, *, as_json: bool, timeout: float, out: TextIO) -> int:
    """Print each check as it is done; the exit code of the first failure, or 0."""
    config = loaded.config
    state_dir = Path(config.state_dir)
    checks: list[Check] = []
    for check in doctor.examine(
        source=lambda: wiring.open_source(config),
        bus=lambda: wiring.open_bus(config),
        state_dir=state_dir,
        max_bytes=config.spool.max_bytes,
        agent_id=read_agent_id(state_dir),
        tls=lambda: _tls_targets(config),
        exposed=exposed_secrets(loaded),
        timeout=timeout,
    ):
        checks.append(check)
        if not as_json:
            out.write(_lines(check, terminal=out.isatty(), colour=takes_colour(out)))
            out.flush()
    code = doctor.exit_code(checks)
    if as_json:
        found = [
            {
                "name": check.name,
                "status": check.status,
                "summary": check.summary,
                "remedy": check.remedy,
                "exit_code": check.exit_code,
                "details": dict(check.details),
            }
            for check in checks
        ]
        out.write(json.dumps({"ok": code == 0, "checks": found}, indent=2, ensure_ascii=False) + "\n")
    return code


def _tls_targets(config: Config) -> list[doctor.TlsTarget]:
    """Every broker that the bus URL reaches by TLS."""
    tls = config.bus.tls
    targets = []
    try:
        urls = re.split(r";(?=[a-z][a-z0-9+.-]*:)", bus_url(config))
    except ConfigError:
        return []  # the bus's own check tells
    for url in urls:
        scheme, _, rest = url.partition("://")
        default = {"amqps": 5671, "kafkas": 9093}.get(scheme)
        if default is None:
            continue
        for place in rest.partition("/")[0].rpartition("@")[2].split(","):
            host, port = _host_and_port(place.strip(), default)
            name = tls.server_name or host
            targets.append(doctor.TlsTarget(host, port, name, tls.ca_file, tls.cert_file, tls.key_file))
    return targets


def _host_and_port(place: str, default: int) -> tuple[str, int]:
    """Of `host`, `host:port` or `[::1]:port`; what is no port is told by the bus's own check."""
    host, separator, port = place.rpartition(":")
    if not separator or port.endswith("]"):
        host, port = place, ""
    return host.strip("[]"), int(port) if port.isdecimal() else default


def _lines(check: Check, *, terminal: bool, colour: bool) -> str:
    mark, code = _MARKS[check.status]
    width = min(shutil.get_terminal_size().columns, 100)
    lines = [f"{mark} {check.name}: {printable(check.summary)}"]
    if check.remedy and check.status != "ok":
        lines.append(f"     → {printable(check.remedy)}")
    if terminal:  # elsewhere one line each: for grep
        lines = [
            textwrap.fill(
                line, width, subsequent_indent=" " * 7, break_long_words=False, break_on_hyphens=False
            )
            for line in lines
        ]
    if colour:
        lines[0] = f"\x1b[{code}m{mark}\x1b[0m{lines[0].removeprefix(mark)}"
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------- the command line


@click.command("doctor")
@common
@libvirt
@bus
@state_dir
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option(
    "--timeout",
    type=Seconds(0.1),
    default=15.0,
    show_default=True,
    metavar="S",
    help="How long one part may take to answer.",
)
def command(as_json: bool, timeout: float, **options: Any) -> None:
    """Look at every part: what is wrong, on what, and what to do.

    libvirt and its events, the broker with credentials, TLS and topology, one confirmed probe event, the
    spool's disk, the clock, the schemas. Ends with the first failure's exit code.

    \b
    Example: virtbus doctor --bus amqps://virtbus@broker//
    """
    sys.exit(run(load(options), as_json=as_json, timeout=timeout, out=sys.stdout))
