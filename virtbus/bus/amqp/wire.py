"""py-amqp with the socket taken over: one connection's frames, read and written without ever blocking.

kombu and py-amqp own the protocol: handshake, SASL, TLS, channels, methods. This module owns the socket:
it is non-blocking, writes are buffered, reads are parsed in bulk. That is what a broker under an alarm
asks for (it stops reading, and a blocking write would stop our heartbeats with it), what a deadline asks
for (py-amqp's own timeouts start again with every frame, heartbeats too), and what makes it fast.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import amqp
from amqp import spec
from amqp.exceptions import AMQPError, FrameSyntaxError, UnexpectedFrame, error_for_code
from amqp.method_framing import frame_writer
from kombu.transport import pyamqp

from virtbus.model import Binding, Message

_CHUNK = 65536
_FRAME_HEADER = struct.Struct(">BHI")
_FRAME_END = 0xCE
_CONTENT_HEADER = 2
# Bodies are split at the negotiated frame size, content headers are not: what the broker itself adds to them
# (x-death, x-delivery-count) can make one larger than what its publisher was allowed.
_FRAME_SLACK = 1 << 20
_FRAME_MAX = 1 << 26  # the most that is agreed to: py-amqp allocates a buffer of this size
_WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

# What py-amqp raises for frames that make no sense: unknown channels, half a table, impossible dates, …
_UNREADABLE = (
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
    struct.error,
)


class ProtocolViolation(AMQPError):
    """The peer said something that can't be: an ack of what was never sent, a return of nothing."""


class Channel(pyamqp.Channel):
    """A channel that stays closed once the broker closed it (py-amqp would open it again and go on)."""

    def _on_close(self, reply_code: int, reply_text: str, class_id: int, method_id: int) -> None:
        self.is_open = False
        self.send_method(spec.Channel.CloseOk)
        raise error_for_code(reply_code, reply_text, (class_id, method_id), amqp.ChannelError)

    def prepare_message(self, *arguments: Any, **named: Any) -> Any:
        """Without the content-encoding "binary" that kombu names where there is none."""
        message = super().prepare_message(*arguments, **named)
        if message.properties.get("content_encoding") == "binary":
            del message.properties["content_encoding"]
        return message

    def dispatch_method(self, method_sig: tuple[int, int], payload: bytes, content: Any) -> None:
        """A routing key is the sender's: one that is not text must not end the connection."""
        if method_sig == spec.Basic.Deliver:
            payload = _with_readable_key(payload)
        super().dispatch_method(method_sig, payload, content)


def _with_readable_key(deliver: bytes) -> bytes:
    """The arguments of basic.deliver with what is not UTF-8 left out of the routing key, their last one."""
    at = 4 + 1 + deliver[4] + 9  # class, method, consumer tag, delivery tag, redelivered
    at += 1 + deliver[at]  # exchange
    key = deliver[at + 1 :]
    if key.isascii():
        return deliver
    readable = key.decode("utf-8", "ignore").encode()
    return deliver[:at] + bytes([len(readable)]) + readable


