"""`virtbus status`, `tap` and `emit`: ask the running agent over its control socket."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from virtbus.agent.control import Drill, ask
from virtbus.commands.common import as_json, common, control, load, rows, timeout
from virtbus.errors import AgentUnavailable, BusUnavailable, ConfigError


def answers(
    path: str, request: Mapping[str, object], *, timeout: float, blanks: bool = False
) -> Iterator[dict[str, Any]]:
    """What the agent answers, a JSON object a line; `blanks` gives a tap's keepalives as empty ones.

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
            raise AgentUnavailable(f"{path}: the answer was cut off; did the agent end?") from error
        if not over:
            raise AgentUnavailable(f"{path}: the agent ended; see its log")


@click.command("status")
@common
@control
@as_json
@click.option("--watch", "watching", is_flag=True, help="Again every second.")
def status_command(as_json: bool, watching: bool, **options: Any) -> None:
    """Ask the running agent what it is doing and what it holds.

    \b
    Example: virtbus status --watch
    """
    path = load(options).config.control.socket
    while True:
        for answer in answers(path, {"command": "status"}, timeout=5.0):
            sys.stdout.write(json.dumps(answer, sort_keys=True) + "\n" if as_json else table(answer))
        sys.stdout.flush()
        if not watching:
            return
        time.sleep(1.0)


def table(answer: Mapping[str, Any]) -> str:
    """The agent's status for people."""
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
        ("parked", f"{spool['parked_keys']} keys that the broker does not take"
                   " (no queue bound, or a queue is full)"),
        ("dead letters", f"{spool['dead']} events"),
        ("sequence", f"{spool['committed_sequence']} committed, {spool['confirmed_sequence']} confirmed"),
        ("incidents", f"{answer['incidents']['open']} open"),
        ("ready", "yes" if not answer["not_ready"] else "NO: " + "; ".join(answer["not_ready"])),
    ])  # fmt: skip


@click.command("tap")
@common
@control
@click.option("--stage", type=click.Choice(["raw", "incident", "published"]), help="Only this stage.")
@click.option("--domain", metavar="NAME|UUID", help="Only this domain.")
def tap_command(stage: str | None, domain: str | None, **options: Any) -> None:
    """Look at what passes through the running agent, one JSON line an item.

    Bounded and lossy: a reader that lags loses lines (and is told how many); the agent never waits.

    \b
    Example: virtbus tap --stage incident --domain web-1
    """
    request = {"command": "tap", "stage": stage, "domain": domain}
    for answer in answers(load(options).config.control.socket, request, timeout=30):
        sys.stdout.write(json.dumps(answer, sort_keys=True) + "\n")
        sys.stdout.flush()


@click.command("emit")
@common
@control
@click.option("--domain-name", default="virtbus-drill", show_default=True, metavar="NAME",
              help="The guest that the event names.")  # fmt: skip
@click.option("--action", type=click.Choice(["none", "pause", "report"]), default="report", show_default=True,
              help="What the hypervisor is said to have done.")  # fmt: skip
@click.option("--reason", default="drill", show_default=True, metavar="TEXT", help="libvirt's reason.")
@click.option("--count", type=click.IntRange(1, 1000), default=1, show_default=True, help="Errors in it.")
@click.option("--resolve", is_flag=True, help="End the drill: its incidents are resolved.")
@timeout(0.1, 10.0, "How long to wait for the broker's confirmation.")
def emit_command(
    timeout: float, domain_name: str, action: str, reason: str, count: int, resolve: bool, **options: Any
) -> None:
    """Run an alert drill: an event that says `replay`, through the running agent to the broker.

    It takes the path of a real error: incident, spool, broker. The guest it names does not exist; consumers
    that act must leave events of origin `replay` alone, and every event of the drill carries it.

    \b
    Example: virtbus emit --action pause --reason enospc
             virtbus emit --resolve
    """
    request: dict[str, object] = {
        "domain_name": domain_name, "action": action, "reason": reason, "count": count, "resolve": resolve,
    }  # fmt: skip
    path, drill = load(options).config.control.socket, Drill.parse(request)
    deadline, asked, event_id = time.monotonic() + timeout, False, None
    for line in answers(path, {"command": "tap", "domain": drill.domain_uuid}, timeout=5.0, blanks=True):
        if not asked:  # the tap is open: nothing of what follows is missed
            asked = True
            for _ in answers(path, {"command": "drill", **request}, timeout=5.0):
                pass
            sys.stdout.write(f"drill      {drill.domain_name} ({drill.domain_uuid}), origin replay\n")
        if line.get("stage") == "incident" and event_id is None:
            event_id = line["stamp"]["id"]
            sys.stdout.write(f"committed  {event_id}\n")
        elif line.get("stage") == "published" and line["item"]["id"] == event_id:
            sys.stdout.write(f"confirmed  {event_id}\n")
            return
        sys.stdout.flush()
        if time.monotonic() > deadline:
            break
    if event_id is None:
        why = "an open drill folds repeats into windows (end it with `virtbus emit --resolve`)"
        raise AgentUnavailable(
            f"no event was committed within {timeout:g} s: "
            f"{f'no drill of {drill.domain_name} is open' if drill.resolve else why}, or the spool can't be "
            "written; see `virtbus status`"
        )
    raise BusUnavailable(
        f"event {event_id} is in the spool, the broker has not confirmed it after {timeout:g} s; "
        "see `virtbus status` and `virtbus doctor`"
    )
