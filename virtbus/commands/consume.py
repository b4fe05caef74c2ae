"""`virtbus consume`: events from a bus to the terminal, validated."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

import click

from virtbus import envelope
from virtbus.commands import wiring
from virtbus.commands.options import (
    Seconds,
    bus,
    common,
    load,
    state_dir,
)
from virtbus.config import Loaded, bus_url
from virtbus.consumer import Consumer

EXIT_TOO_FEW = 1


def _escaped(line: str) -> str:
    """The same JSON with nothing in it that a terminal would obey."""
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in line)


def run(
    loaded: Loaded,
    *,
    group: str | None,
    count: int | None,
    timeout: float | None,
    types: Sequence[str],
    out: TextIO,
    notices: TextIO,
) -> int:
    """Print events until `count`, `timeout` seconds or an interrupt; 1 when `count` was not reached."""
    config = loaded.config
    deadline = None if timeout is None else time.monotonic() + timeout
    seen = 0
    # A broker that was never there must not look like silence: not patient at first.
    with Consumer(
        bus_url(config), group=group, options=wiring.bus_options(config), patient=False
    ) as consumer:
        while count is None or seen < count:
            left = 1.0 if deadline is None else min(1.0, deadline - time.monotonic())
            if left <= 0:
                break
            delivery = consumer.receive(left)
            if delivery is None:
                continue
            if not types or delivery.type.endswith(tuple(types)):
                line = envelope.structured_json(delivery.attributes, delivery.body).decode()
                out.write((_escaped(line) if out.isatty() else line) + "\n")
                out.flush()
                seen += 1
            delivery.ack()
    if count is not None and seen < count:
        notices.write(f"virtbus: {seen} of {count} events came in {timeout:g} s\n")
        return EXIT_TOO_FEW
    return 0


# ------------------------------------------------------------------------------- the command line


@click.command("consume")
@common
@bus
@state_dir
@click.option("--group", metavar="NAME", help="Share the events with the other members of a durable group.")
@click.option("--count", type=click.IntRange(1), metavar="N", help="End after N events.")
@click.option("--timeout", type=Seconds(0), metavar="S", help="End after S seconds.")
@click.option("--type", "types", multiple=True, metavar="TYPE", help="Only these event types (suffices).")
def command(
    group: str | None, count: int | None, timeout: float | None, types: tuple[str, ...], **options: Any
) -> None:
    """Print events as they come: one CloudEvent in structured JSON a line.

    Every event is validated against its schema; notices go to stderr. Without --group nothing is left
    behind on the broker when this ends.

    \b
    Example: virtbus consume --bus amqp://127.0.0.1// --count 1 --timeout 60
    """
    sys.exit(
        run(
            load(options),
            group=group,
            count=count,
            timeout=timeout,
            types=types,
            out=sys.stdout,
            notices=sys.stderr,
        )
    )
