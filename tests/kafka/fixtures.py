"""Fixtures for a real Apache Kafka: one broker a test session, a topic of its own a test."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kafka.cluster import Cluster, KafkaMissing

_numbers = itertools.count(1)


def _need(missing: KafkaMissing) -> None:
    """Skip aloud; in CI nothing may be missing, so fail."""
    if os.environ.get("VIRTBUS_CI") == "1":
        pytest.fail(f"this machine lacks what a real Kafka needs: {missing}")
    pytest.skip(f"this machine lacks what a real Kafka needs: {missing}")


def made(folder: Path, settings: dict[str, str] | None = None) -> Cluster:
    """One broker, not started yet."""
    try:
        return Cluster(folder, settings=settings)
    except KafkaMissing as missing:
        _need(missing)
        raise


@pytest.fixture(scope="session")
def kafka_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One Kafka broker for the session; tests must not kill it."""
    cluster = made(tmp_path_factory.mktemp("kafka") / "cluster")
    try:
        yield cluster.start()
    finally:
        cluster.stop()


@pytest.fixture
def own_kafka(tmp_path: Path) -> Iterator[Cluster]:
    """One Kafka broker for this test alone, which may kill and restart it."""
    cluster = made(tmp_path / "cluster")
    try:
        yield cluster.start()
    finally:
        cluster.stop()


@pytest.fixture
def kafka_topic() -> str:
    """A topic name that no other test uses; it does not exist yet."""
    return f"virtbus.test.{os.getpid()}.{next(_numbers)}"


@pytest.fixture
def kafka_url(kafka_cluster: Cluster) -> str:
    """The session's Kafka as a bus URL."""
    return kafka_cluster.url
