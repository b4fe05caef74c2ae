"""A signal while the program is still being imported ends it without a word."""

from __future__ import annotations

import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

_PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
MODULE, _, FUNCTION = _PROJECT["project"]["scripts"]["virtbus"].partition(":")
# The finder sends the signal when the module is asked for: in an import, at the same place each time.
INTERRUPTED = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {at!r}:
            os.kill(os.getpid(), {number})

sys.meta_path.insert(0, Finder())
sys.argv = ["virtbus", "agent-id", "--state-dir", "/nonexistent"]
{start}
"""
STARTS = {
    "the command": f"from {MODULE} import {FUNCTION}; sys.exit({FUNCTION}())",
    "python -m": "import runpy; runpy.run_module('virtbus', run_name='__main__')",
}


def interrupted(start: str, at: str, number: signal.Signals) -> subprocess.CompletedProcess[str]:
    code = INTERRUPTED.format(at=at, number=int(number), start=STARTS[start])
    # Whoever runs the tests in the background has SIGINT ignored, and Python leaves that so.
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


@pytest.mark.parametrize("at", ["virtbus.cli", "click", "virtbus.errors", "virtbus.commands.host"])
@pytest.mark.parametrize("start", STARTS)
def test_an_interrupt_during_the_imports_is_130_without_a_traceback(start: str, at: str) -> None:
    done = interrupted(start, at, signal.SIGINT)
    # click ends the line in which a terminal shows ^C
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "")


@pytest.mark.parametrize("start", STARTS)
def test_a_termination_during_the_imports_is_a_clean_end_for_systemd(start: str) -> None:
    """Death by SIGTERM is one (systemd.service(5)); an exit code of our own would be a failure."""
    done = interrupted(start, "click", signal.SIGTERM)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGTERM, "", "")
