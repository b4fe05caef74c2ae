"""What a group will never get is told, with its numbers; then it goes on with what is left."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from confluent_kafka import Consumer as bare_consumer
from confluent_kafka import TopicPartition

from tests.kafka.help import admin, bare_producer, hosts, opened
from virtbus import Consumer, MissingEvents
from virtbus.bus import BusOptions
from virtbus.bus.kafka import subscription as kafka_consumer
from virtbus.sequences import Cause
from virtbus.testing import ListFeed, records


class Group:
    """A consumer of one partition, with what it got and what it was told."""

    def __init__(self, url: str, topic: str, dedupe: Path | None = None, **options: object) -> None:
        self.url, self.topic, self.dedupe, self.options = url, topic, dedupe, options
        self.told: list[MissingEvents] = []
        self.open()

    def open(self) -> None:
        self.consumer = Consumer(
            self.url,
            group="g",
            options=BusOptions(topic=self.topic, topic_partitions=1),
            dedupe=self.dedupe,
            on_missing=self.told.append,
            **self.options,  # type: ignore[arg-type]
        )

    def take(self, count: int, seconds: float = 40.0) -> list[str]:
        got: list[str] = []
        limit = time.monotonic() + seconds
        while len(got) < count and time.monotonic() < limit:
            delivery = self.consumer.receive(0.5)
            if delivery is not None:
                got.append(delivery.id)
                delivery.ack()
        return got

    def take_until(self, last: list[str], seconds: float = 40.0) -> list[str]:
        """All that comes until the last of it are these."""
        got: list[str] = []
        limit = time.monotonic() + seconds
        while got[-len(last) :] != last and time.monotonic() < limit:
            got += self.take(1, seconds=1.0)
        return got

    def until_told(self, count: int, seconds: float = 40.0) -> None:
        limit = time.monotonic() + seconds
        while len(self.told) < count and time.monotonic() < limit:
            assert self.consumer.receive(0.2) is None


@pytest.fixture
def group(kafka_url: str, kafka_topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes a group on the test's topic and closes it."""
    monkeypatch.setattr(kafka_consumer, "_LOOK_SECONDS", 1.0)
    made: list[Group] = []

    def make(*, dedupe: bool = False, **options: object) -> Group:
        made.append(Group(kafka_url, kafka_topic, tmp_path / "seen.db" if dedupe else None, **options))
        return made[-1]

    yield make
    for one in made:
        one.consumer.close()


@pytest.fixture
def publish(kafka_url: str, kafka_topic: str) -> Callable[[int], list[str]]:
    """Publishes so many events and gives their ids."""

    def more(count: int) -> list[str]:
        items = records(count)
        with opened(kafka_url, kafka_topic, topic_partitions=1) as bus:
            assert ListFeed(items).drain(bus, timeout=60) == count
        return [item.id for item in items]

    return more


def expire(url: str, topic: str, upto: int) -> None:
    """What retention does, at once: everything below the offset is deleted."""
    client, place = admin(url), TopicPartition(topic, 0, upto)
    client.delete_records([place])[place].result(20)


def delete(url: str, topic: str) -> None:
    """The next one who publishes makes another topic of this name."""
    client = admin(url)
    client.delete_topics([topic])[topic].result(20)
    limit = time.monotonic() + 20
    while topic in client.list_topics(timeout=5).topics and time.monotonic() < limit:
        time.sleep(0.1)


def facts(told: list[MissingEvents]) -> list[tuple[str, int, int | None, Cause]]:
    return [(one.source, one.first, one.last, one.cause) for one in told]


@pytest.mark.parametrize("dedupe", [False, True])
def test_a_group_that_retention_overtook_while_it_was_away(kafka_url, kafka_topic, group, publish, dedupe):
    first = publish(10)
    one = group(dedupe=dedupe)
    assert one.take(4) == first[:4]
    one.consumer.close()
    expire(kafka_url, kafka_topic, 7)
    one.open()
    assert one.take(3) == first[7:]
    assert facts(one.told) == [(f"{kafka_topic}[0]", 4, 6, Cause.RETENTION)]
    one.consumer.close()
    one.open()
    assert one.take(1, seconds=2.0) == []
    assert len(one.told) == 1, "told once"


def test_a_group_that_was_overtaken_by_everything_is_told_though_nothing_comes(
    kafka_url, kafka_topic, group, publish
):
    publish(10)
    one = group()
    one.take(4)
    one.consumer.close()
    expire(kafka_url, kafka_topic, 10)
    one.open()
    one.until_told(1)
    assert facts(one.told) == [(f"{kafka_topic}[0]", 4, 9, Cause.RETENTION)]


