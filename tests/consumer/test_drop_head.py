"""A bounded queue that drops its oldest messages: who checks sequences is told which, also over a restart."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.brokers.rabbitmq import RabbitMQ
from virtbus.bus import BusOptions, open_bus
from virtbus.consumer import Consumer, MissingEvents
from virtbus.testing import ListFeed, records


def consumer(url: str, dedupe: Path, told: list[MissingEvents]) -> Consumer:
    return Consumer(
        url, group="g", dedupe=dedupe, check_gaps=True, reorder_seconds=0.5, on_missing=told.append
    )


def take(one: Consumer, count: int) -> list[int]:
    """The sequence numbers of so many events, acknowledged; and time for what is late."""
    found: list[int] = []
    limit = time.monotonic() + 30
    while len(found) < count and time.monotonic() < limit:
        delivery = one.receive(1.0)
        if delivery is not None:
            found.append(int(delivery.attributes["sequence"]))
            delivery.ack()
    while (delivery := one.receive(2.0)) is not None:
        found.append(int(delivery.attributes["sequence"]))
        delivery.ack()
    return found


@pytest.mark.rabbitmq
def test_what_drop_head_drops_is_told_by_number(rabbitmq: RabbitMQ, vhost: str, tmp_path: Path) -> None:
    url = rabbitmq.url(vhost)
    items = records(60)  # one agent, one epoch, one key
    numbers = [int(item.attributes["sequence"]) for item in items]
    told: list[MissingEvents] = []
    bus = open_bus(url, BusOptions())
    with consumer(url, tmp_path / "seen.db", told) as first:
        assert first.receive(0.5) is None
        assert ListFeed(items[:10]).drain(bus) == 10
        assert take(first, 10) == numbers[:10]
    rabbitmq.policy(vhost, "^virtbus", max_length=15, overflow="drop-head")
    assert ListFeed(items[10:]).drain(bus) == 50, "the broker confirms what it drops later"
    bus.close()
    with consumer(url, tmp_path / "seen.db", told) as second:
        got = take(second, 15)
    assert got == numbers[-15:]
    assert [(hole.first, hole.last) for hole in told] == [(numbers[10], numbers[-16])]
