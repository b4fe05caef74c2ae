"""RabbitMQ: pipelined publisher confirms that can't lie, and consumer groups on quorum queues.

What becomes of a record (`Outcome`), and what of the connection:

| the broker | outcome | connection |
|---|---|---|
| acks | Confirmed | stays |
| returns it (mandatory, nobody bound), then acks | Unroutable | stays |
| nacks it (a full queue with reject-publish, a queue that failed) | Nacked | stays |
| closes the channel over one record: 406 too large or malformed, 311 | Refused | thrown away |
| closes the connection over one record, twice: 501, 502 | Refused | thrown away |
| refuses one routing key (topic permission, 403) | Unroutable | thrown away |
| fails on one record (541, 505) | Nacked | thrown away |
| closes the channel for all: 403, 404, user-id mismatch | Deferred(BusDenied) | thrown away |
| goes away, misses heartbeats or a confirm deadline, acks what it was not sent | Deferred | thrown away |
| is larger than `max_record_bytes` | Refused, without asking | stays |

The broker does not say which of several unconfirmed records closed a channel. All of them are Deferred
then, and as many records are sent one at a time next, until the offending one is alone.

Acks carry nothing but a delivery tag. Tags are counted and kept with the connection they belong to and die
with it, so that a late ack can't meet a newer record; returns are matched by message id.
"""

from __future__ import annotations

import re
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import kombu
from amqp.exceptions import AMQPError, FrameSyntaxError

from virtbus import envelope
from virtbus.bus import BusOptions, DeadLetters, Feed, Memory, Subscription, checked_group
from virtbus.bus.amqp.connection import (
    LINK_FAULTS,
    REFUSING_CODES,
    BrokerLink,
    Dialer,
    Endpoint,
    Waker,
    lost,
    translated,
)
from virtbus.bus.amqp.wire import ProtocolViolation
from virtbus.errors import BusDenied, BusUnavailable, RecordRefused, VirtbusError
from virtbus.model import Check, Confirmed, Deferred, Nacked, Outcome, Record, Refused, Unroutable
from virtbus.telemetry import METRICS, BusBlocked, emit

_CONFIRMED = Confirmed()
_RETURNED = Unroutable()
_NACKED = Nacked("the broker nacked it: a queue is full (reject-publish) or failed")
_UNSENT_LIMIT = 1 << 20  # bytes waiting for the socket before no more is taken
_UNENCODABLE = (struct.error, ValueError, FrameSyntaxError)  # py-amqp's words for what fits in no field
_PROPERTY_BYTES = 4096  # more than what a content header holds beside its headers, and their names
_FIRST_LOOK, _LAST_LOOK = 0.005, 0.1  # seconds between looks at the feed while confirms are awaited
_FAILING_CODES = frozenset({505, 541})  # the broker fails on this record
_TOPIC_REFUSED = re.compile(r"(ACCESS_REFUSED - )?(write |read )?access to topic\b")