def test_a_running_consumer_that_is_slower_than_retention(kafka_url, kafka_topic, group, publish):
    sent = publish(10)
    one = group(prefetch=2)
    held = [one.consumer.receive(20.0), one.consumer.receive(20.0)]
    assert [delivery.id for delivery in held] == sent[:2]
    assert one.consumer.receive(0.5) is None  # its partition is paused, with 2… still to come
    expire(kafka_url, kafka_topic, 8)
    for delivery in held:
        delivery.ack()
    assert one.take(2) == sent[8:]
    assert facts(one.told) == [(f"{kafka_topic}[0]", 2, 7, Cause.RETENTION)]


def test_a_group_that_an_operator_moved_behind_an_open_transaction_has_lost_nothing(
    kafka_url, kafka_topic, group, publish
):
    """The broker calls the end of a log what is before the transaction; the operator's tool does not."""
    first = publish(3)
    one = group()
    assert one.take(3) == first
    one.consumer.close()
    producer = bare_producer(kafka_url, **{"transactional.id": kafka_topic})
    producer.init_transactions(20)
    producer.begin_transaction()
    producer.produce(kafka_topic, b"somebody else's", partition=0)
    producer.flush(20)
    tool = bare_consumer({"bootstrap.servers": hosts(kafka_url), "group.id": "virtbus.g"})
    tool.commit(offsets=[TopicPartition(kafka_topic, 0, 4)], asynchronous=False)
    tool.close()
    one.open()
    assert one.take(1, seconds=3.0) == []
    producer.abort_transaction(20)
    more = publish(2)
    assert one.take(2) == more
    assert one.told == []


def test_a_new_group_is_told_nothing(kafka_url, kafka_topic, group, publish):
    sent = publish(10)
    expire(kafka_url, kafka_topic, 5)
    one = group()
    assert one.take(5) == sent[5:]
    assert one.told == []


def test_another_topic_of_the_same_name_is_read_from_its_beginning(kafka_url, kafka_topic, group, publish):
    publish(3)
    one = group(dedupe=True)
    one.take(3)
    one.consumer.close()
    delete(kafka_url, kafka_topic)
    sent = publish(8)
    one.open()
    assert one.take(8) == sent, "not from where the group stood in the old one"
    assert facts(one.told) == [(f"{kafka_topic}[0]", 3, None, Cause.REPLACED)]


def test_a_topic_that_is_recreated_under_a_running_consumer(kafka_url, kafka_topic, group, publish):
    publish(3)
    one = group()
    one.take(3)
    one.take(1, seconds=4.0)  # a look finds the same topic: what was read until then was its
    delete(kafka_url, kafka_topic)
    sent = publish(8)
    got = one.take_until(sent)
    # Where the new topic had grown beyond the group's place before anybody looked, what follows that place
    # comes first, and comes again.
    assert got in (sent, *(sent[3 : 3 + more] + sent for more in range(1, 6)))
    assert facts(one.told) == [(f"{kafka_topic}[0]", 3, None, Cause.REPLACED)]


def test_a_topic_that_came_back_with_fewer_partitions_while_the_group_was_away(
    kafka_url, kafka_topic, group, publish
):
    items = records(9, keys=9)
    with opened(kafka_url, kafka_topic, topic_partitions=3) as bus:
        ListFeed(items).drain(bus, timeout=60)
    one = group(dedupe=True)
    assert len(one.take(9)) == 9
    one.consumer.close()
    delete(kafka_url, kafka_topic)
    sent = publish(2)
    for _ in range(2):
        one.open()
        assert set(one.take(2, seconds=20.0 if not one.told else 2.0)) <= set(sent)
        one.consumer.close()
    assert {fact[0] for fact in facts(one.told)} == {f"{kafka_topic}[{number}]" for number in range(3)}
    assert [fact[2:] for fact in facts(one.told)] == [(None, Cause.REPLACED)] * 3


def test_another_cluster_at_the_same_address_is_told_from_the_dedupe_file_alone(
    kafka_url, kafka_topic, group, publish, tmp_path
):
    """The broker knows nothing of the group then: a group of another name stands for it."""
    import sqlite3

    publish(3)
    one = group(dedupe=True)
    one.take(2)
    one.consumer.close()
    with sqlite3.connect(tmp_path / "seen.db") as database:
        database.execute("UPDATE note SET value = '[\"another-topic\", 40]'")
    database.close()
    client = admin(kafka_url)
    client.delete_consumer_groups(["virtbus.g"])["virtbus.g"].result(20)
    one.open()
    one.take(1)
    assert facts(one.told) == [(f"{kafka_topic}[0]", 40, None, Cause.REPLACED)]
