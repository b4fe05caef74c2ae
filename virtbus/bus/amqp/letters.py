"""Dead letters on RabbitMQ: stored over a connection of their own; an operator's look at them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import amqp
from amqp import spec
from amqp.exceptions import AMQPError
from amqp.serialization import dumps

from virtbus.bus import CUT_HEADER, REASON_HEADER, BusOptions, DeadLetter, DeadLetters
from virtbus.bus.amqp.connection import LINK_FAULTS, REFUSING_CODES, BrokerLink, Dialer, Waker, translated
from virtbus.bus.amqp.wire import received
from virtbus.bus.subscription import REASON_BYTES, Item, cut_text
from virtbus.errors import BusDenied, BusUnavailable, RecordRefused, VirtbusError
from virtbus.model import Message
from virtbus.telemetry import Trouble, emit

USER_HEADER = "x-virtbus-user-id"
AT_HEADER = "x-virtbus-dead-at"
_OURS = frozenset({REASON_HEADER, CUT_HEADER, USER_HEADER, AT_HEADER})
_KEPT = ("content_type", "content_encoding", "message_id", "timestamp", "type", "app_id")
STUB_BYTES = 65536  # of a body that no dead-letter queue takes, or that we do not keep in memory
_FRAME_OVERHEAD = 8 + 14 + 64  # frame, content header, and what the properties' names need
# What the broker adds to a message on its way.
_BROKERS = ("x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-count", "x-opt-")
# A letter that was looked at so often is stored again, which puts it behind the others: a policy may limit
# deliveries, also of dead letters.
_LOOKS = 3
_BACK_SECONDS = 2.0  # for a broker to requeue what a look has read


class _Desk:
    """A connection that stores one message at a time, so that confirms can't be mixed up."""

    def __init__(self, dialer: Dialer, options: BusOptions) -> None:
        self.link: BrokerLink | None = None
        self.closed = False
        self._options, self._dialer, self._waker = options, dialer, Waker()
        self._channel: Any = None
        self._settled: list[str] = []

    def open(self) -> BrokerLink:
        """The connection. Raises BusUnavailable, BusDenied."""
        if self.link is None:
            self.link, self._channel = self._dialer.dial(self._waker, told=None), None
        return self.link

    def channel(self) -> Any:
        """Our channel in confirm mode. Raises as LINK_FAULTS."""
        assert self.link is not None
        if self._channel is None:
            self._channel = self.link.channel()
            self._channel.confirm_select()
            for name in ("basic_ack", "basic_nack", "basic_return"):
                self._channel.events[name].add(lambda *_, name=name: self._settled.append(name))
        return self._channel

    def publish(self, content: amqp.Message, queue: str, doing: str) -> None:
        """Store a message in a queue, confirmed. Raises BusUnavailable, BusDenied, RecordRefused."""
        link, self._settled = self.open(), []
        limit = time.monotonic() + self._options.confirm_timeout
        with self.failing(doing):
            # Through the default exchange, mandatory: a queue that is gone must not swallow it.
            self.channel().send_method(spec.Basic.Publish, "Bssbb", (0, "", queue, True, False), content)
            while not self._settled or self._settled == ["basic_return"]:
                if self.closed or time.monotonic() >= limit:
                    raise TimeoutError("no confirm of a dead letter: does the broker block publishers?")
                link.connection.pump(min(1.0, limit - time.monotonic()))
        if self._settled != ["basic_ack"]:
            why = "does not exist" if self._settled[0] == "basic_return" else "does not take it: is it full?"
            raise BusUnavailable(f"{link.name}: {doing}: queue {queue} {why}")

    @contextmanager
    def failing(self, doing: str) -> Iterator[None]:
        """Translate what LINK_FAULTS names, and throw the connection away."""
        try:
            yield
        except LINK_FAULTS as error:
            link = self.open()
            self.link = None
            link.discard()
            told = translated(error, link.name, doing=doing)
            if getattr(error, "reply_code", 0) in REFUSING_CODES:
                raise RecordRefused(str(told)) from error
            raise told from error

    def abort(self) -> None:
        """End what is under way, for good; from another thread."""
        self.closed = True
        self._waker.wake()

    def close(self) -> None:
        """Close the connection; idempotent."""
        link, self.link = self.link, None
        if link is not None:
            link.close()


