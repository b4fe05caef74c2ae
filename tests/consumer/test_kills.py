"""A consumer is killed at random under load: each effect at least once, in order, and no more."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sqlite3
from collections import defaultdict
from contextlib import closing
from pathlib import Path

import pytest

from tests.consumer import victim
from tests.waiting import wait_until
from virtbus.bus import BusOptions, open_bus
from virtbus.consumer import Consumer
from virtbus.testing import ListFeed, records

KILLS = int(os.environ.get("VIRTBUS_TEST_CONSUMER_KILLS", "12"))
EVENTS_A_KILL = 60
KEYS = 20
PREFETCH = 50

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture
def bus(request):
    if request.param == "amqp":
        return request.getfixturevalue("amqp_url"), "unused"
    if request.param == "kafka":
        return request.getfixturevalue("kafka_url"), request.getfixturevalue("kafka_topic")
    return f"embedded://{request.getfixturevalue('tmp_path')}/bus.db", "unused"


def lines_of(effects: Path) -> int:
    return effects.read_bytes().count(b"\n")


def new_marks(dedupe: Path, after: int) -> list[str]:
    """The ids whose effect is remembered on disk, but for the first `after`."""
    with closing(sqlite3.connect(dedupe)) as database:
        rows = database.execute("SELECT id FROM seen ORDER BY number LIMIT -1 OFFSET ?", [after])
        return [id_ for (id_,) in rows]


@pytest.mark.parametrize("bus", ["amqp", "kafka", "embedded"], indirect=True)
def test_every_effect_happens_and_only_what_was_in_flight_at_a_kill_happens_again(bus, tmp_path: Path):
    url, topic = bus
    chance = random.Random(7)
    spawn = multiprocessing.get_context("forkserver")
    spawn.set_forkserver_preload(
        ["tests.consumer.victim", "virtbus.bus.amqp.subscription", "virtbus.bus.embedded"]
    )
    effects, dedupe = tmp_path / "effects", tmp_path / "seen.db"
    options = BusOptions(topic=topic)
    with Consumer(url, group="victims", options=options) as first:
        first.receive(0.5)  # the group is there before the first event
    publisher = open_bus(url, options)
    published: list[str] = []
    marked: dict[str, int] = {}  # id → after which kill its mark was on disk
    everything = records(EVENTS_A_KILL * KILLS, keys=KEYS)

    def run(number: int, limit: float | None):
        ready = spawn.Event()
        process = spawn.Process(
            target=victim.consume, args=(url, topic, str(dedupe), str(effects), number, limit, ready)
        )
        process.start()
        return process, ready

    for number in range(KILLS):
        # Each life gets somewhere: what has been delivered nine times comes one at a time, and no longer in
        # order where a consumer dies again.
        enough = (lines_of(effects) if number else 0) + chance.randint(5, EVENTS_A_KILL - 1)
        process, ready = run(number, None)
        batch = everything[number * EVENTS_A_KILL : (number + 1) * EVENTS_A_KILL]
        ListFeed(batch).drain(publisher, timeout=60)
        published += [record.id for record in batch]
        assert ready.wait(60), f"no delivery after kill {number}"
        wait_until(lambda: lines_of(effects) >= enough, timeout=60)  # noqa: B023
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        marked |= dict.fromkeys(new_marks(dedupe, len(marked)), number)
    process, _ = run(KILLS, 15.0)
    process.join(300)
    assert process.exitcode == 0
    publisher.close()

    lines = [line.split() for line in effects.read_text().splitlines()]
    runs = defaultdict(list)  # id → in which runs it had its effect
    order = defaultdict(list)  # (run, key) → sequences
    firsts = defaultdict(list)  # key → sequences of first effects
    for number, key, sequence, id_ in lines:
        if id_ not in runs:
            firsts[key].append(int(sequence))
        runs[id_].append(int(number))
        order[(number, key)].append(int(sequence))
    assert set(runs) == set(published), "every event had its effect"
    assert all(sequences == sorted(sequences) for sequences in firsts.values())
    assert all(sequences == sorted(sequences) for sequences in order.values())
    again = {id_: found for id_, found in runs.items() if len(found) > 1}
    assert all(len(set(found)) == len(found) for found in again.values()), "never twice in one life"
    repeats = sum(len(found) - 1 for found in again.values())
    assert repeats <= KILLS * PREFETCH
    for id_, found in again.items():  # only what had no mark yet: what was in flight at the kill
        assert all(number <= marked.get(id_, KILLS) for number in found), (id_, found, marked.get(id_))
    with Consumer(url, group="victims", options=options, dedupe=dedupe) as last:
        assert last.receive(2.0) is None, "nothing goes round"
    print(f"{url.partition(':')[0]}: {len(published)} events, {KILLS} kills, {repeats} repeats")
