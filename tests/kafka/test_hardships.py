"""What brokers do on a bad day, shown on a real Kafka: nothing is lost, and what is said helps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    NewTopic,
    ResourcePatternType,
    ResourceType,
)

from tests.kafka.cluster import LIMITED_PASSWORD, LIMITED_USER, Cluster
from tests.kafka.help import admin, headers, opened, read
from tests.kafka.test_consume import event_id, joined, take
from virtbus.bus import BusOptions
from virtbus.bus.kafka.bus import KafkaBus
from virtbus.consumer import Consumer
from virtbus.errors import BusDenied, BusUnavailable
from virtbus.model import Confirmed, Deferred
from virtbus.testing import ListFeed, records

pytestmark = pytest.mark.slow


def patiently(feed: ListFeed, bus: KafkaBus, seconds: float = 90.0) -> list[str]:
    """Publish until all is confirmed, over whatever the broker says; what it said."""
    said: list[str] = []
    limit = time.monotonic() + seconds
    while len(feed) and time.monotonic() < limit:
        try:
            feed.publish(bus, again=True)
        except (BusUnavailable, BusDenied) as error:
            said.append(str(error))
            time.sleep(0.2)
    return said


def reasons(feed: ListFeed) -> list[str]:
    """Why events were deferred."""
    return [str(outcome.error) for _, outcome in feed.outcomes if isinstance(outcome, Deferred)]


def confirmed(feed: ListFeed) -> set[str]:
    return {record.id for record, outcome in feed.outcomes if isinstance(outcome, Confirmed)}


def test_min_insync_replicas_that_are_not_met_defer_and_met_again_deliver(
    tmp_path: Path, kafka_topic: str
) -> None:
    items = records(20, keys=5)
    cluster = Cluster(tmp_path / "three", brokers=3).start()
    options = {"topic_replication": 3, "topic_config": {"min.insync.replicas": "3"}}
    try:
        with opened(cluster.url, kafka_topic, confirm_timeout=4.0, connect_timeout=10.0, **options) as bus:
            assert ListFeed(records(1)).drain(bus, timeout=60) == 1
            cluster.kill(cluster.brokers[2])
            feed = ListFeed(items)
            limit = time.monotonic() + 60
            while not any("min.insync.replicas" in why for why in reasons(feed)):
                assert time.monotonic() < limit, reasons(feed)
                with suppress(BusUnavailable):
                    feed.publish(bus, again=True)
            assert any("min.insync.replicas = 3: bring their brokers back" in why for why in reasons(feed))
            before = confirmed(feed)
            feed.publish(bus, again=True)
            assert confirmed(feed) == before, "nothing is confirmed by two of three"
            check = next(each for each in bus.probe() if each.name == "bus.topic")
            assert (check.status, check.exit_code) == ("failed", BusUnavailable.exit_code)
            cluster.restart(cluster.brokers[2])
            patiently(feed, bus)
            assert confirmed(feed) == {item.id for item in items}
            found = read(cluster.url, kafka_topic, 21)
        assert {headers(message)["ce_id"] for message in found} >= {item.id for item in items}
    finally:
        cluster.stop()


def test_a_topic_that_is_deleted_while_events_wait_is_named_and_not_only_timed_out(
    kafka_url: str, kafka_topic: str
) -> None:
    items = records(5)
    with opened(kafka_url, kafka_topic, confirm_timeout=2.0) as bus:
        assert ListFeed(records(1)).drain(bus) == 1
        client = admin(kafka_url)
        client.delete_topics([kafka_topic])[kafka_topic].result(20)
        feed = ListFeed(items)
        feed.publish(bus, again=True)
        assert any(f'topic "{kafka_topic}" does not exist' in why for why in reasons(feed)), reasons(feed)
        patiently(feed, bus)
        assert confirmed(feed) == {item.id for item in items}


@contextmanager
def granted(url: str, topic: str, *operations: AclOperation) -> Iterator[None]:
    """Rights of the limited user on a topic for the length of a `with` block."""
    client = admin(url)
    rules = [
        AclBinding(
            ResourceType.TOPIC, topic, ResourcePatternType.LITERAL, f"User:{LIMITED_USER}", "*", operation,
            AclPermissionType.ALLOW,
        )
        for operation in operations
    ]  # fmt: skip
    for future in client.create_acls(rules).values():
        future.result(20)
    try:
        yield
    finally:
        filters = [
            AclBindingFilter(
                ResourceType.TOPIC, topic, ResourcePatternType.LITERAL, f"User:{LIMITED_USER}", "*",
                operation, AclPermissionType.ALLOW,
            )
            for operation in operations
        ]  # fmt: skip
        for future in client.delete_acls(filters).values():
            future.result(20)


def make(url: str, topic: str) -> None:
    client = admin(url)
    client.create_topics([NewTopic(topic, num_partitions=1, replication_factor=1)])[topic].result(20)


def closed_to_others(url: str, topic: str) -> None:
    """A rule for somebody else: without any the topic is open to all (allow.everyone.if.no.acl.found)."""
    rule = AclBinding(
        ResourceType.TOPIC, topic, ResourcePatternType.LITERAL, "User:nobody", "*", AclOperation.ALL,
        AclPermissionType.ALLOW,
    )  # fmt: skip
    client = admin(url)
    client.create_acls([rule])[rule].result(20)


def test_a_group_whose_acl_is_taken_away_reads_on_when_it_is_given_back(
    kafka_cluster: Cluster, kafka_topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"kafka://{LIMITED_USER}:{LIMITED_PASSWORD}@{kafka_cluster.hosts('sasl')}"
    plain = kafka_cluster.url
    first, second = records(5), records(5)
    make(plain, kafka_topic)
    closed_to_others(plain, kafka_topic)
    rights = (AclOperation.DESCRIBE, AclOperation.READ, AclOperation.DESCRIBE_CONFIGS)
    options = BusOptions(topic=kafka_topic, declare=False, connect_timeout=3.0)
    got: list[str] = []

    def taken(until: Callable[[], bool]) -> None:
        limit = time.monotonic() + 90
        while not until() and time.monotonic() < limit:
            delivery = consumer.receive(1.0)
            if delivery is not None:
                got.append(delivery.id)
                delivery.ack()
        assert until(), (got, caplog.text)

    with opened(plain, kafka_topic) as bus, Consumer(url, group="g", options=options) as consumer:
        assert ListFeed(first).drain(bus, timeout=30) == 5
        with granted(plain, kafka_topic, *rights):
            taken(lambda: len(got) == 5)
        with caplog.at_level("ERROR", logger="virtbus"):
            taken(lambda: "the broker refuses this consumer" in caplog.text)
        assert ListFeed(second).drain(bus, timeout=30) == 5
        with granted(plain, kafka_topic, *rights):
            taken(lambda: len(got) == 10)
    assert got == [item.id for item in [*first, *second]]


def test_an_acl_that_is_taken_away_and_given_back(kafka_cluster: Cluster, kafka_topic: str) -> None:
    url = f"kafka://{LIMITED_USER}:{LIMITED_PASSWORD}@{kafka_cluster.hosts('sasl')}"
    plain = kafka_cluster.url
    first, second = records(5), records(5)
    make(plain, kafka_topic)
    rights = (AclOperation.DESCRIBE, AclOperation.WRITE, AclOperation.READ, AclOperation.DESCRIBE_CONFIGS)
    with opened(url, kafka_topic, declare=False, confirm_timeout=3.0, connect_timeout=3.0) as bus:
        with granted(plain, kafka_topic, *rights):
            assert ListFeed(first).drain(bus, timeout=30) == 5
        closed_to_others(plain, kafka_topic)
        time.sleep(0.5)
        feed = ListFeed(second)
        try:
            feed.publish(bus, again=True)
            told = reasons(feed)
        except BusDenied as error:
            told = [str(error)]
        assert confirmed(feed) == set()
        assert told
        assert "AUTHORIZATION_FAILED" in told[0]
        with granted(plain, kafka_topic, *rights):
            patiently(feed, bus)
    assert confirmed(feed) == {item.id for item in second}
    found = [dict(message.headers())["ce_id"].decode() for message in read(plain, kafka_topic, 10)]
    assert set(found) == {item.id for item in [*first, *second]}


def test_a_kafka_that_is_frozen_for_90_s_loses_nothing(own_kafka: Cluster, kafka_topic: str) -> None:
    items, later = records(200, keys=20), records(50, keys=20)
    broker = own_kafka.brokers[0].pid
    with (
        opened(own_kafka.url, kafka_topic, confirm_timeout=10.0) as bus,
        opened(own_kafka.url, kafka_topic) as other,
        joined(other, "g") as subscription,
    ):
        assert ListFeed(items[:50]).drain(bus, timeout=60) == 50
        got = {event_id(message) for message in take(subscription, 10)}
        thaw = threading.Timer(90.0, os.kill, (broker, signal.SIGCONT))
        os.kill(broker, signal.SIGSTOP)
        thaw.start()
        try:
            feed = ListFeed(items[50:])
            patiently(feed, bus, seconds=240.0)
        finally:
            thaw.cancel()
            os.kill(broker, signal.SIGCONT)
        assert confirmed(feed) == {item.id for item in items[50:]}
        assert ListFeed(later).drain(bus, timeout=60) == 50
        wanted = {item.id for item in [*items, *later]}
        limit = time.monotonic() + 120
        while got < wanted and time.monotonic() < limit:
            try:
                got |= {event_id(message) for message in take(subscription, 1, seconds=1.0)}
            except BusUnavailable:
                continue
    assert got == wanted


MEMBER = """
import sys
from virtbus import BusOptions, Consumer
with Consumer(sys.argv[1], group="g", options=BusOptions(topic=sys.argv[2]), prefetch=5) as consumer:
    for delivery in consumer:
        print(delivery.id, flush=True)
        if len(sys.argv) > 3:
            sys.stdin.readline()
        delivery.ack()
