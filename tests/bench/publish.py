"""Publishing to RabbitMQ: the agent's publisher from its spool against its peers, in one run.

Same events (1,000 domains), same broker, all persistent into durable classic queues, each ended by the
broker's confirm. Raw pipelined kombu is the limit: what a careful author would write who has no spool, no
order a domain to keep and no outcome to tell. Peers that confirm each message get a part of the messages.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import kombu

from tests.bench import peers
from tests.bench.drain import NAME, drained, fill
from tests.bench.measure import Row, ratio
from tests.brokers.rabbitmq import RabbitMQ
from virtbus import envelope
from virtbus.model import Record
from virtbus.testing import records

EXCHANGE = NAME
WINDOW = 256  # the agent's default
WIDE = 1000  # what an operator sets where a backlog must be gone sooner


@contextmanager
def broker() -> Iterator[RabbitMQ]:
    """A private RabbitMQ node."""
    with tempfile.TemporaryDirectory(prefix="vbbench-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        node = RabbitMQ.shared(Path(folder) / "rabbitmq")
        try:
            yield node
        finally:
            node.close()


class Queue:
    """The bench's exchange with one durable queue that gets everything, emptied between the ways."""

    def __init__(self, url: str) -> None:
        self.connection = kombu.Connection(url)
        self.channel = self.connection.channel()
        self.channel.exchange_declare(EXCHANGE, type="topic", durable=True, auto_delete=False)
        self.channel.queue_declare("bench", durable=True, auto_delete=False)
        self.channel.queue_bind("bench", EXCHANGE, "#")

    def purge(self) -> int:
        """Empty it; how many messages it held."""
        return int(self.channel.queue_purge("bench"))


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


def confirm_each(url: str, items: list[Record]) -> float:
    """kombu's transport option confirm_publish=True."""
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


def _peer(name: str, items: list[Record], *words: str) -> float:
    messages = [
        {
            "key": envelope.routing_key(record.attributes),
            "type": record.attributes["type"],
            "headers": envelope.to_amqp(record.attributes, record.body).headers,
            "body": record.body.decode(),
            "payload": json.loads(record.body),
        }
        for record in items
    ]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(messages, file)
        file.flush()
        answer = peers.run(name, *words, file.name)
    return answer["count"] / answer["seconds"]


def rows(rounds: int, *, events: int = 20_000) -> list[Row]:
    """Rates, and ours over each peer's, pair by pair."""
    rates: dict[str, list[float]] = {}
    with broker() as node:
        url = node.url(node.vhost())
        queue = Queue(url)
        items = records(events, keys=1000)
        few = items[: events // 10]
        ways: dict[str, Callable[[], float]] = {
            f"virtbus, from the spool, window {WINDOW}": lambda: drained(url, events, window=WINDOW).rate,
            f"raw pipelined kombu, window {WINDOW}": lambda: raw_pipelined(url, items, WINDOW),
            f"virtbus, from the spool, window {WIDE}": lambda: drained(url, events, window=WIDE).rate,
            f"raw pipelined kombu, window {WIDE}": lambda: raw_pipelined(url, items, WIDE),
            "kombu confirm_publish": lambda: confirm_each(url, few),
            "pika with confirms": lambda: _peer("pika", few, url, EXCHANGE),
            "oslo.messaging notifier": lambda: _peer("oslo", few, url),
        }
        raw_pipelined(url, items[:5000], WINDOW)
        queue.purge()
        for _ in range(rounds):
            for name, way in ways.items():
                rates.setdefault(name, []).append(way())
                queue.purge()
    told = [
        Row(f"rabbitmq {name}", f"RabbitMQ: {name}", tuple(each), "events/s") for name, each in rates.items()
    ]
    for window in (WINDOW, WIDE):
        goals = {
            f"raw pipelined kombu, window {window}": 0.8,
            "oslo.messaging notifier": 4.0,
            "kombu confirm_publish": 7.0,
            "pika with confirms": None,
        }
        ours = rates[f"virtbus, from the spool, window {window}"]
        told += [
            ratio(
                f"publish over {name.partition(',')[0]}, {window}",
                f"from the spool, window {window}, 1,000 domains ÷ {name}",
                ours,
                rates[name],
                goal,
            )
            for name, goal in goals.items()
        ]
    return told


def drain_rows(rounds: int, *, events: int = 100_000) -> list[Row]:
    """A backlog of 100,000 events of 1,000 domains."""
    ours, raw, grown, cpu = [], [], [], []
    with broker() as node, tempfile.TemporaryDirectory(prefix="virtbus-bench-", dir="/var/tmp") as folder:
        url = node.url(node.vhost())
        queue = Queue(url)
        items = records(events, keys=1000)
        for turn in range(rounds):
            state = Path(folder) / f"state-{turn}"
            fill(state, events)
            one = drained(url, events, window=WINDOW, filled=state)
            assert queue.purge() >= events
            raw.append(raw_pipelined(url, items, WINDOW))
            queue.purge()
            ours.append(one.rate)
            grown.append(one.rss_peak / one.rss_begin)
            cpu.append(one.cpu / one.events * 1e6)
    return [
        ratio(
            "drain over raw",
            f"drain of {events:,} events, 1,000 domains ÷ raw pipelined kombu, window {WINDOW}",
            ours,
            raw,
            0.75,
        ),
        Row(
            "drain rss",
            f"RSS at its highest ÷ at 5 %, drain of {events:,} events",
            tuple(grown),
            goal=1.05,
            least=False,
        ),
        Row("drain cpu", "CPU of an event in a drain", tuple(cpu), "µs"),
    ]
