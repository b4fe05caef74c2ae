"""Receivers that nobody here wrote, fetched by their own package clients and cached in `.cache/interop`.

Every receiver is called the same way and answers with what it understood: the events' attributes and data.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".cache" / "interop"


@dataclass(frozen=True, slots=True)
class Understood:
    """One event as a receiver understood it; every attribute as text."""

    attributes: dict[str, str]
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Receiver:
    """A program of another language. `prepare` fetches and builds it once; `command` is what starts it."""

    name: str
    tools: Sequence[str]
    sources: Sequence[str]
    prepare: Callable[[Path], None]
    command: Callable[[Path, str], list[str]]

    def missing(self) -> list[str]:
        """What this machine lacks to run it."""
        return [f"{tool} (for the {self.name} receiver)" for tool in self.tools if shutil.which(tool) is None]

    def folder(self) -> Path:
        """Where it is built; a change of its sources gives another folder."""
        digest = hashlib.sha256(b"".join((HERE / name).read_bytes() for name in self.sources)).hexdigest()
        return CACHE / f"{self.name}-{digest[:16]}"

    def read(self, bus: str, address: str, name: str, count: int) -> list[Understood]:
        """Let it read `count` events of a queue ("amqp") or topic ("kafka")."""
        folder = self.built()
        done = run([*self.command(folder, bus), address, name, str(count)], folder, timeout=120)
        return [Understood(**json.loads(line)) for line in done.splitlines()]

    def built(self) -> Path:
        """Fetch and build it unless that was done; only one process does."""
        folder = self.folder()
        with locked(CACHE / f"{self.name}.lock"):
            if not (folder / ".done").exists():
                for stale in CACHE.glob(f"{self.name}-*"):
                    shutil.rmtree(stale, ignore_errors=True)
                folder.mkdir(parents=True)
                for name in self.sources:
                    shutil.copy(HERE / name, folder)
                self.prepare(folder)
                (folder / ".done").touch()
        return folder


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock file against other test processes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def run(command: list[str], folder: Path, *, timeout: float, stdin: str = "") -> str:
    """Run a command; its output, or an AssertionError with all it said."""
    done = subprocess.run(
        command,
        input=stdin,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=dict(os.environ),
    )
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


JAVASCRIPT = Receiver(
    name="js",
    tools=("node", "npm"),
    sources=tuple(
        f"js/{name}"
        for name in (
            "package.json",
            "package-lock.json",
            "show.mjs",
            "read_amqp.mjs",
            "read_kafka.mjs",
            "asyncapi.mjs",
            "json_format.mjs",
        )
    ),
    prepare=lambda folder: void(
        run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], folder, timeout=280)
    ),
    command=lambda _folder, bus: ["node", f"read_{bus}.mjs"],
)
JAVA = Receiver(
    name="java",
    tools=("java", "mvn"),
    sources=("java/pom.xml", "java/Read.java"),
    prepare=lambda folder: void(
        run(
            ["mvn", "-q", "-B", "-ntp", "dependency:copy-dependencies", "-DoutputDirectory=lib"],
            folder,
            timeout=280,
        )
    ),
    command=lambda folder, bus: ["java", "-cp", f"{folder}/lib/*", "Read.java", bus],
)
GO = Receiver(
    name="go",
    tools=("go",),
    sources=("go/go.mod", "go/go.sum", "go/main.go"),
    prepare=lambda folder: void(
        run(["go", "build", "-mod=readonly", "-o", "interop", "."], folder, timeout=280)
    ),
    command=lambda folder, bus: [f"{folder}/interop", bus],
)
ALL = (JAVASCRIPT, JAVA, GO)


def void(_: object) -> None:
    """For a lambda whose result nobody wants."""