"""


def test_a_member_that_is_frozen_past_its_session_is_replaced_and_comes_back(
    kafka_url: str, kafka_topic: str
) -> None:
    """Its session is ten seconds; what it had in hand goes to the other one, and nothing is lost."""
    items, later = records(40, keys=20), records(40, keys=20)
    words = [sys.executable, "-c", MEMBER, kafka_url, kafka_topic]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    with opened(kafka_url, kafka_topic, topic_partitions=4) as bus:
        assert ListFeed(items).drain(bus, timeout=60) == 40
        member = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
        assert member.stdout is not None
        heard = [member.stdout.readline().strip() for _ in range(5)]
        os.kill(member.pid, signal.SIGSTOP)
        try:
            with joined(bus, "g") as second:
                wanted = {item.id for item in items}
                got: set[str] = set()
                limit = time.monotonic() + 60
                while not got | set(heard) >= wanted and time.monotonic() < limit:
                    got |= {event_id(message) for message in take(second, 1, seconds=1.0)}
                # What the frozen one had acknowledged may be among what it printed and was not yet read here.
                os.kill(member.pid, signal.SIGCONT)
                assert ListFeed(later).drain(bus, timeout=60) == 40
                lines: list[str] = []
                reader = threading.Thread(target=lambda: lines.extend(member.stdout or ()), daemon=True)
                reader.start()
                wanted |= {item.id for item in later}
                limit = time.monotonic() + 60
                while time.monotonic() < limit:
                    got |= {event_id(message) for message in take(second, 1, seconds=1.0)}
                    if got | set(heard) | {line.strip() for line in list(lines)} >= wanted:
                        break
                deadline = time.monotonic() + 60
                while len(second._tracks) == 4 and time.monotonic() < deadline:  # type: ignore[attr-defined]
                    got |= {event_id(message) for message in take(second, 1, seconds=0.5)}
                assert len(second._tracks) < 4, "the member that came back got its share"  # type: ignore[attr-defined]
        finally:
            os.kill(member.pid, signal.SIGCONT)
            member.terminate()
            member.wait(20)
            reader.join(10)
            member.stdout.close()
    assert got | set(heard) | {line.strip() for line in lines} >= wanted


def test_a_topic_that_takes_next_to_nothing_refuses_each_large_event_and_takes_the_small_ones(
    kafka_url: str, kafka_topic: str
) -> None:
    from virtbus.model import Refused

    items = records(10, keys=10)
    large = items[4]._replace(body=b'"' + b"x" * 20_000 + b'"')
    items[4] = large
    with opened(kafka_url, kafka_topic, topic_config={"max.message.bytes": "4000"}) as bus:
        feed = ListFeed(items)
        limit = time.monotonic() + 60
        while len(feed) and time.monotonic() < limit:
            feed.publish(bus, again=True)
    final = {record.id: outcome for record, outcome in feed.outcomes}
    assert isinstance(final.pop(large.id), Refused)
    assert confirmed(feed) == set(final)
