"""`make sim-mutants`: put one fault back at a time, and tell a seed that finds it.

The likeliest are played first: those whose plans have most of what it takes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys

from tests.sim import mutants
from tests.sim.plan import draw
from tests.sim.shrink import play
from tests.sim.world import settle


def _made(name: str) -> None:
    """In each process of the pool; whatever else went wrong in it is not our finding."""
    mutants.apply(name)


def _found(seed: int) -> tuple[int, str | None]:
    violations = play(draw(seed)).violations
    return seed, violations[0] if violations else None


def _is_the_mutants(seed: int) -> bool:
    """Whether the product as it is breaks nothing with this seed; played where nothing was put back."""
    return not play(draw(seed)).violations


def main() -> int:
    """Returns 1 when one was not found."""
    parser = argparse.ArgumentParser(prog="make sim-mutants")
    parser.add_argument("names", nargs="*", help="all by default")
    parser.add_argument("--seeds", type=int, default=2000)
    parser.add_argument("--plays", type=int, help="and no more than so many of them, the likeliest first")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    survived = 0
    settle()
    plans = {seed: draw(seed) for seed in range(1, given.seeds + 1)}
    for name in given.names or mutants.MUTANTS:
        chances = {seed: mutants.MUTANTS[name].chance(plan) for seed, plan in plans.items()}
        likely = sorted((seed for seed, chance in chances.items() if chance), key=lambda one: -chances[one])
        seeds = likely[: given.plays]
        with multiprocessing.Pool(given.jobs, _made, (name,), maxtasksperchild=500) as pool:
            played = ((seed, what) for seed, what in pool.imap(_found, seeds) if what)
            found = next(((seed, what) for seed, what in played if _is_the_mutants(seed)), None)
            pool.terminate()
        survived += found is None
        print(
            f"{name:<36} {f'{found[1][:120]}' if found else f'NOT FOUND within {given.seeds} seeds'}",
            flush=True,
        )
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
