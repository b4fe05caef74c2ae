"""Publishing to a real Kafka: the agent's spool, bare confluent-kafka and stock kombu, in one run.

Every way writes the same I/O error events of 1,000 domains to a topic of 12 partitions; all but the stock
transport with acks=all and idempotence. The bare producer is the limit: its key, headers and value are ready
made and outside of the measured time, and it keeps no spool and no order a domain over a failure.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.bench.drain import NAME, drained
from tests.bench.measure import Row, ratio
from tests.kafka.cluster import Cluster
from virtbus.envelope import to_kafka
from virtbus.model import Record
from virtbus.testing import records

WINDOW = 1000  # more would not help: one record a domain is under way, and there are 1,000

_topics = itertools.count()


def bare(cluster: Cluster, source: Sequence[Record], window: int = 0) -> float:
    """confluent-kafka by itself, idempotent, acks=all, delivery reports, no limit a key; records a second.

    With a `window` at most so many records are unconfirmed.
    """
    from confluent_kafka import Producer

    topic = made_topic(cluster, f"bench.bare.{next(_topics)}")
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
    for sent, wire in enumerate(wires):
        while window and sent - confirmed >= window:
            producer.poll(0.01)
        while True:
            try:
                producer.produce(topic, wire.value, wire.key, headers=wire.headers, on_delivery=report)
                break
            except BufferError:
                producer.poll(0.01)
        producer.poll(0)
    producer.flush()
    seconds = time.perf_counter() - started
    assert confirmed == len(source)
    return len(source) / seconds


def stock(cluster: Cluster, source: Sequence[Record]) -> float:
    """kombu's own Kafka transport: a flush a message, nobody told of a failure; records a second."""
    from kombu import Connection, Exchange, Producer, Queue

    topic = made_topic(cluster, f"bench.stock.{next(_topics)}")
    host, _, port = cluster.hosts().partition(":")
    with Connection(f"confluentkafka://{host}:{port}//") as connection:
        exchange = Exchange("bench", type="direct")
        queue = Queue(topic, exchange, routing_key=topic)
        producer = Producer(connection, exchange=exchange, auto_declare=False)
        queue(connection.default_channel).declare()

        def publish(record: Record) -> None:
            producer.publish(
                record.body, routing_key=topic, headers=dict(record.attributes),
                content_type="application/json", content_encoding="binary",
            )  # fmt: skip

        publish(source[0])
        started = time.perf_counter()
        for record in source:
            publish(record)
        return len(source) / (time.perf_counter() - started)


def made_topic(cluster: Cluster, topic: str) -> str:
    """A topic of 12 partitions."""
    from confluent_kafka.admin import AdminClient, NewTopic

    admin = AdminClient({"bootstrap.servers": cluster.hosts()})
    admin.create_topics([NewTopic(topic, num_partitions=12, replication_factor=1)])[topic].result()
    return topic


def rows(rounds: int, *, events: int = 50_000) -> list[Row]:
    """Rates, and ours over the bare producer's, pair by pair."""
    rates: dict[str, list[float]] = {}
    source = records(events, keys=1000)
    with tempfile.TemporaryDirectory(prefix="virtbus-bench-", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(Path(folder) / "kafka").start()
        try:
            made_topic(cluster, NAME)
            bare(cluster, source[:5000])  # the JVM warms up
            for _ in range(rounds):
                for name, way in {
                    "virtbus, from the spool": lambda: drained(cluster.url, events, window=WINDOW).rate,
                    "bare confluent-kafka": lambda: bare(cluster, source),
                    f"bare confluent-kafka, window {WINDOW}": lambda: bare(cluster, source, WINDOW),
                    "kombu's Kafka transport": lambda: stock(cluster, source[: events // 25]),
                }.items():
                    rates.setdefault(name, []).append(way())
        finally:
            cluster.stop()
    ours = rates["virtbus, from the spool"]
    return [
        *(Row(f"kafka {name}", f"Kafka: {name}", tuple(each), "events/s") for name, each in rates.items()),
        ratio(
            "kafka over bare",
            "from the spool ÷ bare confluent-kafka, acks=all, 1,000 domains",
            ours,
            rates["bare confluent-kafka"],
            0.5,
        ),
        ratio(
            "kafka over bare at a window",
            f"from the spool ÷ bare confluent-kafka, both with at most {WINDOW:,} unconfirmed",
            ours,
            rates[f"bare confluent-kafka, window {WINDOW}"],
            None,
        ),
        ratio(
            "kafka over stock",
            "from the spool ÷ kombu's Kafka transport",
            ours,
            rates["kombu's Kafka transport"],
            10,
        ),
    ]
