"""A consumer group on RabbitMQ: its quorum queue, its bindings, and what becomes of each message.

A group's queue is `virtbus.<group>`: durable, quorum, bound to the exchange with `#`, one active consumer at
a time (the others stand by), because two consumers of one queue would give up the order of a domain. Its
dead letters are in `virtbus.<group>.dead`. A broker that gives up on a message after too many deliveries puts
it there too, instead of dropping it.

**Careful after crashes.** The broker counts a delivery for everything that was prefetched when a connection
ended, and gives up on a message after too many. So a new connection prefetches one message, and as long as
they come with many deliveries it stays at one: an event that kills its consumer is then counted alone. Not
from the first redelivery on: quorum queues put what comes back behind what came back before, and only a
consumer that has all of it keeps its order. basic.qos can't change a consumer, and a cancelled one would hand
the queue to whoever stands by; so each member subscribes several times at once, with rising prefetch, and
climbs by cancelling the lower rungs: the next in line is its own.

**Never deaf.** Every few seconds the group makes sure of its queue, its exchange and its binding, without
traffic. A marker exchange `virtbus.<group>.watch`, bound to the exchange, goes with it: one that was deleted
and made again by somebody else is told from one that always stood.

Without a group the queue is exclusive, of a fresh name at each connection, and goes with it: a forgotten
consumer fills no broker, and the broker may believe in a dead connection for as long as it likes.
"""

from __future__ import annotations

import heapq
import struct
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import amqp
from amqp import spec

from virtbus.bus import BusOptions
from virtbus.bus.amqp.connection import LINK_FAULTS, Dialer, Link, Waker, lost, translated
from virtbus.bus.amqp.dead import DeadLetterOffice, declare_queue
from virtbus.bus.amqp.wire import ProtocolViolation
from virtbus.envelope import MAX_DECODE_BYTES
from virtbus.errors import BusDenied, BusUnavailable, VirtbusError
from virtbus.model import Binding, Message
from virtbus.retry import Backoff
from virtbus.telemetry import BusCutOff, Notice, TelemetryEvent, Trouble, emit

_ACK = struct.Struct(">BHIHHQBB")  # a method frame with basic.ack: tag, multiple, frame end
_ACKS_TOGETHER = 1024  # bytes
_CAREFUL_AT = 8  # deliveries without a verdict; RabbitMQ's own limit, where there is one, is 20
_RUNGS = (1, 2, 3, 5, 9)  # prefetch while messages come with so many: one, beside those that wait here
_SPARE = 50  # messages that wait to be put aside, beside the prefetch
_PREFETCH_MAX = 0xFFFF  # as basic.qos has room for
_VERIFY_SECONDS = 10.0
_STEADY_SECONDS = 10.0  # a connection that stood so long has not failed at once
_CLOSE_SECONDS = 5.0  # for dead letters that are under way
_FAULTS: tuple[type[BaseException], ...] = (BusUnavailable, *LINK_FAULTS)
_REMEMBERED = 10_000  # waits that are resumed after a reconnection


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
class GroupRepaired(TelemetryEvent):
    """Somebody deleted what the group stands on; it was declared and bound again."""

    LEVEL: ClassVar[str] = "error"
    MESSAGE: ClassVar[str] = (
        "the group was cut off from its exchange and is bound again; events in between did not reach it: "
        "see the gap check, or wait for a round of heartbeats"
    )
    queue: str
    what: str


@dataclass(frozen=True, slots=True)
class _Handle:
    """Which delivery a message is; a tag means nothing on another connection."""

    generation: int
    tag: int
    properties: Mapping[str, Any]


