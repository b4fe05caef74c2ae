"""All benchmarks in one run: `python -m tests.bench [--only NAME,…] [--rounds N] [--quick] [--write]`.

Prints a table with `pass` or `short` for each row, and ends with 1 when a row is below its committed floor
(floors.json). `--write` puts the run into docs/benchmarks.md, its data and its plot; with --only the other
rows there stay as they are.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

from tests.bench import consume, effect, growth, host, intake, kafka, kubevirt, publish, report
from tests.bench.measure import Row, below_floor, speed

Family = Callable[[int, bool], Sequence[Row]]

FAMILIES: dict[str, Family] = {
    "publish": lambda rounds, quick: publish.rows(rounds, events=5_000 if quick else 60_000),
    "drain": lambda rounds, quick: publish.drain_rows(rounds, events=20_000 if quick else 100_000),
    "kafka": lambda rounds, quick: kafka.rows(rounds, events=10_000 if quick else 100_000),
    "consume": lambda rounds, quick: consume.rows(rounds, events=2_000 if quick else 10_000),
    "intake": lambda rounds, quick: intake.rows(rounds, callbacks=100_000 if quick else 300_000),
    "growth": lambda rounds, quick: growth.rows(rounds, sizes=growth.SIZES[: 3 if quick else 4]),
    "idle": lambda rounds, quick: host.idle_rows(rounds, seconds=20 if quick else host.IDLE_SECONDS),
    "latency": lambda rounds, quick: host.latency_rows(rounds, errors=20 if quick else 100),
    "effect": lambda rounds, quick: effect.rows(rounds, errors=20 if quick else 100),
    "kubevirt": lambda rounds, quick: kubevirt.rows(
        rounds, counts=kubevirt.COUNTS[: 2 if quick else 3], seconds=10 if quick else kubevirt.SECONDS
    ),
    "storm": lambda rounds, quick: host.storm_rows(rounds, 10 if quick else host.STORM_SECONDS),
}


def main() -> int:
    """Run, print, and say whether every floor holds."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--only", default=",".join(FAMILIES), help=f"some of {', '.join(FAMILIES)}")
    parser.add_argument("--rounds", type=int, default=3, help="how often the ways take turns [3]")
    parser.add_argument("--quick", action="store_true", help="smaller: for a look, not for the page")
    parser.add_argument("--write", action="store_true", help="put the run into docs/benchmarks.md")
    options = parser.parse_args()
    unknown = set(options.only.split(",")) - set(FAMILIES)
    if unknown:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}; known are {', '.join(FAMILIES)}")
    found: dict[str, list[Row]] = {}
    for name in options.only.split(","):
        begun, machine = time.monotonic(), speed()
        print(f"{name} … (this machine's speed: {machine:.1f})", file=sys.stderr, flush=True)
        found[name] = list(FAMILIES[name](options.rounds, options.quick))
        print(f"{name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
        print(report.as_text(found[name]), flush=True)
        if options.write:
            report.write({name: found[name]}, machine)
    low = below_floor([row for rows in found.values() for row in rows])
    for name in low:
        print(f"below its floor: {name}")
    return 1 if low else 0


if __name__ == "__main__":
    sys.exit(main())
