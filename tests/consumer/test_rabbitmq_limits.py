"""A group on a RabbitMQ that is set up in other ways, or in trouble: it reads on, and says what is wrong."""

from __future__ import annotations

import logging
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import amqp
import kombu
import pytest

from tests.brokers.rabbitmq import RabbitMQ
from tests.faults.amqp_kit import close_connections
from tests.faults.consumer_kit import GROUP, QUEUE, dead_ids, die, make_group, publish, publish_raw, waiting
from tests.waiting import wait_until
from virtbus.bus import CUT_HEADER, REASON_HEADER, BusOptions, open_bus
from virtbus.bus.amqp.connection import translated
from virtbus.bus.amqp.letters import USER_HEADER, letter
from virtbus.bus.amqp.subscription import AmqpSubscription
from virtbus.consumer import Consumer, Delivery
from virtbus.errors import BusDenied, BusUnavailable, RecordRefused
from virtbus.model import Binding, Message
from virtbus.telemetry import METRICS
from virtbus.testing import records

pytestmark = pytest.mark.rabbitmq


def received(consumer: Consumer, count: int, seconds: float = 30.0) -> list[Delivery]:
    """That many, acknowledged."""
    found: list[Delivery] = []
    until = time.monotonic() + seconds
    while len(found) < count and time.monotonic() < until:
        delivery = consumer.receive(0.5)
        if delivery is not None:
            found.append(delivery)
            delivery.ack()
    return found


def iter_deliveries(consumer: Consumer, count: int) -> Iterator[Delivery]:
    """So many, without a verdict."""
    until = time.monotonic() + 30
    while count and time.monotonic() < until:
        delivery = consumer.receive(0.5)
        if delivery is not None:
            count -= 1
            yield delivery


@contextmanager
def setting(broker: RabbitMQ, name: str, value: int, before: int) -> Iterator[None]:
    broker.eval(f"application:set_env(rabbit, {name}, {value}).")
    try:
        yield
    finally:
        broker.eval(f"application:set_env(rabbit, {name}, {before}).")


# ------------------------------------------------------------------------------------- frames


def test_a_broker_with_larger_frames_is_read_over_one_connection(rabbitmq_alone: RabbitMQ) -> None:
    url = rabbitmq_alone.url(rabbitmq_alone.vhost())
    with setting(rabbitmq_alone, "frame_max", 4 * 1024 * 1024, 131072):
        make_group(url)
        publish_raw(url, b"x" * 2_000_000)
        items = records(3, keys=3)
        publish(url, items)
        before = METRICS.bus_reconnects._value.get()
        with Consumer(url, group=GROUP) as consumer:
            assert [one.id for one in received(consumer, 3)] == [record.id for record in items]
        assert METRICS.bus_reconnects._value.get() == before + 1


def test_a_dead_letter_that_does_not_fit_is_cut_and_says_so(amqp_url: str) -> None:
    make_group(amqp_url)
    publish_raw(amqp_url, b"{}", {"trace": "t" * 130_950, "small": "kept"})
    bus = open_bus(amqp_url, BusOptions())
    with Consumer(amqp_url, group=GROUP) as consumer, bus.dead_letters(GROUP) as letters:
        wait_until(
            lambda: consumer.receive(0.3) is None and letters.count() == 1, timeout=60, what="the letter"
        )
        (letter,) = letters.read()
        assert REASON_HEADER in letter.message.headers
        assert "not a CloudEvent" in letter.reason
        assert letter.message.headers["small"] == "kept"
        assert "trace" in str(letter.message.headers[CUT_HEADER])
        with pytest.raises(RecordRefused, match="was cut"):
            letters.send_back(letter)
    bus.close()


def test_a_broker_that_allows_one_channel_is_enough(rabbitmq_alone: RabbitMQ) -> None:
    url = rabbitmq_alone.url(rabbitmq_alone.vhost())
    with setting(rabbitmq_alone, "channel_max", 1, 2047):
        items = records(5, keys=5)
        with Consumer(url, group=GROUP) as consumer:
            consumer.receive(0.3)
            publish(url, items)
            found = received(consumer, 4)
            subscription = consumer._grip.subscription
            subscription._verify_at = 0.0  # type: ignore[union-attr]
            found += received(consumer, 1)
            publish_raw(url, b"poison")
            wait_until(
                lambda: consumer.receive(0.3) is None and waiting(url, f"{QUEUE}.dead") == 1,
                timeout=60,
                what="the letter",
            )
    assert {one.id for one in found} == {record.id for record in items}
    assert dead_ids(url) == [None]


