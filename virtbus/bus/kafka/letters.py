"""Kafka's dead letters: how records are stored there, and how they are listed, sent back and dropped.

They lie in the topic `<topic>.dead`, which all groups share; GROUP_HEADER says whose they are. A Kafka log
can't lose a record from its middle, so a letter is settled by a later record of the same partition that names
its offset (SETTLED_HEADER); what every group has settled at the log's beginning is deleted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
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

from virtbus.bus import CUT_HEADER, REASON_HEADER, DeadLetter, DeadLetters
from virtbus.bus.kafka.client import Admin, Headers, Watch, headers_of, make, message_of, translate
from virtbus.bus.kafka.settings import KafkaSettings
from virtbus.bus.subscription import SMALLEST, Item, cut_text
from virtbus.errors import BusDenied, BusUnavailable, RecordRefused, VirtbusError

POSITION_HEADER = "x-virtbus-position"  # where the record stood: topic[partition]@offset
GROUP_HEADER = "x-virtbus-group"  # the group that dead-lettered it
SETTLED_HEADER = "x-virtbus-settled"  # of a record without a value: the offset of the letter that is done
FOR_HEADER = "x-virtbus-for"  # of a record that was sent back: the only group that takes it
_OURS = frozenset({REASON_HEADER, CUT_HEADER, POSITION_HEADER, GROUP_HEADER, SETTLED_HEADER, FOR_HEADER})

_SHORT_BYTES = 64  # of a reason where the topic takes next to nothing
_KEY_BYTES = 256  # of a stub's key
_CONFIRM_SECONDS = 10.0  # for one record to be confirmed
_READ_SECONDS = 10.0  # for the next record of the dead letters' topic


class _Desk:
    """A producer of single records, each confirmed before the next."""

    def __init__(self, settings: KafkaSettings) -> None:
        self.closed = False
        self._settings = settings
        self._producer: Any = None

    def publish(
        self, topic: str, value: bytes | None, key: bytes | None, headers: Headers, partition: int = -1
    ) -> None:
        """Raises RecordRefused, BusUnavailable, BusDenied."""
        outcome: list[Any] = []
        doing = f'writing to topic "{topic}"'
        try:
            if self._producer is None:
                config = self._settings.producer(Watch(), batching=False)
                milliseconds = int(_CONFIRM_SECONDS * 1000)
                self._producer = make(Producer, config | {"message.timeout.ms": milliseconds, "linger.ms": 0})
            self._producer.produce(
                topic, value, key, partition, headers=headers,
                on_delivery=lambda error, _: outcome.append(error),
            )  # fmt: skip
            until = time.monotonic() + _CONFIRM_SECONDS + 1.0
            while not outcome and not self.closed and time.monotonic() < until:
                self._producer.poll(0.1)
        except BufferError as error:
            raise RecordRefused(f"{doing}: more than the client may hold") from error
        except KafkaException as error:
            outcome.append(error.args[0])
        if outcome and outcome[0] is None:
            return
        told = translate(outcome[0], doing) if outcome else BusUnavailable(f"{doing}: no confirm in time")
        if not isinstance(told, RecordRefused):
            self.close()
        raise told

    def serve(self) -> None:
        """Keep the connection."""
        if self._producer is not None:
            with suppress(KafkaException):
                self._producer.poll(0)

    def close(self) -> None:
        """Throw the producer away, with what it may still hold; idempotent."""
        producer, self._producer = self._producer, None
        if producer is not None:
            producer.purge()


class KafkaLetterStore:
    """See virtbus.bus.subscription.LetterStore. What is too large leaves a stub that names the record."""

    def __init__(self, settings: KafkaSettings, group: str) -> None:
        self.name = settings.dead_topic
        self._settings, self._group = settings, group
        self._desk = _Desk(settings)
        self._ensured = False
        self.keep_alive, self.disconnect = self._desk.serve, self._desk.close

    def store(self, item: Item, reason: str, smaller: int) -> str | None:
        """See LetterStore."""
        if not self._ensured:
            Admin(self._settings).ensure(self.name, declare=self._settings.options.declare)
            self._ensured = True
        value, key, headers, cut = self._shaped(item, reason, smaller)
        try:
            self._desk.publish(self.name, value, key, headers)
        except RecordRefused as error:
            if smaller == SMALLEST:
                told = f'{error}: raise max.message.bytes of topic "{self.name}"'
                raise BusDenied(told) from error
            raise
        except (BusUnavailable, BusDenied):
            self._ensured = False
            raise
        return cut

    def abort(self) -> None:
        """See LetterStore."""
        self._desk.closed = True

    def _shaped(
        self, item: Item, reason: str, smaller: int
    ) -> tuple[bytes | None, bytes | None, Headers, str | None]:
        """Value, key and headers as they are stored, and what was cut."""
        message, raw = item.message, item.origin
        reason = cut_text(reason, _SHORT_BYTES) if smaller == SMALLEST else reason
        ours: Headers = [
            (REASON_HEADER, reason.encode()),
            (POSITION_HEADER, message.position.encode()),
            (GROUP_HEADER, self._group.encode()),
        ]
        if not smaller:
            theirs = [(name, value) for name, value in raw.headers if name not in _OURS]
            return (
                message.body,
                raw.key,
                [*theirs, *ours],
                None,
            )  # nobody else settles letters, or names a group
        size = len(message.body)
        stub = {
            "topic": raw.topic,
            "partition": raw.partition,
            "offset": item.number,
            "size_bytes": size,
            "reason": reason,
        }
        cut = f"the whole record of {size} bytes; it stays at {message.position} until retention takes it"
        named = [("content-type", b"application/json"), *ours, (CUT_HEADER, cut.encode())]
        key = raw.key if raw.key is not None and len(raw.key) <= _KEY_BYTES else message.position.encode()
        return json.dumps(stub, ensure_ascii=False).encode(), key, named, cut


# ------------------------------------------------------------------------------------- an operator's look


@dataclass(frozen=True, slots=True)
class _Found:
    """A record of the dead letters' topic, with its headers."""

    record: Any
    headers: Headers

    @property
    def place(self) -> tuple[int, int]:
        """(partition, offset)."""
        return self.record.partition(), self.record.offset()

    def header(self, name: str) -> bytes | None:
        """The last value of a header: ours stand behind the sender's."""
        return dict(self.headers).get(name)


