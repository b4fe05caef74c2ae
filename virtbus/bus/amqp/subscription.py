"""A consumer group on RabbitMQ: its quorum queue, its binding, and what becomes of each message.

A group's queue is `virtbus.<group>`: durable, quorum, bound to the exchange with `#`, one active consumer at
a time (the others stand by), because two consumers of one queue would give up the order of a domain. Its
dead letters are in `virtbus.<group>.dead`; a broker that gives up on a message after too many deliveries puts
it there too, instead of dropping it.

**Careful after crashes.** The broker counts a delivery for everything that was prefetched when a connection
ended, and gives up on a message after too many. So a new connection prefetches one message, and as long as
they come with many deliveries it stays at one: an event that kills its consumer is then counted alone. Not
from the first redelivery on: quorum queues put what comes back behind what came back before, and only a
consumer that has all of it keeps its order. basic.qos can't change a consumer, and a cancelled one would hand
the queue to whoever stands by. So each member starts several consumers at once, its *rungs*, with rising
prefetch. To prefetch more it cancels the lower rungs: the next in line is its own. Members that come together
subscribe one after the other (`_Topology.take_turn`), or another's rung would stand in between.

**Never deaf.** Every few seconds the group makes sure of its queue, its exchange and its binding, without
traffic. A marker exchange `virtbus.<group>.watch`, bound to the exchange, goes with it: one that was deleted
and declared again by somebody else is recognised.

Without a group the queue is exclusive, of a fresh name at each connection, and goes with it: a forgotten
consumer fills no broker, and the broker may believe in a dead connection for as long as it likes.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
import uuid
import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import amqp
from amqp import spec

from virtbus.bus import BusOptions
from virtbus.bus.amqp.connection import LINK_FAULTS, BrokerLink, Dialer, Waker, lost, translated
from virtbus.bus.amqp.letters import STUB_BYTES, AmqpLetterStore, stub_of
from virtbus.bus.amqp.wire import ProtocolViolation, received
from virtbus.bus.subscription import Item, LineSubscription
from virtbus.envelope import MAX_DECODE_BYTES
from virtbus.errors import BusDenied, BusUnavailable
from virtbus.model import Message
from virtbus.retry import Backoff
from virtbus.telemetry import BusCutOff, Notice, TelemetryEvent, Trouble, emit

_ACKS_TOGETHER = 1024  # bytes
_DEAF_SECONDS = 0.05  # while messages are here: acks not sent, and a cut not heard of, mean repeats
_CAREFUL_AT = 8  # deliveries without a verdict; RabbitMQ's own limit, where there is one, is 20
_RUNGS = (1, 2, 3, 5, 9)  # prefetch while messages come with so many: one, beside those that wait here
_SPARE = 50  # messages that wait to be dead-lettered, beside the prefetch
_PREFETCH_MAX = 0xFFFF  # as basic.qos has room for
_VERIFY_SECONDS = 10.0
_STEADY_SECONDS = 10.0  # a connection that stood so long has not failed at once
_CLOSE_SECONDS = 5.0  # for dead letters that are under way
_REMEMBERED = 10_000  # retries that are resumed after a reconnection


class MessageTooLarge(TelemetryEvent, level="warning", every=10):
    """a message is too large for an event; its beginning goes to the dead letters"""

    queue: str
    size_bytes: int
    publisher: str | None


class GroupRepaired(TelemetryEvent, level="error"):
    """the group was cut off from its exchange and is bound again; events in between did not reach it"""

    queue: str
    what: str


class _Topology:
    """A group's queue, its binding, and the marker that shows when somebody deleted the exchange."""

    def __init__(self, options: BusOptions, group: str | None) -> None:
        self.queue, self.durable = f"virtbus.{group}", group is not None
        self._options = options
        self._ours = True  # the queue is ours to bind
        self._existed = False  # the queue was there at our last connection
        self._marked: bool | None = False  # the marker stands; None: we may not make one

    def declare(self, link: BrokerLink) -> None:
        """Make sure of everything on a new connection. Raises BusDenied, and as LINK_FAULTS."""
        link.declare_exchange()
        if not self.durable:
            self.queue = f"virtbus.tap.{uuid.uuid4().hex}"
            with link.brief_channel() as side:
                side.queue_declare(self.queue, durable=False, exclusive=True, auto_delete=True)
                side.queue_bind(self.queue, self._options.exchange, "#")
            return
        dead = f"{self.queue}.dead"
        self._declare(link, dead)
        deleted = self._existed and not link.finds(self._look)
        self._ours = self._declare(
            link,
            self.queue,
            **{
                "x-single-active-consumer": True,
                "x-dead-letter-exchange": "",
                "x-dead-letter-routing-key": dead,
            },
        )
        if not self._ours and link.is_stream(self.queue):
            raise BusDenied(
                f"{link.name}: queue {self.queue} is a stream, which does not know what was acknowledged: "
                "each connection would begin with what comes next; replace it by a quorum queue"
            )
        if deleted:
            emit(GroupRepaired(self.queue, "its queue had been deleted"))
        elif self._marked and self._ours and not self._marker_stands(link):
            emit(GroupRepaired(self.queue, f"exchange {self._options.exchange} had been deleted"))
        self._existed = True
        self._mark(link)
        if self._ours:
            with link.brief_channel() as side:
                side.queue_bind(self.queue, self._options.exchange, "#")

    def verify(self, link: BrokerLink, channel: Any) -> None:
        """Make sure of exchange, queue and binding. Raises BusDenied, and as LINK_FAULTS."""
        # A broker that allows one channel: the consumer's own serves, and a refusal costs a reconnection.
        alone = link.connection.channel_max == 1
        gone = self._marked is True and not alone and not self._marker_stands(link)
        if not alone:
            link.declare_exchange()
        with nullcontext(channel) if alone else link.brief_channel() as side:
            self._look(side)
            if self._ours:
                side.queue_bind(self.queue, self._options.exchange, "#")
        if gone:
            told = f"exchange {self._options.exchange} had been deleted"
            if not self._ours:
                told += "; the queue is the operator's: bind it again"
            self._mark(link)
            emit(GroupRepaired(self.queue, told))

    def take_turn(self, link: BrokerLink) -> str | None:
        """From here on no other member of the group subscribes: until the queue of this name is deleted.

        An exclusive one with the marker's name, so that nobody needs a further right. None: there is none
        (nothing to be kept in turn, no right, no room), or somebody hangs with it. Raises as LINK_FAULTS.
        """
        name, until = f"{self.queue}.watch", time.monotonic() + self._options.connect_timeout
        while self.durable and self._options.declare and time.monotonic() < until:
            try:
                with link.brief_channel() as side:
                    side.queue_declare(name, exclusive=True, auto_delete=False)
                return name
            except amqp.ResourceLocked:
                time.sleep(random.uniform(0.02, 0.1))  # noqa: S311 - no secret
            except (amqp.AccessRefused, amqp.PreconditionFailed):
                break
        return None

    def _look(self, channel: Any) -> None:
        channel.queue_declare(self.queue, passive=True)

    def _declare(self, link: BrokerLink, queue: str, **arguments: Any) -> bool:
        """Make sure that a queue is there. False: it is the operator's, with the bindings he gave it."""
        refusal = link.declare_queue(queue, **arguments) if self._options.declare else None
        if self._options.declare and refusal is None:
            return True
        if not link.finds(lambda channel: channel.queue_declare(queue, passive=True)):
            told = getattr(refusal, "reply_text", "bus.declare is false")  # names the right that is missing
            create = f"create it (quorum, single active consumer) bound to {self._options.exchange}"
            if isinstance(refusal, amqp.PreconditionFailed):  # a limit of the virtual host
                raise BusDenied(
                    f"{link.name}: queue {queue} does not exist, and {told}: raise that, or {create}"
                )
            raise BusDenied(
                f"{link.name}: queue {queue} does not exist and user {link.user} may not create it ({told}): "
                f"grant that right, or {create}"
            )
        if isinstance(refusal, amqp.PreconditionFailed):
            emit(Notice(f"{link.name}: queue {queue} has other arguments than ours; used as it is"))
        return False

    def _marker_stands(self, link: BrokerLink) -> bool:
        return link.finds(
            lambda channel: channel.exchange_declare(f"{self.queue}.watch", "fanout", passive=True)
        )

    def _mark(self, link: BrokerLink) -> None:
        """Bind a marker to the exchange: an auto-delete exchange goes when what it is bound to goes.

        That takes the right to write to the exchange, which a consumer need not have.
        """
        if self._marked is None or not self._options.declare:
            self._marked = None
            return
        try:
            with link.brief_channel() as channel:
                name = f"{self.queue}.watch"
                channel.exchange_declare(name, "fanout", durable=True, auto_delete=True)
                channel.exchange_bind(self._options.exchange, name, "")
            self._marked = True
        except (amqp.AccessRefused, amqp.PreconditionFailed):
            self._marked = None


