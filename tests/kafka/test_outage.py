"""Brokers killed under load, in short; tests/faults has the long runs."""

from __future__ import annotations

import pytest

from tests.faults.kafka_restarts import restarts
from tests.kafka.cluster import Cluster


@pytest.mark.slow
def test_a_broker_killed_and_restarted_under_load_loses_nothing_and_keeps_order(own_kafka: Cluster) -> None:
    account = restarts(own_kafka, 2)
    assert account.sent > 200
    assert (account.lost, account.disordered) == (0, 0)
