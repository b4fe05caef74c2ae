"""Dead letters on RabbitMQ as their operator sees them: counted, listed, sent back, dropped."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import amqp

from virtbus.bus import CUT_HEADER, REASON_HEADER, BusOptions, DeadLetter
from virtbus.bus.amqp.connection import LINK_FAULTS, Dialer, Waker, translated
from virtbus.bus.amqp.dead import AT_HEADER, OURS, USER_HEADER, publish
from virtbus.errors import BusDenied, BusUnavailable, RecordRefused
from virtbus.model import Binding, Message
from virtbus.telemetry import Trouble, emit

# What the broker adds to a message on its way.
_BROKERS = ("x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-count", "x-opt-")
# A letter that was looked at so often is written anew: a policy may limit deliveries, also of dead letters.
_LOOKS = 8


@dataclass(frozen=True, slots=True)
class _Place:
    tag: int
    properties: Mapping[str, Any]


class AmqpDeadLetters:
    """See virtbus.bus.DeadLetters. What it has read is out of others' sight until it lets go."""

    def __init__(self, dialer: Dialer, options: BusOptions, queue: str) -> None:
        """Connects. `queue` is the group's. Raises BusUnavailable, BusDenied."""
        self._options, self._group, self._queue = options, queue, f"{queue}.dead"
        self._waker = Waker()
        self._link = dialer.dial(self._waker, told=None)
        self._channel: Any = None
        self._open: deque[DeadLetter] = deque()

    def __enter__(self) -> AmqpDeadLetters:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def count(self) -> int:
        """See virtbus.bus.DeadLetters."""
        try:
            with self._link.brief_channel() as channel:
                found: int = channel.queue_declare(self._queue, passive=True).message_count
        except amqp.NotFound:
            return len(self._open)
        except LINK_FAULTS as error:
            raise self._failed(error, "counting") from error
        return found + len(self._open)

    def read(self, limit: int | None = None) -> Iterator[DeadLetter]:
        """See virtbus.bus.DeadLetters."""
        left = self.count() - len(self._open)
        if limit is not None:
            left = min(left, limit)
        for _ in range(left):
            try:
                channel = self._working()
                self._link.be_patient()
                raw = channel.basic_get(self._queue)
            except LINK_FAULTS as error:
                raise self._failed(error, "reading") from error
            if raw is None:
                return
            found = _dead_letter(raw, self._queue)
            self._open.append(found)
            yield found

    def send_back(self, letter: DeadLetter) -> None:
        """See virtbus.bus.DeadLetters."""
        if CUT_HEADER in letter.message.headers:
            raise RecordRefused(
                f"{letter.position} was cut when dead-lettered ({letter.message.headers[CUT_HEADER]}): "
                "it can't be sent back as it came"
            )
        place: _Place = letter.message.handle  # type: ignore[assignment]
        headers = {
            name: value
            for name, value in letter.message.headers.items()
            if name not in OURS and not name.startswith(_BROKERS)
        }
        self._store(letter, place, headers, self._group, "sending back")

    def drop(self, letter: DeadLetter) -> None:
        """See virtbus.bus.DeadLetters."""
        place: _Place = letter.message.handle  # type: ignore[assignment]
        self._settle(letter, place, "dropping")

    def close(self) -> None:
        """See virtbus.bus.DeadLetters."""
        worn = [one for one in self._open if (one.message.attempts or 0) > _LOOKS]
        try:
            for letter in worn:
                headers = {k: v for k, v in letter.message.headers.items() if k != "x-delivery-count"}
                self._store(letter, letter.message.handle, headers, self._queue, "keeping")
        except (BusUnavailable, BusDenied) as error:
            emit(Trouble("rewriting dead letters", error))
        self._open.clear()
        self._link.close()

    def _store(
        self, letter: DeadLetter, place: Any, headers: Mapping[str, Any], queue: str, doing: str
    ) -> None:
        """Publish it to a queue, confirmed; then remove it here."""
        kept = ("content_type", "content_encoding", "message_id", "timestamp", "type", "app_id")
        basic = {name: place.properties[name] for name in kept if name in place.properties}
        content = amqp.Message(
            letter.message.body, application_headers=dict(headers), delivery_mode=2, **basic
        )
        settled: list[str] = []
        try:
            channel = self._working()
            for name in ("basic_ack", "basic_nack", "basic_return"):
                channel.events[name].clear()
                channel.events[name].add(lambda *_, name=name: settled.append(name))
            publish(channel, content, queue)
            limit = time.monotonic() + self._options.confirm_timeout
            while not settled or settled == ["basic_return"]:
                if time.monotonic() >= limit:
                    raise TimeoutError("no confirm")
                self._link.connection.pump(min(1.0, limit - time.monotonic()))
        except LINK_FAULTS as error:
            raise self._failed(error, doing) from error
        if settled != ["basic_ack"]:
            why = "does not exist" if settled[0] == "basic_return" else "does not take it: is it full?"
            raise BusUnavailable(f"{self._link.name}: {doing} {letter.position}: queue {queue} {why}")
        self._settle(letter, place, doing)

    def _settle(self, letter: DeadLetter, place: _Place, doing: str) -> None:
        if letter not in self._open:
            return
        try:
            self._channel.basic_ack(place.tag)
            self._link.connection.flush()
        except LINK_FAULTS as error:
            raise self._failed(error, doing) from error
        self._open.remove(letter)

    def _working(self) -> Any:
        if self._channel is None:
            self._channel = self._link.channel()
            self._channel.confirm_select()
        return self._channel

    def _failed(self, error: BaseException, doing: str) -> BusUnavailable | BusDenied:
        return translated(error, self._link.name, doing=f"{doing} dead letters of {self._group}")


def _dead_letter(raw: Any, queue: str) -> DeadLetter:
    headers = raw.properties.get("application_headers") or {}
    body = raw.body.encode() if isinstance(raw.body, str) else bytes(raw.body)
    tag, death = raw.delivery_info["delivery_tag"], (headers.get("x-death") or [{}])[0]
    at = headers.get(AT_HEADER, death.get("time"))
    count = headers.get("x-delivery-count")
    message = Message(
        binding=Binding.AMQP,
        headers=headers,
        content_type=raw.properties.get("content_type"),
        body=body,
        key=None,
        redelivered=bool(raw.delivery_info.get("redelivered")),
        # Our own letters have none; where there is one the broker put it aside, with the sender's headers.
        user_id=raw.properties.get("user_id") or headers.get(USER_HEADER),
        position=f"{queue}#{tag}",
        handle=_Place(tag, raw.properties),
        attempts=count + 1 if isinstance(count, int) else None,
    )

    def text(name: str) -> str | None:
        value = headers.get(name)
        return value if isinstance(value, str) else None

    return DeadLetter(
        position=message.position,
        id=text("ce-id") or raw.properties.get("message_id"),
        source=text("ce-source"),
        type=text("ce-type"),
        reason=text(REASON_HEADER) or str(death.get("reason", "")),
        at=_time(at),
        size_bytes=len(body),
        message=message,
    )


def _time(told: object) -> datetime | None:
    if isinstance(told, datetime):
        return told if told.tzinfo else told.replace(tzinfo=UTC)
    try:
        return datetime.fromisoformat(told) if isinstance(told, str) else None
    except ValueError:
        return None
