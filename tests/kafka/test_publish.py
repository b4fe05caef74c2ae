"""Publishing to a real Kafka: the record on the wire, the topic, refusals, and closing."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter

import kombu
import pytest
from confluent_kafka.cimpl import NewTopic

from tests.kafka.cluster import Cluster
from tests.kafka.help import admin, headers, opened, read, sized, topic_settings
from virtbus import envelope
from virtbus.bus import BusOptions
from virtbus.bus.kafka.bus import TRANSPORT
from virtbus.bus.kafka.client import Watch
from virtbus.bus.kafka.settings import check
from virtbus.errors import BusDenied, BusUnavailable
from virtbus.model import Binding, Confirmed, Deferred, Message, Refused
from virtbus.testing import ListFeed, a_record, records

# --------------------------------------------------------------------------------------- the record


def test_a_record_is_native_key_headers_and_the_data_as_it_is(kafka_url: str, kafka_topic: str) -> None:
    item = a_record()
    with opened(kafka_url, kafka_topic) as bus:
        assert ListFeed([item]).publish(bus) == [Confirmed()]
    (message,) = read(kafka_url, kafka_topic, 1)
    assert message.value() == item.body
    assert message.key() == item.key.encode()
    found = headers(message)
    assert found.pop("content-type") == "application/json"
    assert found.pop("ce_specversion") == "1.0"
    assert found["ce_id"] == item.id
    assert found["ce_partitionkey"] == item.key
    assert all(name.startswith("ce_") for name in found)


def test_structured_mode_on_request_puts_the_whole_event_into_the_value(
    kafka_url: str, kafka_topic: str
) -> None:
    item = a_record()
    with opened(kafka_url, kafka_topic, structured=True) as bus:
        assert ListFeed([item]).publish(bus) == [Confirmed()]
    (message,) = read(kafka_url, kafka_topic, 1)
    assert headers(message)["content-type"].startswith("application/cloudevents+json")
    assert envelope.decode_structured(message.value()).attributes["id"] == item.id
    assert message.key() == item.key.encode()


def test_a_bare_consumer_with_our_decoder_reads_the_event(kafka_url: str, kafka_topic: str) -> None:
    item = a_record()
    with opened(kafka_url, kafka_topic) as bus:
        ListFeed([item]).publish(bus)
    (raw,) = read(kafka_url, kafka_topic, 1)
    message = Message(
        binding=Binding.KAFKA,
        headers=dict(raw.headers()),
        content_type=None,
        body=raw.value(),
        key=raw.key().decode(),
        redelivered=False,
        user_id=None,
        position="",
    )
    decoded = envelope.decode(message)
    assert decoded.attributes == dict(item.attributes)
    assert envelope.to_event(decoded) is not None


def test_all_records_of_a_key_are_in_one_partition_in_order(kafka_url: str, kafka_topic: str) -> None:
    items = records(60, keys=6)
    with opened(kafka_url, kafka_topic) as bus:
        ListFeed(items).publish(bus)
    got = read(kafka_url, kafka_topic, 60)
    places: dict[bytes, set[int]] = {}
    order: dict[bytes, list[int]] = {}
    for message in got:
        places.setdefault(message.key(), set()).add(message.partition())
        order.setdefault(message.key(), []).append(int(headers(message)["ce_sequence"]))
    assert len(got) == 60
    assert all(len(partitions) == 1 for partitions in places.values())
    assert all(sequences == sorted(sequences) for sequences in order.values())


def test_kombus_own_producer_publishes_through_the_transport(kafka_url: str, kafka_topic: str) -> None:
    settings = check(kafka_url, BusOptions(topic=kafka_topic, topic_partitions=1))
    reports: list[object] = []
    options = {"settings": settings, "watch": Watch()}
    with kombu.Connection(transport=TRANSPORT, transport_options=options) as connection:
        channel = connection.channel()
        exchange = kombu.Exchange(kafka_topic, type="topic")
        producer = kombu.Producer(channel, exchange=exchange, auto_declare=True)
        producer.publish(
            b"body",
            routing_key="key",
            headers=[("one", b"1")],
            content_type="text/plain",
            content_encoding="binary",
            on_delivery=lambda error, _message: reports.append(error),
        )
        limit = time.monotonic() + 10
        while not reports and time.monotonic() < limit:
            channel.drain_events(0.1)
    assert reports == [None]
    (message,) = read(kafka_url, kafka_topic, 1)
    assert (message.key(), message.value(), message.headers()) == (b"key", b"body", [("one", b"1")])


# ---------------------------------------------------------------------------------------- the topic


def test_a_missing_topic_is_created_as_configured(kafka_url: str, kafka_topic: str) -> None:
    wanted = {"retention.ms": "3600000", "min.insync.replicas": "1", "cleanup.policy": "delete"}
    with opened(kafka_url, kafka_topic, topic_partitions=5, topic_replication=1, topic_config=wanted) as bus:
        ListFeed([a_record()]).publish(bus)
    found = topic_settings(kafka_url, kafka_topic)
    assert {name: found[name] for name in wanted} == wanted
    assert len(admin(kafka_url).list_topics(kafka_topic, timeout=10).topics[kafka_topic].partitions) == 5


def test_a_missing_topic_that_may_not_be_created_is_a_clear_error(kafka_url: str, kafka_topic: str) -> None:
    feed = ListFeed([a_record()])
    with (
        opened(kafka_url, kafka_topic, declare=False) as bus,
        pytest.raises(BusDenied, match=r"does not exist and bus.declare is false: create it"),
    ):
        feed.publish(bus)
    assert feed.took == []
    # Looking must not create it, though this broker creates topics that a producer asks for.
    assert kafka_topic not in admin(kafka_url).list_topics(timeout=10).topics


def test_more_replicas_than_brokers_is_a_clear_error(kafka_url: str, kafka_topic: str) -> None:
    with (
        opened(kafka_url, kafka_topic, topic_replication=3) as bus,
        pytest.raises(BusUnavailable, match=r"creating topic .*INVALID_REPLICATION_FACTOR"),
    ):
        ListFeed([a_record()]).publish(bus)


def test_a_topic_deleted_while_publishing_is_made_again_as_configured_and_gets_the_rest(
    kafka_url: str, kafka_topic: str
) -> None:
    items = records(60, keys=6)
    with opened(kafka_url, kafka_topic, topic_partitions=4, confirm_timeout=5.0) as bus:
        ListFeed(items[:6]).publish(bus)
        client = admin(kafka_url)
        client.delete_topics([kafka_topic])[kafka_topic].result(10)
        feed = ListFeed(items[6:])
        assert feed.drain(bus, timeout=30) == 54
    stored: dict[bytes, list[int]] = {}
    for message in read(kafka_url, kafka_topic, 54):
        stored.setdefault(message.key(), []).append(int(headers(message)["ce_sequence"]))
    assert sum(map(len, stored.values())) == 54
    assert all(numbers == sorted(numbers) for numbers in stored.values())
    # Not as the broker makes topics that a producer asks for: with one partition.
    assert len(client.list_topics(kafka_topic, timeout=10).topics[kafka_topic].partitions) == 4


def test_a_topic_that_comes_back_with_fewer_partitions_gets_the_rest_of_its_records(
    kafka_url: str, kafka_topic: str
) -> None:
    items = records(60, keys=20)
    with opened(kafka_url, kafka_topic, topic_partitions=6, confirm_timeout=5.0) as bus:
        ListFeed(items[:20]).publish(bus)
        client = admin(kafka_url)
        client.delete_topics([kafka_topic])[kafka_topic].result(10)
        client.create_topics([NewTopic(kafka_topic, 2, 1)])[kafka_topic].result(10)
        feed = ListFeed(items[20:])
        assert feed.drain(bus, timeout=30) == 40
    got = read(kafka_url, kafka_topic, 40)
    assert {headers(message)["ce_id"] for message in got} == {record.id for record in items[20:]}
    assert {message.partition() for message in got} == {0, 1}


# -------------------------------------------------------------------------------- refused, no broker


def test_one_record_too_large_for_the_topic_is_refused_and_its_whole_batch_is_not(
    kafka_url: str, kafka_topic: str
) -> None:
    small = [sized(number, 300) for number in range(1, 40)]
    feed = ListFeed([*small[:20], sized(99, 6000), *small[20:]])
    with opened(
        kafka_url, kafka_topic, topic_partitions=1, topic_config={"max.message.bytes": "4000"}
    ) as bus:
        for _ in range(5):
            feed.publish(bus, again=True)
            if not len(feed):
                break
    final = {record.key: outcome for record, outcome in feed.outcomes if not isinstance(outcome, Deferred)}
    assert isinstance(final.pop("key-99"), Refused)
    assert final == {record.key: Confirmed() for record in small}
    stored = Counter(message.key() for message in read(kafka_url, kafka_topic, len(small)))
    assert set(stored) == {record.key.encode() for record in small}


def test_after_a_refusal_batches_are_used_again(kafka_url: str, kafka_topic: str) -> None:
    feed = ListFeed([sized(99, 6000), *[sized(number, 300) for number in range(1, 30)]])
    with opened(
        kafka_url, kafka_topic, window=8, topic_partitions=1, topic_config={"max.message.bytes": "4000"}
    ) as bus:
        for _ in range(5):
            feed.publish(bus, again=True)
        assert not len(feed)
        ListFeed([sized(100, 300)]).publish(bus)  # may still be one of those that go alone
        ListFeed([sized(101, 300)]).publish(bus)
        assert bus._publisher is not None
        assert bus._publisher.batching


def test_a_full_local_queue_is_back_pressure_and_no_error(kafka_url: str, kafka_topic: str) -> None:
    items = [sized(number, 500) for number in range(300)]
    extra = {"queue.buffering.max.messages": "10"}
    with opened(kafka_url, kafka_topic, window=200, extra=extra) as bus:
        assert ListFeed(items).publish(bus) == [Confirmed()] * 300


def test_a_record_larger_than_the_windows_share_of_memory_goes_out(kafka_url: str, kafka_topic: str) -> None:
    settings = {"max.message.bytes": "8000000"}
    with opened(kafka_url, kafka_topic, window=8, topic_config=settings) as bus:
        assert ListFeed([sized(1, 2_000_000), sized(2, 2_000_000)]).publish(bus) == [Confirmed()] * 2


# ------------------------------------------------------------------------------------------ closing


def test_closing_waits_for_what_is_in_flight(kafka_url: str, kafka_topic: str) -> None:
    items = records(50, keys=50)
    with opened(kafka_url, kafka_topic, extra={"linger.ms": "500"}) as bus:
        ListFeed([a_record(row=100)]).publish(bus)
        feed = ListFeed(items)
        thread = threading.Thread(target=feed.publish, args=(bus,))
        thread.start()
        time.sleep(0.2)
        bus.close()
        thread.join(10)
        assert not thread.is_alive()
    assert [outcome for _, outcome in feed.outcomes] == [Confirmed()] * 50


def test_a_caller_that_lets_go_in_the_middle_leaves_nothing_behind_that_is_sent_later(
    kafka_url: str, kafka_topic: str
) -> None:
    with opened(kafka_url, kafka_topic, extra={"linger.ms": "300"}, window=10) as bus:
        iterator = bus.publish(ListFeed(records(30, keys=30)))
        next(iterator)
        iterator.close()  # type: ignore[attr-defined]
        before = len(read(kafka_url, kafka_topic, 30, seconds=1.5))
        assert ListFeed([a_record(row=200)]).publish(bus) == [Confirmed()]
    assert len(read(kafka_url, kafka_topic, 30, seconds=1.5)) == before + 1


# ---------------------------------------------------------------------------------------- the probe


def test_probe_tells_the_topics_shape_and_that_one_broker_alone_can_lose_events(
    kafka_url: str, kafka_topic: str
) -> None:
    with opened(kafka_url, kafka_topic) as bus:
        before = {each.name: each for each in bus.probe()}
        assert before["bus.topic"].status == "warning"
        assert "it is created at the first event" in before["bus.topic"].summary
        ListFeed([a_record()]).publish(bus)
        after = {each.name: each for each in bus.probe()}
    assert after["bus.reach"].status == "ok"
    assert after["bus.topic"].details["partitions"] == 3
    assert after["bus.topic"].details["min_insync_replicas"] == 1
    assert after["bus.topic"].status == "warning"


def test_a_plaintext_listener_that_is_tls_is_told_from_a_broker_that_is_away(
    kafka_cluster: Cluster, kafka_topic: str
) -> None:
    url = f"kafka://{kafka_cluster.hosts('tls')}"
    with (
        opened(url, kafka_topic, connect_timeout=2.0) as bus,
        pytest.raises(BusUnavailable, match="is it a TLS listener"),
    ):
        ListFeed([a_record()]).publish(bus)


# ---------------------------------------------------------------------------------- stored, not told


@pytest.mark.slow
def test_what_times_out_here_while_the_broker_stores_it_comes_twice_with_the_same_id_and_in_order(
    own_kafka: Cluster, kafka_topic: str
) -> None:
    items = records(30, keys=3)
    broker = own_kafka.brokers[0].pid
    with opened(own_kafka.url, kafka_topic, confirm_timeout=1.0) as bus:
        assert ListFeed([a_record(row=99)]).drain(bus) == 1
        feed = ListFeed(items)
        os.kill(broker, signal.SIGSTOP)
        try:
            outcomes = feed.publish(bus, again=True)  # the broker's kernel takes them, and the broker later
        finally:
            os.kill(broker, signal.SIGCONT)
        assert {type(outcome) for outcome in outcomes} == {Deferred}
        feed.drain(bus, timeout=60)
        assert not len(feed)
    stored: dict[bytes, list[int]] = {}
    copies = 0
    for message in read(own_kafka.url, kafka_topic, 34):
        copies += 1
        numbers = stored.setdefault(message.key(), [])
        number = int(headers(message)["ce_sequence"])
        if number not in numbers:
            numbers.append(number)
    assert copies > 31, "nothing came twice: the broker had not stored what timed out"
    for key in {record.key for record in items}:
        assert stored[key.encode()] == [record.seq for record in items if record.key == key]
