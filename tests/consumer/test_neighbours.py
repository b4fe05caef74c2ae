"""One bad message costs nothing but itself: the good ones beside it are handed out, none is condemned."""

from __future__ import annotations

import pytest

from tests.brokers.rabbitmq import RabbitMQ
from tests.faults.consumer_kit import POISONS, beside_killer, beside_poison

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", POISONS)
def test_good_events_are_handed_out_beside_a_message_that_can_not_be_put_aside(
    name: str, rabbitmq_alone: RabbitMQ
) -> None:
    found = beside_poison(rabbitmq_alone, name)
    assert (found.handed_out, found.in_dead) == (found.sent, 0)


@pytest.mark.parametrize("name", ["dead letters full", "dead letters refused", "memory alarm"])
def test_good_events_are_handed_out_beside_many_that_can_not_be_put_aside(
    name: str, rabbitmq_alone: RabbitMQ
) -> None:
    found = beside_poison(rabbitmq_alone, name, bad=30, seconds=30.0)
    assert (found.handed_out, found.in_dead) == (found.sent, 0)


@pytest.mark.parametrize("limit", [20, None], ids=["a limit of 20", "no limit"])
def test_an_event_that_kills_its_consumer_is_put_aside_and_its_neighbours_are_handed_out(
    limit: int | None, rabbitmq: RabbitMQ
) -> None:
    found = beside_killer(rabbitmq, limit=limit)
    assert (found.handed_out, found.in_dead) == (found.sent, 0)
