"""How the outside looks into a running agent: HTTP for machines, a Unix socket for people.

HTTP (loopback by default): /metrics, /livez (fails only for a dead thread), /readyz (source registered
and spool writable; a broker outage is neither). One request a connection, and so many connections: a new one
makes the oldest give way, so that nobody who is slow keeps a probe out. Unix socket (0600, the peer's uid is
checked): one JSON request a line; `status` answers once, `drill` makes an event of origin replay, `tap`
streams until the peer leaves, lossy and bounded: a slow reader loses lines, never slows the path.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, is_dataclass
from datetime import datetime
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any, ClassVar

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from virtbus.errors import AgentDenied, AgentUnavailable, ConfigError
from virtbus.telemetry import METRICS, PeerRefused, Trouble, emit

TAP_STAGES = ("raw", "incident", "published")
TAP_BUFFER = 1000  # lines a reader may lag behind
MAX_READERS = 8
MAX_HTTP_PEERS = 16
MAX_REQUEST_BYTES = 4096
IDLE_SECONDS = 3600.0  # nobody is waited for more often than this


class Taps:
    """Hands copies of what passes to readers; costs one attribute look-up when there are none."""

    def __init__(self) -> None:
        self.active = False
        self._lock = threading.Lock()
        self._readers: list[_TapReader] = []

    def offer(self, stage: str, item: object, stamp: object = None) -> None:
        """Give `item` to every reader of `stage`; drops it for a reader that lags. Never blocks or raises."""
        for reader in tuple(self._readers):
            reader.offer(stage, item, stamp)

    def open(self, stage: str | None, domain: str | None) -> _TapReader:
        """A new reader; raises ConfigError when too many are open."""
        with self._lock:
            if len(self._readers) >= MAX_READERS:
                raise ConfigError(f"{MAX_READERS} taps are open already; close one")
            reader = _TapReader(stage, domain)
            self._readers.append(reader)
            self.active = True
        return reader

    def close(self, reader: _TapReader) -> None:
        """Let a reader go."""
        with self._lock:
            if reader in self._readers:
                self._readers.remove(reader)
            self.active = bool(self._readers)


class _TapReader:
    """One reader's bounded buffer."""

    def __init__(self, stage: str | None, domain: str | None) -> None:
        self._stage, self._domain = stage, domain
        self._lines: deque[tuple[str, int, object, object]] = deque()
        self._ready = threading.Event()
        self.lost = 0

    def offer(self, stage: str, item: object, stamp: object) -> None:
        if self._stage is not None and stage != self._stage:
            return
        if self._domain is not None and self._domain not in _domains(item):
            return
        if len(self._lines) >= TAP_BUFFER:
            self.lost += 1
            return
        self._lines.append((stage, time.time_ns(), item, stamp))
        self._ready.set()

    def take(self, timeout: float) -> list[str]:
        """The waiting lines as JSON; rendering happens here, on the reader's thread."""
        self._ready.wait(timeout)
        self._ready.clear()
        lines = []
        for _ in range(len(self._lines)):  # not what comes meanwhile: in a storm that never ends
            stage, at_ns, item, stamp = self._lines.popleft()
            line = {"stage": stage, "at_ns": at_ns, "item": plain(item), "stamp": plain(stamp)}
            lines.append(json.dumps(line))
        if self.lost:
            lost, self.lost = self.lost, 0
            lines.append(json.dumps({"stage": "tap", "lost": lost}))
        return lines


def _domains(item: object) -> Sequence[str]:
    domain = getattr(item, "domain", None)
    if domain is not None:
        return (domain.uuid, domain.name)
    raw = getattr(item, "raw", item)
    return tuple(
        str(value)
        for name in ("domain_uuid", "domain_name", "key")
        if (value := getattr(raw, name, None)) is not None
    )


def plain(value: object) -> Any:
    """Dataclasses, enums and times as JSON data."""
    if is_dataclass(value) and not isinstance(value, type):
        return {name: plain(item) for name, item in asdict(value).items()}
    if hasattr(value, "_asdict"):
        return {name: plain(item) for name, item in value._asdict().items()}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return value


