"""Looks that come late, over restarts of the agent: python -m tests.faults.late_look [ROUNDS]

Real guests, each stopped by one error: one that an agent saw, one while no agent ran, one whose event
libvirt loses. Then every QEMU hangs (SIGSTOP), and the agent is ended (SIGTERM and SIGKILL in turn) and
started ROUNDS times; its looks at the guests end in libvirt's own time-out or never. At last the QEMUs go on,
and the looks come. `lost` and `duplicates` compare what a consumer got with what the injector refused;
`unnamed` counts the guests whose device no event names in the end.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.agent.process import COMMAND, AgentProcess
from tests.lab.lab import PAUSED_IOERROR, Lab, wait_until


@contextmanager
def consumed(bus: str) -> Iterator[list[dict[str, Any]]]:
    """The events of a bus, as a consumer prints them."""
    events: list[dict[str, Any]] = []
    consumer = subprocess.Popen(
        [*COMMAND, "consume", "--bus", bus, "--group", "late-look"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert consumer.stdout is not None
    lines = consumer.stdout

    def read() -> None:
        events.extend(map(json.loads, lines))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield events
    finally:
        consumer.terminate()
        consumer.wait(30)
        reader.join(10)
        lines.close()


def main() -> int:
    """Run it, print its line; 1 when an error was lost, told twice or never named."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with Lab() as lab, tempfile.TemporaryDirectory(prefix="virtbus-late-", dir="/tmp") as temporary:
        folder = Path(temporary)
        bus = f"embedded://{folder}/bus.db"
        guests = {
            name: lab.guest(name, nbd_name="" if name == "eventless" else "disk0").start()
            for name in ("seen", "unseen", "eventless")
        }
        with consumed(bus) as events:

            def errors(name: str) -> list[dict[str, Any]]:
                return [
                    event["data"]
                    for event in events
                    if event["type"] == "io.virtbus.domain.io_error.v1"
                    and event["data"]["domain"]["uuid"] == guests[name].uuid
                ]

            def fail(name: str) -> None:
                guests[name].fail()
                guests[name].wait_state(PAUSED_IOERROR)

            agent = AgentProcess(folder, libvirt=lab.uri_ro, bus=bus)
            agent.ready(60)
            fail("seen")
            wait_until(lambda: bool(errors("seen")), "the error that the agent saw is told", 30)
            agent.stop()
            fail("unseen")
            fail("eventless")
            pids = [guest.pid for guest in guests.values()]
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            try:
                for number in range(rounds):
                    agent = AgentProcess(folder, libvirt=lab.uri_ro, bus=bus)
                    agent.ready(60)
                    wait_until(lambda: all(map(errors, guests)), "each guest is told of at once", 30)
                    if number < rounds - 1:
                        agent.kill() if number % 2 else agent.stop()
            finally:
                for pid in pids:
                    os.kill(pid, signal.SIGCONT)
            named = dict.fromkeys(guests, False)

            def all_named() -> bool:
                for name in guests:
                    named[name] = any(each["device"]["alias"] == "virtio-disk0" for each in errors(name))
                return all(named.values())

            began = time.monotonic()
            while not all_named() and time.monotonic() - began < 120:
                time.sleep(0.2)
            time.sleep(3.0)  # what would be told twice
            agent.stop()
            injected = {name: guest.injected() for name, guest in guests.items()}
            told = {name: sum(each["occurrences"]["count"] for each in errors(name)) for name in guests}
    lost = sum(max(0, injected[name] - told[name]) for name in guests)
    duplicates = sum(max(0, told[name] - injected[name]) for name in guests)
    unnamed = sum(not each for each in named.values())
    print(
        f"late_look runs={rounds} events={sum(injected.values())} lost={lost} duplicates={duplicates} "
        f"unnamed={unnamed}"
    )
    return 1 if lost or duplicates or unnamed else 0


if __name__ == "__main__":
    sys.exit(main())
