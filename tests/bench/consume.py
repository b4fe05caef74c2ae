"""Consuming from RabbitMQ: the SDK with dedupe file and validation beside bare kombu, one queue, one run.

Both acknowledge each message; prefetch 100. The bare consumer decodes nothing and remembers nothing.
`durable` is the SDK's default (a synced mark each ack), `group commit` shares a write among up to 64 acks.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import kombu

from tests.bench.measure import Row
from tests.brokers.rabbitmq import RabbitMQ
from virtbus.bus import BusOptions, open_bus
from virtbus.consumer import Consumer
from virtbus.testing import ListFeed, records

PREFETCH = 100
GROUP = "bench"


def bare(url: str, events: int, queue: str = f"virtbus.{GROUP}") -> float:
    """kombu's Consumer with a callback that acknowledges; messages a second."""
    with kombu.Connection(url, heartbeat=10) as connection:
        channel = connection.channel()
        channel.basic_qos(0, PREFETCH, False)
        got = 0

        def take(message: kombu.Message) -> None:
            nonlocal got
            got += 1
            message.ack()

        queues = [kombu.Queue(queue, no_declare=True)]
        consumer = kombu.Consumer(channel, queues=queues, on_message=take, auto_declare=False)
        begun = time.perf_counter()
        with consumer:
            while got < events:
                connection.drain_events(timeout=30)
        return events / (time.perf_counter() - begun)


def sdk(url: str, events: int, folder: Path, *, group_commit: bool) -> float:
    """The Consumer as a scheduler uses it; events a second."""
    with Consumer(
        url, group=GROUP, dedupe=folder / "seen.db", prefetch=PREFETCH, group_commit=group_commit
    ) as consumer:
        begun = time.perf_counter()
        for _ in range(events):
            delivery = consumer.receive(30.0)
            assert delivery is not None
            delivery.ack()
        return events / (time.perf_counter() - begun)


def rows(rounds: int, events: int) -> Sequence[Row]:
    """Both settings as a part of the bare rate, and all three rates."""
    rates: dict[str, list[float]] = {"bare": [], "durable": [], "grouped": []}
    with tempfile.TemporaryDirectory(prefix="vbbench-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        broker = RabbitMQ.shared(Path(folder) / "rabbitmq")
        try:
            url = broker.url(broker.vhost())
            bus = open_bus(url, BusOptions(window=1024))
            with Consumer(url, group=GROUP) as first:
                first.receive(0.3)
            for _ in range(rounds):
                for name, measured in rates.items():
                    assert ListFeed(records(events, keys=1000)).drain(bus, timeout=300.0) == events
                    if name == "bare":
                        measured.append(bare(url, events))
                    else:
                        measured.append(sdk(url, events, Path(folder), group_commit=name == "grouped"))
            bus.close()
        finally:
            broker.close()
    parts = {
        name: tuple(one / other for one, other in zip(rates[name], rates["bare"], strict=True))
        for name in ("durable", "grouped")
    }
    return (
        Row("consume durable", "SDK with dedupe file and validation, over bare kombu", parts["durable"]),
        Row("consume group commit", "the same with group_commit", parts["grouped"]),
        Row("consume bare rate", "bare kombu", tuple(rates["bare"]), "/s"),
        Row("consume durable rate", "SDK, each ack durable", tuple(rates["durable"]), "/s"),
        Row("consume group commit rate", "SDK, group commit", tuple(rates["grouped"]), "/s"),
    )
