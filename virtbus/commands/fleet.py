"""`virtbus fleet`: the health of the fleet, live."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from virtbus.commands.common import (
    Seconds,
    bus_options,
    common,
    cut,
    load,
    on_bus,
    progress,
    setting,
    state_dir,
    wrapped,
)
from virtbus.commands.react import fleet_rules, serving
from virtbus.consumer import Consumer, Delivery
from virtbus.errors import ConfigError
from virtbus.fleet import BackendHealth, Blame, Fleet, FleetView, HostHealth, Publishers
from virtbus.integrations.base import utc
from virtbus.integrations.telemetry import REACT, Disbelieved, EventPutAside
from virtbus.loading import bus_url
from virtbus.log import takes_escapes
from virtbus.model import Clock, Heartbeat, Now
from virtbus.telemetry import emit

_WIDE = 120  # columns: what a host's trouble is stands beside it, else below
_REDRAW_SECONDS = 1.0
_WRITE_SECONDS = 2.0
_STUCK_SECONDS = 60.0  # a file that is not written for so long: the writer hangs
ROUND_SECONDS = 65.0  # one round of heartbeats, and a little


@click.command("fleet")
@common
@on_bus
@state_dir
@click.option("--once", is_flag=True, help="Listen for one round of heartbeats, print, and end.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, a line each second.")
@click.option("--write", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Keep FILE up to date instead, as JSON: for a scheduler on this machine.")  # fmt: skip
@click.option("--listen", type=Seconds(0), metavar="S", help="End after S seconds.")
@setting("react.fleet_listen", "--http-listen", metavar="HOST:PORT",
         help="With --write: address of /metrics, /livez, /readyz (react.fleet_listen).")  # fmt: skip
def command(once: bool, as_json: bool, write: Path | None, listen: float | None, **options: Any) -> None:
    """Show which hosts and storage systems are in trouble, and whose fault it is.

    It knows a host once it has heard its agent: complete after one round of heartbeats (60 s).

    \b
    Example: virtbus fleet --bus amqp://guest:guest@127.0.0.1// --once --json
    """
    loaded = load(options)
    config, clock = loaded.config, Clock()
    fleet, publishers = Fleet(fleet_rules(config)), Publishers(config.react.publishers)
    seconds = listen if listen is not None else (ROUND_SECONDS if once else None)
    end = None if seconds is None else time.monotonic() + seconds
    live = not once and not as_json and write is None and takes_escapes(sys.stdout)
    begun, shown = time.monotonic(), 0  # seconds
    drawn = heard = begun - _REDRAW_SECONDS
    REACT.heard.labels("fleet").set_function(lambda: time.monotonic() - heard)
    with (
        serving(
            loaded,
            "react.fleet_listen",
            config.react.fleet_listen if write else "",
            dead=lambda: ["fleet"] if time.monotonic() - drawn > _STUCK_SECONDS else [],
            # Not "the file is there": it may be one of yesterday.
            not_ready=lambda: [] if drawn >= begun else ["nothing is written yet"],
        ),
        Consumer(
            bus_url(config), group=None, options=bus_options(config), prefetch=1000, patient=False
        ) as consumer,
        progress(round(seconds) if once and seconds else 0, "listening", sys.stderr) as bar,
    ):
        while end is None or time.monotonic() < end:
            delivery = consumer.receive(0.2)
            if delivery is not None:
                if _take(delivery, fleet, publishers, clock()):
                    heard = time.monotonic()
                delivery.ack()
            if once:
                passed = int(time.monotonic() - begun)
                bar.update(passed - shown)
                shown = passed
            elif time.monotonic() - drawn >= (_WRITE_SECONDS if write else _REDRAW_SECONDS):
                drawn = time.monotonic()
                view = fleet.view(clock())
                REACT.show_fleet("fleet", view)
                _show(view, as_json=as_json, write=write, live=live)
    _show(fleet.view(clock()), as_json=as_json, write=write, live=live)


def _take(delivery: Delivery, fleet: Fleet, publishers: Publishers, now: Now) -> bool:
    """Fold one event in if it is believed; whether it was a heartbeat. Nothing that it holds ends us."""
    event = delivery.event
    host = None if event is None or event.host is None else event.host.name
    why = publishers.refuses(delivery.publisher, delivery.source, host)
    if why is not None:
        emit(Disbelieved(delivery.publisher, host, delivery.source, delivery.id, why))
        return False
    if event is None:
        return False
    try:
        fleet.saw(event, delivery.attributes, now)
    except Exception as error:  # noqa: BLE001 - one event must not end the others
        emit(EventPutAside("fleet", delivery.source, delivery.id, error))
        return False
    return isinstance(event, Heartbeat)


def _show(view: FleetView, *, as_json: bool, write: Path | None, live: bool) -> None:
    if write is not None:
        _write(write, json.dumps(as_data(view), sort_keys=True))
    elif as_json:
        sys.stdout.write(json.dumps(as_data(view), sort_keys=True) + "\n")
    else:
        size = shutil.get_terminal_size()
        text = "\n".join(table(view, rows=size.lines - 1 if live else None, columns=size.columns))
        sys.stdout.write(("\x1b[H\x1b[2J" if live else "") + text + "\n")
    sys.stdout.flush()


def _write(path: Path, text: str) -> None:
    """Replace the file in one step: a reader sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("x", encoding="utf-8") as file:  # never through a link that somebody laid there
            file.write(text + "\n")
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error.strerror}; name another file") from error


