"""A fixture for every folder of tests: a real Kubernetes API server."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chart import apiserver
from tests.chart.apiserver import ApiServer


@pytest.fixture(scope="session")
def kube_apiserver() -> Iterator[ApiServer]:
    """A server for this process's tests: use a namespace of your own. Skips where it was not built."""
    from tests.conftest import need

    need(apiserver.missing())
    folder = Path(tempfile.mkdtemp(dir=os.environ["VIRTBUS_TEST_RUN"], prefix="kube-"))
    with ApiServer(folder) as server:
        yield server