class AmqpLetterStore:
    """See virtbus.bus.subscription.LetterStore."""

    def __init__(self, dialer: Dialer, options: BusOptions, queue: str) -> None:
        self.name = queue
        self._options = options
        self._desk = _Desk(dialer, options)
        self.abort, self.disconnect = self._desk.abort, self._desk.close

    def store(self, item: Item, reason: str, smaller: int) -> str | None:
        """See LetterStore."""
        doing, desk = f"dead-lettering to {self.name}", self._desk
        fresh = desk.link is None
        link = desk.open()
        if fresh and self._options.declare:
            with desk.failing(doing):
                link.declare_queue(self.name)  # refused: it is the operator's, if it is there
        room = link.connection.frame_max - _FRAME_OVERHEAD
        origin = item.origin
        content, cut = letter(item.message, origin.properties, reason, room, smaller, origin.cut)
        try:
            desk.publish(content, self.name, doing)
        except BusUnavailable:
            desk.close()  # the next one declares the queue again
            raise
        return cut

    def keep_alive(self) -> None:
        """See LetterStore."""
        if self._desk.link is not None:
            with suppress(VirtbusError), self._desk.failing("keeping alive"):
                self._desk.link.connection.pump(0.0)


def letter(
    message: Message, properties: Mapping[str, Any], reason: str, room: int, smaller: int = 0,
    cut: str | None = None,
) -> tuple[amqp.Message, str | None]:  # fmt: skip
    """The message as it came with the reason in front, and what had to be cut for `room` bytes of properties.

    Who published it moves into a header: the broker lets nobody publish under another user's name. With
    `smaller` 1 its body becomes a stub, with 2 its headers go too. `cut` was cut before.
    """
    basic = {name: properties[name] for name in _KEPT if name in properties}
    headers: dict[str, Any] = {
        REASON_HEADER: cut_text(reason, REASON_BYTES),
        AT_HEADER: datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
    if message.user_id is not None:
        headers[USER_HEADER] = message.user_id
    left, body, dropped = room - _size(headers) - 300 * len(basic), message.body, []
    cuts = [] if cut is None else [cut]
    theirs = {name: value for name, value in message.headers.items() if name not in _OURS}
    for name, size in sorted(
        ((name, _size({name: theirs[name]})) for name in theirs), key=lambda one: one[1]
    ):
        left -= size
        if left < REASON_BYTES or smaller > 1:
            dropped.append(str(name))
            del theirs[name]
    if dropped:
        cuts.append(f"headers left out: {', '.join(dropped)[:400]}")
    if smaller and len(body) > STUB_BYTES:
        cuts.append(stub_of(len(body)))
        body = body[:STUB_BYTES]
    cut = "; ".join(cuts) or None
    if cut is not None:
        headers[CUT_HEADER] = cut_text(cut, REASON_BYTES)
    return amqp.Message(body, application_headers={**headers, **theirs}, delivery_mode=2, **basic), cut


def stub_of(size: int) -> str:
    """What of a body of so many bytes a stub keeps."""
    return f"body: the first {STUB_BYTES} of {size} bytes"


def _size(headers: Mapping[str, Any]) -> int:
    """Bytes in a header table; of what can't be written again, more than any frame has."""
    try:
        return len(dumps("F", [dict(headers)]))
    except (AMQPError, ValueError, TypeError, OverflowError, RecursionError, AttributeError):
        return 1 << 30


# ------------------------------------------------------------------------------------- an operator's look


class AmqpDeadLetters(DeadLetters):
    """See virtbus.bus.DeadLetters. What it has read is out of others' sight until it lets go."""

    def __init__(self, dialer: Dialer, options: BusOptions, group: str) -> None:
        """Connects. Raises BusUnavailable, BusDenied."""
        self._group, self._queue = f"virtbus.{group}", f"virtbus.{group}.dead"
        self._desk = _Desk(dialer, options)
        self._desk.open()
        self._open: list[DeadLetter] = []

    @contextmanager
    def _asking(self, doing: str) -> Iterator[BrokerLink]:
        """The connection that has given out the letters; when it is lost the look is over."""
        link, where = self._desk.link, f"dead letters of {self._group}"
        if link is None:
            raise BusUnavailable(f"{doing} {where}: the connection was lost; look again")
        with self._desk.failing(f"{doing} {where}"):
            yield link

    def count(self) -> int:
        """See virtbus.bus.DeadLetters."""
        with self._asking("counting") as link:
            return self._waiting(link) + len(self._open)

    def _waiting(self, link: BrokerLink) -> int:
        """How many letters anyone may get now. Raises as LINK_FAULTS."""
        try:
            with link.brief_channel() as channel:
                found: int = channel.queue_declare(self._queue, passive=True).message_count
        except amqp.NotFound:
            return 0
        return found

    def read(self, limit: int | None = None) -> Iterator[DeadLetter]:
        """See virtbus.bus.DeadLetters."""
        left = self.count() - len(self._open)
        for _ in range(left if limit is None else min(left, limit)):
            with self._asking("reading") as link:
                link.be_patient()
                raw = self._desk.channel().basic_get(self._queue)
            if raw is None:
                return
            found = _dead_letter(raw, self._queue)
            self._open.append(found)
            yield found

    def send_back(self, letter: DeadLetter) -> None:
        """See virtbus.bus.DeadLetters."""
        headers = letter.message.headers
        if CUT_HEADER in headers:
            raise RecordRefused(
                f"{letter.position} was cut when dead-lettered ({headers[CUT_HEADER]}): "
                "it can't be sent back as it came"
            )
        kept = {
            name: headers[name] for name in headers if name not in _OURS and not name.startswith(_BROKERS)
        }
        self._store(letter, kept, self._group, "sending back")

    def drop(self, letter: DeadLetter) -> None:
        """See virtbus.bus.DeadLetters."""
        raw: Any = letter.message.handle
        if letter in self._open:
            with self._asking("dropping") as link:
                self._desk.channel().basic_ack(raw.delivery_info["delivery_tag"])
                link.connection.flush()
            self._open.remove(letter)

    def close(self) -> None:
        """See virtbus.bus.DeadLetters."""
        try:
            for letter in [one for one in self._open if (one.message.attempts or 0) > _LOOKS]:
                headers = {k: v for k, v in letter.message.headers.items() if k != "x-delivery-count"}
                self._store(letter, headers, self._queue, "keeping")
        except (BusUnavailable, BusDenied) as error:
            emit(Trouble("storing dead letters again", error))
        if self._open:
            with suppress(BusUnavailable, BusDenied):  # the broker puts them back when it notices
                self._put_back()
            self._open.clear()
        self._desk.close()

    def _put_back(self) -> None:
        """Requeue what was read, until the broker shows it.

        It would do so by itself when the connection ends, but some time later: the next look would miss it.
        """
        with self._asking("putting back") as link:
            expected = self._waiting(link) + len(self._open)
            self._desk.channel().basic_recover(requeue=True)
            until = time.monotonic() + _BACK_SECONDS
            while self._waiting(link) < expected and time.monotonic() < until:  # or someone else took one
                time.sleep(0.01)

    def _store(self, letter: DeadLetter, headers: Mapping[str, Any], queue: str, doing: str) -> None:
        """Publish it to a queue, confirmed; then remove it here."""
        raw: Any = letter.message.handle
        basic = {name: raw.properties[name] for name in _KEPT if name in raw.properties}
        body = letter.message.body
        content = amqp.Message(body, application_headers=dict(headers), delivery_mode=2, **basic)
        with self._asking(doing):
            self._desk.publish(content, queue, f"{doing} {letter.position}")
        self.drop(letter)


def _dead_letter(raw: Any, queue: str) -> DeadLetter:
    message = received(raw, queue, handle=raw)
    deaths = message.headers.get("x-death")  # the broker's, or what somebody wrote there
    known = isinstance(deaths, list) and deaths and isinstance(deaths[0], dict)
    death = deaths[0] if known else {}  # type: ignore[index]
    if message.user_id is None and isinstance(user := message.headers.get(USER_HEADER), str):
        message = replace(message, user_id=user)  # our own letters have it there
    return DeadLetter.of(
        message,
        name=raw.properties.get("message_id"),
        reason=str(death.get("reason", "")),
        at=_time(message.headers.get(AT_HEADER, death.get("time"))),
    )


def _time(told: object) -> datetime | None:
    if isinstance(told, datetime):
        return told if told.tzinfo else told.replace(tzinfo=UTC)
    try:
        return datetime.fromisoformat(told) if isinstance(told, str) else None
    except ValueError:
        return None
