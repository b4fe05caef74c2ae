"""Why there is a transport of our own: the same broker failure beside kombu's stock Kafka transport."""

from __future__ import annotations

import json

import kombu

from tests.kafka.cluster import Cluster
from tests.kafka.help import opened, read
from virtbus.model import Deferred
from virtbus.testing import ListFeed, a_record


def stock(cluster: Cluster, topic: str) -> kombu.Connection:
    host, _, port = cluster.hosts().partition(":")
    options = {"kafka_producer_config": {"message.timeout.ms": 1000, "log_level": 0}}
    return kombu.Connection(f"confluentkafka://{host}:{port}//", transport_options=options)


def test_when_the_broker_dies_the_stock_transport_reports_success_and_loses_the_message(
    own_kafka: Cluster, kafka_topic: str
) -> None:
    theirs, ours = f"{kafka_topic}.stock", f"{kafka_topic}.ours"
    item = a_record()
    feed = ListFeed([item])
    connection = stock(own_kafka, theirs)
    channel = connection.channel()
    producer = kombu.Producer(channel, auto_declare=False)
    with opened(own_kafka.url, ours, confirm_timeout=1.0) as bus:
        assert ListFeed([a_record(row=9)]).drain(bus) == 1
        producer.publish(b"before", exchange="", routing_key=theirs, content_type="text/plain")
        own_kafka.kill(own_kafka.brokers[0])

        producer.publish(b"lost", exchange="", routing_key=theirs, content_type="text/plain")  # no error
        (outcome,) = feed.publish(bus, again=True)
        assert isinstance(outcome, Deferred)

        own_kafka.restart(own_kafka.brokers[0])
        assert feed.drain(bus) == 1
    connection.release()
    bodies = [json.loads(message.value())["body"] for message in read(own_kafka.url, theirs, 2, seconds=5)]
    assert bodies == ["YmVmb3Jl"], "base64 of 'before', and nothing else"
    assert len(read(own_kafka.url, ours, 2)) == 2


def test_the_stock_transport_wraps_the_body_and_drops_key_and_headers(
    kafka_cluster: Cluster, kafka_topic: str
) -> None:
    with stock(kafka_cluster, kafka_topic) as connection:
        producer = kombu.Producer(connection.channel(), auto_declare=False)
        producer.publish(
            b'{"a":1}',
            exchange="",
            routing_key=kafka_topic,
            headers={"ce_id": "1"},
            content_type="application/json",
            content_encoding="binary",
        )
    (message,) = read(kafka_cluster.url, kafka_topic, 1)
    assert message.key() is None
    assert message.headers() is None
    assert message.value() != b'{"a":1}'
    assert json.loads(message.value())["properties"]["body_encoding"] == "base64"
