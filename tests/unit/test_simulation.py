"""A few seeds of the simulation, and those that found something once; `make sim` plays many."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sim.world import World

KEPT = Path(__file__).parents[1] / "sim" / "regressions" / "seeds.txt"
SEEDS = [int(line.split()[0]) for line in KEPT.read_text().splitlines() if line and line[0] != "#"]


@pytest.mark.parametrize("seed", sorted({1, 3, *SEEDS}))
def test_no_promise_is_broken(seed: int) -> None:
    world = World(seed)
    tally = world.run()
    assert tally.violations == [], "\n".join(world.page())
    assert tally.errors > 0
    assert tally.events > 0


def test_a_seed_repeats_exactly() -> None:
    first, second = World(1), World(1)
    first.run()
    second.run()
    assert first.page() == second.page()
