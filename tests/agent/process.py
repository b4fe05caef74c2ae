"""`virtbus run` as a process of its own, as an operator starts it."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.ports import free_ports

COMMAND = [sys.executable, "-m", "virtbus"]


def virtbus(*words: str, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    return subprocess.run(
        [*COMMAND, *words],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
        check=False,
    )


def on_a_terminal(
    *words: str, columns: int = 80, stdout: int | None = None, timeout: float = 120, **environment: str
) -> tuple[int, str]:
    """Run one command on a terminal of its own → its exit code and what it wrote there.

    `stdout` takes its standard output elsewhere.
    """
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    process = subprocess.Popen(
        [*COMMAND, *words],
        stdin=writer,
        stdout=writer if stdout is None else stdout,
        stderr=writer,
        env={**os.environ, "TERM": "xterm", **environment},
        start_new_session=True,
    )
    os.close(writer)
    written = b""
    deadline = time.monotonic() + timeout
    try:
        while time.monotonic() < deadline:
            if not select.select([reader], [], [], 1.0)[0]:
                continue
            try:
                part = os.read(reader, 65536)
            except OSError:  # EIO: nobody has the other side any more
                break
            written += part
        return process.wait(max(0.1, deadline - time.monotonic())), written.decode()
    finally:
        os.close(reader)
        if process.poll() is None:
            process.kill()
            process.wait()


class AgentProcess:
    """One run of an agent; `ready()` waits for its callbacks to be registered."""

    def __init__(
        self,
        folder: Path,
        *,
        libvirt: str,
        bus: str,
        settings: str = "",
        command: Sequence[str] = COMMAND,
        http: str = "",
        **environment: str,
    ) -> None:
        self.folder = folder
        self.state_dir = folder / "state"
        self.socket = folder / "control.sock"
        self._log = folder / f"agent-{time.monotonic_ns()}.log"
        self.http = http or f"127.0.0.1:{free_ports(1)[0]}"
        config = folder / "virtbus.toml"
        config.write_text(settings)
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "run", "--config", str(config), "--libvirt", libvirt, "--bus", bus,
                 "--state-dir", str(self.state_dir), "--http-listen", self.http,
                 "--control-socket", str(self.socket), "--log-format", "json"],
                stdin=subprocess.DEVNULL,
                stderr=log,
                env={**os.environ, **environment},
            )  # fmt: skip

    def __enter__(self) -> AgentProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ended = self.process.poll()
        if ended is None:
            self.kill()
        if error is not None:
            how = "still ran" if ended is None else f"had ended with {ended}"
            error.add_note(f"the agent {how}; the end of its log:\n{self.log[-4000:]}")

    @property
    def log(self) -> str:
        """What it wrote on stderr."""
        return self._log.read_text()

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of one of its HTTP pages."""
        try:
            with urllib.request.urlopen(f"http://{self.http}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = self.get("/metrics")[1].splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split(" ")[0] == name)

    def status(self) -> dict[str, Any]:
        """What `virtbus status --json` says."""
        answer = virtbus("status", "--json", "--control-socket", str(self.socket))
        assert answer.returncode == 0, answer.stderr
        found: dict[str, Any] = json.loads(answer.stdout)
        return found

    def ready(self, seconds: float = 30) -> AgentProcess:
        """Wait until it observes."""
        self.until(lambda: self.get("/readyz")[0] == 200, "ready", seconds)
        return self

    def until(self, check: Any, what: str, seconds: float = 20) -> None:
        """Wait until `check()` is true; the agent's log is in the failure's message."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                if check():
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                pass
            if self.process.poll() is not None:
                raise AssertionError(f"the agent ended with {self.process.returncode}:\n{self.log}")
            if time.monotonic() > deadline:
                raise AssertionError(f"not {what} after {seconds} s:\n{self.log}")
            time.sleep(0.05)

    def stop(self, seconds: float = 20) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait(10)
