"""Fixtures for every folder of tests: real parts, each of its own, each ended whatever happens.

A test that needs a part which this machine lacks is skipped with the words for what is missing; with
VIRTBUS_CI=1 (set by .ci/run) it fails instead, because there nothing may be missing.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.brokers import rabbitmq as rabbitmq_module
from tests.brokers.rabbitmq import RabbitMQ
from tests.chart.fixtures import kube_apiserver  # noqa: F401
from tests.kafka.fixtures import kafka_cluster, kafka_topic, kafka_url, own_kafka  # noqa: F401
from tests.lab import lab as lab_module
from tests.lab.lab import Lab
from virtbus import telemetry

# A test that uses a fixture of the left bears the marker of the right.
MARKERS = {"lab": "lab", "rabbitmq": "rabbitmq", "rabbitmq_alone": "rabbitmq"}
MARKERS |= {"kafka_cluster": "kafka", "own_kafka": "kafka"}

# Shared by the processes of one run (pytest-xdist's workers inherit the environment).
RUN_FOLDER = "VIRTBUS_TEST_RUN"


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        os.environ[RUN_FOLDER] = tempfile.mkdtemp(prefix="vbrun-", dir="/tmp")  # short, for Unix sockets


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(RUN_FOLDER), ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for fixture in getattr(item, "fixturenames", ()):
            if fixture in MARKERS:
                item.add_marker(MARKERS[fixture])


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """What a test does to the log ends with it, and no line is left out as the repeat of another test's."""
    log = logging.getLogger("virtbus")
    handlers, propagate, level = log.handlers, log.propagate, log.level
    telemetry._limiter._seen.clear()
    yield
    log.handlers, log.propagate = handlers, propagate
    log.setLevel(level)


def need(lacks: Sequence[str]) -> None:
    """Skip the test, or fail it in CI, when `lacks` names something; it goes into the message."""
    if lacks:
        message = "this machine lacks " + "; ".join(lacks)
        if os.environ.get("VIRTBUS_CI") == "1":
            pytest.fail(message)
        pytest.skip(message)


@pytest.fixture(scope="session")
def lab_lacks() -> list[str]:
    """What keeps this machine from running a lab."""
    return lab_module.missing()


@pytest.fixture
def lab(lab_lacks: list[str]) -> Iterator[Lab]:
    """A private libvirtd for this test alone, without guests."""
    need(lab_lacks)
    with Lab() as one:
        yield one


@pytest.fixture(scope="session")
def rabbitmq_node() -> Iterator[RabbitMQ]:
    """The node that all workers of this run share. Tests ask for `rabbitmq`, which makes sure of it."""
    need(rabbitmq_module.missing())
    broker = RabbitMQ.shared(Path(os.environ[RUN_FOLDER]) / "rabbitmq")
    yield broker
    broker.close()


@pytest.fixture
def rabbitmq(rabbitmq_node: RabbitMQ) -> RabbitMQ:
    """A real RabbitMQ node. Others use it at the same time: stay in a virtual host, and let it live."""
    return rabbitmq_node


@pytest.fixture(scope="session")
def rabbitmq_node_alone(request: pytest.FixtureRequest) -> Iterator[RabbitMQ]:
    """A node that no other process of this run uses."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None:
        yield request.getfixturevalue("rabbitmq_node")
        return
    need(rabbitmq_module.missing())
    broker = RabbitMQ.shared(Path(os.environ[RUN_FOLDER]) / f"rabbitmq-{worker}")
    yield broker
    broker.close()


@pytest.fixture
def rabbitmq_alone(rabbitmq_node_alone: RabbitMQ) -> Iterator[RabbitMQ]:
    """A real RabbitMQ node that the test may kill, restart and alarm: it is made well again afterwards."""
    yield rabbitmq_node_alone
    if not rabbitmq_node_alone.running():
        rabbitmq_node_alone.start()
    rabbitmq_node_alone.set_memory_alarm(False)


@pytest.fixture
def vhost(rabbitmq: RabbitMQ) -> Iterator[str]:
    """A virtual host of the shared node for this test alone."""
    name = rabbitmq.vhost()
    yield name
    rabbitmq.drop_vhost(name)


@pytest.fixture
def amqp_url(rabbitmq: RabbitMQ, vhost: str) -> str:
    """An amqp:// URL of a virtual host for this test alone, as a user with all permissions."""
    return rabbitmq.url(vhost)