class AmqpBus:
    """A `virtbus.bus.Bus` on RabbitMQ (or what speaks its AMQP 0-9-1 with publisher confirms)."""

    def __init__(self, url: str | Sequence[str], *, options: BusOptions) -> None:
        """`url`: amqp:// or amqps://, several separated by ";". Connects to nothing. Raises ConfigError."""
        self._options = options
        self._urls = url
        self._dialer = Dialer(url, options)
        self._waker = Waker()
        # close() may come from another thread. Whoever works on the connection sets _working; close() then
        # only wakes it, and it lets go itself: two threads never touch one connection.
        self._lock = threading.Lock()
        self._publisher: _Publisher | None = None
        self._working = False
        self._closed = False
        self._suspects = 0  # records to be sent alone, because one of so many closed a channel
        self._accused: str | None = None  # the id of a record that closed a connection alone, once

    # -- publishing

    def publish(self, feed: Feed) -> Iterator[tuple[Record, Outcome]]:
        """See virtbus.bus.Bus. While the broker blocks publishers it returns within a second, so that
        the caller keeps control; call it again.
        """
        publisher: _Publisher | None = None
        self._begin()
        try:
            # Read what came while idle: a close by the broker must be seen before records are taken.
            publisher = self._idle_publisher() or self._open_publisher()
            yield from self._publish(publisher, feed)
        finally:
            if publisher is not None and publisher.flying:  # the caller let go in the middle
                self._drop(publisher)
            self._end()

    def tick(self) -> None:
        """See virtbus.bus.Bus."""
        self._begin()
        try:
            if not self._closed:
                self._idle_publisher()
        finally:
            self._end()

    def _begin(self) -> None:
        with self._lock:
            self._working = True

    def _end(self) -> None:
        """Let go of the connection, and close it when somebody asked for that meanwhile."""
        with self._lock:
            self._working = False
            publisher = self._publisher if self._closed else None
        if publisher is not None:
            self._farewell(publisher)

    def _farewell(self, publisher: _Publisher) -> None:
        self._publisher = None
        publisher.set_blocked(False, None)
        publisher.link.close()

    def _idle_publisher(self) -> _Publisher | None:
        """The publisher that stands, served; None when there is none, or it was just found dead."""
        publisher = self._publisher
        fault = publisher.step(0.0) if publisher is not None else None
        if publisher is not None and fault is not None:
            self._drop(publisher, translated(fault, publisher.link.name, doing="idle"))
        return self._publisher

    def _open_publisher(self) -> _Publisher:
        """Try each broker once. Raises BusUnavailable or BusDenied."""
        if self._closed:
            raise BusUnavailable("the bus was closed")
        link = self._dialer.dial(self._waker)
        with self._dialer.setting_up(link, "opening a channel"):
            link.declare_exchange()
            self._publisher = _Publisher(link, self._options)
        return self._publisher

    def _drop(self, publisher: _Publisher, error: VirtbusError | None = None) -> None:
        if self._publisher is publisher:
            self._publisher = None
        publisher.set_blocked(False, None)
        if error is not None:
            lost(publisher.link, error)
        else:
            publisher.link.discard()

    def _publish(self, publisher: _Publisher, feed: Feed) -> Iterator[tuple[Record, Outcome]]:
        look = _FIRST_LOOK
        while True:
            alone, blocked = self._suspects > 0, publisher.blocked
            records: Sequence[Record] = ()
            room = 0 if blocked else (1 if alone else self._options.window) - len(publisher.flying)
            if room > 0 and publisher.unsent < _UNSENT_LIMIT and not self._closed:
                records = feed.take(room, publisher.busy)
                for record in records:
                    publisher.send(record)
                if alone and not records and not publisher.flying:
                    self._suspects = 0
            if not records and not publisher.flying and not publisher.outcomes and not blocked:
                return
            if records:
                look = _FIRST_LOOK
            waiting = publisher.flying or blocked
            fault = publisher.step(0.0 if records or not waiting else 1.0 if room <= 0 else look)
            look = min(2 * look, _LAST_LOOK)
            if alone and publisher.outcomes:
                self._suspects -= 1
            outcomes, publisher.outcomes = publisher.outcomes, []
            if fault is not None or self._closed:
                yield from [*outcomes, *self._give_up(publisher, fault, alone=alone)]
                return
            yield from outcomes
            if blocked and publisher.blocked and not publisher.flying:
                return

    def _give_up(
        self, publisher: _Publisher, fault: BaseException | None, *, alone: bool
    ) -> list[tuple[Record, Outcome]]:
        """The outcomes of what was unconfirmed when the connection went; throws it away."""
        name = publisher.link.name
        records = [record for record, _ in publisher.flying.values()]
        publisher.flying.clear()
        if fault is None:
            self._drop(publisher)
            closed = Deferred(BusUnavailable(f"{name}: the bus was closed"))
            return [(record, closed) for record in records]
        error = translated(fault, name, doing="publishing")
        self._drop(publisher, error)
        verdict = _verdict_on_one(fault, error)
        if verdict is not None and len(records) > 1:
            self._suspects = len(records)
        elif verdict is not None and records:
            (record,) = records
            # These two close the whole connection, and a byte damaged in transit can cause them: an event is
            # given up only after the second time.
            if getattr(fault, "reply_code", 0) in (501, 502) and self._accused != record.id:
                self._accused, self._suspects = record.id, 1
                return [(record, Deferred(error))]
            if alone:
                self._suspects = 0
            return [(record, verdict)]
        return [(record, Deferred(error)) for record in records]

    # -- the rest of the contract

    def consume(
        self, group: str | None, *, prefetch: int = 100, exclusive: bool = False, memory: Memory | None = None
    ) -> Subscription:
        """See virtbus.bus.Bus. Connects at the first `receive`; each group has one active consumer anyway."""
        from virtbus.bus.amqp.subscription import AmqpSubscription

        dialer = Dialer(self._urls, self._options)
        return AmqpSubscription(dialer, self._options, checked_group(group), prefetch)

    def dead_letters(self, group: str) -> DeadLetters:
        """See virtbus.bus.Bus. Over a connection of its own."""
        from virtbus.bus.amqp.letters import AmqpDeadLetters

        checked_group(group)
        return AmqpDeadLetters(Dialer(self._urls, self._options), self._options, group)

    def probe(self) -> Sequence[Check]:
        """See virtbus.bus.Bus. Each broker: reach, trust, log in, and look whether the exchange is there."""
        return [
            check for each in self._dialer.endpoints for check in _probe(each, self._options, self._waker)
        ]

    def close(self) -> None:
        """See virtbus.bus.Bus."""
        with self._lock:
            self._closed = True
            publisher = None if self._working else self._publisher
        if publisher is not None:
            self._farewell(publisher)
        self._waker.wake()


