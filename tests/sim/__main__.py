"""`make sim`: play many seeds, or tell the story of one."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from tests.sim import mutants
from tests.sim.plan import Plan, draw
from tests.sim.shrink import shrink
from tests.sim.world import Tally, World, settle

SEEDS = 200


def play(seed: int) -> Tally:
    """One seed; a crash of the simulation is a violation, too."""
    try:
        return World(seed).run()
    except Exception:
        return Tally(seeds=1, violations=[f"seed {seed}: crashed: {traceback.format_exc()}"])


def tell(plan: Plan, guest: str | None) -> int:
    """The story of one plan, as a page."""
    world = World(plan)
    tally = world.run()
    print("\n".join(page(world, tally, guest)))
    return 1 if tally.violations else 0


def page(world: World, tally: Tally, guest: str | None = None) -> Iterator[str]:
    """What happened and what came of it, then what was promised and broken."""
    plan = world.plan
    hosts = ", ".join(f"{host.name} ({host.release}, clock {host.skew:+.0f} s)" for host in plan.hosts)
    yield f"Seed {plan.seed}: {hosts}; broker like {plan.broker}; {len(plan.faults)} faults"
    yield ""
    yield "  seconds  who       what happened; -> what came of it"
    yield from world.page(guest)
    yield ""
    for violation in tally.violations:
        yield f"BROKEN  {violation}"
    yield tally.line()


def main() -> int:
    """Returns 1 when a promise was broken."""
    parser = argparse.ArgumentParser(prog="make sim")
    parser.add_argument("--seed", type=int, help="tell the story of this one")
    parser.add_argument("--plan", type=Path, help="tell the story of a plan that was kept")
    parser.add_argument("--guest", help="and of this guest's disks alone")
    parser.add_argument(
        "--shrink", type=Path, help="leave out of --seed what it does not need to fail; keep it here"
    )
    parser.add_argument("--seeds", type=int, help=f"how many; {SEEDS}, or what fits into --hours")
    parser.add_argument("--hours", type=float, help="end after so many hours of this machine's time")
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--mutant", help="put one fault of tests/sim/mutants back first")
    parser.add_argument("--stop", action="store_true", help="end at the first seed that breaks a promise")
    given = parser.parse_args()
    if given.mutant:
        mutants.apply(given.mutant)
    if given.seed is not None or given.plan is not None:
        plan = draw(given.seed) if given.plan is None else Plan.parse(given.plan.read_text())
        if given.shrink is not None:
            plan = shrink(plan, lambda line: print(f"  {line}", file=sys.stderr, flush=True))
            given.shrink.write_text(plan.text())
        return tell(plan, given.guest)
    whole, began = Tally(), time.monotonic()
    count = given.seeds or (SEEDS if given.hours is None else sys.maxsize // 2)
    of = f" of {count}" if given.seeds or given.hours is None else ""
    seeds = range(given.first, given.first + count)
    settle()
    with multiprocessing.Pool(given.jobs, maxtasksperchild=500) as pool:
        for done, tally in enumerate(pool.imap(play, seeds, chunksize=4), 1):
            whole.add(tally)
            for violation in tally.violations:
                print(f"BROKEN  {violation}", flush=True)
            if sys.stderr.isatty() or done % 100 == 0:
                print(f"  {done}{of}: {whole.line()}", file=sys.stderr, flush=True)
            late = given.hours is not None and time.monotonic() - began > given.hours * 3600
            if late or (tally.violations and given.stop):
                pool.terminate()
                break
    print(f"sim {whole.line()} seconds={time.monotonic() - began:.0f}")
    return 1 if whole.violations else 0


if __name__ == "__main__":
    sys.exit(main())
