"""AmqpBus on a real RabbitMQ: refusals, alarms, restarts, dead networks, TLS and rights."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import kombu
import pytest

from tests.brokers.rabbitmq import RabbitMQ
from tests.faultkit import TcpFaultProxy
from tests.faults import amqp_kit
from tests.waiting import wait_until
from virtbus.bus import BusOptions
from virtbus.bus.amqp.bus import AmqpBus
from virtbus.errors import BusDenied, ConfigError
from virtbus.model import Confirmed, Deferred, Nacked, Outcome, Refused, Unroutable
from virtbus.telemetry import METRICS
from virtbus.testing import ListFeed, records


@contextmanager
def opened(url: str, **options: object) -> Iterator[AmqpBus]:
    bus = AmqpBus(url, options=BusOptions(**options))  # type: ignore[arg-type]
    try:
        yield bus
    finally:
        bus.close()


def bind(url: str, queue: str, *keys: str, **arguments: object) -> None:
    """A durable queue on the exchange, for these binding keys."""
    with kombu.Connection(url) as connection:
        channel = connection.channel()
        channel.exchange_declare("virtbus.events", type="topic", durable=True, auto_delete=False)
        channel.queue_declare(queue, durable=True, auto_delete=False, arguments=arguments)
        for key in keys or ("#",):
            channel.queue_bind(queue, "virtbus.events", key)


def final(feed: ListFeed) -> dict[str, Outcome]:
    return {record.id: outcome for record, outcome in feed.outcomes}


# ------------------------------------------------------------------------------------- each refusal


def test_a_record_that_nobody_is_bound_for_is_unroutable_and_the_next_is_confirmed(amqp_url: str) -> None:
    items = records(6, keys=6)
    bind(amqp_url, "some", *(f"io_error.*.{record.key}" for record in items[1:]))
    with opened(amqp_url) as bus:
        feed = ListFeed(items)
        feed.publish(bus)
    assert isinstance(final(feed)[items[0].id], Unroutable)
    assert sum(isinstance(outcome, Confirmed) for outcome in final(feed).values()) == 5


def test_a_full_queue_that_rejects_parks_the_record_without_a_new_connection(amqp_url: str) -> None:
    bind(amqp_url, "full", **{"x-max-length": 2, "x-overflow": "reject-publish"})
    before = METRICS.bus_reconnects._value.get()
    with opened(amqp_url) as bus:
        feed = ListFeed(records(4))
        outcomes = feed.publish(bus)
        assert [type(one) for one in outcomes] == [Confirmed, Confirmed, Nacked, Nacked]
        assert "nacked" in outcomes[2].reason  # type: ignore[union-attr]
        with kombu.Connection(amqp_url) as connection:
            connection.channel().queue_purge("full")
        assert ListFeed(records(1)).publish(bus) == [Confirmed()]
    assert METRICS.bus_reconnects._value.get() == before + 1


def test_a_missing_exchange_without_declare_is_denied_until_somebody_makes_it(amqp_url: str) -> None:
    with opened(amqp_url, declare=False) as bus:
        (outcome,) = ListFeed(records(1)).publish(bus)
        assert isinstance(outcome, Deferred)
        assert isinstance(outcome.error, BusDenied)
        assert "virtbus.events" in str(outcome.error)
        bind(amqp_url, "all")
        assert ListFeed(records(1)).publish(bus) == [Confirmed()]


def test_an_exchange_that_is_deleted_under_way_is_made_again(amqp_url: str) -> None:
    bind(amqp_url, "all")
    with opened(amqp_url) as bus:
        assert ListFeed(records(1)).publish(bus) == [Confirmed()]
        with kombu.Connection(amqp_url) as connection:
            connection.channel().exchange_delete("virtbus.events")
        feed = ListFeed(records(1))
        assert [type(one) for one in feed.publish(bus, again=True)] == [Deferred]
        bind(amqp_url, "all")
        assert feed.publish(bus) == [Confirmed()]


def test_a_user_who_may_not_publish_is_denied_and_goes_on_when_he_may(
    rabbitmq: RabbitMQ, vhost: str, amqp_url: str
) -> None:
    bind(amqp_url, "all")
    url = rabbitmq.user("reader", vhost, read=".*")
    with opened(url, declare=False) as bus:
        (outcome,) = ListFeed(records(1)).publish(bus)
        assert isinstance(outcome, Deferred)
        assert isinstance(outcome.error, BusDenied)
        rabbitmq.permit("reader", vhost, write=".*")
        assert ListFeed(records(1)).publish(bus) == [Confirmed()]


def test_a_user_without_configure_rights_uses_the_exchange_that_is_there(
    rabbitmq: RabbitMQ, vhost: str, amqp_url: str
) -> None:
    url = rabbitmq.user("writer", vhost, write=".*")
    with opened(url) as bus:
        with pytest.raises(BusDenied, match="may not create it") as caught:
            ListFeed(records(1)).publish(bus)
        assert "bus.declare = false" in str(caught.value)
        bind(amqp_url, "all")
        assert ListFeed(records(1)).publish(bus) == [Confirmed()]


def test_a_refused_routing_key_parks_its_record_and_the_others_go_on(
    rabbitmq: RabbitMQ, vhost: str, amqp_url: str
) -> None:
    items = records(5, keys=5)
    bind(amqp_url, "all")
    url = rabbitmq.user("narrow", vhost, write=".*")
    rabbitmq.permit_topic("narrow", vhost, "virtbus.events", write=f"^(?!.*{items[2].key}).*$")
    with opened(url, declare=False) as bus:
        feed = ListFeed(items)
        for _ in range(3):
            for record, outcome in bus.publish(feed):
                feed.settle(record, outcome, again=isinstance(outcome, Deferred))
    assert not len(feed)
    outcomes = final(feed)
    assert isinstance(outcomes[items[2].id], Unroutable)
    assert sum(isinstance(outcome, Confirmed) for outcome in outcomes.values()) == 4


def test_a_message_too_large_for_the_broker_is_refused_and_the_rest_arrives(
    rabbitmq_alone: RabbitMQ,
) -> None:
    vhost = rabbitmq_alone.vhost()
    url = rabbitmq_alone.url(vhost)
    bind(url, "all")
    items = records(20, keys=20)
    items[7] = items[7]._replace(body=b'"' + b"x" * 200_000 + b'"')
    with rabbitmq_alone.largest_message(100_000), opened(url) as bus:
        feed = ListFeed(items)
        for _ in range(4):
            feed.publish(bus, again=True)
    assert not len(feed)
    outcomes = final(feed)
    refused = outcomes[items[7].id]
    assert isinstance(refused, Refused)
    assert "larger than" in str(refused.error)
    assert sum(isinstance(outcome, Confirmed) for outcome in outcomes.values()) == 19


# ------------------------------------------------------------------------------------- log in


def test_a_wrong_password_and_a_missing_vhost_are_denied_without_showing_the_password(
    rabbitmq: RabbitMQ, vhost: str
) -> None:
    for url in (rabbitmq.url(vhost, "guest", "wr0ng-s3cret"), rabbitmq.url("no-such-vhost")):
        with opened(url) as bus, pytest.raises(BusDenied) as caught:
            ListFeed(records(1)).publish(bus)
        assert "wr0ng-s3cret" not in str(caught.value)
        assert "check" in str(caught.value)


def test_a_password_file_is_read_at_each_connect(rabbitmq: RabbitMQ, vhost: str, tmp_path: Path) -> None:
    rabbitmq.user("rotated", vhost, configure=".*", write=".*", read=".*", password="first")
    bind(rabbitmq.url(vhost), "all")
    file = tmp_path / "password"
    file.write_text("first\n")
    url = rabbitmq.url(vhost, "someone", "ignored")
    with opened(url, username="rotated", password_file=file) as bus:
        assert ListFeed(records(1)).publish(bus) == [Confirmed()]
        rabbitmq.user("rotated", vhost, configure=".*", write=".*", read=".*", password="second")
        file.write_text("second")
        amqp_kit.close_connections(rabbitmq, vhost)
        assert ListFeed(records(2)).drain(bus, timeout=10) == 2


def test_the_publisher_proves_who_it_is_to_the_consumer(rabbitmq: RabbitMQ, vhost: str) -> None:
    url = rabbitmq.user("agent-7", vhost, configure=".*", write=".*", read=".*")
    with opened(url) as bus:
        subscription = bus.consume("who")
        assert subscription.receive(0.2) is None
        ListFeed(records(1)).publish(bus)
        message = subscription.receive(5.0)
        subscription.close()
    assert message is not None
    assert message.user_id == "agent-7"


# ------------------------------------------------------------------------------------- TLS


def test_tls_with_the_right_authority_and_name_publishes(rabbitmq: RabbitMQ, vhost: str) -> None:
    bind(rabbitmq.url(vhost), "all")
    with opened(rabbitmq.tls_url(vhost), tls_ca_file=rabbitmq.ca_file) as bus:
        feed = ListFeed(records(300, keys=100))
        assert feed.publish(bus) == [Confirmed()] * 300
        subscription = bus.consume("tls")
        assert subscription.receive(0.2) is None
        ListFeed(records(1)).publish(bus)
        message = subscription.receive(5.0)
        assert message is not None
        subscription.ack(message)
        subscription.close()


def test_tls_refuses_a_wrong_name_and_an_unknown_authority(rabbitmq: RabbitMQ, vhost: str) -> None:
    wrong_name = rabbitmq.tls_url(vhost, host="127.0.0.1")
    with (
        opened(wrong_name, tls_ca_file=rabbitmq.ca_file) as bus,
        pytest.raises(BusDenied, match="not trusted"),
    ):
        ListFeed(records(1)).publish(bus)
    with opened(rabbitmq.tls_url(vhost)) as bus, pytest.raises(BusDenied, match=r"bus\.tls\.ca_file"):
        ListFeed(records(1)).publish(bus)
    named = {"tls_ca_file": rabbitmq.ca_file, "tls_server_name": "localhost"}
    bind(rabbitmq.url(vhost), "all")
    with opened(wrong_name, **named) as bus:
        assert ListFeed(records(1)).publish(bus) == [Confirmed()]


def test_a_client_certificate_is_an_identity(rabbitmq: RabbitMQ, vhost: str) -> None:
    rabbitmq.user("agent-9", vhost, configure=".*", write=".*", read=".*")
    certificate = rabbitmq.client_certificate("agent-9")
    options = {
        "auth": "external",
        "tls_ca_file": rabbitmq.ca_file,
        "tls_cert_file": certificate.certfile,
        "tls_key_file": certificate.keyfile,
    }
    with opened(rabbitmq.tls_url(vhost), username="agent-9", **options) as bus:
        subscription = bus.consume("who")
        assert subscription.receive(0.2) is None
        assert ListFeed(records(1)).publish(bus) == [Confirmed()]
        message = subscription.receive(5.0)
        subscription.close()
    assert message is not None
    assert message.user_id == "agent-9"
    with opened(rabbitmq.tls_url(vhost), username="another-name", **options) as bus:
        (outcome,) = ListFeed(records(1)).publish(bus)
        assert isinstance(outcome, Deferred)
        assert "bus.username" in str(outcome.error)


def test_plaintext_beyond_loopback_is_told_once_and_shown(
    rabbitmq: RabbitMQ, vhost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from virtbus.bus.amqp import connection as amqp_link

    monkeypatch.setattr(amqp_link, "is_loopback", lambda host: False)
    told: list[object] = []
    monkeypatch.setattr(amqp_link, "emit", told.append)
    bind(rabbitmq.url(vhost), "all")
    with opened(rabbitmq.url(vhost)) as bus:
        for _ in range(2):
            assert ListFeed(records(1)).publish(bus) == [Confirmed()]
            amqp_kit.close_connections(rabbitmq, vhost)
            wait_until(lambda: bus.tick() or bus._publisher is None, what="the loss")
        assert ListFeed(records(1)).publish(bus) == [Confirmed()]
    warnings = [one for one in told if isinstance(one, amqp_link.InsecureTransport)]
    assert len(warnings) == 1
    assert "guest" not in repr(warnings)


# ------------------------------------------------------------------------------------- faults under load


def test_a_broker_restart_loses_nothing_and_keeps_order(rabbitmq_alone: RabbitMQ) -> None:
    result = amqp_kit.restart(rabbitmq_alone, runs=1, events=3000)
    assert result.lost == 0
    assert result.out_of_order == 0
    assert result.duplicates <= 256


def test_a_killed_broker_loses_nothing_that_it_confirmed(rabbitmq_alone: RabbitMQ) -> None:
    result = amqp_kit.restart(rabbitmq_alone, runs=1, events=3000, kill=True)
    assert result.lost == 0
    assert result.out_of_order == 0


def test_a_black_hole_is_found_and_the_backlog_drains(rabbitmq: RabbitMQ, vhost: str) -> None:
    result = amqp_kit.black_hole(rabbitmq, vhost, seconds=4.0, heartbeat=1, backlog=3000)
    assert result.lost == 0
    assert result.out_of_order == 0


def test_a_memory_alarm_stops_publishing_without_a_new_connection(rabbitmq_alone: RabbitMQ) -> None:
    result = amqp_kit.alarm(rabbitmq_alone, seconds=6.0)
    assert result.reconnects <= 1
    assert result.lost == 0


@pytest.mark.parametrize("fault", ["cut", "half_close client", "half_close target", "throttle", "delay"])
def test_a_bad_network_loses_nothing_and_keeps_order(rabbitmq: RabbitMQ, vhost: str, fault: str) -> None:
    bind(rabbitmq.url(vhost), "all")
    items = records(1500, keys=50)
    with TcpFaultProxy("127.0.0.1", rabbitmq.port) as proxy:
        url = f"amqp://guest:guest@{proxy.host}:{proxy.port}/{vhost}"
        with opened(url, heartbeat=1, confirm_timeout=10.0) as bus:
            feed = ListFeed(items)

            def disturb() -> None:
                for _ in range(4):
                    time.sleep(0.15)
                    name, _, towards = fault.partition(" ")
                    if name == "throttle":
                        proxy.throttle(400_000)
                    elif name == "delay":
                        proxy.delay(0.02)
                    else:
                        getattr(proxy, name)(*([towards] if towards else []))

            thread = threading.Thread(target=disturb)
            thread.start()
            assert feed.drain(bus, timeout=60.0) == 1500
            thread.join()
    stored = amqp_kit.drain_queue(rabbitmq.url(vhost), "all")
    amqp_kit.check(items, stored).assert_nothing_lost_and_ordered()


# ------------------------------------------------------------------------------------- the consumer


def test_a_slow_consumer_keeps_its_connection_while_it_works(rabbitmq: RabbitMQ, vhost: str) -> None:
    with opened(rabbitmq.url(vhost), heartbeat=1) as bus:
        subscription = bus.consume("slow")
        assert subscription.receive(0.2) is None
        ListFeed(records(2)).publish(bus)
        before = METRICS.bus_reconnects._value.get()
        first = subscription.receive(5.0)
        assert first is not None
        time.sleep(4.0)  # the broker gives up on a silent peer after two to three heartbeats
        subscription.ack(first)
        second = subscription.receive(5.0)
        assert second is not None
        assert not second.redelivered
        subscription.ack(second)
        subscription.close()
        assert METRICS.bus_reconnects._value.get() == before


def test_a_consumer_reconnects_for_ever_and_gets_again_what_it_had_not_acknowledged(
    rabbitmq: RabbitMQ, vhost: str
) -> None:
    items = records(3)
    with opened(rabbitmq.url(vhost)) as bus:
        subscription = bus.consume("again", prefetch=1)
        assert subscription.receive(0.2) is None
        ListFeed(items).publish(bus)
        first = subscription.receive(5.0)
        assert first is not None
        amqp_kit.close_connections(rabbitmq, vhost)
        subscription.ack(first)  # of a connection that is gone: it comes again
        got, wanted = [], [item.id for item in items]
        while got[-3:] != wanted:  # what had come before the loss was noticed may be in front
            message = subscription.receive(10.0)
            assert message is not None, got
            subscription.ack(message)
            got.append(str(message.headers["ce-id"]))
        subscription.close()


def test_only_one_member_of_a_group_is_active_and_another_takes_over(rabbitmq: RabbitMQ, vhost: str) -> None:
    with opened(rabbitmq.url(vhost)) as bus:
        first, second = bus.consume("solo"), bus.consume("solo")
        assert first.receive(0.2) is None
        assert second.receive(0.2) is None
        ListFeed(records(4)).publish(bus)
        one = first.receive(5.0)
        assert one is not None
        first.ack(one)
        assert second.receive(0.5) is None
        first.close()
        two = second.receive(5.0)
        assert two is not None
        assert two.headers["ce-sequence"] == "000000000002"
        second.close()


def test_a_consumer_whose_queue_is_deleted_makes_it_again(rabbitmq: RabbitMQ, vhost: str) -> None:
    with opened(rabbitmq.url(vhost)) as bus:
        subscription = bus.consume("deleted")
        assert subscription.receive(0.2) is None
        with kombu.Connection(rabbitmq.url(vhost)) as connection:
            connection.channel().queue_delete("virtbus.deleted")
        assert subscription.receive(1.0) is None
        assert ListFeed(records(1)).publish(bus) == [Confirmed()]
        assert subscription.receive(5.0) is not None
        subscription.close()


def test_a_consumer_without_rights_is_denied_with_what_to_do(rabbitmq: RabbitMQ, vhost: str) -> None:
    bind(rabbitmq.url(vhost), "all")
    url = rabbitmq.user("nobody", vhost, read=".*")
    with opened(url) as bus:
        subscription = bus.consume("mine")
        with pytest.raises(BusDenied, match=r"virtbus\.mine"):
            subscription.receive(2.0)
        subscription.close()


def test_a_queue_made_by_the_operator_is_used_as_it_is(rabbitmq: RabbitMQ, vhost: str) -> None:
    url = rabbitmq.url(vhost)
    bind(url, "virtbus.own", **{"x-max-length": 1000})
    bind(url, "virtbus.own.dead", "none")
    with opened(url) as bus:
        subscription = bus.consume("own")
        assert subscription.receive(0.3) is None
        ListFeed(records(1)).publish(bus)
        assert subscription.receive(5.0) is not None
        subscription.close()


@pytest.mark.parametrize("declare", [True, False])
def test_a_stream_as_a_groups_queue_is_refused_with_what_to_do(
    rabbitmq: RabbitMQ, vhost: str, declare: bool
) -> None:
    url = rabbitmq.url(vhost)
    bind(url, "virtbus.g", **{"x-queue-type": "stream"})
    bind(url, "virtbus.g.dead", "#", **{"x-queue-type": "stream"})
    with opened(url, declare=declare) as bus:
        with closing(bus.consume("g")) as subscription:
            told = r"virtbus\.g is a stream.* replace it by a quorum queue"
            with pytest.raises(BusDenied, match=told):
                subscription.receive(10)
        assert ListFeed(records(1)).publish(bus) == [Confirmed()]
        letters = bus.dead_letters("g")
        wait_until(lambda: letters.count() == 1)
        with pytest.raises(BusDenied, match=r"reading dead letters of virtbus\.g: the queue is a stream"):
            list(letters.read())
        letters.close()


def test_a_dead_letter_whose_queue_is_gone_is_not_lost(rabbitmq: RabbitMQ, vhost: str) -> None:
    item = records(1)[0]
    with opened(rabbitmq.url(vhost)) as bus:
        subscription = bus.consume("gone")
        assert subscription.receive(0.2) is None
        ListFeed([item]).publish(bus)
        message = subscription.receive(5.0)
        assert message is not None
        with kombu.Connection(rabbitmq.url(vhost)) as connection:
            connection.channel().queue_delete("virtbus.gone.dead")
        subscription.dead_letter(message, "unreadable")
        assert subscription.receive(0.3) is None
        subscription.close()
        with bus.dead_letters("gone") as letters:
            assert [letter.id for letter in letters.read()] == [item.id]


# ------------------------------------------------------------------------------------- URLs


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("amqp://", "no usable host"),
        ("amqp://host:99999/", 'has port "99999"'),
        ("amqp://host:port/", 'has port "port"'),
        ("amqp://user:pa?ss@host/", "percent-encoded"),
        ("amqp://one;two", "whole URL"),
        ("amqp://host/?heartbeat=3", "query"),
    ],
)
def test_a_url_that_cannot_be_used_is_named_without_its_secrets(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        AmqpBus(url, options=BusOptions())
    assert "pa?ss" not in str(caught.value)


def test_urls_are_read_as_operators_write_them() -> None:
    from virtbus.bus.amqp.connection import endpoints

    text = "amqps://us%40er:p%3Bw@rabbit-1:5673/%2Fprod;amqp://[::1], amqp://host//"
    first, second, third = endpoints(text, BusOptions())
    assert (first.host, first.port, first.vhost, first.username, first.password, first.tls) == (
        "rabbit-1", 5673, "/prod", "us@er", "p;w", True,
    )  # fmt: skip
    assert (second.host, second.port, second.vhost, second.username) == ("::1", 5672, "/", "guest")
    assert third.vhost == "/"
    assert first.name == "amqps://rabbit-1:5673//prod"
    assert "p;w" not in repr(first)