class KafkaDeadLetters(DeadLetters):
    """See virtbus.bus.DeadLetters. A look walks through the whole topic, for it holds all groups' letters."""

    def __init__(self, settings: KafkaSettings, group: str) -> None:
        """Connects to nothing yet."""
        self._settings, self._name = settings, group.encode()
        self._consumer: Any = None
        self._desk = _Desk(settings)
        self._settled = False  # whether this look has settled a letter
        self._given: set[tuple[int, int]] = set()

    def count(self) -> int:
        """See virtbus.bus.DeadLetters."""
        return len(self._letters())

    def read(self, limit: int | None = None) -> Iterator[DeadLetter]:
        """See virtbus.bus.DeadLetters."""
        new = [found for found in self._letters() if found.place not in self._given]
        for found in new[:limit]:
            self._given.add(found.place)
            yield _letter(found)

    def send_back(self, letter: DeadLetter) -> None:
        """See virtbus.bus.DeadLetters. Other groups' members pass it over; a foreign reader sees it twice."""
        found = _found(letter)
        cut = found.header(CUT_HEADER)
        if cut is not None:
            raise RecordRefused(
                f"{letter.position} can't be sent back, it lacks {cut.decode('utf-8', 'replace')}"
            )
        headers = [(name, value) for name, value in found.headers if name not in _OURS]
        headers.append((FOR_HEADER, self._name))
        self._desk.publish(self._settings.options.topic, found.record.value(), found.record.key(), headers)
        self.drop(letter)

    def drop(self, letter: DeadLetter) -> None:
        """See virtbus.bus.DeadLetters."""
        partition, offset = _found(letter).place
        headers: Headers = [(SETTLED_HEADER, b"%d" % offset), (GROUP_HEADER, self._name)]
        self._desk.publish(self._settings.dead_topic, None, b"settled", headers, partition)
        self._settled = True

    def close(self) -> None:
        """See virtbus.bus.DeadLetters."""
        if self._settled:
            with suppress(VirtbusError, KafkaException):  # it only saves room: the next one does it
                self._trim()
        if self._consumer is not None:
            self._consumer.close()
        self._consumer = None
        self._desk.close()

    def _letters(self) -> list[_Found]:
        """The group's letters that are not settled, oldest first."""
        letters = [one for one in self._unsettled()[0] if one.header(GROUP_HEADER) == self._name]
        return sorted(letters, key=lambda one: (one.record.timestamp()[1], one.place))

    def _unsettled(self) -> tuple[list[_Found], dict[int, int]]:
        """Every group's letters that are not settled, and the end of each partition that holds records."""
        settled: set[tuple[int, int]] = set()
        letters: list[_Found] = []
        ends: dict[int, int] = {}
        for record in self._records():
            found = _Found(record, headers_of(record))
            partition, offset = found.place
            ends[partition] = offset + 1
            names = found.header(SETTLED_HEADER)
            if names is None or record.value() is not None:
                letters.append(found)
            elif names.isdigit() and len(names) < 20:  # an offset has at most 19
                settled.add((partition, int(names)))
        return [one for one in letters if one.place not in settled], ends

    def _records(self) -> Iterator[Any]:
        """Everything that the topic holds now."""
        topic = self._settings.dead_topic
        doing = f'reading topic "{topic}"'
        described = Admin(self._settings).describe(topic)
        if described is None:
            return
        try:
            if self._consumer is None:
                config = self._settings.consumer(Watch(), "virtbus.dead-letters", 1000)
                config |= {"enable.auto.commit": False, "enable.partition.eof": True}
                self._consumer = make(Consumer, config)
            places = [TopicPartition(topic, each.id, OFFSET_BEGINNING) for each in described.partitions]
            self._consumer.assign(places)
            unread = {place.partition for place in places}
            while unread:
                record = self._consumer.poll(_READ_SECONDS)
                if record is None:
                    raise BusUnavailable(f"{doing}: no answer within {_READ_SECONDS:g} s")
                error = record.error()
                if error is None:
                    yield record
                elif error.code() == KafkaError._PARTITION_EOF:
                    unread.discard(record.partition())
                else:
                    raise translate(error, doing)
        except KafkaException as error:
            raise translate(error.args[0], doing) from error

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


def _found(letter: DeadLetter) -> _Found:
    found: _Found = letter.message.handle  # type: ignore[assignment]
    return found


def _letter(found: _Found) -> DeadLetter:
    kind, stamp = found.record.timestamp()
    at = None if kind == TIMESTAMP_NOT_AVAILABLE else datetime.fromtimestamp(stamp / 1000, UTC)
    message = message_of(found.record, found.headers, handle=found)
    return DeadLetter.of(message, name=None, reason="", at=at)
