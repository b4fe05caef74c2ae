"""A consumer that prints what it was handed and what it was told is gone, then acknowledges."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

from virtbus import BusOptions, Consumer, MissingEvents
from virtbus.bus.kafka import subscription as kafka_consumer


def say(**words: object) -> None:
    """One line for the parent, before anything is acknowledged."""
    print(json.dumps(words), flush=True)


def main() -> None:
    """url topic dedupe-file"""
    url, topic, dedupe = sys.argv[1:4]
    kafka_consumer._LOOK_SECONDS = 2.0

    def missing(told: MissingEvents) -> None:
        say(source=told.source, epoch=told.epoch, first=told.first, last=told.last, cause=told.cause)

    options = BusOptions(topic=topic, declare=False)
    with Consumer(
        url, group="g", options=options, dedupe=Path(dedupe), prefetch=20, on_missing=missing
    ) as consumer:
        signal.signal(signal.SIGTERM, lambda *_: consumer.stop())
        for delivery in consumer:
            say(id=delivery.id)
            delivery.ack()


if __name__ == "__main__":
    main()
