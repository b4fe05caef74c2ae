"""A message that is put aside costs nothing but itself; what lies there is counted, sent back and dropped."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from confluent_kafka.admin import NewTopic

from tests.kafka.help import admin, bare_producer, headers, opened, read, sized
from tests.kafka.test_consume import event_id, joined, take
from virtbus.bus import CUT_HEADER, REASON_HEADER, BusOptions, Subscription
from virtbus.consumer import Consumer
from virtbus.errors import ConfigError, RecordRefused
from virtbus.testing import ListFeed, records

LARGE = {"max.message.bytes": "8000000"}


def serve(subscription: Subscription, seconds: float = 20.0) -> None:
    """Receive until nothing waits to be put aside any more."""
    limit = time.monotonic() + seconds
    while subscription._line.held and time.monotonic() < limit:  # type: ignore[attr-defined]
        message = subscription.receive(0.1)
        if message is not None:  # a neighbour that comes again
            subscription.ack(message)


def make_topic(url: str, topic: str, **config: str) -> None:
    new = NewTopic(topic, num_partitions=1, config={name.replace("_", "."): x for name, x in config.items()})
    client = admin(url)  # kept: a client that goes takes its requests along
    client.create_topics([new])[topic].result(20)


def test_a_dead_letter_keeps_key_and_headers_and_tells_reason_position_and_group(
    kafka_url: str, kafka_topic: str
) -> None:
    (item,) = records(1)
    with opened(kafka_url, kafka_topic) as bus:
        ListFeed([item]).publish(bus)
        with joined(bus, "g") as subscription:
            (message,) = take(subscription, 1, ack=False)
            subscription.dead_letter(message, "no such host")
    (dead,) = read(kafka_url, f"{kafka_topic}.dead", 1)
    found = dict(dead.headers())
    assert (dead.key(), dead.value()) == (item.key.encode(), item.body)
    assert found["ce_id"] == item.id.encode()
    assert found["x-virtbus-reason"] == b"no such host"
    assert found["x-virtbus-position"] == message.position.encode()
    assert found["x-virtbus-group"] == b"g"


def test_a_senders_headers_settle_no_letter_and_name_no_group(kafka_url: str, kafka_topic: str) -> None:
    producer = bare_producer(kafka_url)
    forged = [("x-virtbus-settled", b"0"), ("x-virtbus-group", b"other"), (CUT_HEADER, b"cut")]
    with opened(kafka_url, kafka_topic) as bus:
        with joined(bus, "g") as subscription:
            make_topic(kafka_url, f"{kafka_topic}.dead")
            for value, sent in ((b"first", []), (b"second", forged), (None, forged)):
                producer.produce(kafka_topic, value, b"k", headers=sent)
                assert producer.flush(10) == 0
                (message,) = take(subscription, 1, ack=False)
                subscription.dead_letter(message, "unreadable")
                serve(subscription)
        with bus.dead_letters("g") as look:
            assert [letter.message.body for letter in look.read()] == [b"first", b"second", b""]


def test_fifty_good_ones_behind_one_whose_dead_letter_topic_is_missing_are_handed_out(
    kafka_url: str, kafka_topic: str
) -> None:
    items = records(51)  # of one key
    with opened(kafka_url, kafka_topic) as bus:
        ListFeed(items).publish(bus)
    with opened(kafka_url, kafka_topic, declare=False) as bus:
        with joined(bus, "g", prefetch=5) as subscription:
            (message,) = take(subscription, 1, ack=False)
            subscription.dead_letter(message, "unreadable")
            assert [event_id(one) for one in take(subscription, 50)] == [item.id for item in items[1:]]
        with joined(bus, "g") as second:
            (again,) = take(second, 1, ack=False)
            assert again.position == message.position, "it was not acknowledged before it was put aside"
            second.dead_letter(again, "unreadable")
            make_topic(kafka_url, f"{kafka_topic}.dead")
            serve(second)
        with joined(bus, "g") as third:
            assert third.receive(2.0) is None
    assert [one.value() for one in read(kafka_url, f"{kafka_topic}.dead", 1)] == [items[0].body]


@pytest.mark.parametrize("limit", [1024, 16 * 1024 * 1024], ids=["for us", "for the dead letters' topic"])
def test_a_record_that_is_too_large_leaves_a_stub_that_names_it(
    kafka_url: str, kafka_topic: str, limit: int
) -> None:
    item = sized(1, 1_500_000)
    with opened(kafka_url, kafka_topic, topic_config={"max.message.bytes": "4000000"}) as bus:
        ListFeed([item]).publish(bus)
    with opened(kafka_url, kafka_topic, max_record_bytes=limit) as bus:
        make_topic(kafka_url, f"{kafka_topic}.dead", max_message_bytes="100000")
        with joined(bus, "g") as subscription:
            (message,) = take(subscription, 1, ack=False)
            subscription.dead_letter(message, "unreadable " + "é" * 2000)
            serve(subscription)
        with joined(bus, "g") as second:
            assert second.receive(2.0) is None, "the stub counts as put aside"
        with bus.dead_letters("g") as look:
            (letter,) = look.read()
            with pytest.raises(RecordRefused, match=rf"1500000 bytes.*{kafka_topic}\[\d\]@0"):
                look.send_back(letter)
    (dead,) = read(kafka_url, f"{kafka_topic}.dead", 1)
    stub, told = json.loads(dead.value()), headers(dead)
    position = f"{stub['topic']}[{stub['partition']}]@{stub['offset']}"
    assert position == message.position == told["x-virtbus-position"]
    assert (stub["size_bytes"], dead.key()) == (1_500_000, item.key.encode())
    assert stub["reason"].startswith("unreadable ééé")
    assert len(stub["reason"].encode()) <= 1024
    assert told[REASON_HEADER] == stub["reason"]
    assert CUT_HEADER in told


def test_a_dead_letter_topic_that_takes_next_to_nothing_gets_a_short_stub(
    kafka_url: str, kafka_topic: str
) -> None:
    (item,) = records(1)
    with opened(kafka_url, kafka_topic) as bus:
        ListFeed([item]).publish(bus)
        make_topic(kafka_url, f"{kafka_topic}.dead", max_message_bytes="900")
        with joined(bus, "g") as subscription:
            (message,) = take(subscription, 1, ack=False)
            subscription.dead_letter(message, "why not " * 200)
            serve(subscription)
    (dead,) = read(kafka_url, f"{kafka_topic}.dead", 1)
    assert json.loads(dead.value())["offset"] == 0


def test_what_a_group_put_aside_is_counted_listed_dropped_and_sent_back_to_it_alone(
    kafka_url: str, kafka_topic: str
) -> None:
    items = records(4, keys=4)
    with opened(kafka_url, kafka_topic, topic_config=LARGE) as bus:
        with bus.dead_letters("g") as look:
            assert (look.count(), list(look.read())) == (0, [])
        ListFeed(items).publish(bus)
        for group in ("g", "other"):
            with joined(bus, group) as subscription:
                for message in take(subscription, 4, ack=False):
                    subscription.dead_letter(message, f"bad for {group}")
                serve(subscription)
        with bus.dead_letters("g") as look:
            assert look.count() == 4
            first, second = look.read(2)
            assert {first.reason, second.reason} == {"bad for g"}
            assert {first.id, second.id} < {item.id for item in items}
            assert (first.type, first.size_bytes) == (items[0].attributes["type"], len(first.message.body))
            assert first.at is not None
            look.drop(first)
            look.send_back(second)
            assert look.count() == 2
            assert {one.id for one in look.read()} == {item.id for item in items} - {first.id, second.id}
        with bus.dead_letters("g") as look:
            assert look.count() == 2
        with bus.dead_letters("other") as look:
            assert look.count() == 4
        with joined(bus, "g") as subscription:
            (again,) = take(subscription, 1)
            assert (event_id(again), again.redelivered) == (second.id, True)
            assert not [name for name in again.headers if name.startswith("x-virtbus-") and "for" not in name]
            assert subscription.receive(1.0) is None
        with joined(bus, "other") as subscription:
            assert subscription.receive(2.0) is None, "it is not for this group"


def test_dead_letters_that_all_are_settled_take_no_room(kafka_url: str, kafka_topic: str) -> None:
    items = records(3)
    with opened(kafka_url, kafka_topic, topic_partitions=1) as bus:
        ListFeed(items).publish(bus)
        with joined(bus, "g") as subscription:
            for message in take(subscription, 3, ack=False):
                subscription.dead_letter(message, "bad")
            serve(subscription)
        with bus.dead_letters("g") as look:
            for letter in look.read():
                look.drop(letter)
        assert read(kafka_url, f"{kafka_topic}.dead", 1, seconds=2.0) == []


def test_the_name_of_a_group_is_checked(kafka_url: str, kafka_topic: str) -> None:
    with opened(kafka_url, kafka_topic) as bus, pytest.raises(ConfigError, match="group"):
        bus.dead_letters("no such name!")


def test_a_foreign_record_that_no_topic_of_ours_takes_does_not_stop_the_consumer(
    kafka_url: str, kafka_topic: str
) -> None:
    good = records(3, keys=3)
    make_topic(kafka_url, kafka_topic, max_message_bytes="8000000")
    producer = bare_producer(kafka_url, **{"message.max.bytes": 9_000_000})
    producer.produce(kafka_topic, b"z" * 3_000_000, b"k")
    assert producer.flush(20) == 0
    with opened(kafka_url, kafka_topic) as bus:
        ListFeed(good).publish(bus)
    with Consumer(kafka_url, group="g", options=BusOptions(topic=kafka_topic)) as consumer:
        got = set()
        limit = time.monotonic() + 30
        while len(got) < 3 and time.monotonic() < limit:
            delivery = consumer.receive(1.0)
            if delivery is not None:
                got.add(delivery.id)
                delivery.ack()
    assert got == {item.id for item in good}
    (dead,) = read(kafka_url, f"{kafka_topic}.dead", 1)
    assert json.loads(dead.value())["size_bytes"] == 3_000_000


def test_the_command_counts_lists_sends_back_and_drops(
    kafka_url: str, kafka_topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = records(3, keys=3)
    monkeypatch.setenv("VIRTBUS_BUS__TOPIC", kafka_topic)
    with opened(kafka_url, kafka_topic) as bus:
        ListFeed(items).publish(bus)
        with joined(bus, "g") as subscription:
            for message in take(subscription, 3, ack=False):
                subscription.dead_letter(message, "no such host")
            serve(subscription)

    def dead(*words: str) -> str:
        command = [sys.executable, "-m", "virtbus", "dead", *words, "--group", "g", "--bus", kafka_url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert dead("count") == "3\n"
    listed = dead("list")
    assert [item.id in listed for item in items] == [True] * 3
    assert listed.count("no such host") == 3
    dead("retry", items[0].id)
    dead("drop", items[1].id)
    assert dead("count") == "1\n"
    with Consumer(kafka_url, group="g", options=BusOptions(topic=kafka_topic)) as consumer:
        delivery = consumer.receive(20.0)
        assert delivery is not None
        assert delivery.id == items[0].id
        delivery.ack()


def test_the_dead_letter_of_json_in_another_charset_says_which(kafka_url: str, kafka_topic: str) -> None:
    (event,) = records(1)
    sent = [(f"ce_{name}", value.encode()) for name, value in event.attributes.items()]
    sent += [("content-type", b"application/json"), ("Content-Encoding", b"latin-1")]
    with opened(kafka_url, kafka_topic) as bus:
        make_topic(kafka_url, f"{kafka_topic}.dead")
        with joined(bus, "g"):
            pass
    producer = bare_producer(kafka_url)
    producer.produce(kafka_topic, b'{"a":"\xe9"}', b"k", headers=sent)
    assert producer.flush(20) == 0
    with Consumer(kafka_url, group="g", options=BusOptions(topic=kafka_topic)) as consumer:
        limit = time.monotonic() + 20
        while not (dead := read(kafka_url, f"{kafka_topic}.dead", 1, seconds=1.0)):
            assert consumer.receive(1.0) is None
            assert time.monotonic() < limit
    assert headers(dead[0])["x-virtbus-reason"].endswith(
        "its content encoding is 'latin-1'; JSON is sent as UTF-8"
    )
