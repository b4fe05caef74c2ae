"""Publishing to RabbitMQ: AmqpBus against raw pipelined kombu and kombu's own confirm_publish, in one run.

    python -m tests.bench.bench_amqp [amqp-url] [events] [window]

Same messages (1,000 domains, made beforehand), window, confirms and queue; no spool. Each is run three times
in turn, the best counts. Without a URL a private RabbitMQ is started.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import kombu

from tests.brokers.rabbitmq import RabbitMQ
from virtbus import envelope
from virtbus.bus import BusOptions, open_bus
from virtbus.model import Confirmed, Record
from virtbus.testing import ListFeed, records

EXCHANGE = "bench.events"


def raw_pipelined(url: str, items: list[Record], window: int) -> float:
    """What a careful author would write with kombu: py-amqp's publish, a set of tags, drain_events."""
    wires = [
        (envelope.to_amqp(record.attributes, record.body), envelope.routing_key(record.attributes), record)
        for record in items
    ]
    with kombu.Connection(url, heartbeat=10) as connection:
        channel = connection.channel()
        channel.confirm_select()
        open_tags: set[int] = set()
        confirmed = 0

        def on_ack(tag: int, multiple: bool) -> None:
            nonlocal confirmed
            done = {one for one in open_tags if one <= tag} if multiple else {tag}
            open_tags.difference_update(done)
            confirmed += len(done)

        channel.events["basic_ack"].add(on_ack)
        begun = time.perf_counter()
        for tag, (wire, key, record) in enumerate(wires, 1):
            message = channel.prepare_message(
                wire.body,
                content_type=wire.content_type,
                headers=wire.headers,
                properties={"delivery_mode": 2, "message_id": record.id, "timestamp": 1},
            )
            channel.basic_publish(message, exchange=EXCHANGE, routing_key=key, mandatory=True)
            open_tags.add(tag)
            while len(open_tags) >= window:
                connection.drain_events(timeout=30)
        while open_tags:
            connection.drain_events(timeout=30)
        assert confirmed == len(items)
        return len(items) / (time.perf_counter() - begun)


def confirm_each(url: str, items: list[Record], window: int) -> float:
    """kombu's transport option confirm_publish=True; on a tenth of the messages."""
    items = items[: len(items) // 10]
    with kombu.Connection(url, transport_options={"confirm_publish": True}) as connection:
        producer = connection.Producer()
        begun = time.perf_counter()
        for record in items:
            wire = envelope.to_amqp(record.attributes, record.body)
            producer.publish(
                wire.body, exchange=EXCHANGE, routing_key=envelope.routing_key(record.attributes),
                headers=wire.headers, content_type=wire.content_type, content_encoding="binary",
                delivery_mode=2, mandatory=True, message_id=record.id,
            )  # fmt: skip
        return len(items) / (time.perf_counter() - begun)


def ours(url: str, items: list[Record], window: int) -> float:
    """AmqpBus with a list as its feed: encoding, one record a key and settling are in the time."""
    feed = ListFeed(items)
    bus = open_bus(url, BusOptions(exchange=EXCHANGE, window=window))
    for record, outcome in bus.publish(ListFeed([items[0]])):
        assert isinstance(outcome, Confirmed), (record.row, outcome)
    begun = time.perf_counter()
    outcomes = feed.publish(bus)
    seconds = time.perf_counter() - begun
    assert all(isinstance(outcome, Confirmed) for outcome in outcomes)
    assert len(outcomes) == len(items)
    bus.close()
    return len(items) / seconds


def measure(url: str, events: int, window: int) -> dict[str, float]:
    """Events a second of each way, the best of three."""
    with kombu.Connection(url) as connection:
        channel = connection.channel()
        channel.exchange_declare(EXCHANGE, type="topic", durable=True, auto_delete=False)
        channel.queue_declare("bench", durable=True, auto_delete=False)
        channel.queue_bind("bench", EXCHANGE, "#")
        ways: dict[str, Callable[[str, list[Record], int], float]] = {
            "raw_kombu_pipelined": raw_pipelined,
            "kombu_confirm_publish": confirm_each,
            "amqp_bus": ours,
        }
        best = dict.fromkeys(ways, 0.0)
        for _ in range(3):
            items = records(events, keys=1000)
            for name, way in ways.items():
                best[name] = max(best[name], way(url, items, window))
                channel.queue_purge("bench")
        channel.queue_delete("bench")
    return best


def main() -> None:
    """Print one line a way and the ratios."""
    url, events, window = (*sys.argv[1:], *["", "20000", "256"][len(sys.argv) - 1 :])
    broker = None
    if not url:
        broker = RabbitMQ.shared(Path(tempfile.mkdtemp(prefix="vbbench-", dir="/tmp")) / "rabbitmq")
        url = broker.url(broker.vhost())
    try:
        best = measure(url, int(events), int(window))
    finally:
        if broker is not None:
            broker.close()
    for name, rate in best.items():
        print(f"{name} events_per_second={rate:.0f} window={window}")
    print(
        f"amqp_bus ratio_to_raw={best['amqp_bus'] / best['raw_kombu_pipelined']:.2f} "
        f"ratio_to_confirm_publish={best['amqp_bus'] / best['kombu_confirm_publish']:.1f}"
    )


if __name__ == "__main__":
    main()
