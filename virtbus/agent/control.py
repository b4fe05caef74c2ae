"""A Unix socket for people beside a running agent (0600, the peer's uid checked): one JSON request per line.

`status` answers once, `drill` makes an event of origin replay, `tap` streams until the peer leaves.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from virtbus.agent.tap import MAX_READERS, TAP_STAGES, Taps, plain
from virtbus.errors import AgentDenied, AgentUnavailable, ConfigError
from virtbus.telemetry import PeerRefused, Trouble, emit

MAX_REQUEST_BYTES = 4096


_CODES = {"none": 0, "pause": 1, "report": 2}  # as libvirt numbers them
_NAMESPACE = uuid.UUID("6f0d6c3e-8a4e-4d57-9c0e-6f5d1c1b7a10")


@dataclass(frozen=True, slots=True)
class Drill:
    """An error that did not happen, for an alert drill; `resolve` ends it."""

    domain_name: str = "virtbus-drill"
    alias: str = "drill-disk0"
    action: str = "report"
    reason: str = "drill"
    count: int = 1
    resolve: bool = False

    @property
    def domain_uuid(self) -> str:
        """Made of the name: no guest of a hypervisor has it, and a second drill finds the first one."""
        return str(uuid.uuid5(_NAMESPACE, self.domain_name))

    @property
    def action_code(self) -> int:
        """As libvirt numbers it."""
        return _CODES[self.action]

    @classmethod
    def parse(cls, request: Mapping[str, Any]) -> Drill:
        """What a peer asked for; raises ConfigError."""
        drill = cls(**{name: request[name] for name in cls.__slots__ if name in request})
        texts = (drill.domain_name, drill.alias, drill.reason)
        if not all(isinstance(text, str) and len(text) <= 200 and text.isprintable() for text in texts):
            raise ConfigError("domain_name, alias and reason are texts of at most 200 printable characters")
        if not drill.domain_name or str(drill.action) not in _CODES:
            raise ConfigError(f"domain_name is not empty; action is one of {', '.join(_CODES)}")
        if type(drill.count) is not int or not 1 <= drill.count <= 1000 or type(drill.resolve) is not bool:
            raise ConfigError("count is a whole number from 1 to 1000; resolve is true or false")
        return drill


class ControlSocket:
    """`status`, `tap` and `drill` over a Unix socket that only our own user and root may use."""

    def __init__(
        self,
        path: Path,
        *,
        status: Callable[[], Mapping[str, object]],
        taps: Taps,
        drill: Callable[[Drill], None] | None = None,
    ) -> None:
        """Bind the socket; raises ConfigError when it can't be made."""
        self._path, self._status, self._taps, self._drill = path, status, taps, drill
        self._stop = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        problem: str | None = "another agent answers there" if _is_answered(path) else None
        if problem is None:
            try:
                # Before the umask, which would make a folder that not even its owner may enter.
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
                if path.is_socket():
                    path.unlink()  # left by a killed agent
                old_umask = os.umask(0o177)
                try:
                    self._socket.bind(str(path))
                finally:
                    os.umask(old_umask)
            except OSError as error:
                problem = error.strerror or str(error)
        if problem is not None:
            self._socket.close()
            raise ConfigError(
                f"control.socket = {path}: {problem}; "
                "choose another path with --control-socket, or '' for none"
            )
        self._socket.listen(MAX_READERS)
        self._made = _identity(path)
        self._thread = threading.Thread(target=self._accept, name="virtbus-control", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self) -> None:
        """Stop answering and remove the socket."""
        self._stop.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._socket.close()
        if _identity(self._path) == self._made:  # and not somebody else's by now
            self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                peer, _ = self._socket.accept()
            except OSError as error:
                if not self._stop.is_set():
                    emit(Trouble("control socket", error))
                    self._stop.wait(1.0)
                continue
            try:
                threading.Thread(
                    target=self._serve, args=(peer,), name="virtbus-control-peer", daemon=True
                ).start()
            except RuntimeError as error:  # no thread to be had: this peer goes, we stay
                peer.close()
                emit(Trouble("control socket", error))

    def _serve(self, peer: socket.socket) -> None:
        with peer, suppress(OSError):  # a peer that went away is not news
            peer.settimeout(5.0)
            try:
                self._answer(peer)
            except ConfigError as error:
                _say(peer, {"error": str(error)})
            except ValueError:
                _say(peer, {"error": "send one JSON object on one line"})
            except OSError:
                raise
            except Exception as error:  # noqa: BLE001 - a bug costs an answer
                emit(Trouble("control socket", error))

    def _answer(self, peer: socket.socket) -> None:
        uid = _peer_uid(peer)
        if uid not in (0, os.geteuid()):
            emit(PeerRefused(uid))
            _say(peer, {"error": "only the agent's own user and root may ask"})
            peer.recv(MAX_REQUEST_BYTES)  # closing on what is unread would reset the answer away
            return
        request = _read_request(peer)
        command = request.get("command")
        if command == "status":
            _say(peer, self._status())
        elif command == "tap":
            self._tap(peer, request)
        elif command == "drill" and self._drill is not None:
            drill = Drill.parse(request)
            self._drill(drill)
            _say(peer, drill)
        else:
            raise ConfigError("unknown command; known: status, tap, drill")

    def _tap(self, peer: socket.socket, request: Mapping[str, Any]) -> None:
        stage, domain = request.get("stage"), request.get("domain")
        if stage is not None and stage not in TAP_STAGES:
            raise ConfigError(f"unknown stage; known: {', '.join(TAP_STAGES)}")
        reader = self._taps.open(stage, None if domain is None else str(domain))
        try:
            peer.sendall(b"\n")  # from here on nothing is missed
            while not self._stop.is_set():
                # An empty line: still here.
                peer.sendall(("\n".join(reader.take(1.0)) + "\n").encode())
        finally:
            self._taps.close(reader)


