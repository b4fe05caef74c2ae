"""Other releases of what the tests run against: each Debian suite in a folder.

    with Lab(root=suite_root("bullseye")) as lab:     # libvirt 7.0, QEMU 5.2
        ...
    RabbitMQ.shared(folder, root=suite_root("trixie", RABBITMQ))     # RabbitMQ 4.0

A suite is made once, in about a minute and 320 MB, and kept in .cache/ of the checkout. The daemons are the
suite's; virsh, nasm and the tests are this machine's, and reach the daemon over its socket.

`python -m tests.lab.chroot SUITE…` makes them before a test's own time begins.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.lab.lab import CHECKOUT, LabError

# Oldest first, as docs and tests name them.
SUITES = ("bullseye", "bookworm", "trixie", "forky")

RABBITMQ = ("rabbitmq-server",)
PACKAGES = ("libvirt-daemon", "libvirt-daemon-driver-qemu", "mount", "nbdkit", "qemu-system-x86")

# A download is given up when nothing comes any more, however long the whole of it takes.
PROGRESS = ['--aptopt=Acquire::http::Timeout "60"', '--aptopt=Acquire::Retries "5"']
# The testing suite's lists are valid for a week only, and a mirror may lag.
OPTIONS = {"forky": ['--aptopt=Acquire::Check-Valid-Until "false"']}


def missing() -> list[str]:
    """What this machine lacks to make a suite, in words; empty when it can."""
    lacks = []
    if os.geteuid() != 0:
        lacks.append("root (mmdebstrap and chroot)")
    if shutil.which("mmdebstrap") is None:
        lacks.append("mmdebstrap (Debian package mmdebstrap)")
    return lacks


def suite_root(suite: str, packages: tuple[str, ...] = PACKAGES, variant: str = "apt") -> Path:
    """The root folder of a Debian suite with these packages, made if it is not there yet.

    `variant` is mmdebstrap's: "apt" has the least that packages can be installed in, "important" is a Debian
    as debootstrap makes it.
    """
    made_of = (suite, packages, OPTIONS.get(suite), *([variant] if variant != "apt" else []))
    recipe = hashlib.sha256(repr(made_of).encode()).hexdigest()[:8]
    folder = CHECKOUT / ".cache" / "suites"
    folder.mkdir(parents=True, exist_ok=True)
    root = folder / f"{suite}-{recipe}"
    if root.exists():  # complete: it got its name last
        return root
    with (folder / f"{suite}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.exists():
            fresh = folder / f"{suite}.new"
            shutil.rmtree(fresh, ignore_errors=True)
            words = ["--quiet", "--mode=root", f"--variant={variant}"]
            words += [f"--include={','.join(packages)}"] if packages else []
            done = subprocess.run(
                ["mmdebstrap", *words, *PROGRESS, *OPTIONS.get(suite, []), suite, str(fresh)],
                capture_output=True, text=True, cwd="/",
            )  # fmt: skip
            if done.returncode:
                raise LabError(f"mmdebstrap {suite}: {done.stderr.strip()[-2000:]}")
            (fresh / "etc" / "hosts").write_text("127.0.0.1 localhost\n")  # Erlang's nodes look each other up
            shutil.rmtree(fresh / "var" / "cache" / "apt", ignore_errors=True)
            shutil.rmtree(fresh / "var" / "lib" / "apt" / "lists", ignore_errors=True)
            fresh.rename(root)
    return root


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(suite_root(name))
