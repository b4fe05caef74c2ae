"""Dead letters on RabbitMQ: put aside over a connection of their own.

A memory alarm, a full dead-letter queue or a message that breaks its channel must cost the group nothing but
that message: the consuming connection never publishes, and what can't be put aside waits here, unacknowledged
there, until it can.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import amqp
from amqp import spec
from amqp.exceptions import AMQPError
from amqp.serialization import dumps

from virtbus.bus import CUT_HEADER, REASON_HEADER, BusOptions
from virtbus.bus.amqp.connection import LINK_FAULTS, Dialer, Link, Waker, translated
from virtbus.errors import BusDenied, BusUnavailable
from virtbus.model import Message
from virtbus.retry import Backoff
from virtbus.telemetry import DeadLetterStored, DeadLetterWaits, Trouble, emit

USER_HEADER = "x-virtbus-user-id"
AT_HEADER = "x-virtbus-dead-at"
OURS = frozenset({REASON_HEADER, CUT_HEADER, USER_HEADER, AT_HEADER})
_REASON_LIMIT = 1024
_STUB_BYTES = 65536  # of a body that no dead-letter queue takes
_IDLE_SECONDS = 10.0  # without anything to put aside the connection is let go
_CEILING_SECONDS = 30.0
_REFUSING = frozenset({311, 406, 501, 502})  # reply codes that speak of this message
_FRAME_OVERHEAD = 8 + 14 + 64  # frame, content header, and what the properties' names need


def queue_arguments(link: Link, **more: Any) -> list[dict[str, Any]]:
    """The arguments to declare a queue of ours with, in the order to try: a queue that an older broker or
    release made lacks the last one, and is used as it is.

    RabbitMQ 4 gives up on a message after 20 deliveries, and counts what was only prefetched when a
    connection ended; which event kills its consumer only the consumer can tell (`Consumer.max_attempts`).
    """
    plain = {"x-queue-type": "quorum", **more}
    unlimited = (link.server_major or 0) >= 4
    return [{**plain, "x-delivery-limit": -1}, plain] if unlimited else [plain]


def declare_queue(link: Link, queue: str, **more: Any) -> Exception | None:
    """Declare a durable queue of ours on a channel of its own. The refusal (403, 406), or None when done.

    Raises as LINK_FAULTS.
    """
    refusal: Exception | None = None
    for arguments in queue_arguments(link, **more):
        try:
            with link.brief_channel() as channel:
                channel.queue_declare(queue, durable=True, auto_delete=False, arguments=arguments)
            return None
        except (amqp.AccessRefused, amqp.PreconditionFailed) as error:
            refusal = error
    return refusal


# ------------------------------------------------------------------------------------ putting aside


@dataclass(order=True, slots=True)
class _Aside:
    """A message on its way into the dead letters."""

    due: float
    number: int
    message: Message = field(compare=False)
    properties: Mapping[str, Any] = field(compare=False)
    reason: str = field(compare=False)
    backoff: Backoff = field(compare=False)
    refused: int = field(compare=False, default=0)  # by the broker, as it was: the next try is smaller


class DeadLetterOffice:
    """Puts messages of one group aside, in a thread, each until the broker has confirmed it.

    Guarantee: `done` is called for a message only after its letter was confirmed, and not after `forget`.
    """

    def __init__(
        self, dialer: Dialer, options: BusOptions, queue: str, done: Callable[[Message], None]
    ) -> None:
        """`queue`: the dead letters'. Connects when there is something to put aside."""
        self._dialer, self._options, self._queue, self._done = dialer, options, queue, done
        self._waker = Waker()
        self._lock = threading.Lock()
        self._waiting: list[_Aside] = []  # a heap
        self._flying: _Aside | None = None
        self._numbers = itertools.count()
        self._idle = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None
        # Of the thread alone:
        self._link: Link | None = None
        self._channel: Any = None
        self._sent = 0
        self._settled: list[tuple[str, int]] = []

    def __len__(self) -> int:
        """Messages that are not confirmed yet."""
        with self._lock:
            return len(self._waiting) + (self._flying is not None)

    def put(self, message: Message, properties: Mapping[str, Any], reason: str) -> None:
        """Take it on; returns at once."""
        backoff = Backoff("dead_letter", ceiling=_CEILING_SECONDS, hook=lambda _: None)
        with self._lock:
            if self._closed:
                return
            item = _Aside(0.0, next(self._numbers), message, properties, reason, backoff)
            heapq.heappush(self._waiting, item)
            self._idle.clear()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="virtbus-dead-letters", daemon=True)
                self._thread.start()
        self._waker.wake()

    def forget(self) -> None:
        """The consuming connection is gone: all of them come again by themselves."""
        with self._lock:
            self._waiting.clear()
            self._flying = None

    def close(self, timeout: float) -> None:
        """Wait until everything is confirmed or has failed once, `timeout` seconds at most; then let go."""
        if len(self):
            self._idle.wait(timeout)
        with self._lock:
            self._closed = True
        self._waker.wake()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=5.0)

    # -- the thread

    def _run(self) -> None:
        quiet_since = time.monotonic()
        while not self._closed:
            item = self._take()
            try:
                if item is not None:
                    quiet_since = time.monotonic()
                    self._try(item)
                elif self._link is not None and time.monotonic() - quiet_since > _IDLE_SECONDS:
                    self._let_go()
                else:
                    self._rest()
            except Exception as error:  # noqa: BLE001 - this thread must outlive everything
                emit(Trouble("putting a dead letter aside", error))
                if item is not None:
                    self._again(item, error)
        self._let_go()

    def _take(self) -> _Aside | None:
        with self._lock:
            if self._waiting and self._waiting[0].due <= time.monotonic():
                self._flying = heapq.heappop(self._waiting)
                return self._flying
            if all(item.due for item in self._waiting):  # none, or all have failed before
                self._idle.set()
            return None

    def _rest(self) -> None:
        """Until something is put, or due; an open connection is served meanwhile."""
        with self._lock:
            due = self._waiting[0].due if self._waiting else float("inf")
        wait = max(0.0, min(1.0, due - time.monotonic()))
        if self._link is None:
            self._waker.wait(wait)
            return
        try:
            self._link.connection.pump(wait)
        except LINK_FAULTS as error:
            self._lose(error)

    def _try(self, item: _Aside) -> None:
        try:
            link = self._open()
            content, cut = letter(item.message, item.properties, item.reason, _room(link), item.refused)
            self._publish(link, content)
        except LINK_FAULTS as error:
            item.refused += getattr(error, "reply_code", 0) in _REFUSING
            self._again(item, self._lose(error))
            return
        except (BusUnavailable, BusDenied) as error:
            self._again(item, error)
            return
        with self._lock:
            stands = self._flying is item
            self._flying = None
        if stands:
            self._done(item.message)
            emit(DeadLetterStored(self._queue, item.message.position, item.reason[:200], cut))

    def _open(self) -> Link:
        """The connection, with the queue declared. Raises BusUnavailable, BusDenied, LINK_FAULTS."""
        if self._link is None:
            self._link = self._dialer.dial(self._waker, told=None)
            self._link.on_blocked = lambda blocked, reason: None
            if self._options.declare:
                declare_queue(self._link, self._queue)  # refused: it is the operator's, if it is there
            self._channel = self._link.channel()
            self._channel.confirm_select()
            self._sent, self._settled = 0, []
            events = self._channel.events
            events["basic_ack"].add(lambda tag, *_: self._settled.append(("ack", tag)))
            events["basic_nack"].add(lambda tag, *_: self._settled.append(("nack", tag)))
            events["basic_return"].add(lambda *_: self._settled.append(("return", self._sent)))
        return self._link

    def _publish(self, link: Link, content: amqp.Message) -> None:
        """Publish one and wait for its confirm: no other is under way, so tags can't be mixed up."""
        self._sent += 1
        # Through the default exchange, mandatory: a dead-letter queue that is gone must not swallow it.
        publish(self._channel, content, self._queue)
        limit = time.monotonic() + self._options.confirm_timeout
        words: list[str] = []
        while "ack" not in words and "nack" not in words:
            if self._closed or time.monotonic() >= limit:
                raise TimeoutError("no confirm of a dead letter: does the broker block publishers?")
            link.connection.pump(min(1.0, limit - time.monotonic()))
            words = [word for word, tag in self._settled if tag == self._sent]
        if words == ["ack"]:
            return
        told = f"{link.name}: queue {self._queue} does not take a dead letter ({words[0]}): "
        self._let_go()  # the next try declares it again
        raise BusUnavailable(told + ("it does not exist" if words[0] == "return" else "is it full?"))

    def _again(self, item: _Aside, error: Exception) -> None:
        with self._lock:
            if self._flying is not item:  # forgotten
                return
            self._flying = None
            item.due = time.monotonic() + item.backoff.next_wait()
            heapq.heappush(self._waiting, item)
            waiting = len(self._waiting)
        if item.refused in (0, 3):  # a smaller try comes first
            emit(DeadLetterWaits(self._queue, item.message.position, waiting, error))

    def _lose(self, error: BaseException) -> Exception:
        link, self._link = self._link, None
        told = translated(
            error, link.name if link else "the broker", doing=f"dead-lettering to {self._queue}"
        )
        if link is not None:
            link.discard()
        return told

    def _let_go(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()


def publish(channel: Any, content: amqp.Message, queue: str) -> None:
    """basic.publish to one queue, mandatory; the frames go out with the next pump."""
    channel.send_method(spec.Basic.Publish, "Bssbb", (0, "", queue, True, False), content)


def _room(link: Link) -> int:
    """Bytes of properties that one content header may have."""
    return link.connection.frame_max - _FRAME_OVERHEAD


def letter(
    message: Message, properties: Mapping[str, Any], reason: str, room: int, refused: int = 0
) -> tuple[amqp.Message, str | None]:
    """The message as it came with the reason in front, and what had to be cut for `room` bytes of properties.

    Who published it moves into a header: the broker lets nobody publish under another user's name. After
    the broker has `refused` it once its body becomes a stub, after a second time its headers go too.
    """
    kept = ("content_type", "content_encoding", "message_id", "timestamp", "type", "app_id")
    basic = {name: properties[name] for name in kept if name in properties}
    headers: dict[str, Any] = {
        REASON_HEADER: reason.encode()[:_REASON_LIMIT].decode(errors="ignore"),
        AT_HEADER: datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
    if message.user_id is not None:
        headers[USER_HEADER] = message.user_id
    left, body, cuts = room - _size(headers) - 300 * len(basic), message.body, []
    theirs = {name: value for name, value in message.headers.items() if name not in OURS}
    dropped = []
    for name, size in sorted(
        ((name, _size({name: theirs[name]})) for name in theirs), key=lambda one: one[1]
    ):
        left -= size
        if left < _REASON_LIMIT or refused > 1:
            dropped.append(str(name))
            del theirs[name]
    if dropped:
        cuts.append(f"headers left out: {', '.join(dropped)[:400]}")
    if refused and len(body) > _STUB_BYTES:
        cuts.append(f"body: the first {_STUB_BYTES} of {len(body)} bytes")
        body = body[:_STUB_BYTES]
    cut = "; ".join(cuts) or None
    if cut is not None:
        headers[CUT_HEADER] = cut.encode()[:_REASON_LIMIT].decode(errors="ignore")
    content = amqp.Message(body, application_headers={**headers, **theirs}, delivery_mode=2, **basic)
    return content, cut


def _size(headers: Mapping[str, Any]) -> int:
    """Bytes in a header table; of what can't be written again, more than any frame has."""
    try:
        return len(dumps("F", [dict(headers)]))
    except (AMQPError, ValueError, TypeError, OverflowError, RecursionError, AttributeError):
        return 1 << 30
