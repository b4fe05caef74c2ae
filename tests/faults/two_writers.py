"""The lock is removed and a second agent starts on the folder: python -m tests.faults.two_writers [times]

The first one must stop writing, say so on /readyz, and the second must tell everything from then on: no event
of either is overwritten, and every error is counted or lies within a gap.
"""

from __future__ import annotations

import sys
import time

from tests.faults.seen_kit import Stage, drained, end, report


def scenario(times: int) -> bool:
    """`times` takeovers, one after the other."""
    refused = 0
    with Stage() as stage:
        guest = stage.guest("storm")
        with stage.injecting(guest) as injector:
            first = stage.agent("agent0").ready(60)
            guest.fail()
            for number in range(1, times + 1):
                time.sleep(4)
                (stage.folder / f"agent{number}").mkdir()
                (stage.folder / f"agent{number}" / "state").symlink_to(
                    (stage.folder / "agent0" / "state").resolve()
                )
                (stage.folder / "agent0" / "state" / "lock").unlink()
                second = stage.agent(f"agent{number}").ready(60)
                time.sleep(3)
                code, why = first.get("/readyz")
                refused += code == 503 and "another" in why
                first.kill()
                first = second
            time.sleep(3)
            guest.heal()
            time.sleep(10)
            drained(first)
            first.stop()
        stage.came.settle()
        return report("two_writers", stage.came, injector, good=refused == times, runs=times, refused=refused)


def main() -> None:
    """Print the line."""
    end(scenario(int([*sys.argv[1:], "3"][0])))


if __name__ == "__main__":
    main()
