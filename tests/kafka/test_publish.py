"""Publishing to a real Kafka: the record on the wire, the topic, refusals, and closing."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter

import kombu
import pytest

from tests.kafka.cluster import Cluster
from tests.kafka.help import admin, headers, opened, read, topic_settings
from virtbus import envelope
from virtbus.bus import BusOptions
from virtbus.bus.kafka_errors import Watch
from virtbus.bus.kafka_settings import check
from virtbus.bus.kafka_transport import TRANSPORT
from virtbus.errors import BusDenied, BusUnavailable
from virtbus.model import Binding, Confirmed, Deferred, Message, Record, Refused
from virtbus.testing import ListFeed, a_record, records


def sized(number: int, size: int) -> Record:
    """A record of a key of its own, with a body of `size` bytes."""
    made = a_record(row=number)
    key = f"key-{number}"
    attributes = {**made.attributes, "partitionkey": key}
    return dataclasses.replace(made, key=key, attributes=attributes, body=b'"' + b"x" * (size - 2) + b'"')


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


def test_a_bare_consumer_with_the_sdks_decoder_reads_the_event(kafka_url: str, kafka_topic: str) -> None:
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
        assert bus._link is not None
        assert bus._link.batching


def test_a_full_local_queue_is_back_pressure_and_no_error(kafka_url: str, kafka_topic: str) -> None:
    items = [sized(number, 500) for number in range(300)]
    extra = {"queue.buffering.max.messages": "10"}
    with opened(kafka_url, kafka_topic, window=200, extra=extra) as bus:
        assert ListFeed(items).publish(bus) == [Confirmed()] * 300


def test_an_option_that_librdkafka_refuses_in_combination_is_a_config_error(
    kafka_url: str, kafka_topic: str
) -> None:
    from virtbus.errors import ConfigError

    extra = {"max.in.flight.requests.per.connection": "100"}  # too many for an idempotent producer
    with (
        opened(kafka_url, kafka_topic, extra=extra) as bus,
        pytest.raises(ConfigError, match="librdkafka refuses the settings"),
    ):
        ListFeed([a_record()]).publish(bus)


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
