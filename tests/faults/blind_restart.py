"""libvirt goes away, and the agent ends before it is back: python -m tests.faults.blind_restart [times]

The guest goes on failing 18 times a second all the while. Every error must be counted, or lie within a gap.
"""

from __future__ import annotations

import random
import signal
import sys
import time

from tests.faults.seen_kit import Stage, drained, end, report


def scenario(times: int, seed: int = 1) -> bool:
    """`times` rounds at random moments."""
    chance = random.Random(seed)
    killed = 0
    with Stage() as stage:
        guest = stage.guest("tick")
        with stage.injecting(guest) as injector:
            guest.fail()
            for _ in range(times):
                with stage.agent().ready(60) as agent:
                    time.sleep(chance.uniform(0, 8))
                    stage.lab.kill_libvirtd(chance.choice([signal.SIGKILL, signal.SIGTERM]))
                    time.sleep(chance.uniform(0, 4))
                    if chance.random() < 0.5:
                        agent.kill()
                        killed += 1
                    else:
                        agent.stop()
                if chance.random() < 0.3:  # a start that finds no libvirt, and its end
                    with stage.agent() as agent:
                        time.sleep(chance.uniform(1, 8))
                        agent.kill()
                time.sleep(chance.uniform(0, 2))
                stage.lab.start_libvirtd()
            with stage.agent().ready(60) as agent:
                time.sleep(3)
                guest.heal()
                time.sleep(8)
                drained(agent)
                agent.stop()
        stage.came.settle()
        return report("blind_restart", stage.came, injector, runs=times, killed=killed)


def main() -> None:
    """Print the line."""
    end(scenario(int([*sys.argv[1:], "20"][0])))


if __name__ == "__main__":
    main()
