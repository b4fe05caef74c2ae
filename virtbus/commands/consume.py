"""`virtbus consume`: events from a bus to the terminal, validated."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TextIO

from virtbus import envelope, schema
from virtbus.commands import wiring
from virtbus.config import Loaded
from virtbus.errors import BusUnavailable, SchemaError
from virtbus.retry import Backoff
from virtbus.telemetry import BusLost, emit

EXIT_TOO_FEW = 1


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
    import threading

    bus = wiring.open_bus(loaded.config)
    deadline = None if timeout is None else time.monotonic() + timeout
    never = threading.Event()
    backoff = Backoff("consume")
    seen = 0
    connected = False
    try:
        subscription = bus.consume(group)
        while count is None or seen < count:
            left = 1.0 if deadline is None else min(1.0, deadline - time.monotonic())
            if left <= 0:
                break
            try:
                message = subscription.receive(left)
            except BusUnavailable as error:
                if not connected:
                    raise  # a wrong address must not look like silence
                emit(BusLost("consume", error))
                backoff.wait(never, error)
                continue
            connected = True
            backoff.reset()
            if message is None:
                continue
            try:
                event = envelope.decode(message)
                problems = schema.validate(
                    event.attributes.get("dataschema", event.attributes["type"]), event.data
                )
                if problems:
                    raise SchemaError(f"{problems[0].pointer}: {problems[0].message}")
            except SchemaError as error:
                notices.write(f"virtbus: {message.position}: not one of our events: {error}\n")
                subscription.dead_letter(message, str(error))
                continue
            if not types or any(event.attributes["type"].endswith(name) for name in types):
                out.write(envelope.structured_json(event.attributes, event.body).decode() + "\n")
                out.flush()
                seen += 1
            subscription.ack(message)
        subscription.close()
    finally:
        bus.close()
    if count is not None and seen < count:
        notices.write(f"virtbus: {seen} of {count} events came in {timeout:g} s\n")
        return EXIT_TOO_FEW
    return 0
