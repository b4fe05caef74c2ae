"""`virtbus status` and `virtbus tap`: ask the running agent over its control socket."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import click

from virtbus.agent.control import ask
from virtbus.commands.options import (
    common,
    load,
    setting,
)
from virtbus.commands.terminal import rows
from virtbus.config import Config
from virtbus.errors import AgentUnavailable, ConfigError


def answers(
    path: str, request: Mapping[str, object], *, timeout: float, blanks: bool = False
) -> Iterator[dict[str, Any]]:
    """What the agent answers, a JSON object a line; `blanks` gives a tap's signs of life as empty ones.

    Raises AgentUnavailable when no agent answers or goes on, AgentDenied, ConfigError for what it refuses.
    """
    if not path:
        raise ConfigError("control.socket is empty: this agent has no control socket")
    with ask(Path(path), request) as peer:
        peer.settimeout(timeout)
        over = False  # a tap never ends by itself
        try:
            for line in peer.makefile("rb"):
                if blanks and not line.strip():
                    yield {}
                elif line.strip():
                    answer = json.loads(line)
                    if "error" in answer:
                        raise ConfigError(f"{path}: {answer['error']}")
                    over = request["command"] != "tap"
                    yield answer
        except OSError as error:
            why = error.strerror or str(error)
            raise AgentUnavailable(f"{path}: the agent does not answer: {why}; see its log") from error
        except ValueError as error:
            raise AgentUnavailable(f"{path}: the answer is broken off; did the agent end?") from error
        if not over:
            raise AgentUnavailable(f"{path}: the agent ended; see its log")


def status(config: Config, *, as_json: bool, watching: bool, out: TextIO) -> None:
    """Print the agent's status, once or every second."""
    while True:
        for answer in answers(config.control.socket, {"command": "status"}, timeout=5.0):
            if as_json:
                out.write(json.dumps(answer, sort_keys=True) + "\n")
            else:
                out.write(_table(answer))
        out.flush()
        if not watching:
            return
        time.sleep(1.0)


def _table(answer: Mapping[str, Any]) -> str:
    spool, source, bus = answer["spool"], answer["source"], answer["bus"]
    oldest = spool["oldest_seconds"]
    return rows([
        ("agent", f"{answer['agent_id']}  virtbus {answer['version']}"),
        ("host", answer["host"] or "not known yet"),
        ("started", answer["started_at"]),
        ("libvirt", f"{source['state']} since {source['since']}"),
        ("broker", f"{bus['url']}  {bus['error'] or 'no error'}"),
        ("waiting", f"{spool['pending']} events, {spool['bytes']} bytes"
                    + (f", oldest {oldest:.0f} s" if oldest is not None else "")),
        ("parked", f"{spool['parked_keys']} keys that nobody is bound for"),
        ("set aside", f"{spool['dead']} events"),
        ("sequence", f"{spool['committed_sequence']} committed, {spool['confirmed_sequence']} confirmed"),
        ("incidents", f"{answer['incidents']['open']} open"),
        ("ready", "yes" if not answer["not_ready"] else "NO: " + "; ".join(answer["not_ready"])),
    ])  # fmt: skip


def tap(config: Config, *, stage: str | None, domain: str | None, out: TextIO) -> None:
    """Print what passes until interrupted."""
    for answer in answers(
        config.control.socket, {"command": "tap", "stage": stage, "domain": domain}, timeout=30
    ):
        out.write(json.dumps(answer, sort_keys=True) + "\n")
        out.flush()


# ------------------------------------------------------------------------------- the command line


@click.command("status")
@common
@setting("control.socket", "--control-socket", metavar="PATH", help="The agent's control socket.")
@click.option("--json", "as_json", is_flag=True, help="The answer as it comes.")
@click.option("--watch", "watching", is_flag=True, help="Again every second.")
def command(as_json: bool, watching: bool, **options: Any) -> None:
    """Ask the running agent what it is doing and what it holds.

    \b
    Example: virtbus status --watch
    """
    status(load(options).config, as_json=as_json, watching=watching, out=sys.stdout)


@click.command("tap")
@common
@setting("control.socket", "--control-socket", metavar="PATH", help="The agent's control socket.")
@click.option("--stage", type=click.Choice(["raw", "incident", "published"]), help="Only this stage.")
@click.option("--domain", metavar="NAME|UUID", help="Only this domain.")
def tap_command(stage: str | None, domain: str | None, **options: Any) -> None:
    """Look at what passes through the running agent, one JSON line an item.

    Bounded and lossy: a reader that lags loses lines (and is told how many); the agent never waits.

    \b
    Example: virtbus tap --stage incident --domain web-1
    """
    tap(load(options).config, stage=stage, domain=domain, out=sys.stdout)
