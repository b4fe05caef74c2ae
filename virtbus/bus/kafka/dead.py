"""Kafka's dead letters: how records are put aside, and how they are listed, sent back and dropped.

They lie in the topic `<topic>.dead`, which all groups share; GROUP_HEADER tells whose they are. A Kafka log
can't lose a record from its middle, so a letter is settled by a later record of the same partition that names
its offset (SETTLED_HEADER); what every group has settled at the log's beginning is deleted.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import IntEnum
from typing import Any

from confluent_kafka import (
    OFFSET_BEGINNING,
    TIMESTAMP_NOT_AVAILABLE,
    Consumer,
    KafkaError,
    KafkaException,
    Producer,
    TopicPartition,
)

from virtbus.bus import CUT_HEADER, REASON_HEADER, DeadLetter
from virtbus.bus.kafka.client import Admin, make
from virtbus.bus.kafka.errors import Watch, oneline, translate
from virtbus.bus.kafka.records import Headers, headers_of, message_of
from virtbus.bus.kafka.settings import KafkaSettings
from virtbus.errors import BusDenied, BusUnavailable, RecordRefused, VirtbusError
from virtbus.model import Message
from virtbus.retry import Backoff
from virtbus.telemetry import DeadLetterStored, DeadLetterWaits, emit

POSITION_HEADER = "x-virtbus-position"  # where the record stood: topic[partition]@offset
GROUP_HEADER = "x-virtbus-group"  # the group that put it aside
SETTLED_HEADER = "x-virtbus-settled"  # of a record without a value: the offset of the letter that is done
FOR_HEADER = "x-virtbus-for"  # of a record that was sent back: the only group that takes it
_OURS = frozenset({REASON_HEADER, CUT_HEADER, POSITION_HEADER, GROUP_HEADER, SETTLED_HEADER, FOR_HEADER})

_REASON_BYTES = 1024
_SHORT_BYTES = 64  # of a reason where the topic takes next to nothing
_KEY_BYTES = 256  # of a stub's key
_CONFIRM_SECONDS = 10.0  # for one record to be confirmed
_AT_ONCE_SECONDS = 0.5  # how long `put` waits, so that what goes well is done when it returns
_LEAVE_SECONDS = 3.0
_READ_SECONDS = 10.0  # for the next record of the dead letters' topic


class _Shape(IntEnum):
    """How much of a record is put aside; each is tried when the topic refuses the one before."""

    WHOLE = 0
    STUB = 1  # names topic, partition, offset, size and reason
    SHORT = 2  # the same with a short reason


@dataclass(slots=True)
class _Pending:
    message: Message
    key: bytes | None
    headers: Headers
    reason: str
    done: Callable[[], None]
    shape: _Shape = _Shape.WHOLE
    outcome: list[Any] = field(default_factory=list)  # its delivery report, once it came
    sent_at: float | None = None


class DeadLetterWriter:
    """Puts records aside, one request each; what fails waits with backoff and nothing else waits for it.

    Guarantee: `done` of a record is called once, after the broker has confirmed it or its stub.
    """

    def __init__(self, settings: KafkaSettings, group: str) -> None:
        self._settings, self._group = settings, group
        self._producer: Any = None
        self._waiting: deque[_Pending] = deque()
        self._sent: list[_Pending] = []
        self._backoff = Backoff("dead letters")
        self._again_at = 0.0

    def __len__(self) -> int:
        """Records that are not put aside yet."""
        return len(self._waiting) + len(self._sent)

    def put(
        self, message: Message, key: bytes | None, headers: Headers, reason: str, done: Callable[[], None]
    ) -> None:
        """Put a record aside; `done` may be called before this returns, or in a later `serve`."""
        healthy = not self._waiting
        self._waiting.append(_Pending(message, key, headers, reason, done))
        self.serve()
        if healthy:
            self._finish(_AT_ONCE_SECONDS)

    def serve(self, timeout: float = 0.0) -> None:
        """Take in reports for up to `timeout` seconds and send what is due; raises nothing."""
        if self._producer is not None and self._sent:
            with suppress(KafkaException):  # a fatal error: its records run out of time
                self._producer.poll(timeout)
            self._settle()
        now = time.monotonic()
        if self._waiting and now >= self._again_at:
            self._send(now)

    def close(self) -> None:
        """Give what is on its way a moment more; the rest is put aside by whoever reads it next."""
        self._finish(_LEAVE_SECONDS)
        self._drop()

    # ---- within

    def _finish(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._sent and time.monotonic() < deadline:
            self.serve(0.05)

    def _send(self, now: float) -> None:
        topic = self._settings.dead_topic
        try:
            if self._producer is None:
                Admin(self._settings).ensure(topic, declare=self._settings.options.declare)
                config = self._settings.producer(Watch(), batching=False)
                self._producer = make(Producer, config | {"message.timeout.ms": int(_CONFIRM_SECONDS * 1000)})
            while self._waiting:
                pending = self._waiting[0]
                value, key, headers = self._shaped(pending)
                try:
                    self._producer.produce(
                        topic, value, key, headers=headers,
                        on_delivery=lambda error, _, one=pending: one.outcome.append(error),
                    )  # fmt: skip
                except BufferError:
                    if (
                        not self._sent and pending.shape < _Shape.SHORT
                    ):  # larger than what the client may hold
                        pending.shape = _Shape(pending.shape + 1)
                        continue
                    return
                except KafkaException as error:
                    pending.outcome.append(error.args[0])
                pending.sent_at = now
                self._sent.append(self._waiting.popleft())
        except VirtbusError as error:
            self._failed(error)
            return
        self._settle()

    def _settle(self) -> None:
        """What the reports that came mean."""
        now = time.monotonic()
        sent, self._sent = self._sent, []
        failure: VirtbusError | None = None
        again: list[_Pending] = []
        for pending in sent:
            late = pending.sent_at is not None and now - pending.sent_at > _CONFIRM_SECONDS + 5.0
            if not pending.outcome and not late:
                self._sent.append(pending)
                continue
            error = pending.outcome.pop() if pending.outcome else KafkaError(KafkaError._MSG_TIMED_OUT)
            if error is None:
                self._backoff.reset()
                cut = None if pending.shape == _Shape.WHOLE else "the record: a stub names it"
                position, reason = pending.message.position, pending.reason[:200]
                emit(DeadLetterStored(self._settings.dead_topic, position, reason, cut))
                pending.done()
                continue
            again.append(pending)
            topic = self._settings.dead_topic
            told = translate(error, f'putting {pending.message.position} aside in "{topic}"')
            if isinstance(told, RecordRefused) and pending.shape < _Shape.SHORT:
                pending.shape = _Shape(pending.shape + 1)
                continue
            if isinstance(told, RecordRefused):
                told = BusDenied(f'{told}: raise max.message.bytes of topic "{topic}"')
            failure = told
        self._waiting.extendleft(reversed(again))
        if failure is not None:
            self._failed(failure)

    def _failed(self, error: VirtbusError) -> None:
        self._drop()
        self._again_at = time.monotonic() + self._backoff.next_wait()
        first = self._waiting[0].message.position if self._waiting else ""
        emit(DeadLetterWaits(self._settings.dead_topic, first, len(self), error))

    def _drop(self) -> None:
        """Throw the producer away; what it still held is sent again by the next one."""
        producer, self._producer = self._producer, None
        if producer is not None:
            producer.purge()
        for pending in reversed(self._sent):
            pending.outcome = []
            self._waiting.appendleft(pending)
        self._sent = []

    def _shaped(self, pending: _Pending) -> tuple[bytes | None, bytes | None, Headers]:
        """Value, key and headers as they are put aside."""
        message = pending.message
        reason = _cut(
            oneline(pending.reason), _SHORT_BYTES if pending.shape == _Shape.SHORT else _REASON_BYTES
        )
        ours: Headers = [
            (REASON_HEADER, reason.encode()),
            (POSITION_HEADER, message.position.encode()),
            (GROUP_HEADER, self._group.encode()),
        ]
        if pending.shape == _Shape.WHOLE:
            theirs = [(name, value) for name, value in pending.headers if name not in _OURS]
            return message.body, pending.key, [*theirs, *ours]  # nobody settles letters, or names their group
        topic, partition, offset = split_position(message.position)
        size = len(message.body)
        stub = {
            "topic": topic,
            "partition": partition,
            "offset": offset,
            "size_bytes": size,
            "reason": reason,
        }
        cut = f"the whole record of {size} bytes; it stays at {message.position} until retention takes it"
        named = [("content-type", b"application/json"), *ours, (CUT_HEADER, cut.encode())]
        key = pending.key if pending.key is not None and len(pending.key) <= _KEY_BYTES else None
        return json.dumps(stub, ensure_ascii=False).encode(), key or message.position.encode(), named


def split_position(position: str) -> tuple[str, int, int]:
    """(topic, partition, offset) of "topic[partition]@offset"."""
    topic, _, rest = position.rpartition("[")
    partition, _, offset = rest.partition("]@")
    return topic, int(partition), int(offset)


def _cut(text: str, size: int) -> str:
    """At most `size` bytes of UTF-8."""
    return text.encode("utf-8", "replace")[:size].decode("utf-8", "ignore")


@dataclass(frozen=True, slots=True)
class _Entry:
    """A record of the dead letters' topic, with its headers."""

    record: Any
    headers: Headers

    @property
    def place(self) -> tuple[int, int]:
        """(partition, offset)."""
        return self.record.partition(), self.record.offset()


