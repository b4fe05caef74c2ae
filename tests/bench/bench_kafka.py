"""Throughput to a real Kafka in one run: bare confluent-kafka, our bus, our bus from the spool, stock kombu.

    python -m tests.bench.bench_kafka [--records N] [--runs N]

Prints one line a way: `NAME records=… seconds=… per_second=… of_bare=…`. Every way writes the same I/O error
events of 1,000 guests to a topic of 12 partitions; all but the stock transport with acks=all and idempotence.
The bare producer gets its key, headers and value ready-made and outside of the measured time. The ways take
turns; the best of the runs counts.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

from tests.kafka.cluster import Cluster
from virtbus.bus import BusOptions, open_bus
from virtbus.envelope import to_kafka
from virtbus.model import Confirmed, IoError, Outcome, Record
from virtbus.spool import Spool, SpoolLimits
from virtbus.testing import a_domain, a_record, an_io_error

KEYS = 1000
SETTLE_AT = 256  # outcomes a transaction, as the agent does
_topics = itertools.count()


def made(count: int) -> list[IoError]:
    """Events of 1,000 guests in trouble, in rotation."""
    domains = [a_domain(uuid=f"6ba7b810-9dad-11d1-80b4-{number:012d}") for number in range(KEYS)]
    return [an_io_error(domain=domains[number % KEYS]) for number in range(count)]


def encoded(events: Sequence[IoError]) -> list[Record]:
    """The events as the spool would give them."""
    return [a_record(event, row=number) for number, event in enumerate(events, 1)]


class ListFeed:
    """A feed from memory: what the bus alone can do."""

    def __init__(self, source: Sequence[Record]) -> None:
        self.left = deque(source)

    def take(self, limit: int, busy: AbstractSet[str]) -> Sequence[Record]:
        taken: list[Record] = []
        keys: set[str] = set()
        while self.left and len(taken) < limit:
            key = self.left[0].key
            if key in busy or key in keys:
                break
            keys.add(key)
            taken.append(self.left.popleft())
        return taken


def bare(cluster: Cluster, source: Sequence[Record]) -> int:
    """confluent-kafka by itself, idempotent, acks=all, delivery reports, no limit a key."""
    from confluent_kafka import Producer

    topic = fresh_topic(cluster)
    producer = Producer(
        {
            "bootstrap.servers": cluster.hosts(),
            "enable.idempotence": True,
            "acks": "all",
            "partitioner": "murmur2_random",
        }
    )
    wires = [to_kafka(record.attributes, record.body) for record in source]
    confirmed = 0

    def report(error: object, _message: object) -> None:
        nonlocal confirmed
        confirmed += error is None

    producer.poll(0)
    producer.list_topics(topic, timeout=10)
    started = time.perf_counter()
    for wire in wires:
        while True:
            try:
                producer.produce(topic, wire.value, wire.key, headers=wire.headers, on_delivery=report)
                break
            except BufferError:
                producer.poll(0.01)
        producer.poll(0)
    producer.flush()
    timing.append(time.perf_counter() - started)
    return confirmed


def bus(cluster: Cluster, source: Sequence[Record]) -> int:
    """Our bus with records from memory."""
    topic = fresh_topic(cluster)
    ours = open_bus(cluster.url, BusOptions(topic=topic, window=1000))
    list(ours.publish(ListFeed(source[:1])))
    feed = ListFeed(source)
    started = time.perf_counter()
    confirmed = sum(isinstance(outcome, Confirmed) for _, outcome in ours.publish(feed))
    timing.append(time.perf_counter() - started)
    ours.close()
    return confirmed


class SpoolFeed:
    """The spool as the agent publishes from it: outcomes are settled in groups."""

    def __init__(self, spool: Spool) -> None:
        self.spool = spool
        self.outcomes: list[tuple[Record, Outcome]] = []

    def take(self, limit: int, busy: AbstractSet[str]) -> Sequence[Record]:
        if len(self.outcomes) >= SETTLE_AT:
            self.settle()
        taken = self.spool.take(limit, busy)
        if not taken and self.outcomes:
            self.settle()
            taken = self.spool.take(limit, busy)
        return taken

    def settle(self) -> None:
        self.spool.settle(self.outcomes)
        self.outcomes = []


def spool(cluster: Cluster, source: Sequence[Record]) -> int:
    """Our bus from the spool: read from SQLite, check, encode, publish, settle."""
    topic = fresh_topic(cluster)
    ours = open_bus(cluster.url, BusOptions(topic=topic, window=1000))
    list(ours.publish(ListFeed(source[:1])))
    with tempfile.TemporaryDirectory(prefix="virtbus-bench-") as folder:
        agent = "2b6a7f0e-0000-4000-8000-000000000000"
        outbox = Spool.open(Path(folder), limits=SpoolLimits(), agent_id=agent)
        events = made(len(source))
        for at in range(0, len(events), 1000):
            outbox.commit(events[at : at + 1000])
        feed = SpoolFeed(outbox)
        confirmed = 0
        started = time.perf_counter()
        while outbox.stats().pending or feed.outcomes:
            for record, outcome in ours.publish(feed):
                feed.outcomes.append((record, outcome))
                confirmed += isinstance(outcome, Confirmed)
            feed.settle()
        timing.append(time.perf_counter() - started)
        outbox.close()
    ours.close()
    return confirmed


def stock(cluster: Cluster, source: Sequence[Record]) -> int:
    """kombu's own Kafka transport: a flush a message."""
    from kombu import Connection, Exchange, Producer, Queue

    topic = fresh_topic(cluster)
    host, _, port = cluster.hosts().partition(":")
    with Connection(f"confluentkafka://{host}:{port}//") as connection:
        exchange = Exchange("bench", type="direct")
        queue = Queue(topic, exchange, routing_key=topic)
        producer = Producer(connection, exchange=exchange, auto_declare=False)
        queue(connection.default_channel).declare()
        producer.publish(
            source[0].body, routing_key=topic, content_encoding="binary", content_type="application/json"
        )
        started = time.perf_counter()
        for record in source:
            producer.publish(
                record.body,
                routing_key=topic,
                headers=dict(record.attributes),
                content_type="application/json",
                content_encoding="binary",
            )
        timing.append(time.perf_counter() - started)
    return len(source)


