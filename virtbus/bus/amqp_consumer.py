"""A consumer group on RabbitMQ: its quorum queue, its dead letters, and what becomes of each message.

A group's queue is `virtbus.<group>`: durable, quorum, bound to the exchange with `#`, one active consumer at
a time (the others stand by), because two consumers of one queue would give up the order of a domain. Its
dead letters are in `virtbus.<group>.dead`. A broker that gives up on a message after too many deliveries
(RabbitMQ 4 does after 20 by itself) puts it there too, instead of dropping it.

Without a group the queue is exclusive and goes with the connection: a forgotten consumer fills no broker.
"""

from __future__ import annotations

import heapq
import struct
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import amqp
from amqp import spec
from amqp.exceptions import AMQPError

from virtbus.bus import REASON_HEADER, BusOptions
from virtbus.bus.amqp_link import LINK_FAULTS, Dialer, Link, ProtocolViolation, Waker, lost, translated
from virtbus.envelope import MAX_DECODE_BYTES
from virtbus.errors import BusDenied, BusUnavailable, VirtbusError
from virtbus.model import Binding, Message
from virtbus.retry import Backoff
from virtbus.telemetry import Notice, TelemetryEvent, Trouble, emit

USER_HEADER = "x-virtbus-user-id"
_REASON_LIMIT = 1024
_ACK = struct.Struct(">BHIHHQBB")  # a method frame with basic.ack: tag, multiple, frame end
_ACKS_TOGETHER = 1024  # bytes


@dataclass(frozen=True, slots=True)
class MessageTooLarge(TelemetryEvent):
    """A message that is larger than any event was rejected; the broker has put it aside."""

    LEVEL: ClassVar[str] = "warning"
    MESSAGE: ClassVar[str] = "a message is too large for an event; rejected into the dead letters"
    LIMIT_SECONDS: ClassVar[float] = 10.0
    queue: str
    size_bytes: int
    publisher: str | None


@dataclass(frozen=True, slots=True)
class _Handle:
    """Which delivery a message is; a tag means nothing on another connection."""

    generation: int
    tag: int
    properties: Mapping[str, Any]


