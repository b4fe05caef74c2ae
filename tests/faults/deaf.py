"""Listeners that are killed in a storm, and whether the next one hears: python -m tests.faults.deaf [rounds]

libvirt's queue of events may get stuck when its last listener leaves while events come (`_listen` in
virtbus/sources/libvirt.py). Each round freezes a bare listener for 2 s under two guests that fail as fast as
they can, kills it, and lets the next one listen for a second: once a bare one, once the agent's own
connection.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.lab.lab import Lab, wait_until
from virtbus.sources import SourceOptions
from virtbus.sources.libvirt import LibvirtConnector

FROZEN_SECONDS, LISTEN_SECONDS = 2.0, 1.0
BARE = Path(__file__).parents[1] / "lab" / "listen.py"


class Counting:
    """A handler that counts errors."""

    def __init__(self) -> None:
        self.errors = 0

    def io_error(self, raw: object) -> None:
        self.errors += 1

    def lifecycle(self, *_: object) -> None:
        """Not counted."""

    device_removed = changed = job_failed = undecodable = closed = lifecycle


def own(uri: str) -> None:
    """The agent's connection: print how many errors it hears, and stay until killed."""
    handler = Counting()
    link = LibvirtConnector(uri, SourceOptions()).open(handler)  # type: ignore[arg-type]
    time.sleep(LISTEN_SECONDS)
    print(handler.errors, flush=True)
    sys.stdin.buffer.read()
    link.close()


def bare(uri: str) -> subprocess.Popen[bytes]:
    """A listener with three callbacks, registered."""
    process = subprocess.Popen(
        [sys.executable, str(BARE), uri],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.strip() == b"ready", line
    return process


def heard_by_bare(uri: str) -> bool:
    """Whether a bare listener hears anything."""
    process = bare(uri)
    assert process.stdout is not None
    time.sleep(LISTEN_SECONDS)
    process.kill()
    heard = len(process.stdout.read()) > 0
    process.wait()
    return heard


def heard_by_ours(uri: str) -> bool:
    """Whether the agent's connection hears anything."""
    words = [sys.executable, "-m", "tests.faults.deaf", "listen", uri]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    errors = int(process.stdout.readline())
    process.kill()
    process.wait()
    return errors > 0


def compared(rounds: int) -> bool:
    """Print how often each was deaf → whether ours never was."""
    deaf = {"bare": 0, "ours": 0}
    with Lab() as lab:
        guests = [
            lab.guest(f"storm{n}", error="EIO", policy="report", bus="ide", boot="storm").start()
            for n in range(2)
        ]
        for guest in guests:
            guest.fail()
        wait_until(lambda: all(guest.injected() > 100 for guest in guests), "a storm", 60)
        for _ in range(rounds):
            for name, heard in (("bare", heard_by_bare), ("ours", heard_by_ours)):
                victim = bare(lab.uri_ro)
                victim.send_signal(signal.SIGSTOP)
                time.sleep(FROZEN_SECONDS)
                victim.kill()
                victim.wait()
                deaf[name] += not heard(lab.uri_ro)
        for guest in guests:
            guest.heal()
    print(f"deaf rounds={rounds} bare={deaf['bare']} ours={deaf['ours']}", flush=True)
    return deaf["ours"] == 0


def main() -> None:
    """Compare, or be the one that listens."""
    if sys.argv[1:2] == ["listen"]:
        own(sys.argv[2])
    else:
        sys.exit(not compared(int([*sys.argv[1:], "20"][0])))


if __name__ == "__main__":
    main()
