"""What is no event of ours goes to the dead letters, also where these can't take it at first."""

from __future__ import annotations

import dataclasses

import kombu
import pytest

from virtbus.bus import BusOptions, open_bus
from virtbus.bus.embedded import EmbeddedSubscription
from virtbus.consumer import Consumer
from virtbus.errors import BusUnavailable
from virtbus.testing import ListFeed, records


def poison_and_events(url: str, count: int) -> list[str]:
    """Publish a message that no schema takes, then `count` events; their ids."""
    first, *events = records(count + 1, keys=count + 1)
    bus = open_bus(url, BusOptions())
    ListFeed([dataclasses.replace(first, body=b"nonsense"), *events]).drain(bus)
    bus.close()
    return [record.id for record in events]


def received(consumer: Consumer, count: int) -> list[str]:
    found = []
    for _ in range(count):
        delivery = consumer.receive(20.0)
        assert delivery is not None
        found.append(delivery.id)
        delivery.ack()
    return found


@pytest.mark.rabbitmq
def test_a_poison_message_whose_dead_letter_queue_is_gone_is_waited_out(amqp_url: str) -> None:
    with Consumer(amqp_url, group="g") as consumer, kombu.Connection(amqp_url) as other:
        assert consumer.receive(0.3) is None
        other.channel().queue_delete("virtbus.g.dead")
        sent = poison_and_events(amqp_url, 2)
        assert received(consumer, 2) == sent
        assert consumer.receive(1.0) is None
        assert other.channel().basic_get("virtbus.g.dead") is not None


def test_a_broker_that_goes_away_at_a_poison_message_is_waited_out(tmp_path, monkeypatch) -> None:
    put_aside, failures = EmbeddedSubscription.dead_letter, [BusUnavailable("gone for a moment")] * 2

    def gone_at_first(self, message, reason):
        if failures:
            self._drop()
            raise failures.pop()
        put_aside(self, message, reason)

    monkeypatch.setattr(EmbeddedSubscription, "dead_letter", gone_at_first)
    url = f"embedded://{tmp_path}/bus.db"
    with Consumer(url, group="g") as consumer:
        assert consumer.receive(0.1) is None
        sent = poison_and_events(url, 2)
        assert received(consumer, 2) == sent
        assert consumer.receive(0.2) is None
    bus = open_bus(url)
    assert len(bus.dead_letters("g")) == 1  # type: ignore[attr-defined]
    bus.close()
