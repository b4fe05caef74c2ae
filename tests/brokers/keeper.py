"""Keeps servers for a test run and ends them when nobody needs them any more.

    python keeper.py FOLDER

It listens on FOLDER/keeper.sock. Each test process that uses a server holds one connection open; when the
last one closes, also because its process was killed, every process that the keeper started, and whatever
those left behind, is ended, and FOLDER is removed. Orders are JSON, one a line, each answered by one line:

    {"start": [argv…], "env": {…}, "log": "path"}   -> {"pid": N}
    {"alive": N}                                    -> {"alive": true | false}
    {"hold": true}                                  -> {"hold": true}: from here on it will not end

A server of its own session may be killed and started again by its users; the keeper only minds the end.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

PR_SET_CHILD_SUBREAPER = 36
FIRST_USER_SECONDS = 30
GRACE_SECONDS = 5


class Keeper:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: dict[int, subprocess.Popen[bytes]] = {}
        self.users = 0
        self.lock = threading.Lock()
        self.ended = threading.Event()

    def serve(self) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.folder / "keeper.sock"))
        listener.listen()
        threading.Thread(target=self.accept, args=(listener,), daemon=True).start()
        threading.Timer(FIRST_USER_SECONDS, self.leave, args=(0,)).start()
        self.ended.wait()
        listener.close()

    def accept(self, listener: socket.socket) -> None:
        while True:
            try:
                user, _ = listener.accept()
            except OSError:  # closed: the end
                return
            with self.lock:
                if self.ended.is_set():  # too late: who finds the door shut makes a new keeper
                    user.close()
                    continue
                self.users += 1
            threading.Thread(target=self.attend, args=(user,), daemon=True).start()

    def attend(self, user: socket.socket) -> None:
        with contextlib.suppress(OSError), user, user.makefile("rwb") as stream:
            for line in stream:
                stream.write(json.dumps(self.carry_out(json.loads(line))).encode() + b"\n")
                stream.flush()
        self.leave(1)

    def leave(self, number: int) -> None:
        with self.lock:
            self.users -= number
            if self.users == 0:
                self.ended.set()

    def carry_out(self, order: dict[str, Any]) -> dict[str, Any]:
        with self.lock:
            if "hold" in order:
                return order
            if "alive" in order:
                process = self.started.get(order["alive"])
                return {"alive": process is not None and process.poll() is None}
            with Path(order["log"]).open("ab") as log:
                process = subprocess.Popen(
                    order["start"], env=order["env"], cwd=self.folder, stdin=subprocess.DEVNULL,
                    stdout=log, stderr=log, start_new_session=True,
                )  # fmt: skip
            self.started[process.pid] = process
            return {"pid": process.pid}

    def end(self) -> None:
        """SIGTERM to what was started, SIGKILL to all that is left, and the folder goes."""
        for process in self.started.values():
            if process.poll() is None:
                process.terminate()
        until = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < until and any(p.poll() is None for p in self.started.values()):
            time.sleep(0.05)
        while children := descendants(os.getpid()):
            for pid in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            time.sleep(0.01)
        shutil.rmtree(self.folder, ignore_errors=True)


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, whoever started them: orphans are re-parented to a subreaper."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found + [deeper for child in found for deeper in descendants(child)]


def main(folder: Path) -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    keeper = Keeper(folder)
    keeper.serve()
    keeper.end()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))


class Hold:
    """A test process's hold on a keeper: while it is open, the keeper's servers live.

    Joins the keeper of `folder`, or raises OSError where there is none; `Hold.first` starts one.
    """

    def __init__(self, folder: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.connect(str(folder / "keeper.sock"))
            self._stream = self._socket.makefile("rwb")
            self.ask(hold=True)
        except (OSError, ValueError):
            self._socket.close()
            raise ConnectionError(f"no keeper in {folder}") from None

    @classmethod
    def first(cls, folder: Path) -> Hold:
        """Start a keeper for `folder`, which it makes and in the end removes, and hold it."""
        folder.mkdir(parents=True)
        process = subprocess.Popen(
            [sys.executable, __file__, str(folder)], stdin=subprocess.DEVNULL, start_new_session=True
        )
        process.returncode = 0  # not ours to wait for: it outlives us by design
        until = time.monotonic() + 10
        while True:
            try:
                return cls(folder)
            except ConnectionError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.02)

    def ask(self, **order: Any) -> dict[str, Any]:
        """Give the keeper an order and return its answer."""
        self._stream.write(json.dumps(order).encode() + b"\n")
        self._stream.flush()
        answer: dict[str, Any] = json.loads(self._stream.readline())
        return answer

    def close(self) -> None:
        """Let go; the last one to do so ends the servers."""
        self._stream.close()
        self._socket.close()