def fresh_topic(cluster: Cluster) -> str:
    """A topic of 12 partitions, made."""
    from confluent_kafka.admin import AdminClient, NewTopic

    topic = f"bench.{next(_topics)}"
    admin = AdminClient({"bootstrap.servers": cluster.hosts()})
    admin.create_topics([NewTopic(topic, num_partitions=12, replication_factor=1)])[topic].result()
    return topic


timing: list[float] = []


def main() -> None:
    """Run every way `--runs` times, in turn, and print the best of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=50_000)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    source = encoded(made(arguments.records))
    ways: list[tuple[str, Callable[[Cluster, Sequence[Record]], int], int]] = [
        ("kafka_bare", bare, len(source)),
        ("kafka_bus", bus, len(source)),
        ("kafka_spool", spool, len(source)),
        ("kafka_stock_kombu", stock, min(len(source), 2000)),
    ]
    with tempfile.TemporaryDirectory(prefix="virtbus-bench-") as folder:
        cluster = Cluster(Path(folder) / "kafka").start()
        try:
            best: dict[str, float] = {}
            bare(cluster, source[:5000])  # the JVM warms up
            for _ in range(arguments.runs):
                for name, way, count in ways:
                    confirmed = way(cluster, source[:count])
                    assert confirmed == count, f"{name}: {confirmed} of {count} confirmed"
                    best[name] = max(best.get(name, 0.0), count / timing[-1])
        finally:
            cluster.stop()
    for name, _, count in ways:
        share = best[name] / best["kafka_bare"]
        seconds = count / best[name]
        print(f"{name} records={count} seconds={seconds:.2f} per_second={best[name]:.0f} of_bare={share:.3f}")


if __name__ == "__main__":
    main()