def _probe(endpoint: Endpoint, options: BusOptions, waker: Waker) -> Iterator[Check]:
    where = f"{endpoint.name}: exchange {options.exchange}"
    try:
        link = BrokerLink(endpoint, options, waker)
    except (BusUnavailable, BusDenied) as error:
        yield Check("bus", "failed", str(error), exit_code=error.exit_code)
        yield Check("bus exchange", "skipped", f"{endpoint.name}: not connected")
        return
    server = link.connection.server_properties
    version = f"{server.get('product', 'broker')} {server.get('version', '')}".strip()
    summary = f"{endpoint.name}: {version}, logged in as {link.user or 'the certificate'}"
    details = {"heartbeat_seconds": link.connection.heartbeat or 0}
    if link.is_private:
        yield Check("bus", "ok", summary, details=details)
    else:
        yield Check("bus", "warning", f"{summary}, in PLAINTEXT", "use amqps://", details=details)
    failed = BusDenied.exit_code
    try:
        found = link.has_exchange()
        # Declaring what is there as it is changes nothing; who may not declare can't learn how it is.
        refusal = link.exchange_refusal() if found else None
    except LINK_FAULTS as error:
        fault = translated(error, endpoint.name, doing=f"looking for exchange {options.exchange}")
        yield Check("bus exchange", "failed", str(fault), exit_code=fault.exit_code)
    else:
        if refusal is not None and refusal.reply_code == 406:
            told = f"{where} is not a durable topic exchange: {refusal.reply_text}"
            remedy = "events may reach nobody: delete it, or name another with bus.exchange"
            yield Check("bus exchange", "failed", told, remedy, failed)
        elif found or options.declare:
            yield Check(
                "bus exchange", "ok", f"{where} {'is there' if found else 'will be made when needed'}"
            )
        else:
            remedy = (
                "create it (topic, durable): rabbitmqadmin declare exchange "
                f"name={options.exchange} type=topic durable=true"
            )
            told = f"{where} does not exist, and bus.declare is false"
            yield Check("bus exchange", "failed", told, remedy, failed)
    link.close()


def _verdict_on_one(fault: BaseException, error: VirtbusError) -> Outcome | None:
    """What a closed channel or connection says about the one record that was under way; None: nothing."""
    code = getattr(fault, "reply_code", 0) or 0
    text = str(getattr(fault, "reply_text", ""))
    # Without a method it is not the broker's word: py-amqp raises the same classes for what it can't read.
    if not isinstance(fault, AMQPError) or getattr(fault, "method_sig", None) is None:
        return None
    # Not a user-id mismatch, which is BusDenied: that is all of them.
    if code in REFUSING_CODES and isinstance(error, BusUnavailable):
        return Refused(RecordRefused(f"the broker refuses it: {text} ({code})"))
    if code in _FAILING_CODES:
        return Nacked(f"the broker fails on it: {text} ({code})")
    # RabbitMQ's words for a topic permission; an exchange's own name may hold the word "topic".
    if code == 403 and _TOPIC_REFUSED.match(text):
        return Unroutable(f"the broker refuses its routing key: {text}")
    return None