def as_data(view: FleetView) -> dict[str, Any]:
    """The view as plain data: a stable contract with whoever reads the file or the output."""
    return {
        "written_at": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "hosts": {host.name: _plain(host, without=("name", "early", "witnessed")) for host in view.hosts},
        "backends": [_plain(one) for one in view.backends],
        **_plain(view, without=("hosts", "backends", "own")),
    }


def _plain(one: FleetView | HostHealth | BackendHealth, *, without: Sequence[str] = ()) -> dict[str, Any]:
    return {
        item.name: _json(item.name, getattr(one, item.name))
        for item in fields(one)
        if item.name not in without
    }


def _json(name: str, value: Any) -> Any:
    if isinstance(value, Blame):
        return value.value
    if isinstance(value, float):
        return utc(value) if name == "since" else round(value, 3)
    return list(value) if isinstance(value, tuple) else value


_ORDER = {Blame.HOST: 0, Blame.UNDETERMINED: 1, Blame.BACKEND: 2, Blame.NONE: 3}


def table(view: FleetView, *, rows: int | None, columns: int) -> list[str]:
    """Lines for a terminal: the summary, storage in trouble, hosts in trouble or not observing."""
    wide = columns >= _WIDE
    summary = (
        f"{len(view.hosts)} hosts, {view.silent} silent; {view.incidents} open incidents, "
        f"{view.errors_per_minute:.1f} errors/min, {len(view.backends)} storage systems in trouble"
    )
    lines = [summary] if wide else _fitting(summary)
    if view.suspect_ourselves:
        lines.append("most agents are silent at once: rather our own connection than theirs")
    why = "  WHY" if wide else ""
    if view.backends:
        lines += ["", f"{'STORAGE':<32} {'BLAME':<13} {'HOSTS':>5} {'GUESTS':>6}{why}"]
        worst = sorted(view.backends, key=lambda one: (_ORDER[one.blame], -one.guests, one.name))
        for one in worst:
            blame = one.blame.value + ("/full" if one.full else "")
            line = f"{cut(one.name, 32):<32} {blame:<13} {len(one.hosts):>5} {one.guests:>6}"
            lines += _with_why(line, one.why, wide)
    shown = [host for host in view.hosts if host.incidents or host.state != "observing"]
    if shown:
        header = f"{'HOST':<32} {'BLAME':<13} {'STATE':<9} {'GUESTS':>6} {'PAUSED':>6} {'ERR/MIN':>7}{why}"
        lines += ["", header]
        shown.sort(key=lambda one: (_ORDER[one.blame], one.state == "observing", -one.guests, one.name))
        for host in shown:
            line = (
                f"{cut(host.name, 32):<32} {host.blame.value if host.incidents else '-':<13} {host.state:<9} "
                f"{host.guests:>6} {host.paused:>6} {host.errors_per_minute:>7.1f}"
            )
            lines += _with_why(line, host.why, wide)
    if rows is not None and len(lines) > rows:
        left = len(lines) - rows + 1
        lines = [*lines[: rows - 1], f"… {left} more lines"]
    return [cut(line, columns if rows is not None else len(line)) for line in lines]


def _with_why(line: str, why: str, wide: bool) -> list[str]:
    if not why:
        return [line]
    return [f"{line}  {cut(why, len(why))}"] if wide else [line, *_fitting(f"    {why}")]


def _fitting(text: str) -> list[str]:
    return wrapped(cut(text, len(text)), indent=4).splitlines()
