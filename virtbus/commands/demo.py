"""`virtbus demo`: recorded real I/O errors through the whole pipeline, on the embedded bus."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import quote

import click

from virtbus.commands.common import FILE, progress
from virtbus.errors import InputMissing, VirtbusError
from virtbus.sources import recording as recordings

RECORDING = Path(__file__).parent.parent / "recordings" / "demo.jsonl"
_LONG = 100  # errors; less is replayed within a moment
SECONDS = 30.0  # without an error before the rest counts as lost


@click.command("demo")
@click.option("--debug", is_flag=True, help="Tracebacks.")
@click.option("--recording", type=FILE, metavar="FILE",
              help="Recorded callbacks of `virtbus watch --json`; default: the built-in ones.")  # fmt: skip
def command(recording: Path | None, debug: bool) -> None:
    """Replay recorded real I/O errors through the whole pipeline, on the embedded bus.

    Nothing is installed and no broker is needed: a replay source, incidents, spool, embedded bus and a
    consumer, in a temporary folder. The events carry origin `replay`. In a checkout, `make demo` does
    the same with a real guest whose disk fails. Exits with 1 when an error did not arrive.

    \b
    Example: virtbus demo --recording recording.jsonl
    """
    path = recording or RECORDING
    try:
        with path.open(encoding="utf-8") as lines:
            injected = sum(one.get("cb") == "IO_ERROR_REASON" for one in recordings.read(lines, str(path)))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputMissing(f"recording {path} can't be read: {why}") from error
    click.echo(f"Replaying {injected} recorded I/O error(s) of real guests: not live errors.\n")
    with tempfile.TemporaryDirectory(prefix="virtbus-demo-") as folder:
        bus, program = f"embedded://{folder}/bus.db", [sys.executable, "-m", "virtbus"]
        agent = subprocess.Popen(
            [*program, "run", "--libvirt", f"replay:{quote(str(path.resolve()))}?speed=full", "--bus", bus,
             "--state-dir", f"{folder}/state", "--http-listen", "", "--control-socket", ""],
            stderr=None if debug else subprocess.PIPE,
            env={**os.environ, "VIRTBUS_INCIDENTS__MAX_WINDOW_SECONDS": "5"},  # nobody waits for a minute
        )  # fmt: skip
        try:
            delivered = _consume([*program, "consume", "--bus", bus, "--group", "demo"], injected)
        finally:
            agent.send_signal(signal.SIGTERM)
            try:
                _, complaint = agent.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                agent.kill()
                raise VirtbusError("the demo's agent did not end; run again with --debug") from None
    if agent.returncode not in (0, -signal.SIGTERM):
        raise VirtbusError(f"the demo's agent ended with {agent.returncode}: {(complaint or b'').decode()}")
    click.echo(f"\nreplayed={injected} delivered={delivered} lost={injected - delivered}")
    sys.exit(0 if delivered == injected else 1)


def _consume(program: list[str], wanted: int) -> int:
    """Print each event; the number of errors that they count, when all came or no more do."""
    delivered = 0
    consumer = subprocess.Popen(program, stdout=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        assert consumer.stdout is not None
        for line in consumer.stdout:
            lines.put(line)
        lines.put(b"")

    reading = threading.Thread(target=read, name="virtbus-demo", daemon=True)
    reading.start()
    try:
        deadline = time.monotonic() + SECONDS
        with progress(wanted if wanted > _LONG else 0, "replaying", sys.stderr) as bar:
            while delivered < wanted and time.monotonic() < deadline:
                try:
                    line = lines.get(timeout=1.0)
                except queue.Empty:
                    continue
                if not line:
                    break
                event = json.loads(line)
                bar.make_way(sys.stdout)
                click.echo(json.dumps(event, indent=2, ensure_ascii=False))
                count = event["data"].get("occurrences", {}).get("count", 0)
                if count:
                    delivered += count
                    bar.update(count)
                    deadline = time.monotonic() + SECONDS
    finally:
        consumer.terminate()
        consumer.wait(timeout=10)
        reading.join(1.0)
    return delivered
