"""Consuming from RabbitMQ: AmqpSubscription against a bare kombu consumer, on one quorum queue in one run.

    python -m tests.bench.bench_amqp_consume [amqp-url] [events]

Both acknowledge each message; prefetch 100. Best of three. No decoding: that is the SDK's share.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import kombu

from tests.brokers.rabbitmq import RabbitMQ
from virtbus.bus import BusOptions, open_bus
from virtbus.testing import ListFeed, records

PREFETCH = 100


def bare_kombu(url: str, queue: str, events: int) -> float:
    """kombu's Consumer with a callback that acknowledges."""
    with kombu.Connection(url, heartbeat=10) as connection:
        channel = connection.channel()
        channel.basic_qos(0, PREFETCH, False)
        got = 0

        def take(message: kombu.Message) -> None:
            nonlocal got
            got += 1
            message.ack()

        consumer = kombu.Consumer(
            channel, queues=[kombu.Queue(queue, no_declare=True)], on_message=take, auto_declare=False
        )
        begun = time.perf_counter()
        with consumer:
            while got < events:
                connection.drain_events(timeout=30)
        return events / (time.perf_counter() - begun)


def main() -> None:
    """Print one line a way and the ratio."""
    url, events = (*sys.argv[1:], *["", "10000"][len(sys.argv) - 1 :])
    broker = None
    if not url:
        broker = RabbitMQ.shared(Path(tempfile.mkdtemp(prefix="vbbench-", dir="/tmp")) / "rabbitmq")
        url = broker.url(broker.vhost())
    count = int(events)
    best = {"bare_kombu_consumer": 0.0, "amqp_subscription": 0.0}
    try:
        bus = open_bus(url, BusOptions(window=1024))
        subscription = bus.consume("bench")
        subscription.receive(0.3)
        subscription.close()
        for _ in range(3):
            ListFeed(records(count, keys=1000)).publish(bus)
            best["bare_kombu_consumer"] = max(
                best["bare_kombu_consumer"], bare_kombu(url, "virtbus.bench", count)
            )
            ListFeed(records(count, keys=1000)).publish(bus)
            subscription = bus.consume("bench", prefetch=PREFETCH)
            begun = time.perf_counter()
            for _ in range(count):
                message = subscription.receive(30)
                assert message is not None
                subscription.ack(message)
            best["amqp_subscription"] = max(best["amqp_subscription"], count / (time.perf_counter() - begun))
            subscription.close()
        bus.close()
    finally:
        if broker is not None:
            broker.close()
    for name, rate in best.items():
        print(f"{name} events_per_second={rate:.0f} prefetch={PREFETCH}")
    print(
        f"amqp_subscription ratio_to_bare_kombu={best['amqp_subscription'] / best['bare_kombu_consumer']:.2f}"
    )


if __name__ == "__main__":
    main()
