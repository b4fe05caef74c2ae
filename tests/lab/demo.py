"""The body of `make demo`: two real guests, a disk that fails with EIO and one that runs out of space.

The agent and the consumer are the installed commands, with the embedded bus between them. The last line
gives real figures: `injected` was counted by nbdkit, `observed` by the agent's own metric, `delivered` by
whoever reads the events that came out. Exit code 1 when they differ. Where no guest can be run, this says
what is missing and replays recorded errors instead.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from tests.lab.lab import PAUSED_IOERROR, RUNNING, Lab, missing
from tests.ports import free_ports

IO_ERROR = "io.virtbus.domain.io_error.v1"
READY_SECONDS = 30
DELIVERY_SECONDS = 30
COMMAND = [sys.executable, "-m", "virtbus"]


def main() -> int:
    lacks = missing()
    if lacks:
        print("No real guest can be run here. Missing:", *(f"  - {each}" for each in lacks), sep="\n")
        print("Replaying recorded errors of real guests through the same pipeline instead.\n", flush=True)
        os.execv(COMMAND[0], [*COMMAND, "demo"])
    with tempfile.TemporaryDirectory(prefix="virtbus-demo-") as folder, Lab() as lab:
        return with_real_guests(lab, Path(folder))


def with_real_guests(lab: Lab, folder: Path) -> int:
    say("A private libvirtd is up. Two guests start; their disks are served by nbdkit.")
    guests = {error: lab.guest(f"demo-{error.lower()}", error=error).start() for error in ("EIO", "ENOSPC")}
    bus = f"embedded://{folder}/bus.db"
    health = f"http://127.0.0.1:{free_ports(1)[0]}"
    agent = subprocess.Popen(
        [*COMMAND, "run", "--libvirt", lab.uri_ro, "--bus", bus, "--state-dir", f"{folder}/state",
         "--http-listen", health.removeprefix("http://"), "--control-socket", ""],
        stderr=(folder / "agent.log").open("wb"),
    )  # fmt: skip
    consumer = subprocess.Popen(
        [*COMMAND, "consume", "--bus", bus, "--group", "demo"], stdout=subprocess.PIPE
    )
    try:
        wait_ready(agent, health, folder / "agent.log")
        say("The agent listens, over the read-only socket. Now the disks fail.")
        for error, guest in guests.items():
            guest.fail()
            guest.wait_state(PAUSED_IOERROR)
            say(f"{guest.name}: {error} injected; QEMU has paused the guest.")
        injected = sum(guest.injected() for guest in guests.values())
        say("The consumer prints what came over the bus:")
        delivered = read_events(consumer, injected)
        for guest in guests.values():
            guest.heal()
            guest.resume()
            guest.wait_state(RUNNING)
        say("Both disks work again and both guests run on.")
        injected = sum(guest.injected() for guest in guests.values())
        observed = observed_callbacks(health)
    finally:
        for process in (consumer, agent):
            process.terminate()
        for process in (consumer, agent):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
    if agent.returncode:
        say(f"the agent ended with {agent.returncode}:\n{(folder / 'agent.log').read_text()}")
        return 1
    print(f"injected={injected} observed={observed} delivered={delivered} lost={injected - delivered}")
    return 0 if injected == observed == delivered else 1


def read_events(consumer: subprocess.Popen[bytes], wanted: int) -> int:
    """Print each event as it comes, until they count `wanted` errors; how many they count."""
    lines: Queue[bytes] = Queue()
    assert consumer.stdout is not None
    threading.Thread(target=lambda out: [*map(lines.put, out)], args=(consumer.stdout,), daemon=True).start()
    seen: set[tuple[str, str]] = set()
    delivered, deadline = 0, time.monotonic() + DELIVERY_SECONDS
    while delivered < wanted and time.monotonic() < deadline:
        try:
            event: dict[str, Any] = json.loads(lines.get(timeout=0.5))
        except Empty:
            continue
        print(json.dumps(event, indent=2, ensure_ascii=False), flush=True)
        if event["type"] == IO_ERROR and (event["source"], event["id"]) not in seen:
            seen.add((event["source"], event["id"]))  # delivery is at least once
            delivered += event["data"]["occurrences"]["count"]
    return delivered


def wait_ready(agent: subprocess.Popen[bytes], health: str, log: Path) -> None:
    """Wait until the agent has registered its callbacks, or end with what it said."""
    until = time.monotonic() + READY_SECONDS
    while True:
        try:
            urllib.request.urlopen(f"{health}/readyz", timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError) as error:
            if agent.poll() is not None or time.monotonic() > until:
                sys.exit(f"the agent is not ready ({error}):\n{log.read_text()}")
            time.sleep(0.05)


def observed_callbacks(health: str) -> int:
    """How many I/O-error callbacks the agent says it had from libvirt."""
    with urllib.request.urlopen(f"{health}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith("virtbus_callbacks_total"))


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
