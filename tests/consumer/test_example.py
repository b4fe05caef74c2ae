"""The scheduler of docs/examples/acting.py, killed at random under load: every effect happens."""

from __future__ import annotations

import dataclasses
import os
import random
import runpy
import sqlite3
import subprocess
import sys
import time
import uuid
from contextlib import closing
from pathlib import Path

import pytest

from tests.faultkit import wait_until
from virtbus.bus import BusOptions, open_bus
from virtbus.consumer import Consumer
from virtbus.testing import ListFeed, a_record, an_io_error

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "acting.py"
KILLS = int(os.environ.get("VIRTBUS_TEST_CONSUMER_KILLS", "5"))
EACH = 10


def incidents(state: Path) -> set[str]:
    if not state.exists():
        return set()
    with closing(sqlite3.connect(state)) as database:
        return {one for (one,) in database.execute("SELECT incident FROM hold")}


def test_the_example_is_as_short_as_it_says_and_runs() -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 65
    assert callable(runpy.run_path(str(EXAMPLE))["main"])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["amqp", "kafka"])
def test_a_scheduler_by_the_docs_survives_kills(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    url, topic = request.getfixturevalue(f"{kind}_url"), "virtbus.events"
    if kind == "kafka":
        topic = request.getfixturevalue("kafka_topic")
    options = BusOptions(topic=topic)
    with Consumer(url, group="acting", options=options) as first:
        first.receive(0.5 if kind == "amqp" else 5.0)
    bus, chance, state = open_bus(url, options), random.Random(3), tmp_path / "state.db"
    wanted: set[str] = set()

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, str(EXAMPLE), url, str(state), topic])

    for number in range(KILLS):
        scheduler = start()
        for one in range(EACH):
            name = str(uuid.UUID(int=number * EACH + one))
            wanted.add(name)
            event = an_io_error(incident=dataclasses.replace(an_io_error().incident, id=name))
            ListFeed([a_record(event, row=number * EACH + one + 1)]).drain(bus)
        time.sleep(chance.uniform(0.3, 1.5))
        scheduler.kill()
        scheduler.wait()
    scheduler = start()
    try:
        wait_until(lambda: incidents(state) >= wanted, timeout=120, what="every effect")
    finally:
        scheduler.terminate()
        assert scheduler.wait(60) == 0
        bus.close()
