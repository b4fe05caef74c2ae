"""Retention overtakes a group that is killed and restarted, and topics are replaced: what is lost is named.

    python -m tests.faults.kafka_overtaken [--rounds N]

Each round publishes, lets a consumer run for a moment, ends it (SIGKILL or in good order) or not, and deletes
a random part of each partition as retention would; every fourth round deletes the whole topic and makes
another of its name. The obligations are the records whose delivery the broker reported. Prints the line
`kafka_overtaken rounds=… sent=… handed_out=… named=… unnamed=…`; ends with 1 when a record was neither handed
out nor named.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from confluent_kafka import KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import NewTopic

from tests.kafka.cluster import Cluster
from tests.kafka.help import admin, bare_producer
from virtbus import envelope
from virtbus.testing import records

TOPIC, PARTITIONS, KEYS = "overtaken", 3, 12


@dataclass
class Reader:
    """The consumer's process and all that it said."""

    url: str
    folder: Path
    handed: list[str] = field(default_factory=list)
    told: list[dict[str, Any]] = field(default_factory=list)
    process: subprocess.Popen[str] | None = None
    thread: threading.Thread | None = None

    def start(self) -> None:
        """Start it, if it does not run."""
        if self.process is None:
            words = [sys.executable, "-m", "tests.faults.overtaken_child"]
            words += [self.url, TOPIC, str(self.folder / "seen.db")]
            with (self.folder / "consumer.log").open("a") as log:
                self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True)
            self.thread = threading.Thread(target=self.listen, args=(self.process,), daemon=True)
            self.thread.start()

    def said(self) -> int:
        """How many lines it has printed."""
        return len(self.handed) + len(self.told)

    def listen(self, process: subprocess.Popen[str]) -> None:
        """Sort its lines."""
        assert process.stdout is not None
        for line in process.stdout:
            if not line.endswith("\n"):  # killed in the middle
                continue
            words = json.loads(line)
            if "id" in words:
                self.handed.append(words["id"])
            else:
                self.told.append(words)

    def end(self, number: int) -> None:
        """End it by a signal."""
        if self.process is not None and self.thread is not None:
            self.process.send_signal(number)
            self.process.wait(60)
            self.thread.join(10)
            self.process = None


class Account:
    """What was published where: by topic id, partition and offset."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.sent: dict[str, tuple[str, int, int]] = {}
        self.topic_id = ""
        self.producer = bare_producer(url)
        self.client = admin(url)

    def make_topic(self) -> None:
        """Another topic of this name."""
        if self.topic_id:
            self.client.delete_topics([TOPIC])[TOPIC].result(30)
            while TOPIC in self.client.list_topics(timeout=10).topics:
                time.sleep(0.1)
            self.producer = bare_producer(self.url)
        made = self.client.create_topics([NewTopic(TOPIC, num_partitions=PARTITIONS, replication_factor=1)])
        made[TOPIC].result(30)
        old, until = self.topic_id, time.monotonic() + 30
        while self.topic_id == old and time.monotonic() < until:  # every broker learns of it a moment later
            with suppress(KafkaException):
                found = self.client.describe_topics(TopicCollection([TOPIC]))[TOPIC].result(30)
                self.topic_id = str(found.topic_id)

    def publish(self, count: int) -> set[str]:
        """Publish so many events and note where each went; their ids."""
        items = records(count, keys=KEYS)
        for record in items:
            wire = envelope.to_kafka(record.attributes, record.body)

            def stored(error: Any, message: Any, name: str = record.id) -> None:
                if error is None:
                    self.sent[name] = self.topic_id, message.partition(), message.offset()

            self.producer.produce(TOPIC, wire.value, wire.key, headers=wire.headers, on_delivery=stored)
        assert self.producer.flush(60) == 0
        return {record.id for record in items}

    def expire(self, chance: random.Random) -> None:
        """Delete a random part of each partition, as retention does."""
        ends = [0] * PARTITIONS
        for topic_id, partition, offset in self.sent.values():
            if topic_id == self.topic_id:
                ends[partition] = max(ends[partition], offset + 1)
        places = [TopicPartition(TOPIC, number, chance.randint(0, end)) for number, end in enumerate(ends)]
        for place, future in self.client.delete_records(places).items():
            try:
                future.result(30)
            except KafkaException as error:  # below what was deleted before: nothing to do
                if error.args[0].code() != KafkaError.OFFSET_OUT_OF_RANGE:
                    raise RuntimeError(f"deleting up to {place}") from error


def wait(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Until it is true; what is missing after that is found in the account."""
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)


def is_named(place: tuple[str, int, int], told: list[dict[str, Any]]) -> bool:
    """Whether the consumer was told that this record is gone."""
    topic_id, partition, offset = place
    return any(
        one["source"] == f"{TOPIC}[{partition}]"
        and one["epoch"] == topic_id
        and one["first"] <= offset
        and (one["last"] is None or offset <= one["last"])
        for one in told
    )


def scenario(cluster: Cluster, folder: Path, rounds: int, seed: int) -> bool:
    """Print the line; whether everything is accounted for."""
    chance = random.Random(seed)
    account = Account(cluster.url)
    reader = Reader(cluster.url, folder)
    account.make_topic()
    try:
        for number in range(rounds):
            account.publish(chance.randint(50, 300))
            said = reader.said()
            reader.start()
            wait(lambda: reader.said() > said)  # noqa: B023 - called at once
            time.sleep(chance.uniform(0.0, 0.5))
            if number % 3:  # else it runs on, and is overtaken while it does
                reader.end(signal.SIGKILL if number % 2 else signal.SIGTERM)
            account.publish(chance.randint(50, 300))
            if number % 4 == 3:
                account.make_topic()
            else:
                account.expire(chance)
        last = account.publish(100)
        reader.start()
        wait(lambda: last <= set(reader.handed))
    finally:
        reader.end(signal.SIGTERM)
    handed = set(reader.handed)
    gone = {name: place for name, place in account.sent.items() if name not in handed}
    unnamed = [place for place in gone.values() if not is_named(place, reader.told)]
    words = {
        "rounds": rounds,
        "seed": seed,
        "sent": len(account.sent),
        "handed_out": len(handed),
        "named": len(gone) - len(unnamed),
        "unnamed": len(unnamed),
        "repeated": len(reader.handed) - len(handed),
        "told": len(reader.told),
    }
    print("kafka_overtaken", *(f"{name}={value}" for name, value in words.items()), flush=True)
    if unnamed:
        print(f"unnamed: {sorted(unnamed)[:20]}; told: {reader.told}", file=sys.stderr)
    return not unnamed and bool(gone) and bool(reader.told)


def main() -> int:
    """Run it on a broker of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=20261129)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="virtbus-faults-") as name:
        folder = Path(name)
        cluster = Cluster(folder / "kafka").start()
        try:
            return int(not scenario(cluster, folder, options.rounds, options.seed))
        finally:
            cluster.stop()


if __name__ == "__main__":
    sys.exit(main())