@dataclass(frozen=True, slots=True)
class Drill:
    """An error that did not happen, for an alert drill; `resolve` ends it."""

    domain_name: str
    alias: str
    action: str
    reason: str
    count: int
    resolve: bool

    _CODES: ClassVar[Mapping[str, int]] = {"none": 0, "pause": 1, "report": 2}
    _NAMESPACE: ClassVar[uuid.UUID] = uuid.UUID("6f0d6c3e-8a4e-4d57-9c0e-6f5d1c1b7a10")

    @property
    def domain_uuid(self) -> str:
        """Made of the name: no guest of a hypervisor has it, and a second drill finds the first one."""
        return str(uuid.uuid5(self._NAMESPACE, self.domain_name))

    @property
    def action_code(self) -> int:
        """As libvirt numbers it."""
        return self._CODES[self.action]

    @classmethod
    def parse(cls, request: Mapping[str, Any]) -> Drill:
        """What a peer asked for; raises ConfigError."""
        drill = cls(
            domain_name=request.get("domain_name", "virtbus-drill"),
            alias=request.get("alias", "drill-disk0"),
            action=request.get("action", "report"),
            reason=request.get("reason", "drill"),
            count=request.get("count", 1),
            resolve=request.get("resolve", False),
        )
        texts = (drill.domain_name, drill.alias, drill.reason)
        if not all(isinstance(text, str) and len(text) <= 200 and text.isprintable() for text in texts):
            raise ConfigError("domain_name, alias and reason are texts of at most 200 printable characters")
        if not drill.domain_name or str(drill.action) not in cls._CODES:
            raise ConfigError(f"domain_name is not empty; action is one of {', '.join(cls._CODES)}")
        if type(drill.count) is not int or not 1 <= drill.count <= 1000 or type(drill.resolve) is not bool:
            raise ConfigError("count is a whole number from 1 to 1000; resolve is true or false")
        return drill


# --------------------------------------------------------------------------------------------- HTTP


def _is_address(host: str | None) -> bool:
    """Whether a Host header names this machine and not a name of the web.

    A page whose name is made to lead to 127.0.0.1 (DNS rebinding) would have a browser read our answers.
    """
    if not host:
        return True
    name, separator, port = host.rpartition(":")
    if not separator or not port.isdecimal():
        name = host
    if name.lower() == "localhost":
        return True
    try:
        ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


class _Server(ThreadingHTTPServer):
    """A thread a peer, MAX_HTTP_PEERS at most: whoever has been there longest gives way."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = MAX_HTTP_PEERS

    def __init__(self, *arguments: Any) -> None:
        self._peers: dict[Any, None] = {}  # in the order in which they came
        self._lock = threading.Lock()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            oldest = list(self._peers)[: max(0, len(self._peers) + 1 - MAX_HTTP_PEERS)]
            for peer in oldest:
                del self._peers[peer]
            self._peers[request] = None
        for peer in oldest:
            with suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)  # its thread reads an end, or can't go on writing
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._peers.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A peer that went away is no news either."""
        error = sys.exception()
        if isinstance(error, Exception) and not isinstance(error, OSError):
            emit(Trouble("http", error))


