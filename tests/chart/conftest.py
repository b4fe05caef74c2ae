"""Fixtures for tests of the chart: the genuine tools, fetched once and kept in .cache."""

from __future__ import annotations

import pytest

from tests.chart import tools
from tests.conftest import need


@pytest.fixture(scope="session")
def _tools_lacks() -> list[str]:
    return tools.missing()


@pytest.fixture(autouse=True)
def _genuine_tools(_tools_lacks: list[str]) -> None:
    need(_tools_lacks)
