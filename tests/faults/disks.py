"""Disks that turn bad and good again: real file systems, mounted here, so root is needed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TOOLS = ("mkfs.ext2", "mkfs.ext4", "losetup", "chattr")


@dataclass(frozen=True, slots=True)
class Disk:
    """Where it is mounted, and what harms and mends it while files on it are open."""

    at: Path
    harm: Callable[[], object]
    mend: Callable[[], object]


def sh(*command: object) -> str:
    """Run a command; OSError with what it said when it fails."""
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(str(each) for each in command)}: {done.stderr.strip()}")
    return done.stdout.strip()


def fill(disk: Path) -> Path:
    """Take all the room that is left; the file to delete when there shall be room again."""
    filler = disk / "filler"
    for size in (1 << 20, 4096):
        with filler.open("ab", buffering=0) as stream:
            try:
                while True:
                    stream.write(bytes(size))
            except OSError:
                continue
    return filler


@contextmanager
def small_disk(folder: Path, mebibytes: int = 4) -> Iterator[Disk]:
    """A tmpfs that can be filled."""
    at = folder / "small"
    at.mkdir()
    sh("mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "virtbus-test", at)
    try:
        yield Disk(at, lambda: fill(at), lambda: (at / "filler").unlink(missing_ok=True))
    finally:
        sh("umount", "-l", at)


@contextmanager
def failing_disk(folder: Path, mebibytes: int = 64) -> Iterator[Disk]:
    """ext2 on a loop device whose own disk takes no new blocks.

    A write then fails in the block layer: what the spool sees is a true EIO, at fsync.
    """
    below, at = folder / "below", folder / "bad"
    below.mkdir()
    at.mkdir()
    sh("mount", "-t", "tmpfs", "-o", f"size={mebibytes + mebibytes // 2}m", "virtbus-test", below)
    try:
        with _on_loop(below / "image", at, "ext2", mebibytes, "errors=continue"):
            filler = below / "filler"
            yield Disk(at, lambda: fill(below), lambda: filler.unlink(missing_ok=True))
            filler.unlink(missing_ok=True)
    finally:
        sh("umount", "-l", below)


@contextmanager
def read_only_files(folder: Path, mebibytes: int = 64) -> Iterator[Disk]:
    """ext4 on which the spool's files become immutable: writes to them fail with EPERM, also open ones.

    As on a file system that turned read-only, a write to a mapped page of them is a SIGBUS.
    """
    at = folder / "immutable"
    at.mkdir()

    def every(flag: str) -> None:
        sh("chattr", flag, *(at / "state").iterdir())

    with _on_loop(folder / "image", at, "ext4", mebibytes, "defaults"):
        yield Disk(at, lambda: every("+i"), lambda: every("-i"))
        every("-i")


@contextmanager
def read_only_disk(folder: Path, mebibytes: int = 64) -> Iterator[Disk]:
    """ext4 that the kernel turns read-only, as after an error; it can't be mended while a file is open."""
    at = folder / "aborted"
    at.mkdir()
    with _on_loop(folder / "aborted-image", at, "ext4", mebibytes, "defaults") as device:

        def mend() -> None:
            sh("umount", at)
            sh("mount", device, at)

        yield Disk(at, lambda: sh("mount", "-o", "remount,abort", at), mend)


@contextmanager
def _on_loop(image: Path, at: Path, kind: str, mebibytes: int, options: str) -> Iterator[str]:
    with image.open("wb") as stream:
        stream.truncate(mebibytes << 20)
    sh(f"mkfs.{kind}", "-q", "-F", image)
    device = sh("losetup", "--show", "-f", image)
    try:
        sh("mount", "-o", options, device, at)
        try:
            yield device
        finally:
            sh("umount", "-l", at)
    finally:
        sh("losetup", "-d", device)


def missing_tools() -> list[str]:
    """Names of the tools that are not there."""
    return [tool for tool in TOOLS if shutil.which(tool) is None]
