"""The scheduler of the docs, as it stands there, places guests by what a bus tells."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import pytest

from tests.integrations.parts import eventually, heartbeat, publish

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "scheduler.py"


@pytest.fixture
def scheduler_class():
    spec = importlib.util.spec_from_file_location("scheduler_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Scheduler


def test_it_has_about_forty_lines():
    code = EXAMPLE.read_text().partition('"""\n\n')[2]
    assert len([line for line in code.splitlines() if line.strip()]) <= 40


def test_guests_go_to_well_hosts_and_are_spread(scheduler_class, tmp_path):
    url = f"embedded://{tmp_path}/bus.db"
    publish(url, heartbeat("warm-up"))  # the file is there
    scheduler = scheduler_class(url)
    with pytest.raises(RuntimeError, match="no host is heard"):
        scheduler.place("web-0")
    agents = [f"00000000-0000-4000-8000-00000000000{number}" for number in range(3)]
    told = [
        heartbeat(f"compute-{number}", guests=3 if number == 1 else 0, agent=agent)
        for number, agent in enumerate(agents)
    ]
    deadline = time.monotonic() + 20
    while len(scheduler.fleet) < 3 and time.monotonic() < deadline:
        publish(url, *told)
        time.sleep(0.3)
    eventually(lambda: len(scheduler.fleet) == 3, "three hosts heard")
    placed = [scheduler.place(f"web-{number}") for number in range(4)]
    assert sorted(placed) == ["compute-0", "compute-0", "compute-2", "compute-2"]
    scheduler.consumer.stop()
    time.sleep(1.2)
    scheduler.consumer.close()
