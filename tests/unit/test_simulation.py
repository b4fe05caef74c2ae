"""A few plans of the simulation, and those that found something once; `make sim` plays many."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.sim import disk, mutants
from tests.sim.__main__ import page
from tests.sim.plan import Plan, draw
from tests.sim.world import World

# A process of the simulation that is killed closes nothing, as a real one; Python 3.13 complains of that.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning")

KEPT = sorted((Path(__file__).parents[1] / "sim" / "regressions").glob("*.json"))


@pytest.fixture(autouse=True)
def nothing_is_left_to_later_tests() -> Iterator[None]:
    """What was killed in a world goes with it."""
    yield
    gc.collect()


@pytest.mark.parametrize("seed", [1, 3, 19, 40])
def test_no_promise_is_broken(seed: int) -> None:
    world = World(seed)
    tally = world.run()
    assert tally.violations == [], "\n".join(page(world, tally))
    assert tally.errors > 0
    assert tally.events > 0


@pytest.mark.parametrize("kept", KEPT, ids=lambda path: path.stem)
def test_what_was_found_once_stays_found(kept: Path) -> None:
    world = World(Plan.parse(kept.read_text(encoding="utf-8")))
    tally = world.run()
    assert tally.violations == [], "\n".join(page(world, tally))
    assert tally.faults or tally.errors


def test_a_seed_repeats_exactly() -> None:
    first, second = World(1), World(1)
    first.run()
    second.run()
    assert first.page() == second.page()


def locks_open() -> int:
    names = [one.readlink().name for one in Path("/proc/self/fd").iterdir() if one.is_symlink()]
    return sum(name.startswith(("lock", "plane.lock")) for name in names)


def test_a_killed_process_leaves_no_lock_file_open() -> None:
    before = locks_open()
    assert World(6).run().faults > 0
    assert locks_open() <= before


def test_a_plan_is_kept_as_it_was_drawn() -> None:
    plan = draw(8)
    assert Plan.parse(plan.text()) == plan


@pytest.mark.parametrize("name", mutants.MUTANTS)
def test_a_mutant_still_finds_what_it_changes(name: str) -> None:
    assert mutants.changed(name)


def test_a_power_cut_loses_what_was_not_synced(tmp_path: Path) -> None:
    import random
    import sqlite3

    for sync, left in (("FULL", 50), ("OFF", 0)):
        path = tmp_path / f"{sync}.db"
        with disk.watched() as journal:
            database = sqlite3.connect(path, isolation_level=None)
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("CREATE TABLE t (a)")
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            database.execute(f"PRAGMA synchronous = {sync}")
            for number in range(50):
                database.execute("INSERT INTO t VALUES (?)", [number])
            for name in (path.name, f"{path.name}-wal"):
                content = journal.after_power_cut(tmp_path / name, "nothing", random.Random(1))
                (tmp_path / f"after-{name}").write_bytes(content)
            database.close()
        with closing(sqlite3.connect(tmp_path / f"after-{path.name}")) as after:
            (count,) = after.execute("SELECT count(*) FROM t").fetchone()
        assert count == left