class _Publisher:
    """A channel in confirm mode and every record that is under way on it."""

    def __init__(self, link: BrokerLink, options: BusOptions) -> None:
        """Open the channel. Raises as LINK_FAULTS."""
        self.link = link
        link.on_blocked = self.set_blocked
        self.blocked = False
        self.flying: dict[int, tuple[Record, float]] = {}  # delivery tag -> record, when it was sent
        self.busy: set[str] = set()
        self.outcomes: list[tuple[Record, Outcome]] = []
        self._options = options
        self._tag = 0
        self._tags: dict[str, int] = {}  # message id -> delivery tag
        self._returned: set[int] = set()
        self._unblocked_at = 0.0
        self._io = link.connection
        channel = link.channel()
        channel.confirm_select()
        channel.events["basic_ack"].add(lambda tag, multiple: self._on_confirm(tag, multiple, _CONFIRMED))
        channel.events["basic_nack"].add(lambda tag, multiple: self._on_confirm(tag, multiple, _NACKED))
        channel.events["basic_return"].add(self._on_return)
        exchange = kombu.Exchange(options.exchange, type="topic")  # durable, messages are persistent
        self._producer = kombu.Producer(channel, exchange, auto_declare=False)
        self._user = {} if link.user is None else {"user_id": link.user}

    @property
    def unsent(self) -> int:
        """Bytes that wait for the socket."""
        return self._io.unsent

    def send(self, record: Record) -> None:
        """Put a record on its way (into the buffer); what can't be encoded is refused. Does no I/O."""
        try:
            self._publish(record)
        except RecordRefused as error:
            self.outcomes.append((record, Refused(error)))
            return
        self._tag += 1
        self.flying[self._tag] = record, time.monotonic()
        self._tags[record.id] = self._tag
        self.busy.add(record.key)

    def _publish(self, record: Record) -> None:
        """Raises RecordRefused for what no broker could take."""
        options = self._options
        wire = envelope.to_amqp(record.attributes, record.body, structured=options.structured)
        if len(wire.body) > options.max_record_bytes:
            raise RecordRefused(
                f"{len(wire.body)} bytes are more than bus.max_record_bytes ({options.max_record_bytes})"
            )
        # A broker closes the connection for headers that do not fit into one frame. A character has at most
        # four bytes: most records are done with the first look.
        headers, room = wire.headers, self._io.frame_max - _PROPERTY_BYTES
        if 4 * sum(map(len, headers.values())) > room:
            size = sum(len(name.encode()) + len(text.encode()) + 6 for name, text in headers.items())
            if size > room:
                raise RecordRefused(f"its attributes have {size} bytes: a frame holds {room}")
        try:
            self._producer.publish(
                wire.body,
                routing_key=envelope.routing_key(record.attributes),
                content_type=wire.content_type,
                headers=headers,
                priority=None,
                mandatory=True,
                message_id=record.id,
                timestamp=record.created_ns // 1_000_000_000,
                **self._user,
            )
        except _UNENCODABLE as error:
            raise RecordRefused(f"AMQP can't carry it: {error}") from error

    def step(self, timeout: float) -> BaseException | None:
        """Write and read for up to `timeout` seconds; the fault when the connection can't be trusted now."""
        try:
            self._io.pump(min(timeout, max(0.0, self._deadline() - time.monotonic())))
        except LINK_FAULTS as fault:
            return fault
        if time.monotonic() >= self._deadline():
            return TimeoutError(f"no confirm within {self._options.confirm_timeout:g} s")
        return None

    def set_blocked(self, blocked: bool, reason: str | None) -> None:
        """The broker's alarm; while it lasts no confirm is late."""
        if blocked != self.blocked:
            self.blocked = blocked
            self._unblocked_at = time.monotonic()
            emit(BusBlocked(self.link.name, blocked, reason))

    def _deadline(self) -> float:
        """When the oldest unconfirmed record is late, on the monotonic clock."""
        if self.blocked or not self.flying:
            return float("inf")
        _, sent_at = next(iter(self.flying.values()))
        return max(sent_at, self._unblocked_at) + self._options.confirm_timeout

    def _on_confirm(self, tag: int, multiple: bool, outcome: Outcome) -> None:
        flying = self.flying
        if multiple:
            tags = []
            for one in flying:
                if one > tag:
                    break
                tags.append(one)
        else:
            tags = [tag] if tag in flying else []
        if not tags or tag > self._tag:
            raise ProtocolViolation(f"the broker settled delivery tag {tag}, which is not under way")
        now = time.monotonic()
        for one in tags:
            record, sent_at = flying.pop(one)
            del self._tags[record.id]
            self.busy.discard(record.key)
            if one in self._returned:
                self._returned.discard(one)
                self.outcomes.append((record, _RETURNED))
                continue
            if outcome is _CONFIRMED:
                METRICS.confirm_seconds.observe(now - sent_at)
            self.outcomes.append((record, outcome))

    def _on_return(self, error: Exception, exchange: str, routing_key: str, message: Any) -> None:
        """Comes before the ack of the same message: remember it until then."""
        tag = self._tags.get(message.properties.get("message_id", ""))
        if tag is None:
            raise ProtocolViolation("the broker returned a message that is not under way")
        self._returned.add(tag)