# ------------------------------------------------------------------------------------- deliveries


def test_an_ack_waits_for_no_other_where_events_take_their_time(
    rabbitmq: RabbitMQ, vhost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is acknowledged and not sent comes again after a cut: without a dedupe file as an effect."""
    monkeypatch.setattr(AmqpSubscription, "beat", lambda self: None)  # it would send them within a second
    url = rabbitmq.url(vhost)
    make_group(url)
    items = records(20, keys=20)
    publish(url, items)
    with Consumer(url, group=GROUP) as consumer:
        for delivery in iter_deliveries(consumer, 6):
            if delivery.id != items[5].id:
                time.sleep(0.1)
                delivery.ack()
        wait_until(lambda: rabbitmq.queues(vhost)[QUEUE] == 15, timeout=30, what="five acks")


def test_after_a_cut_nothing_is_handed_out_that_somebody_else_gets(
    rabbitmq: RabbitMQ, vhost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AmqpSubscription, "beat", lambda self: None)  # it would hear of it within a second
    url = rabbitmq.url(vhost)
    make_group(url)
    publish(url, records(20, keys=20))
    with Consumer(url, group=GROUP) as consumer:
        (first,) = iter_deliveries(consumer, 1)
        cut = consumer._grip.subscription._link  # type: ignore[union-attr]
        close_connections(rabbitmq, vhost)
        time.sleep(0.1)  # of work
        first.ack()
        assert len(list(iter_deliveries(consumer, 1))) == 1
        assert consumer._grip.subscription._link is not cut  # type: ignore[union-attr]


def test_a_delivery_tells_how_often_it_came(amqp_url: str) -> None:
    make_group(amqp_url)
    publish(amqp_url, records(1))
    for attempt in (1, 2, 3):
        consumer = Consumer(amqp_url, group=GROUP)
        delivery = consumer.receive(20.0)
        assert delivery is not None
        assert (delivery.attempts, delivery.redelivered) == (attempt, attempt > 1)
        die(consumer)


def of_somebody_else(url: str, id_: str, **headers: Any) -> None:
    """A CloudEvent without a message id, as other senders make them."""
    event = {"specversion": "1.0", "id": id_, "source": "/theirs", "type": "com.example.thing"}
    event["partitionkey"] = id_
    publish_raw(url, b"{}", {f"ce-{name}": value for name, value in event.items()} | headers)


@pytest.mark.parametrize("count", [500, -5, True, "many"])
def test_what_a_sender_says_of_deliveries_counts_for_nothing(count: Any, amqp_url: str) -> None:
    """A shovel brings the header along from another quorum queue."""
    make_group(amqp_url)
    of_somebody_else(amqp_url, "1", **{"x-delivery-count": count})
    for attempt in (1, 2):
        consumer = Consumer(amqp_url, group=GROUP)
        delivery = consumer.receive(20.0)
        assert delivery is not None
        assert delivery.attempts == attempt
        die(consumer)


def test_a_retry_of_a_message_without_an_id_is_kept_over_a_lost_connection(
    rabbitmq: RabbitMQ, vhost: str
) -> None:
    url = rabbitmq.url(vhost)
    make_group(url)
    for id_ in ("long", "other"):
        of_somebody_else(url, id_)
    with Consumer(url, group=GROUP) as consumer:
        delivery = consumer.receive(5.0)
        assert delivery is not None
        assert delivery.id == "long"
        delivery.retry(3600.0)
        close_connections(rabbitmq, vhost)
        assert [one.id for one in received(consumer, 1)] == ["other"]
        assert consumer.receive(1.0) is None, "its hour is not over"


def test_a_retry_is_kept_over_a_lost_connection(rabbitmq: RabbitMQ, vhost: str) -> None:
    url = rabbitmq.url(vhost)
    make_group(url)
    long, short, *others = records(6, keys=6)
    publish(url, [long, short, *others])
    with Consumer(url, group=GROUP) as consumer:
        for record, after in ((long, 3600.0), (short, 3.0)):
            delivery = consumer.receive(5.0)
            assert delivery is not None
            assert delivery.id == record.id
            delivery.retry(after)
        close_connections(rabbitmq, vhost)
        got = [one.id for one in received(consumer, 5)]
        assert set(got) == {record.id for record in [short, *others]}
        assert consumer.receive(1.0) is None, "its hour is not over"


def test_a_retry_outlives_the_consumer_timeout_times_the_delivery_limit(rabbitmq_alone: RabbitMQ) -> None:
    vhost = rabbitmq_alone.vhost()
    url = rabbitmq_alone.url(vhost)
    with (
        setting(rabbitmq_alone, "consumer_timeout", 1000, 1_800_000),
        setting(rabbitmq_alone, "channel_tick_interval", 500, 60_000),
    ):
        make_group(url)
        first, *others = records(6, keys=6)
        publish(url, [first, *others])
        with Consumer(url, group=GROUP, max_attempts=2) as consumer:
            delivery = consumer.receive(5.0)
            assert delivery is not None
            delivery.retry(10.0)
            assert {one.id for one in received(consumer, 5)} == {record.id for record in others}
            (again,) = received(consumer, 1)
    assert again.id == first.id
    assert again.attempts is not None
    assert again.attempts > 3
    assert dead_ids(url) == []


DIES_AT_ONCE = """
import os, sys
from virtbus import Consumer
delivery = Consumer(sys.argv[1], group="g").receive(60.0)
print(delivery and delivery.id, flush=True)
os._exit(9)
"""


def test_an_event_that_kills_its_consumer_at_once_is_still_in_front_of_its_domain(amqp_url: str) -> None:
    make_group(amqp_url)
    items = records(30)  # of one domain
    publish(amqp_url, items)
    words = [sys.executable, "-c", DIES_AT_ONCE, amqp_url]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    came = [
        subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120).stdout.strip()
        for _ in range(7)  # from the eighth time on each comes alone, and what is behind it overtakes
    ]
    assert came == [items[0].id] * 7


# ------------------------------------------------------------------------------------- a tap after a cut


class Nat:
    """A way to the broker that can end for the client alone: the broker goes on believing in it."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._clients: list[socket.socket] = []
        self._kept: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target))
            self._clients.append(client)
            self._kept.append(server)
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._forward, args=(source, sink), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
        except OSError:
            pass

    def cut(self) -> None:
        for client in self._clients:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with suppress(OSError):
                client.shutdown(socket.SHUT_RD)
            client.close()
        self._clients.clear()

    def close(self) -> None:
        self._listener.close()
        for each in (*self._clients, *self._kept):
            each.close()