class HttpServer:
    """/metrics, /livez and /readyz on a thread of its own."""

    def __init__(
        self,
        listen: str,
        *,
        dead: Callable[[], Sequence[str]],
        not_ready: Callable[[], Sequence[str]],
        registry: CollectorRegistry = METRICS.registry,
        setting: str = "http.listen",
    ) -> None:
        """`listen` is host:port, from `setting`; raises ConfigError when it can't be had."""
        host, _, port = listen.rpartition(":")
        host = host.strip("[]")

        class Handler(BaseHTTPRequestHandler):
            # One request a connection: what follows it, a body that nobody reads say, is never another one.
            protocol_version = "HTTP/1.0"
            server_version = "virtbus"
            sys_version = ""
            timeout = 10  # a peer that says nothing does not hold a thread

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if not _is_address(self.headers.get("Host")):
                    self._answer(403, "text/plain; charset=utf-8", b"ask by IP address or as localhost\n")
                elif path == "/metrics":
                    self._answer(200, CONTENT_TYPE_LATEST, generate_latest(registry))
                elif path == "/livez":
                    self._verdict([f"thread {name} is dead" for name in dead()])
                elif path == "/readyz":
                    self._verdict(list(not_ready()))
                else:
                    self._answer(404, "text/plain; charset=utf-8", b"try /metrics, /livez or /readyz\n")

            def _verdict(self, reasons: list[str]) -> None:
                body = json.dumps({"ok": not reasons, "reasons": reasons}).encode()
                self._answer(503 if reasons else 200, "application/json", body)

            def _answer(self, code: int, kind: str, body: bytes) -> None:
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("X-Content-Type-Options", "nosniff")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Scrapes are no news."""

        class Server(_Server):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        try:
            self._server = Server((host, int(port)), Handler)
        except OSError as error:
            raise ConfigError(
                f"{setting} = {listen}: {error.strerror or error}; "
                "choose another address with --http-listen, or '' for none"
            ) from error
        self.port = int(self._server.server_address[1])
        # It sleeps until somebody comes: `close` wakes it by shutting the socket down.
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(IDLE_SECONDS,), name="virtbus-http", daemon=True
        )

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        ending = threading.Thread(target=self._server.shutdown, name="virtbus-http-close")
        ending.start()
        with suppress(OSError):  # not connected, says Linux, and wakes who waits for connections
            self._server.socket.shutdown(socket.SHUT_RDWR)
        ending.join()
        self._server.server_close()


# ------------------------------------------------------------------------------------- Unix socket


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
        if _is_answered(path):
            raise ConfigError(
                f"control.socket = {path}: another agent answers there; "
                "choose another path with --control-socket, or '' for none"
            )
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
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
            self._socket.close()
            raise ConfigError(
                f"control.socket = {path}: {error.strerror or error}; "
                "choose another path with --control-socket, or '' for none"
            ) from error
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
        with peer, suppress(OSError):  # a peer that went away is no news
            peer.settimeout(5.0)
            try:
                self._answer(peer)
            except ConfigError as error:
                peer.sendall(json.dumps({"error": str(error)}).encode() + b"\n")
            except ValueError:
                peer.sendall(b'{"error": "send one JSON object on one line"}\n')
            except OSError:
                raise
            except Exception as error:  # noqa: BLE001 - a bug costs an answer
                emit(Trouble("control socket", error))

    def _answer(self, peer: socket.socket) -> None:
        uid = _peer_uid(peer)
        if uid not in (0, os.geteuid()):
            emit(PeerRefused(uid))
            peer.sendall(b'{"error": "only the agent\'s own user and root may ask"}\n')
            peer.recv(MAX_REQUEST_BYTES)  # closing on what is unread would reset the answer away
            return
        request = _read_request(peer)
        if request.get("command") == "status":
            peer.sendall(json.dumps(plain(self._status())).encode() + b"\n")
        elif request.get("command") == "tap":
            self._tap(peer, request)
        elif request.get("command") == "drill" and self._drill is not None:
            drill = Drill.parse(request)
            self._drill(drill)
            peer.sendall(json.dumps(plain(drill)).encode() + b"\n")
        else:
            peer.sendall(b'{"error": "unknown command; known: status, tap, drill"}\n')

    def _tap(self, peer: socket.socket, request: Mapping[str, Any]) -> None:
        stage, domain = request.get("stage"), request.get("domain")
        if stage is not None and stage not in TAP_STAGES:
            peer.sendall(
                json.dumps({"error": f"unknown stage; known: {', '.join(TAP_STAGES)}"}).encode() + b"\n"
            )
            return
        try:
            reader = self._taps.open(stage, None if domain is None else str(domain))
        except ConfigError as error:
            peer.sendall(json.dumps({"error": str(error)}).encode() + b"\n")
            return
        try:
            peer.sendall(b"\n")  # from here on nothing is missed
            while not self._stop.is_set():
                lines = reader.take(1.0)
                peer.sendall(
                    ("\n".join(lines) + "\n").encode() if lines else b"\n"
                )  # an empty line: still here
        finally:
            self._taps.close(reader)


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
        raise ValueError("not an object")  # noqa: TRY004 - as for text that is no JSON
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
