"""A real OpenTelemetry collector, built from its Go modules with the components of docs/operations.md.

`python -m tests.chart.collector` builds it: some minutes of two processors, once.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

from tests.chart.tools import CACHE, ToolMissing

VERSION = "v0.165.0"
MODULE = Path(__file__).parent / "collector"
_SOURCES = b"".join((MODULE / name).read_bytes() for name in ("main.go", "go.sum"))
BINARY = CACHE / f"otel-collector-{VERSION}-{hashlib.sha256(_SOURCES).hexdigest()[:8]}"


def missing() -> list[str]:
    """What this machine lacks to run it, in words."""
    if BINARY.exists():
        return []
    return [f"an OpenTelemetry collector: build it with `python -m {__spec__.name}` (needs Go)"]


def build() -> None:
    """Build it, if that was not done before. Raises ToolMissing when there is no Go."""
    if BINARY.exists():
        return
    if shutil.which("go") is None:
        raise ToolMissing(f"the collector {VERSION}: Go is not here to build it with")
    CACHE.mkdir(parents=True, exist_ok=True)
    draft = BINARY.with_suffix(".new")
    done = subprocess.run(
        ["go", "build", "-mod=readonly", "-ldflags", "-s -w", "-o", str(draft), "."],
        cwd=MODULE, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise ToolMissing(f"the collector {VERSION}: go build: {done.stderr.strip()[-2000:]}")
    draft.replace(BINARY)


if __name__ == "__main__":
    try:
        build()
    except ToolMissing as error:
        raise SystemExit(str(error)) from error
    print(BINARY)