def test_reading_without_a_group_goes_on_at_once_after_a_one_sided_cut(
    rabbitmq: RabbitMQ, vhost: str
) -> None:
    nat = Nat(rabbitmq.port)
    with Consumer(f"amqp://guest:guest@127.0.0.1:{nat.port}/{vhost}") as consumer:
        consumer.receive(0.5)
        nat.cut()
        connected = METRICS.bus_reconnects._value.get()
        while METRICS.bus_reconnects._value.get() == connected:  # the test's own timeout ends it
            consumer.receive(0.5)
        item = records(1)[0]
        publish(rabbitmq.url(vhost), [item])
        assert [one.id for one in received(consumer, 1, seconds=10.0)] == [item.id]
    nat.close()


# ------------------------------------------------------------------------------------- what is said


def test_a_group_whose_exchange_was_deleted_says_so(
    rabbitmq: RabbitMQ, vhost: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = rabbitmq.url(vhost)
    with Consumer(url, group=GROUP) as consumer, kombu.Connection(url) as other:
        consumer.receive(0.3)
        channel = other.channel()
        channel.exchange_delete("virtbus.events")
        channel.exchange_declare("virtbus.events", type="topic", durable=True, auto_delete=False)
        consumer._grip.subscription._verify_at = 0.0  # type: ignore[union-attr]
        with caplog.at_level(logging.INFO, logger="virtbus"):
            consumer.receive(0.5)
        assert any("exchange virtbus.events had been deleted" in line.getMessage() for line in caplog.records)
        item = records(1)[0]
        publish(url, [item])
        assert [one.id for one in received(consumer, 1)] == [item.id]


def test_an_exchange_of_another_type_is_warned_of(amqp_url: str, caplog: pytest.LogCaptureFixture) -> None:
    with kombu.Connection(amqp_url) as other:
        other.channel().exchange_declare("virtbus.events", type="direct", durable=True, auto_delete=False)
    with caplog.at_level(logging.WARNING, logger="virtbus"), Consumer(amqp_url, group=GROUP) as consumer:
        consumer.receive(0.3)
    assert any("is not a durable topic exchange" in line.getMessage() for line in caplog.records)


def test_a_group_without_the_right_to_mark_the_exchange_is_still_bound_again(
    rabbitmq: RabbitMQ, vhost: str
) -> None:
    rabbitmq.user("reader", vhost, configure=r"^virtbus\.g", write=r"^(virtbus\.g|amq\.default$)", read=".*")
    url = rabbitmq.url(vhost)
    with kombu.Connection(url) as other:
        channel = other.channel()
        channel.exchange_declare("virtbus.events", type="topic", durable=True, auto_delete=False)
        with Consumer(rabbitmq.url(vhost, user="reader", password="secret"), group=GROUP) as consumer:
            consumer.receive(0.3)
            channel.queue_unbind(QUEUE, "virtbus.events", "#")
            consumer._grip.subscription._verify_at = 0.0  # type: ignore[union-attr]
            consumer.receive(0.5)
            item = records(1)[0]
            publish(url, [item])
            assert [one.id for one in received(consumer, 1)] == [item.id]


@pytest.mark.parametrize(
    ("code", "text", "kind", "says", "never"),
    [
        (530, "NOT_ALLOWED - access to vhost 'x' refused for user 'u': connection limit (1) is reached",
         BusUnavailable, "raise the limit", "check the virtual host"),
        (530, "NOT_ALLOWED - number of channels opened (9) has reached the maximum allowed user limit of (9)",
         BusUnavailable, "raise the limit", "check the virtual host"),
        (530, "NOT_ALLOWED - vhost limited not found", BusDenied, "check the virtual host", "raise"),
        (406, "PRECONDITION_FAILED - inequivalent arg 'durable' for queue 'user_id' in vhost '/'",
         BusUnavailable, "inequivalent arg", "bus.username"),
        (404, "NOT_FOUND - no exchange", BusDenied, "declared again", "set bus.declare = true"),
    ],
)  # fmt: skip
def test_an_error_advises_what_helps(
    code: int, text: str, kind: type[Exception], says: str, never: str
) -> None:
    error = amqp.exceptions.error_for_code(code, text, (10, 40), amqp.ConnectionError)
    told = translated(error, "amqp://host:5672/x", doing="connecting")
    assert type(told) is kind
    assert says in str(told)
    assert never not in str(told)


def test_an_exchange_whose_name_holds_the_word_topic_is_no_topic_permission() -> None:
    from virtbus.bus.amqp.bus import _verdict_on_one

    def verdict(text: str) -> object:
        error = amqp.exceptions.error_for_code(403, text, (60, 40), amqp.ChannelError)
        return _verdict_on_one(error, translated(error, "x", doing="publishing"))

    refused = "ACCESS_REFUSED - {}access to topic 'a.b' in exchange 'e' in vhost '/' refused for user 'u'"
    assert verdict(refused.format("")) is not None
    assert verdict(refused.format("write ")) is not None
    assert verdict("ACCESS_REFUSED - access to exchange 'my.topic' in vhost '/' refused for user 'u'") is None


# ------------------------------------------------------------------------------------- rights


def test_a_prefetch_beyond_what_the_protocol_has_room_for_is_as_much_as_it_has(rabbitmq: RabbitMQ) -> None:
    url = rabbitmq.url(rabbitmq.vhost())
    make_group(url)
    items = records(3, keys=3)
    publish(url, items)
    with Consumer(url, group=GROUP, prefetch=1_000_000) as consumer:
        assert [one.id for one in received(consumer, 3)] == [record.id for record in items]


def documented_rights() -> dict[str, str]:
    """What docs/security.md grants a consumer group's user."""
    text = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")
    command = text.split("set_permissions --vhost virtbus scheduler ", 1)[1].split("```", 1)[0]
    configure, write, read = re.findall('"([^"]*)"', command)
    return {"configure": configure, "write": write, "read": read}


def test_the_documented_rights_are_enough_for_a_group_and_its_dead_letters(rabbitmq: RabbitMQ) -> None:
    vhost = rabbitmq.vhost()
    url = rabbitmq.user(f"scheduler-{vhost}", vhost, **documented_rights())
    with Consumer(url, group="scheduler") as consumer:
        consumer.receive(0.3)
        publish_raw(rabbitmq.url(vhost), b"not an event")
        items = records(3, keys=3)
        publish(rabbitmq.url(vhost), items)
        assert [one.id for one in received(consumer, 3)] == [record.id for record in items]
        bus = open_bus(url, BusOptions())
        with bus.dead_letters("scheduler") as letters:
            wait_until(lambda: letters.count() == 1, timeout=30, what="the letter")
            (found,) = letters.read()
            letters.drop(found)
        bus.close()
    rabbitmq.drop_vhost(vhost)


def test_they_take_no_less_than_write_on_the_default_exchange_and_give_none_on_the_events(
    rabbitmq: RabbitMQ,
) -> None:
    vhost = rabbitmq.vhost()
    make_group(rabbitmq.url(vhost))  # the exchange
    rights = documented_rights()
    url = rabbitmq.user(f"scheduler-{vhost}", vhost, **rights)
    with kombu.Connection(url) as connection, pytest.raises(amqp.AccessRefused):
        channel = connection.channel()
        channel.confirm_select()
        channel.basic_publish_confirm(amqp.Message(b"x"), "virtbus.events", "io_error.a.b")
    rights["write"] = rights["write"].replace(r"amq\.default|", "")
    url = rabbitmq.user(f"less-{vhost}", vhost, **rights)
    with (
        Consumer(url, group="scheduler", give_up_when_denied=True) as consumer,
        pytest.raises(BusDenied, match=r"exchange 'amq\.default'"),
    ):
        consumer.receive(10.0)
    rabbitmq.drop_vhost(vhost)


def test_a_forged_sender_in_a_header_is_not_who_published(rabbitmq: RabbitMQ) -> None:
    url = rabbitmq.url(rabbitmq.vhost())
    make_group(url)
    with kombu.Connection(url) as connection:  # as the broker leaves it when it puts a message aside itself
        channel = connection.channel()
        channel.confirm_select()
        message = amqp.Message(b"x", application_headers={USER_HEADER: "other"}, user_id="guest")
        channel.basic_publish_confirm(message, "", f"{QUEUE}.dead")
    bus = open_bus(url, BusOptions())
    with bus.dead_letters(GROUP) as letters:
        (found,) = letters.read()
        assert found.message.user_id == "guest"
    bus.close()


def test_looks_at_dead_letters_lose_none_under_a_policys_delivery_limit(
    rabbitmq: RabbitMQ, vhost: str
) -> None:
    url = rabbitmq.url(vhost)
    make_group(url)
    rabbitmq.policy(vhost, "^virtbus", delivery_limit=3)
    with kombu.Connection(url) as connection:
        channel = connection.channel()
        channel.confirm_select()
        for _ in range(3):
            channel.basic_publish_confirm(amqp.Message(b"x"), "", f"{QUEUE}.dead")
    bus = open_bus(url, BusOptions())
    for look in range(10):
        with bus.dead_letters(GROUP) as letters:
            assert len(list(letters.read())) == 3, f"look {look}"
    bus.close()


def test_a_queue_that_another_client_has_for_itself_is_waited_for(amqp_url: str) -> None:
    with kombu.Connection(amqp_url) as connection:
        channel = connection.channel()
        channel.exchange_declare("virtbus.events", "topic", durable=True, auto_delete=False)
        channel.queue_declare(QUEUE, durable=True, auto_delete=False)
        channel.queue_bind(QUEUE, "virtbus.events", "#")
        channel.basic_consume(QUEUE, exclusive=True)
        with (
            Consumer(amqp_url, group=GROUP, patient=False) as consumer,
            pytest.raises(BusUnavailable, match=r"in exclusive use.*: end the client that has it"),
        ):
            consumer.receive(0.5)
    items = records(1)
    with Consumer(amqp_url, group=GROUP, give_up_when_denied=True) as consumer:
        consumer.receive(0.3)
        publish(amqp_url, items)
        assert [one.id for one in received(consumer, 1)] == [items[0].id]


@pytest.mark.parametrize("odd", ["boom", 5, [], [5], {"reason": "x"}, [{"reason": 5, "time": "x"}]])
def test_a_sender_who_writes_the_brokers_own_header_breaks_no_look(odd: object, amqp_url: str) -> None:
    make_group(amqp_url)
    with kombu.Connection(amqp_url) as connection:
        channel = connection.channel()
        channel.confirm_select()
        for headers in ({"x-death": odd}, {REASON_HEADER: "good"}):
            message = amqp.Message(b"x", application_headers=headers)
            channel.basic_publish_confirm(message, "", f"{QUEUE}.dead")
    bus = open_bus(amqp_url, BusOptions())
    with bus.dead_letters(GROUP) as letters:
        found = list(letters.read())
        assert [letter.reason for letter in found][1:] == ["good"]
        letters.send_back(found[0])
        assert letters.count() == 1
    bus.close()


def test_a_senders_headers_say_nothing_in_our_name() -> None:
    forged = {REASON_HEADER: "theirs", CUT_HEADER: "theirs", USER_HEADER: "other", "trace": "t"}
    message = Message(Binding.AMQP, forged, None, b"x", None, False, None, "q#1", None)
    content, cut = letter(message, {}, "ours", 131_072)
    headers = content.properties["application_headers"]
    assert cut is None
    assert {headers.get(name) for name in (REASON_HEADER, CUT_HEADER, USER_HEADER, "trace")} == {
        "ours",
        None,
        "t",
    }
