"""Look-ups log a line each at level debug: too much for ten thousand of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from virtbus import telemetry


@pytest.fixture(autouse=True)
def quiet_log() -> Iterator[None]:
    telemetry.configure(level="error")
    yield
    telemetry.configure()


@pytest.fixture(autouse=True)
def quick_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("virtbus.sources.observer.POLL_SECONDS", 0.05)
