"""Every fault scenario, one after the other: python -m tests.faults [--quick] [--list] [NAME…]

Each runs in a process of its own and prints its lines, `NAME runs=… lost=… duplicates=… …`, as well as one
when it ends. Ends with 1 when one of them broke a promise. A NAME is the beginning of a scenario's name.
`--quick` takes a few minutes in all and shows that the scenarios work; the numbers of docs/reliability.md
come from full runs, which take about an hour on two cores.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scenario:
    """A module of this package with its own arguments: at full size, and just to see it work."""

    name: str
    what: str
    full: str = ""
    quick: str = ""

    def words(self, *, quick: bool) -> list[str]:
        """The command."""
        words = (self.quick if quick else self.full).split()
        return [sys.executable, "-m", f"tests.faults.{self.name}", *words]


SCENARIOS = (
    Scenario("kills", "SIGKILL at named points and at random times", "50 200", "2 5"),
    Scenario("amqp_restart", "the broker restarts or is killed under load", "20", "2"),
    Scenario("black_hole", "the network swallows everything, then a backlog drains", "60 60000", "35 5000"),
    Scenario("amqp_alarm", "the broker's memory alarm stops publishers", "3 30", "1 5"),
    Scenario("amqp_acks", "random ack schedules of a lying peer", "10000", "200"),
    Scenario("amqp_refusals", "unroutable, nacked, 403, 404, 406", "5", "1"),
    Scenario("bad_disk", "a disk that is full, fails or turns read-only under a running agent", "5", "1"),
    Scenario("spool_damage", "random damage to the spool's files", "1000 20261123", "50 20261123"),
    Scenario("spool_model", "a model of the spool against the real one", "1000", "50"),
    Scenario("clock", "the wall clock jumps an hour forward and back", "", "--quick"),
    Scenario("freeze", "an agent that is stopped under a real guest's errors", "60", "20"),
    Scenario("deaf", "a listener that is killed in a storm, and whether the next one hears", "40", "2"),
    Scenario("blind_restart", "libvirt goes away and the agent ends before it is back", "20", "3"),
    Scenario("gap_edges", "errors at the edges of gaps, over kills under load", "100", "6"),
    Scenario("two_writers", "the lock is removed and a second agent starts", "10", "1"),
    Scenario("amqp_herd", "a thousand agents after the broker's return", "1000 15", "100 5"),
    Scenario("throughput", "from the spool against raw pipelined kombu", "3 20000", "1 5000"),
    Scenario("late_look", "guests whose QEMU hangs, over restarts of the agent", "20", "3"),
    Scenario("incidents_model", "random histories of errors, kills and failed commits",
             "--examples 10000", "--examples 200"),
    Scenario("consumer_kills", "a consumer is killed at random under load, on each bus", "200", "5"),
    Scenario("scheduler_kills", "the scheduler of docs/examples is killed at random", "200", "5"),
    Scenario("poison_neighbours", "a message that can't be put aside, before good ones", "3", "1"),
    Scenario("crash_neighbours", "an event that kills its consumer, before good ones", "3", "1"),
    Scenario("deaf_group", "exchange, queue, binding, virtual host deleted under load", "3", "1"),
    Scenario("ack_durable", "SIGKILL right after an ack returned", "200", "5"),
    Scenario("kafka_restarts", "the only Kafka broker is killed under load", "--runs 10", "--runs 2"),
    Scenario("kafka_overtaken", "retention overtakes a Kafka group, its topic is replaced",
             "--rounds 40", "--rounds 8"),
    Scenario("holds", "random fleets over days: holds, and whether they are given back", "1000 2", "20 1"),
    Scenario("kafka_leader", "leaders of a Kafka cluster are killed under load", "--runs 5", "--runs 1"),
)  # fmt: skip


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="small numbers")
    parser.add_argument("--list", action="store_true", help="say what there is, and end")
    options = parser.parse_args()
    chosen = [
        each
        for each in SCENARIOS
        if not options.names or any(each.name.startswith(name) for name in options.names)
    ]
    unknown = [name for name in options.names if not any(each.name.startswith(name) for each in SCENARIOS)]
    if unknown:
        parser.error(f"no scenario is called {', '.join(unknown)}; --list tells which there are")
    if options.list:
        for each in chosen:
            print(f"{each.name:16} {each.what} ({' '.join(each.words(quick=options.quick)[1:])})")
        return 0
    return run(chosen, quick=options.quick)


def run(chosen: Sequence[Scenario], *, quick: bool) -> int:
    """One after the other, all of them; 1 when one is broken."""
    broken = []
    for each in chosen:
        begun = time.monotonic()
        code = subprocess.run(each.words(quick=quick), check=False).returncode
        if code:
            broken.append(each.name)
        word = "ok" if code == 0 else f"BROKEN (exit code {code})"
        print(f"{each.name}: {word} after {time.monotonic() - begun:.0f} s", flush=True)
    if broken:
        print(f"broken: {', '.join(broken)}", file=sys.stderr)
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