class AmqpSubscription:
    """A `virtbus.bus.Subscription`; a thread keeps heartbeats going while a message is worked on."""

    def __init__(self, dialer: Dialer, options: BusOptions, group: str | None, prefetch: int) -> None:
        """Connects at the first `receive`; `prefetch` bounds what is here without a verdict."""
        self._dialer = dialer
        self._options = options
        self._prefetch = max(1, prefetch)
        self._durable = group is not None
        self._queue = f"virtbus.{group or 'tap.' + uuid.uuid4().hex}"
        self._waker = Waker()
        self._lock = threading.RLock()  # one thread at a time on the connection
        self._link: Link | None = None
        self._channel: Any = None
        self._dead_channel: Any = None
        self._generation = 0
        self._ready: deque[Message] = deque()
        self._waiting: list[tuple[float, int, Message]] = []  # a heap: due, delivery tag, message
        self._held: dict[str, deque[Message]] = {}  # by key: what came behind a message that waits
        self._backoff = Backoff("consume")
        self._closed = threading.Event()
        self._beat: threading.Thread | None = None

    # -- the contract

    def receive(self, timeout: float) -> Message | None:
        """See virtbus.bus.Subscription."""
        limit = time.monotonic() + timeout
        while not self._closed.is_set():
            self._connect(limit)
            with self._lock:
                message = self._next()
                if message is not None:
                    return message
                now = time.monotonic()
                if now >= limit:
                    return None
                due = self._waiting[0][0] if self._waiting else limit
                self._pump(min(limit, due) - now)
        return None

    def ack(self, message: Message) -> None:
        """See virtbus.bus.Subscription. A message of a lost connection is left alone: it comes again."""
        self._verdict(message, self._ack)

    def retry(self, message: Message, after: float) -> None:
        """See virtbus.bus.Subscription. It stays unacknowledged here: nobody else gets it meanwhile.

        RabbitMQ takes back what stays unacknowledged for half an hour (`consumer_timeout`).
        """

        def hold(handle: _Handle) -> None:
            due = time.monotonic() + max(0.0, after)
            if message.key is not None:
                due = self._in_line(message.key, handle.tag, due)
            heapq.heappush(self._waiting, (due, handle.tag, replace(message, redelivered=True)))
            if message.key is not None:
                held = self._held.setdefault(message.key, deque())
                behind = [one for one in self._ready if one.key == message.key]
                if behind:
                    held.extendleft(reversed(behind))
                    self._ready = deque(one for one in self._ready if one.key != message.key)

        self._verdict(message, hold)

    def _in_line(self, key: str, tag: int, due: float) -> float:
        """When a message may come that waits until `due`, were it not for others of its key that wait.

        Two that were out together come again in their order: not before an earlier one, and a later one
        not before it.
        """
        same = [(when, number) for when, number, one in self._waiting if one.key == key]
        due = max([due, *(when for when, number in same if number < tag)])
        if any(number > tag and when < due for when, number in same):
            self._waiting = [
                (max(when, due) if one.key == key and number > tag else when, number, one)
                for when, number, one in self._waiting
            ]
            heapq.heapify(self._waiting)
        return due

    def dead_letter(self, message: Message, reason: str) -> None:
        """See virtbus.bus.Subscription: into `virtbus.<group>.dead`, confirmed, then acknowledged."""

        def put_aside(handle: _Handle) -> None:
            if self._durable:
                self._publish_dead(message, handle, reason)
            else:
                emit(
                    Trouble(f"{self._queue}: {message.position} can't be read, and no group keeps it", reason)
                )
            self._ack(handle)

        self._verdict(message, put_aside)

    def close(self) -> None:
        """See virtbus.bus.Subscription."""
        self._closed.set()
        self._waker.wake()
        with self._lock:
            link, self._link = self._link, None
            self._forget()
        if link is not None:
            link.close()
        if self._beat is not None and self._beat is not threading.current_thread():
            self._beat.join(timeout=5.0)

    # -- connection

    def _connect(self, limit: float) -> None:
        """Return with a connection, or raise when there is none at `limit`."""
        while self._link is None and not self._closed.is_set():
            try:
                with self._lock:
                    self._open()
            except BusUnavailable as error:
                wait = self._backoff.next_wait()
                remaining = limit - time.monotonic()
                if self._closed.wait(max(0.0, min(wait, remaining))) or wait >= remaining:
                    raise BusUnavailable(str(error)) from error

    def _open(self) -> None:
        link = self._dialer.dial(self._waker)
        try:
            self._subscribe(link)
        except (BusUnavailable, BusDenied) as error:
            lost(link, error)
            self._dialer.skip()
            raise
        except LINK_FAULTS as error:
            told = translated(error, link.name, doing=f"subscribing to {self._queue}")
            lost(link, told)
            self._dialer.skip()
            raise told from error
        self._link = link
        self._backoff.reset()
        if self._beat is None:
            self._beat = threading.Thread(target=self._keep_alive, name="virtbus-consumer-beat", daemon=True)
            self._beat.start()

    def _subscribe(self, link: Link) -> None:
        link.declare_exchange()
        self._generation += 1
        self._forget()
        if self._durable:
            self._declare(link, f"{self._queue}.dead", {"x-queue-type": "quorum"})
            fresh = self._declare(
                link,
                self._queue,
                {
                    "x-queue-type": "quorum",
                    "x-single-active-consumer": True,
                    "x-dead-letter-exchange": "",
                    "x-dead-letter-routing-key": f"{self._queue}.dead",
                },
            )
        else:
            fresh = True
        channel = link.channel()
        if not self._durable:
            channel.queue_declare(self._queue, durable=False, exclusive=True, auto_delete=True)
        if fresh:
            channel.queue_bind(self._queue, self._options.exchange, "#")
        channel.basic_qos(0, self._prefetch, False)
        generation = self._generation
        channel.basic_consume(
            self._queue,
            callback=lambda raw: self._on_delivery(generation, raw),
            on_cancel=self._on_cancel,
        )
        self._channel = channel
        self._dead_channel = None

    def _declare(self, link: Link, queue: str, arguments: dict[str, Any]) -> bool:
        """Make sure that a queue is there. False: it is the operator's, with the bindings he gave it."""
        refusal: AMQPError | None = None
        if self._options.declare:
            try:
                link.channel().queue_declare(queue, durable=True, auto_delete=False, arguments=arguments)
                return True
            except (amqp.AccessRefused, amqp.PreconditionFailed) as error:
                refusal = error
        try:
            link.channel().queue_declare(queue, passive=True)
        except amqp.NotFound as error:
            raise BusDenied(
                f"{link.name}: queue {queue} does not exist and user {link.user} may not create it: create "
                f"it (quorum, single active consumer) bound to {self._options.exchange}, or grant configure "
                "rights"
            ) from error
        if isinstance(refusal, amqp.PreconditionFailed):
            emit(Notice(f"{link.name}: queue {queue} has other arguments than ours; used as it is"))
        return False

    def _forget(self) -> None:
        """What has no verdict comes again; what is here of it must not be handed out twice."""
        self._ready.clear()
        self._waiting.clear()
        self._held.clear()

    def _lose(self, error: BaseException) -> VirtbusError:
        link, self._link = self._link, None
        told: VirtbusError
        if link is None:
            told = BusUnavailable("not connected")
        else:
            told = translated(error, link.name, doing=f"consuming {self._queue}")
            lost(link, told)
            self._dialer.skip()
        self._forget()
        return told

    def _pump(self, timeout: float) -> None:
        if self._link is None:
            return
        try:
            self._link.connection.pump(max(0.0, timeout))
        except LINK_FAULTS as error:
            self._lose(error)

    def _keep_alive(self) -> None:
        """Heartbeats while the caller works on a message; `receive` does it itself while it waits."""
        while not self._closed.wait(min(1.0, (self._options.heartbeat or 4.0) / 4)):
            if self._lock.acquire(blocking=False):
                try:
                    self._pump(0.0)
                except Exception as error:  # noqa: BLE001 - this thread must outlive everything
                    emit(Trouble("consumer heartbeat", error))
                finally:
                    self._lock.release()

    # -- messages

    def _on_delivery(self, generation: int, raw: Any) -> None:
        properties = raw.properties
        info = raw.delivery_info
        if len(raw.body) > MAX_DECODE_BYTES:
            # No event of ours is so large, and what is prefetched of them would fill the memory: the broker
            # itself puts it aside (x-dead-letter-exchange), with the reason in x-death.
            self._channel.basic_reject(info["delivery_tag"], requeue=False)
            emit(MessageTooLarge(self._queue, len(raw.body), properties.get("user_id")))
            return
        headers = properties.get("application_headers") or {}
        body = raw.body
        message = Message(
            binding=Binding.AMQP,
            headers=headers,
            content_type=properties.get("content_type"),
            body=body.encode() if isinstance(body, str) else bytes(body),
            key=_key(headers, info["routing_key"]),
            redelivered=bool(info["redelivered"]),
            user_id=properties.get("user_id"),
            position=f"{self._queue}#{info['delivery_tag']}",
            handle=_Handle(generation, info["delivery_tag"], properties),
        )
        held = self._held.get(message.key) if message.key is not None else None
        if held is not None:
            held.append(message)
        else:
            self._ready.append(message)

    def _on_cancel(self, consumer_tag: str) -> None:
        raise ProtocolViolation(f"the broker cancelled us: queue {self._queue} was deleted or moved")

    def _next(self) -> Message | None:
        if self._waiting and self._waiting[0][0] <= time.monotonic():
            _, _, message = heapq.heappop(self._waiting)
            key = message.key
            if key in self._held and not any(one.key == key for _, _, one in self._waiting):
                self._ready.extendleft(reversed(self._held.pop(key)))
            return message
        return self._ready.popleft() if self._ready else None

    def _verdict(self, message: Message, act: Callable[[_Handle], None]) -> None:
        handle = message.handle
        if not isinstance(handle, _Handle):
            raise TypeError("this message is of another bus")
        with self._lock:
            if self._link is None or handle.generation != self._generation:
                return
            try:
                act(handle)
            except LINK_FAULTS as error:
                self._lose(error)

    def _ack(self, handle: _Handle) -> None:
        assert self._link is not None
        io = self._link.connection
        io.write(_ACK.pack(1, self._channel.channel_id, 13, *spec.Basic.Ack, handle.tag, 0, 0xCE))
        io.bytes_sent += 1
        # A write each is most of what an ack costs. While more is here to be handed out, several go
        # together: with the next read, or at the next beat at the latest.
        if not self._ready or io.unsent > _ACKS_TOGETHER:
            io.flush()

    def _publish_dead(self, message: Message, handle: _Handle, reason: str) -> None:
        """Publish to the dead-letter queue and wait for the confirm; without it the connection goes."""
        link = self._link
        assert link is not None
        settled: list[str] = []
        try:
            channel = self._dead_channel
            if channel is None:
                channel = link.channel()
                channel.confirm_select()
                self._dead_channel = channel
            for name, word in (("basic_ack", "ack"), ("basic_nack", "nack"), ("basic_return", "return")):
                channel.events[name].clear()
                channel.events[name].add(lambda *_, word=word: settled.append(word))
            channel.send_method(*_dead_letter(message, handle, reason, f"{self._queue}.dead"))
            limit = time.monotonic() + self._options.confirm_timeout
            while not settled or settled == ["return"]:
                if time.monotonic() >= limit:
                    raise TimeoutError("no confirm of a dead letter")
                link.connection.pump(min(1.0, limit - time.monotonic()))
        except LINK_FAULTS as error:
            raise self._lose(error) from error
        if settled != ["ack"]:
            told = BusUnavailable(
                f"{link.name}: queue {self._queue}.dead does not take a dead letter ({settled[0]}): is it "
                "there, is it full?"
            )
            self._lose(OSError(str(told)))
            raise told


def _dead_letter(message: Message, handle: _Handle, reason: str, queue: str) -> tuple[Any, ...]:
    """The message as it came, with the reason; who published it moves into a header (we are another user)."""
    kept = ("content_type", "content_encoding", "message_id", "timestamp", "type", "app_id")
    properties = {name: handle.properties[name] for name in kept if name in handle.properties}
    headers = {**message.headers, REASON_HEADER: reason.encode()[:_REASON_LIMIT].decode(errors="ignore")}
    if message.user_id is not None:
        headers[USER_HEADER] = message.user_id
    content = amqp.Message(message.body, application_headers=headers, delivery_mode=2, **properties)
    # exchange "", mandatory: a dead-letter queue that is gone must not swallow it
    return spec.Basic.Publish, "Bssbb", (0, "", queue, True, False), content


def _key(headers: Mapping[str, object], routing_key: str) -> str | None:
    """The partition key: in binary mode a header; a structured message shows it in its routing key."""
    key = headers.get("ce-partitionkey")
    if isinstance(key, str):
        return key
    words = routing_key.split(".")
    if len(words) != 3:
        return None
    return words[2] if words[2] != "-" else words[1]