@dataclass(frozen=True, slots=True)
class _Origin:
    """Which delivery of this connection a message is."""

    tag: int
    properties: Mapping[str, Any]
    cut: str | None = None  # what was cut of the message when it came


class AmqpSubscription(LineSubscription):
    """A `virtbus.bus.Subscription`; a thread keeps heartbeats going while a message is worked on."""

    def __init__(self, dialer: Dialer, options: BusOptions, group: str | None, prefetch: int) -> None:
        """Connects at the first `receive`; `prefetch` bounds what is handed out without a verdict."""
        self._topology = _Topology(options, group)
        store = AmqpLetterStore(dialer, options, f"virtbus.{group}.dead") if group is not None else None
        super().__init__(group, prefetch, store)
        self._dialer = dialer
        self._options = options
        self._prefetch = max(1, prefetch)
        self._waker = Waker()
        self._link: BrokerLink | None = None
        self._channel: Any = None
        self._rungs: list[
            tuple[str, int]
        ] = []  # our consumers that stand, with their prefetch; first the active
        self._ending = ""  # the consumer that was active and is being cancelled
        self._resumed: dict[str, float] = {}  # by `_name`: when a retry is due, over reconnections
        self._calm = False  # a message came that had not been delivered too often
        self._backoff = Backoff("consume")
        self._next_try, self._why = 0.0, ""  # when to try again, and why the last try failed
        self._stood_since = 0.0
        self._verify_at = 0.0
        self._pumped_at = 0.0
        self._closed = threading.Event()
        self._beat: threading.Thread | None = None

    def receive(self, timeout: float) -> Message | None:
        """See virtbus.bus.Subscription."""
        limit = time.monotonic() + timeout
        while not self._closed.is_set():
            self._connect(limit)
            with self._lock:
                if time.monotonic() - self._pumped_at > _DEAF_SECONDS:
                    self._pump(0.0)
                self._serve()
                if self._link is None:
                    continue
                now = time.monotonic()
                # Who dies of a message before the next rung has what follows gets it back behind all of that.
                message = self._line.next(now) if self._ending not in self._channel.callbacks else None
                if message is not None:
                    return message
                self._climb()
                if now >= limit:
                    return None
                self._pump(min(limit, self._line.due(), now + 1.0) - now)
        return None

    def retry(self, message: Message, after: float) -> None:
        """See virtbus.bus.Subscription.

        RabbitMQ takes back what stays unacknowledged for half an hour (`consumer_timeout`); what comes again
        before its time waits here for the rest of it.
        """
        origin = getattr(message.handle, "origin", None)
        if isinstance(origin, _Origin):
            self._resumed[_name(message, origin.properties)] = time.monotonic() + max(0.0, after)
            while len(self._resumed) > _REMEMBERED:
                del self._resumed[next(iter(self._resumed))]
        super().retry(message, after)

    def close(self) -> None:
        """See virtbus.bus.Subscription."""
        if not self._closed.is_set() and self._letters is not None:
            self._letters.close(_CLOSE_SECONDS)
        self._closed.set()
        self._waker.wake()
        with self._lock:
            self._collect()
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
                raise BusUnavailable(
                    f"{self._topology.queue}: not connected; next try in {wait - remaining:.1f} s{self._why}"
                )
            try:
                with self._lock:
                    self._open()
            except (BusUnavailable, BusDenied) as error:
                self._next_try, self._why = time.monotonic() + self._backoff.next_wait(), f": {error}"
                if isinstance(error, BusDenied) or self._next_try >= limit:
                    raise

    def _open(self) -> None:
        link = self._dialer.dial(self._waker)
        with self._dialer.setting_up(link, f"subscribing to {self._topology.queue}", BusCutOff):
            self._topology.declare(link)
            self._subscribe(link)
        self._link, self._why = link, ""
        self._stood_since = time.monotonic()
        self._verify_at = self._stood_since + _VERIFY_SECONDS
        if self._beat is None:
            seconds = min(1.0, (self._options.heartbeat or 4.0) / 4)
            self._beat = threading.Thread(
                target=_keep_alive, args=(weakref.ref(self), self._closed, seconds),
                name="virtbus-consumer-beat", daemon=True,
            )  # fmt: skip
            self._beat.start()

    def _subscribe(self, link: BrokerLink) -> None:
        self._forget()
        self._calm, self._ending = False, ""
        turn = self._topology.take_turn(link)
        channel = self._channel = link.channel()
        top = min(_PREFETCH_MAX, self._prefetch + (_SPARE if self._topology.durable else 0))
        rooms = [*(rung for rung in _RUNGS if self._topology.durable and rung < top), top]
        # A broker that loses us takes back what our consumers had in the order of their tags.
        rungs = [(f"virtbus-{number:02}", room) for number, room in enumerate(rooms)]
        self._rungs = []  # messages come in between: nobody climbs before the last rung stands
        for tag, prefetch in rungs:
            link.be_patient()
            channel.basic_qos(0, prefetch, False)
            channel.basic_consume(
                self._topology.queue,
                tag,
                callback=lambda raw: self._on_delivery(channel, raw),
                on_cancel=self._on_cancel,
            )
        if turn is not None:
            link.be_patient()
            channel.queue_delete(turn)
        self._rungs = rungs
        self._climb()

    def _forget(self) -> None:
        """What has no verdict comes again; what is here of it must not be handed out twice."""
        self._line.forget()
        if self._letters is not None:
            self._letters.forget()

    def _lose(self, error: BaseException) -> None:
        link, self._link = self._link, None
        if link is not None:
            lost(link, translated(error, link.name, doing=f"consuming {self._topology.queue}"), BusCutOff)
            self._dialer.skip()
            now = time.monotonic()
            if now - self._stood_since > _STEADY_SECONDS:
                self._backoff.reset()
            # Whatever fails after a successful connect waits too: it may fail each time.
            self._next_try = now + self._backoff.next_wait()
        self._forget()

    def _pump(self, timeout: float) -> None:
        if self._link is not None:
            try:
                self._link.connection.pump(max(0.0, timeout))
            except LINK_FAULTS as error:
                self._lose(error)
        self._pumped_at = time.monotonic()

    def beat(self) -> None:
        """What the thread does while the caller works on a message; `receive` does it while it waits."""
        if self._lock.acquire(blocking=False):
            try:
                self._pump(0.0)
                self._serve()
            finally:
                self._lock.release()

    def _serve(self) -> None:
        self._collect()
        if self._link is None or time.monotonic() < self._verify_at:
            return
        self._verify_at = time.monotonic() + _VERIFY_SECONDS
        self._link.be_patient()
        queue = self._topology.queue
        try:
            self._topology.verify(self._link, self._channel)
        except BusDenied as error:  # the exchange is gone, and not ours to make
            emit(Trouble(f"{queue} is cut off from its exchange", error))
        except amqp.AccessRefused as error:
            emit(Trouble(f"{queue}: its binding can't be checked", error.reply_text))
            if self._link.connection.channel_max == 1:
                self._lose(error)
        except LINK_FAULTS as error:
            self._lose(error)

    # -- messages

    def _on_delivery(self, channel: Any, raw: Any) -> None:
        properties, queue, tag = raw.properties, self._topology.queue, raw.delivery_info["delivery_tag"]
        size, cut = len(raw.body), None
        if size > MAX_DECODE_BYTES:  # no event of ours, and what is prefetched of them would fill the memory
            raw.body, cut = raw.body[:STUB_BYTES], stub_of(size)
        key = _key(properties.get("application_headers") or {}, raw.delivery_info["routing_key"])
        item = Item(key if key is not None else tag, tag, _Origin(tag, properties, cut))
        message = item.message = received(raw, queue, key=key, handle=item)
        if message.redelivered and self._resumed:
            name = _name(message, properties)
            due = self._resumed.pop(name, 0.0)
            if due > time.monotonic():
                item.due = self._resumed[name] = due
        if cut is None:
            self._line.arrived(item)
        else:
            emit(MessageTooLarge(queue, size, properties.get("user_id")))
            reason = f"{message.position}: {size} bytes are more than the {MAX_DECODE_BYTES} that are read"
            self._dead_letter(item, reason)
        if not self._calm and (message.attempts or 0) <= _CAREFUL_AT:
            self._calm = True
            self._climb()

    def _on_cancel(self, consumer_tag: str) -> None:
        raise ProtocolViolation(f"the broker cancelled us: queue {self._topology.queue} was deleted or moved")

    def _climb(self) -> None:
        """More prefetch: all of it once a message came that is above suspicion, else one beside what waits.

        The lower rungs are cancelled from above, the active one last: the next in line is ours. Until the
        broker has confirmed that end nothing is handed out.
        """
        top, held = len(self._rungs) - 1, self._line.held
        rung = top if self._calm else next((n for n, (_, room) in enumerate(self._rungs) if room > held), top)
        if rung > 0:
            lower, self._rungs = self._rungs[:rung], self._rungs[rung:]
            for tag, _ in reversed(lower[1:]):
                self._channel.basic_cancel(tag, nowait=True)
            self._ending = lower[0][0]
            self._channel.send_method(spec.Basic.Cancel, "sb", (self._ending, False))  # not waited for here
            self._channel.connection.flush()

    def _done(self, item: Item) -> None:
        if self._link is None:
            return
        connection = self._link.connection
        try:
            self._channel.basic_ack(item.origin.tag)
            # A write each is most of what an ack costs. While more is here to be handed out, several go
            # together: with the next read, or at the next beat at the latest.
            if not self._line.ready or connection.unsent > _ACKS_TOGETHER:
                connection.flush()
        except LINK_FAULTS as error:
            self._lose(error)

    def _wake(self) -> None:
        self._waker.wake()


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


def _name(message: Message, properties: Mapping[str, Any]) -> str:
    """What identifies a message that comes again; others than agents may send none, or one like another's."""
    given = f"{properties.get('message_id')} {message.headers.get('ce-id')}".encode("utf-8", "replace")
    return hashlib.blake2b(given + b"\0" + message.body, digest_size=16).hexdigest()


def _key(headers: Mapping[str, object], routing_key: str) -> str | None:
    """The partition key: in binary mode a header; a structured message shows it in its routing key."""
    key = headers.get("ce-partitionkey")
    if isinstance(key, str):
        return key
    words = routing_key.split(".")
    if len(words) != 3:
        return None
    return words[2] if words[2] != "-" else words[1]
