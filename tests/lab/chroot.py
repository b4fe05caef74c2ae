"""Other releases of libvirt and QEMU: each Debian suite in a folder, with a lab inside it.

    with Lab(root=suite_root("bullseye")) as lab:     # libvirt 7.0, QEMU 5.2
        ...

A suite is made once, in about a minute and 320 MB, and kept in .cache/ of the checkout. libvirtd, QEMU and
nbdkit are the suite's; virsh, nasm and the tests are this machine's, and reach the daemon over its socket.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from tests.lab.lab import CHECKOUT, LabError

# Oldest first, as docs and tests name them.
SUITES = ("bullseye", "bookworm", "trixie", "forky")

PACKAGES = ("libvirt-daemon", "libvirt-daemon-driver-qemu", "mount", "nbdkit", "qemu-system-x86")

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


def suite_root(suite: str) -> Path:
    """The root folder of a Debian suite with libvirt, QEMU and nbdkit, made if it is not there yet."""
    recipe = hashlib.sha256(repr((suite, PACKAGES, OPTIONS.get(suite))).encode()).hexdigest()[:8]
    folder = CHECKOUT / ".cache" / "suites"
    folder.mkdir(parents=True, exist_ok=True)
    root = folder / f"{suite}-{recipe}"
    with (folder / f"{suite}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.exists():
            fresh = folder / f"{suite}.new"
            shutil.rmtree(fresh, ignore_errors=True)
            done = subprocess.run(
                ["mmdebstrap", "--quiet", "--mode=root", "--variant=apt", f"--include={','.join(PACKAGES)}",
                 *OPTIONS.get(suite, []), suite, str(fresh)],
                capture_output=True, text=True, cwd="/", timeout=900,
            )  # fmt: skip
            if done.returncode:
                raise LabError(f"mmdebstrap {suite}: {done.stderr.strip()[-2000:]}")
            shutil.rmtree(fresh / "var" / "cache" / "apt", ignore_errors=True)
            shutil.rmtree(fresh / "var" / "lib" / "apt" / "lists", ignore_errors=True)
            fresh.rename(root)
    return root
