"""A unit test needs nothing but the virtual environment: no root, no broker, no network."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from virtbus import loading

NEAR = ("127.", "::1", "localhost")
OF_THE_TESTS = ("VIRTBUS_CI", "VIRTBUS_TEST_")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that reaches for another machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(NEAR):
            raise AssertionError(f"a unit test may not use the network, and this one connects to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def no_settings_of_this_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What an installed agent or a developer's shell sets here is none of a test's business."""
    monkeypatch.setattr(loading, "DEFAULT_FILE", tmp_path / "etc" / "virtbus.toml")
    for name in list(os.environ):
        if name.startswith(loading.ENVIRONMENT_PREFIX) and not name.startswith(OF_THE_TESTS):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def no_real_part(request: pytest.FixtureRequest) -> None:
    """Fail a test that asks for a broker, a cluster or a guest."""
    for name in ("lab", "rabbitmq", "kafka"):
        assert request.node.get_closest_marker(name) is None, f"{name} is a real part: not a unit test"
