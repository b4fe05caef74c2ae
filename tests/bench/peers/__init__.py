"""Peers in environments of their own, made from PyPI at first use; each script prints its seconds as JSON.

The scripts in this folder know nothing of virtbus: they run with the peer's own Python.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[2] / ".cache"

PACKAGES = {
    "oslo": ("oslo.messaging>=14",),
    "pika": ("pika>=1.3",),
    "masakari": ("masakari-monitors>=17", "libvirt-python"),
}


def python_of(name: str, *packages: str, editable: str = "") -> Path:
    """The Python of the environment `.cache/bench-<name>`, made when it is not there."""
    home = CACHE / f"bench-{name}"
    done = home / ".complete"
    wanted = "\n".join([*packages, editable])
    if not done.exists() or done.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        words = [*packages, *(["--editable", editable] if editable else [])]
        pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *words], check=True)
        done.write_text(wanted)
    return home / "bin" / "python"


def agent_python() -> Path:
    """A Python with what an operator installs, `virtbus[agent]`, and nothing else."""
    return python_of("agent", editable=f"{HERE.parents[2]}[agent]")


def run(peer: str, *words: str, timeout: float = 300) -> dict[str, float]:
    """Run a peer's script and return what it printed last."""
    python = python_of(peer, *PACKAGES[peer])
    done = subprocess.run(
        [str(python), str(HERE / f"{peer}_peer.py"), *words],
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{peer}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found
