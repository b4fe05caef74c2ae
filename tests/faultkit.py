"""Peers that misbehave on purpose: a TCP proxy that cuts, delays and swallows, and a RabbitMQ that lies.

Public through `virtbus.testing`. Standard library only, loopback only, a few threads each; use them with
`with`, so that nothing is left behind.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

_CHUNK = 65536
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: on, 0 s: close() sends a reset


def _shut(sock: socket.socket) -> None:
    """Wake whoever reads `sock`, and close it."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(OSError):
        sock.close()


class _Listener:
    """A loopback listener with a thread for each connection; ends them all at `close`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.host = "127.0.0.1"
        self.port: int = self._socket.getsockname()[1]
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        self._start(self._accept_all)

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, name=self._name, daemon=True)
        self._threads = [one for one in self._threads if one.is_alive()] + [thread]
        thread.start()

    def _accept_all(self) -> None:
        while not self._closing.is_set():
            try:
                sock, _ = self._socket.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._accepted(sock)

    def _accepted(self, sock: socket.socket) -> None:
        raise NotImplementedError

    def _end_connections(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """End every connection and thread; idempotent."""
        self._closing.set()
        _shut(self._socket)
        self._end_connections()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=5.0)

    def __exit__(self, *_: object) -> None:
        self.close()


# ------------------------------------------------------------------------------------- the proxy


class TcpFaultProxy(_Listener):
    """Forwards TCP from `host:port` to a target, with faults that can be switched while it runs.

    `delay(seconds)` · `throttle(bytes_per_second)` · `black_hole()` (connections stay open, nothing passes) ·
    `cut()` (all connections are reset) · `half_close(towards)` · `refuse()` (new connections are reset) ·
    `heal()` takes delay, throttle, black hole and refusal back. `accepted` counts connections.
    """

    def __init__(self, target_host: str, target_port: int) -> None:
        """Listen on a free port of 127.0.0.1 and forward to the target (name or address, TCP port)."""
        self._target = (target_host, target_port)
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._cut: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._open = threading.Event()
        self._open.set()
        self._refusing = False
        self._delay = 0.0
        self._rate: float | None = None
        self.accepted = 0
        self.forwarded_bytes = 0
        super().__init__("fault-proxy")

    def __enter__(self) -> TcpFaultProxy:
        return self

    def delay(self, seconds: float) -> None:
        """Hold each chunk back for `seconds`, in each direction; order is kept."""
        self._delay = seconds

    def throttle(self, bytes_per_second: float) -> None:
        """Let no more than so many bytes a second pass, for each connection and direction."""
        self._rate = bytes_per_second

    def black_hole(self) -> None:
        """Swallow in silence: connections stay, new ones are accepted, no byte passes until `heal`."""
        self._open.clear()

    def refuse(self) -> None:
        """Reset new connections at once; those that stand go on."""
        self._refusing = True

    def heal(self) -> None:
        """Take delay, throttle, black hole and refusal back."""
        self._delay, self._rate, self._refusing = 0.0, None, False
        self._open.set()

    def cut(self) -> int:
        """Reset every connection; the number of them."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        ends = [sock for pair in pairs for sock in pair]
        self._cut.update(ends)
        for sock in ends:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                sock.shutdown(socket.SHUT_RD)  # wakes the thread that reads it, and says nothing outside
            sock.close()
        return len(pairs)

    def half_close(self, towards: str) -> None:
        """End one direction of every connection: `towards` is "client" or "target"."""
        with self._lock:
            for client, target in self._pairs:
                with contextlib.suppress(OSError):
                    (client if towards == "client" else target).shutdown(socket.SHUT_WR)

    def _accepted(self, sock: socket.socket) -> None:
        self.accepted += 1
        if self._refusing:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            sock.close()
            return
        self._start(self._connect, sock)

    def _connect(self, client: socket.socket) -> None:
        while not self._open.wait(0.05):
            if self._closing.is_set():
                break
        if self._closing.is_set():
            _shut(client)
            return
        try:
            target = socket.create_connection(self._target, timeout=5.0)
        except OSError:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            client.close()
            return
        target.settimeout(None)
        target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._pairs.append((client, target))
        self._start(self._forward, client, target)
        self._forward(target, client)

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while not self._closing.is_set():
                rate = self._rate
                data = source.recv(_CHUNK if rate is None else max(1, int(rate / 20)))
                self._wait(self._delay)
                while not self._open.wait(0.05):
                    if self._closing.is_set():
                        return
                if source in self._cut:
                    return
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                sink.sendall(data)
                self.forwarded_bytes += len(data)
                if rate is not None:
                    self._wait(len(data) / rate)
        except OSError:
            _shut(source)
            _shut(sink)
        finally:
            if self._closing.is_set():
                _shut(source)
                _shut(sink)

    def _wait(self, seconds: float) -> None:
        if seconds > 0:
            self._closing.wait(seconds)

    def _end_connections(self) -> None:
        self._open.set()
        self.cut()