class WireConnection(pyamqp.Connection):
    """py-amqp's connection, reading and writing through our own non-blocking loop."""

    Channel = Channel
    # RabbitMQ says why it blocks; py-amqp leaves the argument unread.
    _METHODS: Mapping[Any, Any] = {
        **pyamqp.Connection._METHODS,
        spec.Connection.Blocked: spec.method(spec.Connection.Blocked, "s"),
    }

    def __init__(self, *, wake_fd: int, patience: float, **arguments: Any) -> None:
        super().__init__(frame_writer=_buffered_writer, **arguments)
        self._wake_fd = wake_fd
        self._in = bytearray()
        self._out = bytearray()
        self._eof = False
        self._socket: Any = None
        self._poll = select.poll()
        self._polled = 0
        self._next_tick = 0.0
        self.limit = time.monotonic() + patience  # when a synchronous call gives up

    def connect(self, callback: Callable[[], None] | None = None) -> None:
        """The handshake; whatever ends it, the socket is closed."""
        try:
            super().connect(callback)
        except BaseException:
            self.abort()
            raise

    # -- the socket

    def start_io(self, sock: Any) -> None:
        """Take the connected (and, for TLS, wrapped) socket over."""
        sock.setblocking(False)
        self._socket = sock
        self._poll.register(self._wake_fd, select.POLLIN)
        self._poll.register(sock, select.POLLIN)
        self._polled = select.POLLIN

    @property
    def unsent(self) -> int:
        """Bytes that wait for the socket."""
        return len(self._out)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append whole frames; `flush` or `pump` sends them."""
        self._out += data

    def flush(self) -> None:
        """Send what the socket takes now."""
        out = self._out
        while out:
            with memoryview(out) as whole, whole[:_CHUNK] as head:
                try:
                    sent = self._socket.send(head)
                except _WOULD_BLOCK:
                    return
            del out[:sent]

    def pump(self, timeout: float, *, one: bool = False) -> bool:
        """Write, wait up to `timeout` seconds for something to read, dispatch it; True when a method came.

        With `one` it stops after one method. Serves heartbeats about once a second, or as often as a
        short interval asks for. Raises what LINK_FAULTS names when the connection is over.
        """
        if self._dispatch(one):  # left over by `one`, or by a handler that raised
            return True
        self.flush()
        wanted = select.POLLIN | (select.POLLOUT if self._out else 0)
        if wanted != self._polled:
            self._poll.modify(self._socket, wanted)
            self._polled = wanted
        for descriptor, mask in self._poll.poll(max(0.0, timeout) * 1000.0):
            if descriptor == self._wake_fd:
                os.eventfd_read(self._wake_fd)
            elif mask & ~select.POLLOUT:
                self._receive()
        if self._out:
            self.flush()
        handled = self._dispatch(one)
        if self._eof and not handled:
            raise ConnectionResetError("the broker closed the connection")
        now = time.monotonic()
        if now >= self._next_tick:
            self._next_tick = now + min(1.0, (self.heartbeat or 4.0) / 4)
            self.heartbeat_tick()
        return handled

    def _receive(self) -> None:
        while True:
            try:
                chunk = self._socket.recv(_CHUNK)
            except _WOULD_BLOCK:
                return
            if not chunk:
                self._eof = True  # reported after what came before it has been dispatched
                return
            self._in += chunk
            # TLS keeps decrypted bytes that poll() does not see: read until there are none.
            if len(chunk) < _CHUNK and not isinstance(self._socket, ssl.SSLSocket):
                return

    def _dispatch(self, one: bool) -> bool:
        data = self._in
        position, end, handled = 0, len(data), False
        try:
            while end - position >= 8:
                kind, channel, size = _FRAME_HEADER.unpack_from(data, position)
                if size > self.frame_max + _FRAME_SLACK:
                    raise UnexpectedFrame(f"a frame of {size} bytes: this is not AMQP 0-9-1")
                last = position + 7 + size
                if last >= end:
                    break
                if data[last] != _FRAME_END:
                    raise UnexpectedFrame("a frame without its end: this is not AMQP 0-9-1")
                payload = bytes(data[position + 7 : last])
                position = last + 1
                if self._on_frame(kind, channel, payload):
                    handled = True
                    if one:
                        break
        except _UNREADABLE as error:
            raise ProtocolViolation(f"a frame that can't be read ({type(error).__name__})") from error
        finally:
            del data[:position]
        return handled

    def _on_frame(self, kind: int, channel: int, payload: bytes) -> bool:
        """Give a frame to py-amqp. A message whose properties can't be read is handed over without any.

        They are the sender's, and the broker passes on what it does not look at (a date after all time, a
        table of 5,000 levels): throwing the connection away would bring the same message again, for ever.
        Without properties it is not an event of ours, and its reader dead-letters it.
        """
        try:
            return bool(self.on_inbound_frame((kind, channel, payload)))
        except (*_UNREADABLE, FrameSyntaxError) as error:
            if kind != _CONTENT_HEADER:
                raise
            try:
                return bool(self.on_inbound_frame((kind, channel, payload[:12] + b"\0\0")))
            except UnexpectedFrame:  # the header was read: what failed is what came of it
                raise error from None

    def abort(self) -> None:
        """Let go at once; unsent bytes are dropped, also the kernel's.

        An orderly close would let the kernel deliver what it still holds whenever the network heals:
        old events behind newer ones of the same key.
        """
        sock, self._socket = self._socket, None
        if sock is not None:
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                # Not transport.close(): on TLS that begins a farewell which nobody will answer.
                sock.close()
            except OSError:
                pass  # it is gone already, which is what we want
            if self._transport is not None:
                self._transport.sock = None
        self._out.clear()
        if self._transport is not None:
            self.collect()

    # -- what py-amqp calls

    def drain_events(self, timeout: float | None = None) -> None:
        """Wait for a method, at most until `limit` however many heartbeats come in between.

        One method and no more: py-amqp registers a consumer's callback only after it has seen the
        broker's consume-ok, and gives back, out of order, what was dispatched before.
        """
        if timeout == 0:
            raise TimeoutError  # py-amqp asks so before each publish; `pump` looks, between publishes
        limit = self.limit if timeout is None else min(self.limit, time.monotonic() + timeout)
        while not self.pump(min(1.0, limit - time.monotonic()), one=True):
            if time.monotonic() >= limit:
                raise TimeoutError("the broker does not answer")

    def _on_tune(self, channel_max: int, frame_max: int, *more: Any) -> None:
        super()._on_tune(channel_max, min(frame_max or _FRAME_MAX, _FRAME_MAX), *more)

    def _on_close(self, reply_code: int, reply_text: str, class_id: int, method_id: int) -> None:
        self.send_method(spec.Connection.CloseOk)
        self.flush()
        raise error_for_code(reply_code, reply_text, (class_id, method_id), amqp.ConnectionError)

    def _on_blocked(self, reason: str) -> None:
        self.on_blocked(reason)


class Transport(pyamqp.Transport):
    """What kombu opens connections with."""

    Connection = WireConnection


def _buffered_writer(connection: WireConnection, transport: Any) -> Callable[..., None]:
    """py-amqp's frame encoder, writing into our buffer: frames of both sides never interleave."""
    connection.start_io(transport.sock)
    writer: Callable[..., None] = frame_writer(connection, SimpleNamespace(write=connection.write))
    return writer


def received(raw: Any, queue: str, *, key: str | None = None, handle: object) -> Message:
    """A message as py-amqp received it."""
    properties, info = raw.properties, raw.delivery_info
    redelivered = bool(info["redelivered"])
    headers = properties.get("application_headers") or {}
    # A publisher, or a shovel from another queue, may have sent it too: on redelivery it is the broker's.
    counted = headers.get("x-delivery-count") if redelivered else 0
    return Message(
        binding=Binding.AMQP,
        headers=headers,
        content_type=properties.get("content_type"),
        body=raw.body.encode() if isinstance(raw.body, str) else bytes(raw.body),
        key=key,
        redelivered=redelivered,
        user_id=properties.get("user_id"),
        position=f"{queue}#{info['delivery_tag']}",
        handle=handle,
        attempts=counted + 1 if type(counted) is int and counted >= 0 else None,
        content_encoding=properties.get("content_encoding"),
    )
