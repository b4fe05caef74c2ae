"""Nothing that was committed is lost when the agent is killed; the long runs are `make faults`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.kills import at_points, at_random


@pytest.mark.slow
def test_a_kill_at_any_named_point_loses_nothing_and_repeats_at_most_a_window(amqp_url: str, tmp_path: Path):
    assert at_points(amqp_url, tmp_path, runs=2)


@pytest.mark.slow
def test_kills_at_random_times_under_load_lose_nothing(amqp_url: str, tmp_path: Path):
    assert at_random(amqp_url, tmp_path, runs=5)
