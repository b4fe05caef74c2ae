"""The simulation's models of brokers say to one script what the real brokers say."""

from __future__ import annotations

import pytest

from tests.contract.rigs import Rig
from tests.sim import scripts
from tests.sim.broker import Broker, ModelBus

DOMAINS = (0, 1)  # Kafka's partitions keep them apart, and the model's


def model(kind: str) -> list[str]:
    with scripts.simulated(
        lambda virtual, process: scripts.broker(
            ModelBus(Broker(virtual.scheduler, virtual, kind), process, "script"), domains=DOMAINS
        )
    ) as said:
        return said


def test_a_model_of_a_broker_is_like_its_original(rig: Rig) -> None:
    kind = "kafka" if rig.name == "kafka" else "amqp"  # the embedded bus has the manners of a queue
    bus = rig.open()
    try:
        said = scripts.broker(bus, domains=DOMAINS, quiet=rig.quiet)
    finally:
        bus.close()
    assert said == model(kind)


@pytest.mark.parametrize("kind", ["amqp", "kafka"])
def test_the_script_is_played_to_its_end_in_a_model(kind: str) -> None:
    assert len(model(kind)) == 11
