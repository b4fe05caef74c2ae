"""An agent that is stopped (SIGSTOP) under a real guest's errors: python -m tests.faults.freeze [seconds]

`freeze[tick]`: 18 errors a second; the agent goes on after so many seconds. What it did not hear must lie
in a gap of reason agent_standstill, and it may not call itself ready before it has connected again.
`freeze[storm]`: two guests that fail as fast as they can; the frozen agent is ended after the unit's
WatchdogSec, as systemd ends it. libvirtd's memory must stay bounded, and it must answer `virsh list` within
10 s of that.
"""

from __future__ import annotations

import signal
import sys
import time

from tests.faults.seen_kit import Stage, drained, end, report, seconds_of
from virtbus.commands.host import WATCHDOG_SECONDS

MOST_MIB, MOST_SECONDS = 200, 10.0
STORMING = 2


def tick(seconds: float) -> bool:
    """Frozen for `seconds`, and then not."""
    with Stage() as stage:
        guest = stage.guest("tick")
        with stage.injecting(guest) as injector, stage.agent().ready(60) as agent:
            guest.fail()
            time.sleep(8)
            agent.process.send_signal(signal.SIGSTOP)
            stopped = time.time()
            time.sleep(seconds)
            agent.process.send_signal(signal.SIGCONT)
            began = agent.get("/readyz")[0]  # at once: it has not looked around yet
            agent.until(
                lambda: any(gap["reason"] == "agent_standstill" for gap in stage.came.gaps()), "told", 60
            )
            agent.ready(30)
            time.sleep(8)
            guest.heal()
            time.sleep(8)
            drained(agent)
            agent.stop()
        stage.came.settle()
        (gap,) = [each for each in stage.came.gaps() if each["reason"] == "agent_standstill"]
        early = stopped - seconds_of(gap["started_at"])
        length = seconds_of(gap["ended_at"]) - seconds_of(gap["started_at"])
        good = early >= 0 and length >= seconds and began == 503
        return report("freeze[tick]", stage.came, injector, good=good, seconds=seconds,
                      gap_seconds=round(length, 1), ready_at_once=began)  # fmt: skip


def storm() -> bool:
    """Frozen until the watchdog's end."""
    with Stage() as stage:
        guests = [stage.guest("storm") for _ in range(STORMING)]
        with stage.injecting(*guests) as injector:
            with stage.agent().ready(60) as agent:
                for guest in guests:
                    guest.fail()
                time.sleep(5)
                before = injector.total
                agent.process.send_signal(signal.SIGSTOP)
                time.sleep(WATCHDOG_SECONDS)
                rate = (injector.total - before) / WATCHDOG_SECONDS
                agent.kill()
            answered, memory = stage.virsh_seconds(60), stage.daemon_mib()
            with stage.agent().ready(60) as agent:
                time.sleep(5)
                for guest in guests:
                    guest.heal()
                time.sleep(10)
                drained(agent)
                agent.stop()
        stage.came.settle()
        good = answered <= MOST_SECONDS and memory <= MOST_MIB
        return report(
            "freeze[storm]", stage.came, injector, good=good, rate=round(rate), frozen=WATCHDOG_SECONDS,
            libvirtd_mib=memory, virsh_seconds=round(answered, 1),
        )  # fmt: skip


def main() -> None:
    """Print both lines."""
    good = tick(float([*sys.argv[1:], "60"][0]))
    end(storm() and good)


if __name__ == "__main__":
    main()
