"""Publishing to a real Kafka: the agent's spool, the same work done bare, and stock kombu, in one run.

Every way writes the same I/O error events of 1,000 domains to a topic of 12 partitions; all but the stock
transport with acks=all and idempotence. "The same work bare" is what a careful author would write who keeps
no order a domain over a failure: rows of SQLite, confluent-kafka with the same headers, and the confirmed
rows deleted with a sync of the disk. The bare producer alone does less: all is ready made in memory.
"""

from __future__ import annotations

import itertools
import json
import sqlite3
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


def bare(cluster: Cluster, source: Sequence[Record]) -> float:
    """confluent-kafka by itself, idempotent, acks=all, delivery reports, no limit a key; records a second."""
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
    for wire in wires:
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


def outbox(cluster: Cluster, source: Sequence[Record], window: int) -> float:
    """The same work bare: rows of SQLite → confluent-kafka → delete; records a second.

    At most `window` are read and unconfirmed; 128 are read and deleted at a time, as the agent does.
    """
    from confluent_kafka import Producer

    topic = made_topic(cluster, f"bench.outbox.{next(_topics)}")
    producer = Producer(
        {
            "bootstrap.servers": cluster.hosts(),
            "enable.idempotence": True,
            "acks": "all",
            "partitioner": "murmur2_random",
        }
    )
    producer.list_topics(topic, timeout=10)
    confirmed: list[int] = []
    with tempfile.TemporaryDirectory(prefix="virtbus-bench-", dir="/var/tmp") as folder:
        db = sqlite3.connect(Path(folder) / "outbox.db", isolation_level=None)
        db.executescript(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;"
            "CREATE TABLE outbox (id INTEGER PRIMARY KEY, key BLOB, headers TEXT, value BLOB); BEGIN"
        )
        for record in source:
            wire = to_kafka(record.attributes, record.body)
            db.execute(
                "INSERT INTO outbox (key, headers, value) VALUES (?, ?, ?)",
                (wire.key, json.dumps(wire.headers), wire.value),
            )
        db.execute("COMMIT")
        sent = deleted = last = 0
        started = time.perf_counter()
        while deleted < len(source):
            room = min(128, window - (sent - deleted - len(confirmed)))
            if room > 0 and sent < len(source):
                for row, key, headers, value in db.execute(
                    "SELECT id, key, headers, value FROM outbox WHERE id > ? ORDER BY id LIMIT ?",
                    (last, room),
                ).fetchall():
                    pairs = [(name, text) for name, text in json.loads(headers)]
                    producer.produce(
                        topic, value, key, headers=pairs,
                        on_delivery=lambda error, _, id=row: confirmed.append(id) if not error else None,
                    )  # fmt: skip
                    sent, last = sent + 1, row
            producer.poll(0 if room > 0 and sent < len(source) else 0.01)
            if len(confirmed) >= min(128, len(source) - deleted):
                db.execute("BEGIN")
                db.executemany("DELETE FROM outbox WHERE id = ?", [(id_,) for id_ in confirmed])
                db.execute("COMMIT")
                deleted += len(confirmed)
                confirmed.clear()
        seconds = time.perf_counter() - started
        db.close()
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
            bare(cluster, source)  # the JVM warms up
            for _ in range(rounds):
                for name, way in {
                    "virtbus, from the spool": lambda: drained(cluster.url, events, window=WINDOW).rate,
                    "the same work bare": lambda: outbox(cluster, source, WINDOW),
                    "bare confluent-kafka": lambda: bare(cluster, source),
                    "kombu's Kafka transport": lambda: stock(cluster, source[: events // 25]),
                }.items():
                    rates.setdefault(name, []).append(way())
        finally:
            cluster.stop()
    ours = rates["virtbus, from the spool"]
    return [
        *(Row(f"kafka {name}", f"Kafka: {name}", tuple(each), "events/s") for name, each in rates.items()),
        ratio(
            "kafka over the same work bare",
            f"from the spool ÷ SQLite → confluent-kafka → delete, at most {WINDOW:,} unconfirmed",
            ours,
            rates["the same work bare"],
            0.7,
        ),
        ratio(
            "kafka over bare",
            "from the spool ÷ bare confluent-kafka, from memory",
            ours,
            rates["bare confluent-kafka"],
            None,
        ),
        ratio(
            "kafka over stock",
            "from the spool ÷ kombu's Kafka transport",
            ours,
            rates["kombu's Kafka transport"],
            7,
        ),
    ]
