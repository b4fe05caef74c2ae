"""`make audit` never passes in silence: with a stand-in for the tool that asks the databases."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("tool", "code", "told"),
    [
        ("echo 'No known vulnerabilities found' >&2", 0, "No known vulnerabilities found"),
        (
            "echo 'kombu 5.5 CVE-1'; echo 'Found 1 known vulnerability' >&2; exit 1",
            2,
            "Found 1 known vulnerability",
        ),
        (
            "seq 70 >&2; echo 'ConnectionError: no route' >&2; exit 1",
            2,
            "Not audited, the vulnerability database gave no answer: ConnectionError: no route",
        ),
    ],
    ids=["clean", "vulnerable", "unreachable"],
)
def test_an_audit_ends_with_one_clear_line(tmp_path: Path, tool: str, code: int, told: str) -> None:
    program = tmp_path / "build" / "audit" / "bin" / "pip-audit"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\n{tool}\n")
    program.chmod(0o755)
    # Not as a part of the `make test` that may run this: such a make says where it is.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        ["make", "-f", ROOT / "Makefile", "-o", "setup", f"BIN={Path(sys.executable).parent}", "audit"],
        cwd=tmp_path, env=outside, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code
    assert [line for line in done.stderr.splitlines() if not line.startswith("make: ***")] == [told]
    assert done.stdout == ("kombu 5.5 CVE-1\n" if "CVE" in tool else "")
