"""Prints how many random histories of errors, kills, failed commits and set clocks the incidents kept.

    python -m tests.faults.incidents_model [--examples 10000] [--steps 50] [--seed 1]

Each history is checked after every step (see tests/faults/incidents_machine.py). Ends with 1 and the shortest
failing history when a promise is broken.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.faults.incidents_machine import IncidentsMachine

done: Counter[str] = Counter()


class CountingMachine(IncidentsMachine):
    """Also counts what the histories held, so that the line that is printed can be judged."""

    def teardown(self) -> None:
        super().teardown()
        done["histories"] += 1
        done["incidents"] += len(self.log.ended)
        done["errors"] += sum(self.log.counts.values())
        done["kills"] += self.kills
        done.update({scope.value: opened for scope, opened in self.scopes.items()})


def main() -> int:
    """Run the histories and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    started = time.monotonic()
    try:
        run_state_machine_as_test(
            seed(options.seed)(CountingMachine),
            settings=settings(
                max_examples=options.examples,
                stateful_step_count=options.steps,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    except Exception:
        print(f"incidents: BROKEN after {done['histories']} histories, seed {options.seed}", flush=True)
        raise
    print(
        f"incidents: {done['histories']} histories of up to {options.steps} steps kept every promise: "
        f"{done['errors']} errors in {done['incidents']} incidents, {done['kills']} kills "
        f"(opened for a device {done['device']} times, for a domain {done['domain']}, for the host "
        f"{done['host']}), "
        f"seed {options.seed}, {time.monotonic() - started:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
