"""`virtbus demo`: recorded real I/O errors through the whole pipeline, on the embedded bus."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TextIO
from urllib.parse import quote

from virtbus.errors import InputMissing, VirtbusError

RECORDING = Path(__file__).parent.parent / "recordings" / "demo.jsonl"
SECONDS = 30.0


def run(*, recording: Path | None, out: TextIO, debug: bool) -> int:
    """Replay, consume, print; the last line gives the figures. 1 when an error did not arrive."""
    path = recording or RECORDING
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputMissing(f"recording {path} can't be read: {error}") from error
    injected = sum(1 for line in lines if json.loads(line).get("cb") == "IO_ERROR_REASON")
    out.write(f"Replaying {injected} recorded I/O error(s) of real guests: not live errors.\n\n")
    with tempfile.TemporaryDirectory(prefix="virtbus-demo-") as folder:
        bus = f"embedded://{folder}/bus.db"
        command = [sys.executable, "-m", "virtbus"]
        source = f"replay:{quote(str(path.resolve()))}?speed=full"
        agent = subprocess.Popen(
            [*command, "run", "--libvirt", source, "--bus", bus, "--state-dir",
             f"{folder}/state", "--http-listen", "", "--control-socket", ""],
            stderr=None if debug else subprocess.PIPE,
        )  # fmt: skip
        try:
            delivered = _consume([*command, "consume", "--bus", bus, "--group", "demo"], injected, out)
        finally:
            agent.send_signal(signal.SIGTERM)
            try:
                _, complaint = agent.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                agent.kill()
                raise VirtbusError("the demo's agent did not end; run again with --debug") from None
    if agent.returncode not in (0, -signal.SIGTERM):
        raise VirtbusError(f"the demo's agent ended with {agent.returncode}: {(complaint or b'').decode()}")
    out.write(f"\nreplayed={injected} delivered={delivered} lost={injected - delivered}\n")
    return 0 if delivered == injected else 1


def _consume(command: list[str], wanted: int, out: TextIO) -> int:
    """Print each event; the number of errors that they count."""
    delivered, deadline = 0, time.monotonic() + SECONDS
    consumer = subprocess.Popen(
        [*command, "--timeout", str(SECONDS)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert consumer.stdout is not None
    try:
        for line in consumer.stdout:
            event = json.loads(line)
            out.write(json.dumps(event, indent=2, ensure_ascii=False) + "\n")
            out.flush()
            delivered += event["data"].get("occurrences", {}).get("count", 0)
            if delivered >= wanted or time.monotonic() > deadline:
                break
    finally:
        consumer.terminate()
        consumer.wait(timeout=10)
    return delivered
