"""What the agent's tests share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.agent.test_agent import House
from virtbus.errors import SourceDenied


@pytest.fixture
def house(tmp_path: Path) -> Iterator[Any]:
    made: list[House] = []

    def make(*script: Any, **more: Any) -> House:
        made.append(House(tmp_path / "state", script, **more))
        return made[-1].start()

    yield make
    for one in made:
        one.agent.abort()
        with suppress(SourceDenied):
            one.agent.join()
