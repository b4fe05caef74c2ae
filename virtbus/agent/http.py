"""HTTP for machines, loopback by default: /metrics, /livez and /readyz.

/livez fails only for a dead thread, /readyz when nothing is observed or kept; a broker outage is neither. One
request per connection, and so many connections: a new one evicts the oldest, so no slow peer keeps a probe
out.
"""

from __future__ import annotations

import errno
import json
import socket
import sys
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from virtbus.bus import is_loopback
from virtbus.errors import ConfigError
from virtbus.telemetry import METRICS, Trouble, emit

MAX_HTTP_PEERS = 16
IDLE_SECONDS = 3600.0  # nobody is waited for more often than this


def _answers(host: str | None, allowed: Collection[str]) -> bool:
    """Whether a Host header is an address, localhost or one of the `allowed` names (in lower case).

    A page whose name is made to lead to 127.0.0.1 (DNS rebinding) would have a browser read our answers.
    """
    if not host:
        return True
    name, separator, port = host.rpartition(":")
    if not separator or not port.isdecimal():
        name = host
    if name.lower() == "localhost" or name.lower() in allowed:
        return True
    try:
        ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


class _Server(ThreadingHTTPServer):
    """A thread a peer, MAX_HTTP_PEERS at most: whoever has been there longest is evicted."""

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
        """A peer that went away is not news either."""
        error = sys.exception()
        if isinstance(error, Exception) and not isinstance(error, OSError):
            emit(Trouble("http", error))


class _Server6(_Server):
    """On IPv6; `::` takes IPv4 too, whatever the host's bindv6only says."""

    address_family = socket.AF_INET6

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, self.server_address[0] != "::")
        super().server_bind()


def _listening(host: str, port: int, handler: type[BaseHTTPRequestHandler]) -> _Server:
    """Raises OSError. `::` on a host without IPv6 is every address of IPv4."""
    if ":" not in host:
        return _Server((host, port), handler)
    try:
        return _Server6((host, port), handler)
    except OSError as error:
        if host != "::" or error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            raise
        return _Server(("0.0.0.0", port), handler)  # noqa: S104 - what was asked for


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
        allowed_hosts: Collection[str] = (),
    ) -> None:
        """`listen` is host:port, from `setting`; raises ConfigError when it can't be had.

        `[::]` is every address of both families. On loopback only addresses, localhost and `allowed_hosts`
        are answered; a listener that the network reaches gains nothing by it, and is asked by name.
        """
        host, _, port = listen.rpartition(":")
        host = host.strip("[]")
        guarded = is_loopback(host.lower())
        allowed = {name.lower() for name in allowed_hosts}

        class Handler(BaseHTTPRequestHandler):
            # One request per connection: what follows it, a body that nobody reads say, is never another one.
            protocol_version = "HTTP/1.0"
            server_version = "virtbus"
            sys_version = ""
            timeout = 10  # a peer that says nothing does not hold a thread

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if guarded and not _answers(self.headers.get("Host"), allowed):
                    why = b"ask by IP address, as localhost, or by a name in http.allowed_hosts\n"
                    self._answer(403, "text/plain; charset=utf-8", why)
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
                """Scrapes are not news."""

        try:
            self._server = _listening(host, int(port), Handler)
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
