"""A consumer that has an effect for each event and is killed while it does."""

from __future__ import annotations

import os
from pathlib import Path

from virtbus.bus import BusOptions
from virtbus.consumer import Consumer


def consume(
    url: str, topic: str, dedupe: str, effects: str, run: int, limit: int | None, ready: object
) -> None:
    """Write one line an event, then acknowledge it; for ever, or until nothing came for `limit` seconds."""
    out = os.open(effects, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    options = BusOptions(topic=topic)
    with Consumer(
        url, group="victims", options=options, dedupe=Path(dedupe), exclusive=True, prefetch=50
    ) as consumer:
        while True:
            delivery = consumer.receive(limit or 1.0)
            if delivery is None:
                if limit is not None:
                    return
                continue
            ready.set()  # type: ignore[attr-defined]
            line = f"{run} {delivery.key} {int(delivery.attributes['sequence'])} {delivery.id}\n"
            os.write(out, line.encode())  # the effect
            delivery.ack()