# ------------------------------------------------------------------------------------- the AMQP peer


@dataclass(frozen=True, slots=True)
class Published:
    """One basic.publish as read. `connection` counts connections from 1, `tag` the publishes on it."""

    connection: int
    tag: int
    exchange: str
    routing_key: str
    mandatory: bool
    message_id: str
    user_id: str | None
    header: bytes = field(repr=False)  # the content header's properties, as they came
    body: bytes = field(repr=False)


Script = Callable[["FakeAmqpConnection", Published], None]
"""What the peer does about a publish: any of the connection's calls, now or from another thread."""


def _acks(connection: FakeAmqpConnection, published: Published) -> None:
    connection.ack(published.tag)


class FakeAmqpPeer(_Listener):
    """Enough of an AMQP 0-9-1 broker for a publisher with confirms, whose acks are a script's to send.

    It takes any user, exchange and key; `published` has every publish in the order it was read. The peer
    knows what it truly vouched for, see `vouches_for`: a publisher that reports anything else as confirmed
    has believed a lie.
    """

    def __init__(self, script: Script = _acks, *, heartbeat: int = 0) -> None:
        """`script` is called for each publish on the connection's thread; the default acks at once."""
        self.script = script
        self.heartbeat = heartbeat
        self.published: list[Published] = []
        self._vouched: set[tuple[int, int]] = set()  # connection, tag
        self._latest: dict[str, tuple[int, int]] = {}  # message id -> its newest publish
        self.connections: list[FakeAmqpConnection] = []
        super().__init__("fake-amqp-peer")

    def __enter__(self) -> FakeAmqpPeer:
        return self

    @property
    def url(self) -> str:
        """Where a publisher connects to."""
        return f"amqp://guest:guest@{self.host}:{self.port}//"

    def vouches_for(self, message_id: str) -> bool:
        """Whether the newest publish of this id was acked, on its connection and by its tag, not returned."""
        return self._latest.get(message_id) in self._vouched

    def _accepted(self, sock: socket.socket) -> None:
        connection = FakeAmqpConnection(self, sock, len(self.connections) + 1)
        self.connections.append(connection)
        self._start(connection.serve)

    def _end_connections(self) -> None:
        for connection in self.connections:
            connection.hang_up()