class AmqpSubscription:
    """A `virtbus.bus.Subscription`; a thread keeps heartbeats going while a message is worked on."""

    def __init__(self, dialer: Dialer, options: BusOptions, group: str | None, prefetch: int) -> None:
        """Connects at the first `receive`; `prefetch` bounds what is handed out without a verdict."""
        self._dialer = dialer
        self._options = options
        self._prefetch = max(1, prefetch)
        self._durable = group is not None
        self._queue = f"virtbus.{group}"
        self._waker = Waker()
        self._lock = threading.RLock()  # one thread at a time on the connection
        self._link: Link | None = None
        self._channel: Any = None
        self._tags: list[str] = []  # of our consumers that stand, the active one first
        self._room: list[int] = []  # their prefetch
        self._ending = ""  # the consumer that was active and is being cancelled
        self._generation = 0
        self._ready: deque[Message] = deque()
        self._out: set[int] = set()  # delivery tags that are with the caller
        self._waiting: list[tuple[float, int, Message]] = []  # a heap: due, delivery tag, message
        self._held: dict[str, deque[Message]] = {}  # by key: what came behind a message that waits
        self._resumed: dict[str, float] = {}  # by message id: when a wait ends, over reconnections
        self._calm = False  # a message came that had not been delivered too often
        self._office = DeadLetterOffice(dialer, options, f"{self._queue}.dead", self._put_aside)
        self._backoff = Backoff("consume")
        self._next_try = 0.0
        self._stood_since = 0.0
        self._closed = threading.Event()
        self._beat: threading.Thread | None = None
        self._ours = False  # the queue is ours to bind
        self._existed = False  # the queue was there at our last connection
        self._marked: bool | None = False  # the marker stands; None: we may not make one
        self._verify_at = 0.0

    # -- the contract

    def receive(self, timeout: float) -> Message | None:
        """See virtbus.bus.Subscription."""
        limit = time.monotonic() + timeout
        while not self._closed.is_set():
            self._connect(limit)
            with self._lock:
                self._verify()
                message = self._next()
                if message is not None:
                    return message
                self._climb()
                now = time.monotonic()
                if now >= limit:
                    return None
                due = self._waiting[0][0] if self._waiting else limit
                self._pump(min(limit, due if due > now else limit, now + 1.0) - now)
        return None

    def ack(self, message: Message) -> None:
        """See virtbus.bus.Subscription. A message of a lost connection is left alone: it comes again."""
        self._verdict(message, self._ack)

    def retry(self, message: Message, after: float) -> None:
        """See virtbus.bus.Subscription. It stays unacknowledged here: nobody else gets it meanwhile.

        RabbitMQ takes back what stays unacknowledged for half an hour (`consumer_timeout`); what comes again
        before its time waits here for the rest of it.
        """

        def hold(handle: _Handle) -> None:
            due = time.monotonic() + max(0.0, after)
            if (name := handle.properties.get("message_id")) is not None:
                self._resumed[name] = due
                while len(self._resumed) > _REMEMBERED:
                    del self._resumed[next(iter(self._resumed))]
            self._hold(message, handle, due)

        self._verdict(message, hold)

    def _hold(self, message: Message, handle: _Handle, due: float) -> None:
        """Keep it until `due`, and what came or comes of its key behind it."""
        if message.key is not None:
            due = self._in_line(message.key, handle.tag, due)
        heapq.heappush(self._waiting, (due, handle.tag, replace(message, redelivered=True)))
        if message.key is not None:
            held = self._held.setdefault(message.key, deque())
            behind = [one for one in self._ready if one.key == message.key]
            if behind:
                held.extendleft(reversed(behind))
                self._ready = deque(one for one in self._ready if one.key != message.key)

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
                self._office.put(message, handle.properties, reason)
            else:
                emit(
                    Trouble(f"{self._queue}: {message.position} can't be read, and no group keeps it", reason)
                )
                self._ack(handle)

        self._verdict(message, put_aside)

    def _put_aside(self, message: Message) -> None:
        """The office has the broker's confirm for it."""
        self._verdict(message, lambda handle: self._ack(handle, now=True))

    def close(self) -> None:
        """See virtbus.bus.Subscription."""
        if not self._closed.is_set():
            self._office.close(_CLOSE_SECONDS)
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
            wait, remaining = self._next_try - time.monotonic(), limit - time.monotonic()
            if self._closed.wait(max(0.0, min(wait, remaining))):
                return
            if wait > max(0.0, remaining):
                raise BusUnavailable(f"{self._queue}: not connected; next try in {wait - remaining:.1f} s")
            try:
                with self._lock:
                    self._open()
            except (BusUnavailable, BusDenied) as error:
                self._next_try = time.monotonic() + self._backoff.next_wait()
                if isinstance(error, BusDenied) or self._next_try >= limit:
                    raise

    def _open(self) -> None:
        link = self._dialer.dial(self._waker)
        try:
            self._subscribe(link)
        except (BusUnavailable, BusDenied) as error:
            lost(link, error, BusCutOff)
            self._dialer.skip()
            raise
        except LINK_FAULTS as error:
            told = translated(error, link.name, doing=f"subscribing to {self._queue}")
            lost(link, told, BusCutOff)
            self._dialer.skip()
            raise told from error
        self._link = link
        self._stood_since = time.monotonic()
        self._verify_at = self._stood_since + _VERIFY_SECONDS
        if self._beat is None:
            seconds = min(1.0, (self._options.heartbeat or 4.0) / 4)
            self._beat = threading.Thread(
                target=_keep_alive, args=(weakref.ref(self), self._closed, seconds),
                name="virtbus-consumer-beat", daemon=True,
            )  # fmt: skip
            self._beat.start()

    def _subscribe(self, link: Link) -> None:
        link.declare_exchange()
        self._generation += 1
        self._forget()
        self._calm = False
        if self._durable:
            self._declare_group(link)
        else:
            self._queue, self._ours = f"virtbus.tap.{uuid.uuid4().hex}", True
        channel = self._channel = link.channel()
        if not self._durable:
            channel.queue_declare(self._queue, durable=False, exclusive=True, auto_delete=True)
        if self._ours:
            channel.queue_bind(self._queue, self._options.exchange, "#")
        generation = self._generation
        top = min(_PREFETCH_MAX, self._prefetch + (_SPARE if self._durable else 0))
        self._room = [*(rung for rung in _RUNGS if self._durable and rung < top), top]
        self._tags, self._ending = [], ""
        for number, prefetch in enumerate(self._room):
            link.be_patient()
            channel.basic_qos(0, prefetch, False)
            tag = channel.basic_consume(
                self._queue,
                # A broker that loses us takes back what our consumers had in the order of their tags.
                f"virtbus-{number:02}",
                callback=lambda raw: self._on_delivery(generation, raw),
                on_cancel=self._on_cancel,
            )
            self._tags.append(tag)
        self._climb()

    def _declare_group(self, link: Link) -> None:
        self._declare(link, f"{self._queue}.dead", {})
        there = self._existed and not self._is_there(link)
        self._ours = self._declare(
            link,
            self._queue,
            {
                "x-single-active-consumer": True,
                "x-dead-letter-exchange": "",
                "x-dead-letter-routing-key": f"{self._queue}.dead",
            },
        )
        if there:
            emit(GroupRepaired(self._queue, "its queue had been deleted"))
        elif self._marked and self._ours and not self._marker_stands(link):
            emit(GroupRepaired(self._queue, f"exchange {self._options.exchange} had been deleted"))
        self._existed = True
        self._mark(link)

    def _is_there(self, link: Link) -> bool:
        try:
            with link.brief_channel() as channel:
                channel.queue_declare(self._queue, passive=True)
        except amqp.NotFound:
            return False
        return True

    def _declare(self, link: Link, queue: str, arguments: dict[str, Any]) -> bool:
        """Make sure that a queue is there. False: it is the operator's, with the bindings he gave it."""
        refusal: Exception | None = None
        if self._options.declare:
            refusal = declare_queue(link, queue, **arguments)
            if refusal is None:
                return True
        try:
            with link.brief_channel() as channel:
                channel.queue_declare(queue, passive=True)
        except amqp.NotFound as error:
            told = getattr(refusal, "reply_text", "bus.declare is false")  # names the right that is missing
            raise BusDenied(
                f"{link.name}: queue {queue} does not exist and user {link.user} may not create it ({told}): "
                f"grant that right, or create it (quorum, single active consumer) bound to "
                f"{self._options.exchange}"
            ) from error
        if isinstance(refusal, amqp.PreconditionFailed):
            emit(Notice(f"{link.name}: queue {queue} has other arguments than ours; used as it is"))
        return False

    def _forget(self) -> None:
        """What has no verdict comes again; what is here of it must not be handed out twice."""
        self._ready.clear()
        self._waiting.clear()
        self._held.clear()
        self._out.clear()
        self._office.forget()

    def _lose(self, error: BaseException) -> VirtbusError:
        link, self._link = self._link, None
        told: VirtbusError
        if link is None:
            told = BusUnavailable("not connected")
        else:
            told = translated(error, link.name, doing=f"consuming {self._queue}")
            lost(link, told, BusCutOff)
            self._dialer.skip()
            now = time.monotonic()
            if now - self._stood_since > _STEADY_SECONDS:
                self._backoff.reset()
            # Whatever fails after a successful connect waits too: it may fail each time.
            self._next_try = now + self._backoff.next_wait()
        self._forget()
        return told

    def _pump(self, timeout: float) -> None:
        if self._link is None:
            return
        try:
            self._link.connection.pump(max(0.0, timeout))
        except LINK_FAULTS as error:
            self._lose(error)

    def beat(self) -> None:
        """What the thread does while the caller works on a message; `receive` does it while it waits."""
        if self._lock.acquire(blocking=False):
            try:
                self._pump(0.0)
                self._verify()
            finally:
                self._lock.release()

    # -- the group's existence

    def _verify(self) -> None:
        """Make sure of exchange, queue and binding, when it is time."""
        link, now = self._link, time.monotonic()
        if link is None or now < self._verify_at:
            return
        self._verify_at = now + _VERIFY_SECONDS
        link.be_patient()
        try:
            gone = self._marked is True and not self._marker_stands(link)
            if self._options.declare and link.connection.channel_max != 1:
                link.declare_exchange()
            # A broker that allows one channel: the consumer's own serves, and a refusal costs a reconnection.
            alone = link.connection.channel_max == 1
            with nullcontext(self._channel) if alone else link.brief_channel() as side:
                side.queue_declare(self._queue, passive=True)
                if self._ours:
                    side.queue_bind(self._queue, self._options.exchange, "#")
            if gone:
                told = f"exchange {self._options.exchange} had been deleted"
                if not self._ours:
                    told += "; the queue is the operator's: bind it again"
                self._mark(link)
                emit(GroupRepaired(self._queue, told))
        except BusDenied as error:  # the exchange is gone, and not ours to make
            emit(Trouble(f"{self._queue} is cut off from its exchange", error))
        except amqp.NotFound as error:
            self._lose(error)
        except amqp.AccessRefused as error:
            emit(Trouble(f"{self._queue}: its binding can't be made sure of", error.reply_text))
            if link.connection.channel_max == 1:
                self._lose(error)
        except _FAULTS as error:
            self._lose(error)

    def _marker_stands(self, link: Link) -> bool:
        if link.connection.channel_max == 1 and self._link is link:
            return True  # no channel to ask on without risking the consumer's
        try:
            with link.brief_channel() as channel:
                channel.exchange_declare(f"{self._queue}.watch", type="fanout", passive=True)
        except amqp.NotFound:
            return False
        return True

    def _mark(self, link: Link) -> None:
        """Bind a marker to the exchange: an auto-delete exchange goes when what it is bound to goes.

        That takes the right to write to the exchange, which a consumer need not have.
        """
        name = f"{self._queue}.watch"
        if self._marked is None or not self._options.declare:
            self._marked = None
            return
        try:
            with link.brief_channel() as channel:
                channel.exchange_declare(name, type="fanout", durable=True, auto_delete=True)
                channel.exchange_bind(self._options.exchange, name, "")
            self._marked = True
        except (amqp.AccessRefused, amqp.PreconditionFailed):
            self._marked = None

    # -- messages

    def _on_delivery(self, generation: int, raw: Any) -> None:
        properties = raw.properties
        info = raw.delivery_info
        tag, redelivered = info["delivery_tag"], bool(info["redelivered"])
        if len(raw.body) > MAX_DECODE_BYTES:
            # No event of ours is so large, and what is prefetched of them would fill the memory: the broker
            # itself puts it aside (x-dead-letter-exchange), with the reason in x-death.
            self._channel.basic_reject(tag, requeue=False)
            emit(MessageTooLarge(self._queue, len(raw.body), properties.get("user_id")))
            return
        headers = properties.get("application_headers") or {}
        body = raw.body
        counted = headers.get("x-delivery-count", None if redelivered else 0)
        message = Message(
            binding=Binding.AMQP,
            headers=headers,
            content_type=properties.get("content_type"),
            body=body.encode() if isinstance(body, str) else bytes(body),
            key=_key(headers, info["routing_key"]),
            redelivered=redelivered,
            user_id=properties.get("user_id"),
            position=f"{self._queue}#{tag}",
            handle=_Handle(generation, tag, properties),
            attempts=counted + 1 if isinstance(counted, int) else None,
        )
        if not self._calm and (not isinstance(counted, int) or counted < _CAREFUL_AT):
            self._calm = True
            if self._link is not None:
                self._climb()
        due = self._resumed.pop(properties.get("message_id", ""), 0.0) if redelivered else 0.0
        held = self._held.get(message.key) if message.key is not None else None
        if due > time.monotonic():
            self._resumed[properties["message_id"]] = due
            self._hold(message, message.handle, due)  # type: ignore[arg-type]
        elif held is not None:
            held.append(message)
        else:
            self._ready.append(message)

    def _on_cancel(self, consumer_tag: str) -> None:
        raise ProtocolViolation(f"the broker cancelled us: queue {self._queue} was deleted or moved")

    def _climb(self) -> None:
        """More prefetch: all of it once a message came that is above suspicion, else one beside what waits.

        The lower rungs are cancelled from above, the active one last: the next in line is ours. Until the
        broker has confirmed that end nothing is handed out: who dies of a message before the next rung has
        what follows gets it back behind all of that.
        """
        if len(self._tags) < 2:
            return
        waiting = len(self._waiting) + sum(map(len, self._held.values())) + len(self._office)
        rung = next((n for n, room in enumerate(self._room) if room > waiting), len(self._room) - 1)
        if self._calm:
            rung = len(self._room) - 1
        if rung:
            lower, self._tags, self._room = self._tags[:rung], self._tags[rung:], self._room[rung:]
            for tag in reversed(lower[1:]):
                self._channel.basic_cancel(tag, nowait=True)
            self._ending = lower[0]
            self._channel.send_method(spec.Basic.Cancel, "sb", (lower[0], False))  # not waited for here
            self._channel.connection.flush()

    def _next(self) -> Message | None:
        if len(self._out) >= self._prefetch or self._ending in self._channel.callbacks:
            return None
        if self._waiting and self._waiting[0][0] <= time.monotonic():
            _, tag, message = heapq.heappop(self._waiting)
            key = message.key
            if key in self._held and not any(one.key == key for _, _, one in self._waiting):
                self._ready.extendleft(reversed(self._held.pop(key)))
            self._out.add(tag)
            return message
        if not self._ready:
            return None
        message = self._ready.popleft()
        self._out.add(message.handle.tag)  # type: ignore[attr-defined]
        return message

    def _verdict(self, message: Message, act: Callable[[_Handle], None]) -> None:
        handle = message.handle
        if not isinstance(handle, _Handle):
            raise TypeError("this message is of another bus")
        with self._lock:
            if self._link is None or handle.generation != self._generation:
                return
            self._out.discard(handle.tag)
            try:
                act(handle)
            except LINK_FAULTS as error:
                self._lose(error)

    def _ack(self, handle: _Handle, *, now: bool = False) -> None:
        assert self._link is not None
        io = self._link.connection
        io.write(_ACK.pack(1, self._channel.channel_id, 13, *spec.Basic.Ack, handle.tag, 0, 0xCE))
        io.bytes_sent += 1
        # A write each is most of what an ack costs. While more is here to be handed out, several go
        # together: with the next read, or at the next beat at the latest.
        if now or not self._ready or io.unsent > _ACKS_TOGETHER:
            io.flush()


def _keep_alive(subscription: weakref.ref[AmqpSubscription], closed: threading.Event, seconds: float) -> None:
    """Heartbeats while the caller works on a message, for as long as somebody holds the subscription."""
    while not closed.wait(seconds):
        held = subscription()
        if held is None:
            return
        try:
            held.beat()
        except Exception as error:  # noqa: BLE001 - this thread must outlive everything
            emit(Trouble("consumer heartbeat", error))
        del held


def _key(headers: Mapping[str, object], routing_key: str) -> str | None:
    """The partition key: in binary mode a header; a structured message shows it in its routing key."""
    key = headers.get("ce-partitionkey")
    if isinstance(key, str):
        return key
    words = routing_key.split(".")
    if len(words) != 3:
        return None
    return words[2] if words[2] != "-" else words[1]
