"""Fixtures for every folder of tests: real parts, each of its own, each ended whatever happens.

A test that needs a part which this machine lacks is skipped with the words for what is missing; with
VIRTBUS_CI=1 (set by .ci/run) it fails instead, because there nothing may be missing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import pytest

from tests.lab import lab as lab_module
from tests.lab.lab import Lab

# A test that uses a fixture of the left bears the marker of the right.
MARKERS = {"lab": "lab", "rabbitmq": "rabbitmq", "amqp_url": "rabbitmq"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for fixture in getattr(item, "fixturenames", ()):
            if fixture in MARKERS:
                item.add_marker(MARKERS[fixture])


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