class KafkaDeadLetters:
    """See virtbus.bus.DeadLetters. A look walks through the whole topic, for it holds all groups' letters."""

    def __init__(self, settings: KafkaSettings, group: str) -> None:
        """Connects to nothing yet."""
        self._settings, self._group, self._name = settings, group, group.encode()
        self._consumer: Any = None
        self._producer: Any = None
        self._settled = False  # whether this look has settled a letter
        self._given: set[tuple[int, int]] = set()

    def __enter__(self) -> KafkaDeadLetters:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def count(self) -> int:
        """See virtbus.bus.DeadLetters."""
        return len(self._letters())

    def read(self, limit: int | None = None) -> Iterator[DeadLetter]:
        """See virtbus.bus.DeadLetters."""
        new = [entry for entry in self._letters() if entry.place not in self._given]
        for entry in new[:limit]:
            self._given.add(entry.place)
            yield _letter(entry)

    def send_back(self, letter: DeadLetter) -> None:
        """See virtbus.bus.DeadLetters. Other groups' members pass it over; a foreign reader sees it twice."""
        entry = _entry(letter)
        cut = dict(entry.headers).get(CUT_HEADER)
        if cut is not None:
            raise RecordRefused(
                f"{letter.position} can't be sent back, it lacks {cut.decode('utf-8', 'replace')}"
            )
        headers = [(name, value) for name, value in entry.headers if name not in _OURS]
        headers.append((FOR_HEADER, self._name))
        self._publish(self._settings.options.topic, entry.record.value(), entry.record.key(), headers)
        self.drop(letter)

    def drop(self, letter: DeadLetter) -> None:
        """See virtbus.bus.DeadLetters."""
        partition, offset = _entry(letter).place
        headers: Headers = [(SETTLED_HEADER, b"%d" % offset), (GROUP_HEADER, self._name)]
        self._publish(self._settings.dead_topic, None, b"settled", headers, partition)
        self._settled = True

    def close(self) -> None:
        """See virtbus.bus.DeadLetters."""
        if self._settled:
            with suppress(VirtbusError, KafkaException):  # it only saves room: the next one does it
                self._trim()
        if self._consumer is not None:
            self._consumer.close()
        self._consumer = self._producer = None

    # ---- within

    def _letters(self) -> list[_Entry]:
        """The group's letters that are not settled, oldest first."""
        letters = [one for one in self._unsettled()[0] if dict(one.headers).get(GROUP_HEADER) == self._name]
        return sorted(letters, key=lambda one: (one.record.timestamp()[1], one.place))

    def _unsettled(self) -> tuple[list[_Entry], dict[int, int]]:
        """Every group's letters that are not settled, and the end of each partition that holds records."""
        settled: set[tuple[int, int]] = set()
        letters: list[_Entry] = []
        ends: dict[int, int] = {}
        for record in self._records():
            entry = _Entry(record, headers_of(record))
            partition, offset = entry.place
            ends[partition] = offset + 1
            names = dict(entry.headers).get(SETTLED_HEADER)
            if names is None or record.value() is not None:
                letters.append(entry)
            elif names.isdigit():
                settled.add((partition, int(names)))
        return [one for one in letters if one.place not in settled], ends

    def _records(self) -> Iterator[Any]:
        """Everything that the topic holds now."""
        topic = self._settings.dead_topic
        doing = f'reading topic "{topic}"'
        found = Admin(self._settings).describe(topic)
        if found is None:
            return
        try:
            if self._consumer is None:
                watch = Watch()
                config = self._settings.consumer(watch, "virtbus.dead-letters", 1000)
                config |= {"enable.auto.commit": False, "enable.partition.eof": True}
                self._consumer = make(Consumer, config)
            places = [TopicPartition(topic, each.id, OFFSET_BEGINNING) for each in found.partitions]
            self._consumer.assign(places)
            open_ones = {place.partition for place in places}
            while open_ones:
                record = self._consumer.poll(_READ_SECONDS)
                if record is None:
                    raise BusUnavailable(f"{doing}: no answer within {_READ_SECONDS:g} s")
                error = record.error()
                if error is None:
                    yield record
                elif error.code() == KafkaError._PARTITION_EOF:
                    open_ones.discard(record.partition())
                else:
                    raise translate(error, doing)
        except KafkaException as error:
            raise translate(error.args[0], doing) from error

    def _publish(
        self, topic: str, value: bytes | None, key: bytes | None, headers: Headers, partition: int = -1
    ) -> None:
        if self._producer is None:
            self._producer = make(Producer, self._settings.producer(Watch(), batching=False))
        outcome: list[Any] = []
        doing = f'writing to topic "{topic}"'
        try:
            self._producer.produce(
                topic, value, key, partition, headers=headers,
                on_delivery=lambda error, _: outcome.append(error),
            )  # fmt: skip
            self._producer.flush(self._settings.options.confirm_timeout + 1.0)
        except (KafkaException, BufferError) as error:
            cause = error.args[0] if isinstance(error, KafkaException) else None
            raise translate(cause, doing) if cause else BusUnavailable(f"{doing}: {error}") from error
        if not outcome:
            raise BusUnavailable(f"{doing}: not confirmed in time")
        if outcome[0] is not None:
            raise translate(outcome[0], doing)

    def _trim(self) -> None:
        """Delete what stands before each partition's first letter that is not settled, of any group."""
        letters, upto = self._unsettled()
        for partition, offset in (one.place for one in letters):
            upto[partition] = min(offset, upto[partition])
        topic = self._settings.dead_topic
        admin = Admin(self._settings)
        for partition, offset in upto.items():
            place = TopicPartition(topic, partition, offset)

            def delete(client: Any, place: TopicPartition = place) -> Any:
                return client.delete_records([place])[place]

            admin.call(f'deleting settled records of topic "{topic}"', delete)


def _entry(letter: DeadLetter) -> _Entry:
    entry: _Entry = letter.message.handle  # type: ignore[assignment]
    return entry


def _letter(entry: _Entry) -> DeadLetter:
    message = message_of(entry.record, entry.headers, handle=entry)

    def text(name: str) -> str | None:
        value = message.headers.get(name)
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else None

    kind, stamp = entry.record.timestamp()
    at = None if kind == TIMESTAMP_NOT_AVAILABLE else datetime.fromtimestamp(stamp / 1000, UTC)
    return DeadLetter(
        position=message.position,
        id=text("ce_id"),
        source=text("ce_source"),
        type=text("ce_type"),
        reason=text(REASON_HEADER) or "",
        at=at,
        size_bytes=len(message.body),
        message=message,
    )
