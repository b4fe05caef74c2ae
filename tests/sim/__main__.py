"""`make sim`: play many seeds, or tell the story of one."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
import traceback
from pathlib import Path

from tests.sim.world import Tally, World

OPEN = {int(line.split()[0]) for line in (Path(__file__).parent / "regressions" / "open.txt").open()}
"""Seeds whose fault is known and still open: told again only when asked for by name."""


def play(seed: int) -> Tally:
    """One seed; a crash of the simulation is a violation, too."""
    try:
        return World(seed).run()
    except Exception:
        return Tally(seeds=1, violations=[f"seed {seed}: crashed: {traceback.format_exc()}"])


def tell(seed: int, guest: str | None) -> int:
    """The story of one seed."""
    world = World(seed)
    tally = world.run()
    print(f"Seed {seed}\n")
    print("\n".join(world.page(guest)))
    print()
    for violation in tally.violations:
        print(f"BROKEN  {violation}")
    print(tally.line())
    return 1 if tally.violations else 0


def main() -> int:
    """Returns 1 when a promise was broken."""
    parser = argparse.ArgumentParser(prog="make sim")
    parser.add_argument("--seed", type=int, help="tell the story of this one")
    parser.add_argument("--guest", help="and of this guest's disks alone")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--stop", action="store_true", help="end at the first seed that breaks a promise")
    given = parser.parse_args()
    if given.seed is not None:
        return tell(given.seed, given.guest)
    whole, began = Tally(), time.monotonic()
    seeds = [seed for seed in range(given.first, given.first + given.seeds) if seed not in OPEN]
    with multiprocessing.Pool(given.jobs, maxtasksperchild=50) as pool:
        for done, tally in enumerate(pool.imap(play, seeds), 1):
            whole.add(tally)
            for violation in tally.violations:
                print(f"BROKEN  {violation}", flush=True)
            if tally.violations and given.stop:
                pool.terminate()
                break
            if sys.stderr.isatty() or done % 100 == 0:
                print(f"  {done} of {given.seeds}: {whole.line()}", file=sys.stderr, flush=True)
    print(f"sim {whole.line()} seconds={time.monotonic() - began:.0f}")
    return 1 if whole.violations else 0


if __name__ == "__main__":
    sys.exit(main())