class FakeAmqpConnection:
    """One connection of the fake peer: what a script may say on it. A dead connection ignores it all."""

    def __init__(self, peer: FakeAmqpPeer, sock: socket.socket, number: int) -> None:
        """Made by the peer."""
        self._peer = peer
        self._socket = sock
        self._lock = threading.Lock()
        self._channel = 1
        self._by_tag: dict[int, Published] = {}
        self._returned: set[int] = set()
        self.number = number
        self.silent = False  # swallow everything that is read, answer nothing

    # -- what a script says

    def ack(self, tag: int, *, multiple: bool = False) -> None:
        """basic.ack; counts as vouched for every publish it covers that has come and was not returned."""
        covered = [one for one in self._by_tag if one == tag or (multiple and one <= tag)]
        for one in covered:
            del self._by_tag[one]
            if one not in self._returned:
                self._peer._vouched.add((self.number, one))
        self._method(60, 80, struct.pack(">QB", tag, multiple))

    def nack(self, tag: int, *, multiple: bool = False) -> None:
        """basic.nack."""
        for one in [one for one in self._by_tag if one == tag or (multiple and one <= tag)]:
            del self._by_tag[one]
        self._method(60, 120, struct.pack(">QB", tag, int(multiple)))

    def return_(self, published: Published) -> None:
        """basic.return with the message; a broker acks it afterwards."""
        self._returned.add(published.tag)
        method = struct.pack(">HHH", 60, 50, 312) + _short("NO_ROUTE") + _short(published.exchange)
        with self._lock:
            self._send(1, method + _short(published.routing_key))
            self._send(2, published.header)
            for start in range(0, len(published.body), _CHUNK):
                self._send(3, published.body[start : start + _CHUNK])

    def close_channel(self, code: int, text: str) -> None:
        """channel.close over the last publish."""
        self._method(20, 40, struct.pack(">H", code) + _short(text) + struct.pack(">HH", 60, 40))

    def close_connection(self, code: int, text: str) -> None:
        """connection.close."""
        self._method(10, 50, struct.pack(">H", code) + _short(text) + struct.pack(">HH", 0, 0), channel=0)

    def block(self, reason: str = "low on memory") -> None:
        """connection.blocked."""
        self._method(10, 60, _short(reason), channel=0)

    def unblock(self) -> None:
        """connection.unblocked."""
        self._method(10, 61, b"", channel=0)

    def send_raw(self, data: bytes) -> None:
        """Bytes that may be no frame at all."""
        with self._lock, contextlib.suppress(OSError):
            self._socket.sendall(data)

    def hang_up(self) -> None:
        """Drop the TCP connection."""
        _shut(self._socket)

    # -- the protocol

    def serve(self) -> None:
        """Read until the connection ends."""
        with contextlib.suppress(OSError, EOFError, struct.error):
            self._serve()
        _shut(self._socket)

    def _serve(self) -> None:
        if self._read(8)[:4] != b"AMQP":
            return
        properties = _table({"product": "FakeAmqpPeer"}, {"connection.blocked": True, "basic.nack": True})
        self._method(10, 10, b"\x00\x09" + properties + _long(b"PLAIN EXTERNAL") + _long(b"en_US"), channel=0)
        count = 0
        for kind, channel, payload in self._frames():
            if kind != 1 or self.silent:
                continue
            method = struct.unpack_from(">HH", payload)
            if method == (60, 40):
                count += 1
                self._channel = channel
                published = self._publish(count, payload)
                self._by_tag[count] = published
                self._peer._latest[published.message_id] = self.number, count
                self._peer.published.append(published)
                self._peer.script(self, published)
            else:
                self._answer(method, channel, payload)
                if method == (10, 50):
                    return

    def _answer(self, method: tuple[int, ...], channel: int, payload: bytes) -> None:
        if method == (10, 11):  # start-ok
            tune = struct.pack(">HIH", 0, 131072, self._peer.heartbeat)
            self._method(10, 30, tune, channel=0)
        elif method == (10, 40):
            self._method(10, 41, _short(""), channel=0)
        elif method == (10, 50):
            self._method(10, 51, b"", channel=0)
        elif method == (20, 10):
            self._method(20, 11, _long(b""), channel=channel)
        elif method == (20, 40):
            self._method(20, 41, b"", channel=channel)
        elif method == (40, 10):
            self._method(40, 11, b"", channel=channel)
        elif method == (85, 10):
            self._method(85, 11, b"", channel=channel)

    def _publish(self, tag: int, method: bytes) -> Published:
        exchange, position = _read_short(method, 6)
        routing_key, position = _read_short(method, position)
        frames = self._frames()
        _, _, header = next(frames)
        (size,) = struct.unpack_from(">Q", header, 4)
        body = b""
        while len(body) < size:
            kind, _, part = next(frames)
            if kind == 3:
                body += part
        message_id, user_id = _ids(header)
        mandatory = bool(method[position] & 1)
        return Published(
            self.number, tag, exchange, routing_key, mandatory, message_id, user_id, header, body
        )

    def _frames(self) -> Iterator[tuple[int, int, bytes]]:
        while True:
            kind, channel, size = struct.unpack(">BHI", self._read(7))
            payload = self._read(size)
            if self._read(1) != b"\xce":
                raise EOFError("frame end")
            yield kind, channel, payload

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self._socket.recv(size - len(data))
            if not part:
                raise EOFError("peer gone")
            data += part
        return data

    def _method(self, class_id: int, method_id: int, arguments: bytes, *, channel: int | None = None) -> None:
        with self._lock:
            self._send(1, struct.pack(">HH", class_id, method_id) + arguments, channel)

    def _send(self, kind: int, payload: bytes, channel: int | None = None) -> None:
        number = self._channel if channel is None else channel
        frame = struct.pack(">BHI", kind, number, len(payload)) + payload + b"\xce"
        with contextlib.suppress(OSError):
            self._socket.sendall(frame)


def _short(text: str) -> bytes:
    data = text.encode()
    return bytes((len(data),)) + data


def _long(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def _table(strings: dict[str, str], capabilities: dict[str, bool]) -> bytes:
    inner = b"".join(_short(name) + b"t" + bytes((value,)) for name, value in capabilities.items())
    fields = b"".join(_short(name) + b"S" + _long(value.encode()) for name, value in strings.items())
    return _long(fields + _short("capabilities") + b"F" + _long(inner))


def _read_short(data: bytes, position: int) -> tuple[str, int]:
    end = position + 1 + data[position]
    return data[position + 1 : end].decode(), end


def _ids(header: bytes) -> tuple[str, str | None]:
    """The message-id and user-id properties of a content header (AMQP 0-9-1, 4.2.6.1)."""
    (flags,) = struct.unpack_from(">H", header, 12)
    position = 14
    found: dict[int, str] = {}
    for bit in range(15, 2, -1):
        if not flags & (1 << bit):
            continue
        if bit == 13:  # headers
            (size,) = struct.unpack_from(">I", header, position)
            position += 4 + size
        elif bit in (12, 11):  # delivery-mode, priority
            position += 1
        elif bit == 6:  # timestamp
            position += 8
        else:
            found[bit], position = _read_short(header, position)
    return found.get(7, ""), found.get(4)
