"""`virtbus emit`: an alert drill through the running agent, its spool and its broker."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

import click

from virtbus.agent.control import Drill
from virtbus.commands.options import (
    Seconds,
    common,
    load,
    setting,
)
from virtbus.commands.status import answers
from virtbus.config import Config
from virtbus.errors import AgentUnavailable, BusUnavailable


def run(config: Config, request: Mapping[str, object], *, timeout: float, out: TextIO) -> None:
    """Make the drill's event and follow it until the broker has confirmed it.

    Raises AgentUnavailable when no agent answers or it commits nothing, AgentDenied, BusUnavailable when
    the broker did not confirm within `timeout` seconds (the spool keeps the event).
    """
    drill = Drill.parse(request)
    path = config.control.socket
    deadline = time.monotonic() + timeout
    event_id = None
    asked = False
    for line in answers(path, {"command": "tap", "domain": drill.domain_uuid}, timeout=5.0, blanks=True):
        if not asked:  # the tap is open: nothing of what follows is missed
            asked = True
            for _ in answers(path, {"command": "drill", **request}, timeout=5.0):
                pass
            out.write(f"drill      {drill.domain_name} ({drill.domain_uuid}), origin replay\n")
        if line.get("stage") == "incident" and event_id is None:
            event_id = line["stamp"]["id"]
            out.write(f"committed  {event_id}\n")
        elif line.get("stage") == "published" and line["item"]["id"] == event_id:
            out.write(f"confirmed  {event_id}\n")
            return
        out.flush()
        if time.monotonic() > deadline:
            break
    if event_id is None:
        why = (
            f"no drill of {drill.domain_name} is open"
            if drill.resolve
            else "an open drill folds repeats into windows (end it with `virtbus emit --resolve`)"
        )
        raise AgentUnavailable(
            f"no event was committed within {timeout:g} s: {why}, or the spool can't be written; "
            "see `virtbus status`"
        )
    raise BusUnavailable(
        f"event {event_id} is in the spool, the broker has not confirmed it after {timeout:g} s; "
        "see `virtbus status` and `virtbus doctor`"
    )


# ------------------------------------------------------------------------------- the command line


@click.command("emit")
@common
@setting("control.socket", "--control-socket", metavar="PATH", help="The agent's control socket.")
@click.option(
    "--domain-name",
    default="virtbus-drill",
    show_default=True,
    metavar="NAME",
    help="The guest that the event names.",
)
@click.option(
    "--action",
    type=click.Choice(["none", "pause", "report"]),
    default="report",
    show_default=True,
    help="What the hypervisor is said to have done.",
)
@click.option("--reason", default="drill", show_default=True, metavar="TEXT", help="libvirt's reason.")
@click.option("--count", type=click.IntRange(1, 1000), default=1, show_default=True, help="Errors in it.")
@click.option("--resolve", is_flag=True, help="End the drill: its incidents are resolved.")
@click.option(
    "--timeout",
    type=Seconds(0.1),
    default=10.0,
    show_default=True,
    metavar="S",
    help="How long to wait for the broker's confirmation.",
)
def command(
    timeout: float, domain_name: str, action: str, reason: str, count: int, resolve: bool, **options: Any
) -> None:
    """Run an alert drill: an event that says `replay`, through the running agent to the broker.

    It takes the way of a real error: incident, spool, broker. The guest it names does not exist; consumers
    that act must leave events of origin `replay` alone, and every event of the drill carries it.

    \b
    Example: virtbus emit --action pause --reason enospc
             virtbus emit --resolve
    """
    request = {
        "domain_name": domain_name,
        "action": action,
        "reason": reason,
        "count": count,
        "resolve": resolve,
    }
    run(load(options).config, request, timeout=timeout, out=sys.stdout)
