"""Each bus adapter with a real broker behind it: a test that asks for `rig` runs once for every one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract.rigs import AmqpRig, EmbeddedRig, KafkaRig, Rig


@pytest.fixture
def amqp_rig(amqp_url: str) -> AmqpRig:
    return AmqpRig(amqp_url)


@pytest.fixture
def embedded_rig(tmp_path: Path) -> EmbeddedRig:
    return EmbeddedRig(tmp_path)


@pytest.fixture
def kafka_rig(kafka_url: str, kafka_topic: str) -> KafkaRig:
    return KafkaRig(kafka_url, kafka_topic)


@pytest.fixture(
    params=[
        pytest.param("amqp", marks=pytest.mark.rabbitmq),
        "embedded",
        pytest.param("kafka", marks=pytest.mark.kafka),
    ]
)
def rig(request: pytest.FixtureRequest) -> Rig:
    """One broker of each kind, with nothing else on it."""
    adapter: Rig = request.getfixturevalue(f"{request.param}_rig")
    return adapter