def _say(peer: socket.socket, answer: object) -> None:
    peer.sendall(json.dumps(plain(answer)).encode() + b"\n")


def _is_answered(path: Path) -> bool:
    """Whether a process listens there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (BlockingIOError, TimeoutError):  # it listens, and has much to do
            return True
        except OSError:
            return False
    return True


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _peer_uid(peer: socket.socket) -> int:
    """The user at the other end: SO_PEERCRED, struct ucred {pid, uid, gid} (unix(7))."""
    ucred = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", ucred)[1])


def _read_request(peer: socket.socket) -> dict[str, Any]:
    data = b""
    while not data.endswith(b"\n") and len(data) < MAX_REQUEST_BYTES:
        chunk = peer.recv(MAX_REQUEST_BYTES - len(data))
        if not chunk:
            break
        data += chunk
    try:
        request = json.loads(data)
    except RecursionError as error:  # thousands of opening brackets
        raise ValueError("nested too deeply") from error
    if not isinstance(request, dict):
        raise ValueError("not an object")  # noqa: TRY004 - as for text that is not JSON
    return request


def ask(path: Path, request: Mapping[str, object]) -> socket.socket:
    """Connect to an agent's control socket and send a request; the answer is read from the socket.

    Raises AgentUnavailable when no agent answers there, AgentDenied when this user may not ask, or when the
    folder does not belong to who answers.
    """
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        peer.settimeout(5.0)
        peer.connect(str(path))
        uid = _peer_uid(peer)
        if uid not in (0, os.geteuid(), path.parent.stat().st_uid):
            peer.close()
            raise AgentDenied(
                f"{path}: a process of uid {uid} answers, to whom the folder does not belong: not the agent?"
            )
        peer.sendall(json.dumps(request).encode() + b"\n")
    except PermissionError as error:
        peer.close()
        raise AgentDenied(f"{path}: {error.strerror}; ask as the agent's own user, or as root") from error
    except OSError as error:
        peer.close()
        raise AgentUnavailable(
            f"no agent answers at {path}: {error.strerror or error}; "
            "is it running, and is this its --control-socket?"
        ) from error
    return peer
