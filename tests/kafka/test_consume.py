"""Consuming from a real Kafka: what may be committed, rebalances, kills. The rest is the bus contract's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from confluent_kafka.cimpl import NewPartitions

from tests.kafka.cluster import Cluster, kafka_version
from tests.kafka.help import admin, bare_producer, hosts, opened, read
from tests.kafka.mock import produce_with_header
from virtbus import envelope
from virtbus.bus import BusOptions, Subscription
from virtbus.bus.kafka import subscription as kafka_consumer
from virtbus.bus.kafka.bus import KafkaBus
from virtbus.bus.kafka.client import headers_of
from virtbus.bus.kafka.places import Track
from virtbus.consumer import Consumer
from virtbus.errors import BusUnavailable, ConfigError, SchemaError
from virtbus.model import Message
from virtbus.testing import ListFeed, a_record, records


@contextmanager
def joined(bus: KafkaBus, group: str | None, prefetch: int = 100) -> Iterator[Subscription]:
    subscription = bus.consume(group, prefetch=prefetch)
    try:
        yield subscription
    finally:
        subscription.close()


def take(subscription: Subscription, count: int, *, ack: bool = True, seconds: float = 20.0) -> list[Message]:
    got: list[Message] = []
    limit = time.monotonic() + seconds
    while len(got) < count and time.monotonic() < limit:
        message = subscription.receive(0.5)
        if message is not None:
            got.append(message)
            if ack:
                subscription.ack(message)
    return got


def event_id(message: Message) -> str:
    return envelope.decode(message).attributes["id"]


# ---------------------------------------------------------------------------------------- offsets


def test_an_offset_moves_only_when_everything_before_it_is_acknowledged() -> None:
    track = Track()
    for offset in (10, 11, 13, 20):  # a compacted log has holes
        track.took(offset)
    assert track.done(11) is None
    assert track.done(20) is None
    assert track.done(10) == 12
    assert track.done(13) == 21
    assert track.span == 0


def test_what_comes_after_an_unacknowledged_message_is_delivered_again(
    kafka_url: str, kafka_topic: str
) -> None:
    items = records(6)
    with opened(kafka_url, kafka_topic, topic_partitions=1) as bus:
        ListFeed(items).publish(bus)
        with joined(bus, "g") as first:
            messages = take(first, 6, ack=False)
            for number in (0, 1, 3, 4, 5):
                first.ack(messages[number])
        with joined(bus, "g") as second:
            again = take(second, 4)
    assert [event_id(message) for message in again] == [record.id for record in items[2:]]


def test_a_new_group_begins_with_the_oldest_event_the_topic_holds(kafka_url: str, kafka_topic: str) -> None:
    items = records(5, keys=2)
    with opened(kafka_url, kafka_topic) as bus:
        ListFeed(items).publish(bus)
        with joined(bus, "late") as subscription:
            assert len(take(subscription, 5)) == 5


def test_the_groups_offsets_are_committed_in_the_background(kafka_url: str, kafka_topic: str) -> None:
    from confluent_kafka import Consumer, TopicPartition

    with opened(kafka_url, kafka_topic, topic_partitions=1) as bus:
        ListFeed(records(3)).publish(bus)
        with joined(bus, "g") as subscription:
            take(subscription, 3)
            settings = {"bootstrap.servers": hosts(kafka_url), "group.id": "virtbus.g", "log_level": 0}
            bare = Consumer(settings)
            limit = time.monotonic() + 10
            offset = -1
            while offset != 3 and time.monotonic() < limit:
                offset = bare.committed([TopicPartition(kafka_topic, 0)], timeout=5)[0].offset
            bare.close()
    assert offset == 3


def test_without_a_group_partitions_that_are_added_are_found_too(
    kafka_url: str, kafka_topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka_consumer, "_LOOK_SECONDS", 0.5)
    before, after = records(20, keys=20), records(60, keys=60)
    with opened(kafka_url, kafka_topic, topic_partitions=1) as bus:
        ListFeed(before).publish(bus)
        with joined(bus, None) as tap:
            ListFeed(before).publish(bus)
            assert len(take(tap, 20)) == 20
            client = admin(kafka_url)
            client.create_partitions([NewPartitions(kafka_topic, 4)])[kafka_topic].result(10)
            with opened(kafka_url, kafka_topic) as other:  # one that knows of them
                ListFeed(after).publish(other)
            got = take(tap, 60)
    assert {event_id(message) for message in got} == {record.id for record in after}
    assert {message.position.partition("@")[0] for message in got} == {
        f"{kafka_topic}[{number}]" for number in range(4)
    }


# -------------------------------------------------------------------------------------- rebalance


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_a_rebalance_loses_nothing_and_repeats_only_what_was_not_acknowledged(
    protocol: str, kafka_url: str, kafka_topic: str
) -> None:
    if protocol == "consumer" and kafka_version().startswith("3."):
        pytest.skip("Kafka 4.0 and later have this protocol")
    items = records(40, keys=20)
    seen: dict[str, int] = {}

    def note(messages: list[Message]) -> None:
        for message in messages:
            seen[event_id(message)] = seen.get(event_id(message), 0) + 1

    extra = {"group.protocol": protocol}
    with opened(kafka_url, kafka_topic, topic_partitions=6, extra=extra) as bus:
        ListFeed(items).publish(bus)
        with joined(bus, "g") as first:
            handled = take(first, 15)
            note(handled)
            open_ones = take(first, 5, ack=False)
            note(open_ones)
            with joined(bus, "g") as second:
                limit = time.monotonic() + 30
                while time.monotonic() < limit and len(seen) < 40:
                    for member in (first, second):
                        note(take(member, 1, seconds=0.5))
                for message in open_ones:  # some of these belong to the other member by now
                    first.ack(message)
                note(take(second, 20, seconds=1.5))
    assert set(seen) == {record.id for record in items}
    repeated = {event for event, times in seen.items() if times > 1}
    assert repeated.isdisjoint(map(event_id, handled)), "what had been acknowledged before came again"


def test_an_exclusive_member_needs_the_classic_protocol() -> None:
    options = BusOptions(extra={"group.protocol": "consumer"})
    with (
        Consumer("kafka://127.0.0.1:1", group="g", options=options, exclusive=True) as consumer,
        pytest.raises(ConfigError, match=r"exclusive.*group\.protocol = classic"),
    ):
        consumer.receive(0.0)


def both_have_partitions(first: Subscription, second: Subscription, seconds: float = 30.0) -> None:
    """Wait until two members share four partitions, acknowledging what comes."""
    limit = time.monotonic() + seconds
    while not all(len(member._tracks) == 2 for member in (first, second)):  # type: ignore[attr-defined]
        assert time.monotonic() < limit, "no rebalance"
        for member in (first, second):
            message = member.receive(0.2)
            if message is not None:
                member.ack(message)


def test_a_partition_that_was_paused_goes_on_after_another_one_came(kafka_url: str, kafka_topic: str) -> None:
    items = records(60, keys=30)
    with opened(kafka_url, kafka_topic, topic_partitions=4) as bus:
        ListFeed(items[:1]).publish(bus)
        with joined(bus, "g", prefetch=4) as first:
            with joined(bus, "g", prefetch=4) as second:
                both_have_partitions(first, second)
                ListFeed(items[1:]).publish(bus)
                held = take(first, 4, ack=False)  # as much as it may have: its partitions are paused
                assert first.receive(0.3) is None
            limit = time.monotonic() + 30
            while len(first._tracks) < 4 and time.monotonic() < limit:  # type: ignore[attr-defined]
                assert first.receive(0.0) is None
            for message in held:
                first.ack(message)
            rest = take(first, 55)
    assert {event_id(message) for message in [*held, *rest]} == {record.id for record in items[1:]}


def test_keys_that_are_always_due_again_keep_neither_new_messages_nor_a_rebalance_away(
    kafka_url: str, kafka_topic: str
) -> None:
    failing, later = records(3, keys=3), records(6, keys=6)[3:]
    keys = {record.key for record in failing}
    with opened(kafka_url, kafka_topic, topic_partitions=4) as bus:
        ListFeed(failing).publish(bus)
        with joined(bus, "g") as first, joined(bus, "g") as second:
            fresh: set[str] = set()
            limit = time.monotonic() + 30
            published = False
            while len(fresh) < 3 or not second._tracks:  # type: ignore[attr-defined]
                assert time.monotonic() < limit, "starved"
                message = first.receive(0.5)
                time.sleep(0.2)  # slower than retries come due
                if message is not None and message.key in keys:
                    first.retry(message, 0.1)
                    if not published:
                        ListFeed(later).publish(bus)
                        published = True
                for member, got in ((first, message), (second, second.receive(0.0))):
                    if got is not None and got.key not in keys:
                        fresh.add(event_id(got))
                        member.ack(got)
                    elif got is not None and member is second:
                        member.retry(got, 0.1)
    assert fresh == {record.id for record in later}


def test_what_two_members_had_not_acknowledged_when_both_left_at_once_goes_to_a_third(
    kafka_url: str, kafka_topic: str
) -> None:
    items = records(60, keys=30)
    with opened(kafka_url, kafka_topic, topic_partitions=4) as bus:
        ListFeed(items[:1]).publish(bus)
        with joined(bus, "g") as first, joined(bus, "g") as second:
            both_have_partitions(first, second)
            ListFeed(items[1:]).publish(bus)
            handled = [*take(first, 5), *take(second, 5)]
            assert take(first, 3, ack=False)
            assert take(second, 3, ack=False)
            leaving = threading.Thread(target=second.close)
            leaving.start()
            first.close()
            leaving.join()
        with joined(bus, "g") as third:
            rest = take(third, 49)
    assert sorted(map(event_id, [*handled, *rest])) == sorted(record.id for record in items[1:])


def test_a_message_of_a_partition_that_is_gone_can_be_acknowledged_without_effect(
    kafka_url: str, kafka_topic: str
) -> None:
    with opened(kafka_url, kafka_topic, topic_partitions=1) as bus:
        ListFeed(records(2)).publish(bus)
        first = bus.consume("g")
        (message,) = take(first, 1, ack=False)
        first.close()
        first.ack(message)
        with joined(bus, "g") as second:
            assert len(take(second, 2)) == 2


def test_a_killed_consumer_repeats_and_loses_nothing(kafka_url: str, kafka_topic: str) -> None:
    items = records(30, keys=5)
    with opened(kafka_url, kafka_topic) as bus:
        ListFeed(items).publish(bus)
    code = (
        "import sys, os, signal\n"
        "from virtbus.bus import BusOptions, open_bus\n"
        "from virtbus import envelope\n"
        "s = open_bus(sys.argv[1], BusOptions(topic=sys.argv[2])).consume('g')\n"
        "got = 0\n"
        "while got < 10:\n"
        "    m = s.receive(1.0)\n"
        "    if m is not None:\n"
        "        print(envelope.decode(m).attributes['id'], flush=True)\n"
        "        s.ack(m)\n"
        "        got += 1\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, kafka_url, kafka_topic],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    handled = set(done.stdout.split())
    with opened(kafka_url, kafka_topic) as bus, joined(bus, "g") as subscription:
        rest = {event_id(message) for message in take(subscription, 30, seconds=20.0)}
    assert len(handled) == 10
    assert handled | rest == {record.id for record in items}


# ------------------------------------------------------------------------------ holding back, limits


def test_a_key_that_waits_for_a_retry_does_not_grow_without_bound(kafka_url: str, kafka_topic: str) -> None:
    items = records(200)
    with opened(kafka_url, kafka_topic, topic_partitions=1, window=16) as bus:
        ListFeed(items).publish(bus)
        with joined(bus, "g", prefetch=5) as subscription:
            (first,) = take(subscription, 1, ack=False)
            subscription.retry(first, 3.0)
            assert subscription.receive(1.5) is None
            assert subscription._line.held <= 5 * 10 + 1  # type: ignore[attr-defined]
            got = take(subscription, 200, seconds=30.0)
    assert [event_id(message) for message in got] == [record.id for record in items]


def test_many_that_wait_for_a_retry_keep_no_other_away_though_only_one_is_handed_out_at_a_time(
    kafka_url: str, kafka_topic: str
) -> None:
    items = records(40, keys=40)
    with opened(kafka_url, kafka_topic, topic_partitions=1) as bus:
        ListFeed(items).publish(bus)
        with joined(bus, "g", prefetch=1) as subscription:
            for record in items:
                (message,) = take(subscription, 1, ack=False)
                assert event_id(message) == record.id
                subscription.retry(message, 3600.0)


def test_records_with_neither_key_nor_headers_nor_value_or_with_odd_ones_come_and_can_be_put_aside(
    kafka_url: str, kafka_topic: str
) -> None:
    good = a_record()
    with opened(kafka_url, kafka_topic, topic_partitions=1) as bus:
        ListFeed([good]).publish(bus)
        producer = bare_producer(kafka_url)
        producer.produce(kafka_topic, None, None)
        odd = [("a", None), ("a", b"\xff"), ("ce_id", b"\xff"), ("CE_ID", b"1"), ("content-type", b"\xff")]
        producer.produce(kafka_topic, b"x", b"\xff\xfe", headers=odd)
        producer.flush(10)
        produce_with_header(hosts(kafka_url), kafka_topic, b"\xff\xfe")
        ListFeed([good]).publish(bus)
        with joined(bus, "g") as subscription:
            messages = take(subscription, 5, ack=False)
            assert [message.position for message in messages] == [f"{kafka_topic}[0]@{n}" for n in range(5)]
            for message in messages[1:4]:
                with pytest.raises(SchemaError):
                    envelope.decode(message)
                subscription.dead_letter(message, "no event")
            for message in (messages[0], messages[4]):
                assert event_id(message) == good.id
                subscription.ack(message)
        with joined(bus, "g") as later:
            assert later.receive(2.0) is None, "all were acknowledged"
    assert len(read(kafka_url, f"{kafka_topic}.dead", 3)) == 3
    raw = read(kafka_url, kafka_topic, 5)
    for _ in range(1000):  # an interpreter that has specialised the call must not go on with a broken list
        assert headers_of(raw[0])
    assert headers_of(raw[3]) == []


# ---------------------------------------------------------------------------------------- outages


@pytest.mark.slow
def test_closing_a_subscription_ends_in_time_though_the_broker_is_silent(
    own_kafka: Cluster, kafka_topic: str
) -> None:
    with opened(own_kafka.url, kafka_topic) as bus:
        ListFeed(records(10, keys=5)).publish(bus)
        with joined(bus, "g") as subscription, joined(bus, None) as tap:
            take(subscription, 10)
            broker = own_kafka.brokers[0].pid
            os.kill(broker, signal.SIGSTOP)
            try:
                for each in (subscription, tap):
                    closing = threading.Thread(target=each.close, daemon=True)
                    closing.start()
                    closing.join(60.0)  # while the broker stays silent
                    assert not closing.is_alive()
            finally:
                os.kill(broker, signal.SIGCONT)


@pytest.mark.slow
def test_a_subscription_outlives_its_brokers_restart_and_loses_nothing(
    own_kafka: Cluster, kafka_topic: str
) -> None:
    before, after = records(5, keys=3), records(5, keys=3)
    broker = own_kafka.brokers[0]
    with (
        opened(own_kafka.url, kafka_topic) as bus,
        joined(bus, "g") as subscription,
        joined(bus, None) as tap,
    ):
        assert ListFeed(before).drain(bus) == 5
        assert len(take(subscription, 5)) == 5
        assert len(take(tap, 5)) == 5
        own_kafka.kill(broker)
        with pytest.raises(BusUnavailable):
            for _ in range(20):
                subscription.receive(1.0)
        own_kafka.restart(broker)
        assert ListFeed(after).drain(bus, timeout=60) == 5

        def patient(one: Subscription) -> set[str]:
            got: set[str] = set()
            limit = time.monotonic() + 40
            while not got >= {record.id for record in after} and time.monotonic() < limit:
                try:
                    got |= {event_id(message) for message in take(one, 1, seconds=1.0)}
                except BusUnavailable:
                    continue
            return got

        assert patient(subscription) >= {record.id for record in after}
        assert patient(tap) >= {record.id for record in after}
