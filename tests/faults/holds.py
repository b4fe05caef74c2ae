"""Random fleets over simulated days: python -m tests.faults.holds [FLEETS [DAYS [FIRST_SEED]]]

Reactor kills and fail-overs, renames, replaced hardware, clock steps, silent and blind agents, outages of
storage that many hosts share, and faults of single hosts (tests/fleet/simulation.py). Prints one line:
`wrong` are holds of hosts that were not at fault, `kept` holds that were never given back. Ends with 1 when
there is any.
"""

from __future__ import annotations

import sys

from tests.fleet.simulation import play


def main() -> int:
    """Play and print."""
    fleets, days, first = [*map(float, sys.argv[1:]), *(1000.0, 2.0, 1.0)[len(sys.argv) - 1 :]]
    found = play(range(int(first), int(first) + int(fleets)), days)
    for line in [*found.wrong, *found.kept, *found.beyond][:20]:
        print(line, file=sys.stderr)
    print(f"holds {found.line()} days={days:g} seed={first:g}", flush=True)
    return int(bool(found.wrong or found.kept or found.beyond or not found.holds))


if __name__ == "__main__":
    sys.exit(main())
