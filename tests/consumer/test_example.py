"""The scheduler of docs/examples/acting.py, killed at random under load: what it does, it does once."""

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
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from tests.waiting import wait_until
from virtbus.bus import BusOptions, open_bus
from virtbus.consumer import Consumer
from virtbus.testing import ListFeed, a_record, an_io_error

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "acting.py"
KILLS = int(os.environ.get("VIRTBUS_TEST_SCHEDULER_KILLS", "5"))
EACH = 10


class State:
    """The scheduler's own database, which a trigger makes remember how often each effect happened."""

    def __init__(self, path: Path) -> None:
        self.path, self.marks = path, Path(f"{path}.seen")
        with closing(sqlite3.connect(path)) as database:
            database.executescript(
                "CREATE TABLE hold (incident TEXT PRIMARY KEY, host TEXT NOT NULL);"
                "CREATE TABLE effect (incident TEXT NOT NULL);"
                "CREATE TRIGGER noted AFTER INSERT ON hold BEGIN "
                "INSERT INTO effect VALUES (new.incident); END;"
            )

    def effects(self) -> Counter[str]:
        with closing(sqlite3.connect(self.path)) as database:
            return Counter(one for (one,) in database.execute("SELECT incident FROM effect"))

    def marked(self) -> set[str]:
        """The ids of the events whose mark is on disk."""
        with closing(sqlite3.connect(self.marks)) as database:
            return {one for (one,) in database.execute("SELECT id FROM seen")}


def test_the_example_is_as_short_as_it_says_and_runs() -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 60
    assert callable(runpy.run_path(str(EXAMPLE))["main"])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["amqp", "kafka"])
def test_a_scheduler_by_the_docs_repeats_only_what_was_in_flight_at_a_kill(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    url, topic = request.getfixturevalue(f"{kind}_url"), "virtbus.events"
    if kind == "kafka":
        topic = request.getfixturevalue("kafka_topic")
    options = BusOptions(topic=topic)
    with Consumer(url, group="acting", options=options) as first:
        first.receive(0.5 if kind == "amqp" else 5.0)
    bus, chance, state = open_bus(url, options), random.Random(3), State(tmp_path / "state.db")
    (tmp_path / "bus-url").write_text(url)
    ids: dict[str, str] = {}  # incident → its event's id
    unmarked: set[str] = set()  # effects without a mark on disk when the last process was gone
    in_flight = 0  # how many, over all kills

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, str(EXAMPLE), str(tmp_path / "bus-url"), str(state.path), topic]
        )

    def publish(row: int) -> None:
        incident = dataclasses.replace(an_io_error().incident, id=str(uuid.UUID(int=row)))
        record = a_record(an_io_error(incident=incident), row=row)
        ids[incident.id] = record.id
        ListFeed([record]).drain(bus)

    for number in range(KILLS):
        before = state.effects()
        scheduler = start()
        for one in range(EACH):
            publish(number * EACH + one + 1)
        wait_until(lambda: state.effects() != before, timeout=60, what="an effect of this life")  # noqa: B023
        time.sleep(chance.uniform(0.0, 0.2))
        scheduler.kill()
        scheduler.wait()
        now, marked = state.effects(), state.marked()
        for incident_id, times in (now - before).items():
            had = before[incident_id]
            assert times == 1, f"{incident_id} had its effect {times} times in one life"
            assert not had or incident_id in unmarked, f"{incident_id} was marked, and had its effect again"
        unmarked = {incident for incident in now if ids[incident] not in marked}
        assert len(unmarked) <= 1, f"effect first, ack after, one at a time: {unmarked}"
        in_flight += len(unmarked)
    scheduler = start()
    publish(KILLS * EACH + 1)  # its effect shows that this process runs: only then does it take SIGTERM
    try:
        wait_until(lambda: state.effects().keys() >= ids.keys(), timeout=120, what="every effect")
        wait_until(lambda: state.marked() >= set(ids.values()), timeout=60, what="every mark")
    finally:
        scheduler.terminate()
        assert scheduler.wait(60) == 0
        bus.close()
    repeats = state.effects().total() - len(ids)
    assert repeats <= in_flight
    print(f"scheduler_kills[{kind}] kills={KILLS} effects={len(ids)} in_flight={in_flight} repeats={repeats}")
