"""A group never goes deaf: what was deleted under it is noticed without traffic, made again, and told."""

from __future__ import annotations

import pytest

from tests.brokers.rabbitmq import RabbitMQ
from tests.faults.consumer_kit import DEAFENING, deafened

pytestmark = [pytest.mark.slow, pytest.mark.rabbitmq]


@pytest.mark.parametrize("what", DEAFENING)
def test_a_group_hears_again_and_names_what_it_missed(what: str, rabbitmq: RabbitMQ) -> None:
    found = deafened(rabbitmq, what)
    assert found.after > 0
    assert found.after_lost == 0
    assert found.named == found.before_lost
