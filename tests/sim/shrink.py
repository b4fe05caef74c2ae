"""The smallest part of a plan that breaks the same promise: halves are left out first, then single faults."""

from __future__ import annotations

from collections.abc import Callable

from tests.sim.plan import Plan
from tests.sim.world import Tally, World


def kinds(violations: list[str]) -> set[str]:
    """Which promises were broken, whatever the numbers: "P1", "P2" …, or the first words of another one."""
    return {" ".join(violation.partition(": ")[2].split()[:2]).partition(":")[0] for violation in violations}


def play(plan: Plan) -> Tally:
    """Play it; a crash of the simulation breaks a promise of its own."""
    try:
        return World(plan).run()
    except Exception as error:
        return Tally(seeds=1, violations=[f"seed {plan.seed}: crashed: {type(error).__name__}: {error}"])


def shrink(plan: Plan, say: Callable[[str], None] = lambda line: None) -> Plan:
    """A plan with fewer faults that breaks a promise that `plan` breaks, too."""
    broken = kinds(play(plan).violations)
    size = max(1, len(plan.faults) // 2)
    while plan.faults:
        found = False
        start = 0
        while start < len(plan.faults):
            smaller = plan.without(frozenset(range(start, start + size)))
            if kinds(play(smaller).violations) & broken:
                plan, found = smaller, True
                say(f"{len(plan.faults)} faults still break it")
            else:
                start += size
        if size > 1:
            size //= 2
        elif not found:
            break
    return plan
