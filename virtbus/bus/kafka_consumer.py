"""Consuming from Kafka at least once: what is acknowledged, what waits, and which offset may be committed."""

from __future__ import annotations

import heapq
import operator
import threading
import time
import uuid
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

from confluent_kafka import (
    OFFSET_BEGINNING,
    Consumer,
    KafkaError,
    KafkaException,
    Producer,
    TopicPartition,
)

from virtbus.bus import REASON_HEADER
from virtbus.bus.kafka_admin import Admin, make
from virtbus.bus.kafka_errors import Watch, is_missing, oneline, translate
from virtbus.bus.kafka_settings import KafkaSettings
from virtbus.errors import BusDenied, BusUnavailable, GroupTakenOver, RecordRefused, VirtbusError
from virtbus.model import Binding, Message
from virtbus.telemetry import Notice, Trouble, emit

# Not `message.headers()`: for a name that is not UTF-8 confluent-kafka gives a broken list beside its
# exception, and an interpreter that has specialised the call goes on with the list, into a crash.
_give_headers = operator.methodcaller("headers")

# Messages of a key that waits for a retry are held back; at most this many times `prefetch` in all.
_HELD_FACTOR = 10
_NO_LEADER_YET = frozenset({KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.LEADER_NOT_AVAILABLE})
_CALL_SECONDS = 5.0
_CLOSE_SECONDS = 5.0  # to leave the group and to commit what was acknowledged
_DEAD_LETTER_SECONDS = 10.0
_DEAD_LETTER_AGAIN_SECONDS = 1.0  # what could not be put aside comes again after this
_LOOK_SECONDS = 30.0  # for partitions that were added, where there is no group to tell of them
# Without a partition for so long, while brokers answer, an exclusive member was replaced.
_OUSTED_SECONDS = 20.0


class Track:
    """One assigned partition: which offsets were taken and not yet acknowledged, in order.

    Guarantee: `done` gives an offset to commit only when every message before it is acknowledged.
    """

    def __init__(self) -> None:
        self._open: deque[int] = deque()  # taken, in order; an acknowledged one goes when it is the first
        self._acknowledged: set[int] = set()

    def __len__(self) -> int:
        """Messages taken and not acknowledged."""
        return len(self._open) - len(self._acknowledged)

    @property
    def span(self) -> int:
        """Offsets kept in mind, acknowledged or not."""
        return len(self._open)

    def took(self, offset: int) -> None:
        """A message came; offsets rise, with holes where the log was compacted."""
        self._open.append(offset)

    def done(self, offset: int) -> int | None:
        """A message is acknowledged: the offset to go on from after a restart, if it moved."""
        self._acknowledged.add(offset)
        watermark = None
        while self._open and self._open[0] in self._acknowledged:
            watermark = self._open.popleft() + 1
            self._acknowledged.discard(watermark - 1)
        return watermark


@dataclass(slots=True)
class _Handle:
    """What a message needs for its verdict; a partition taken away makes it worthless."""

    track: Track
    topic: str
    partition: int
    offset: int
    key: bytes | None
    headers: list[tuple[str, bytes]]
    settled: bool = False


@dataclass(slots=True)
class _Held:
    """A key whose first message is to come again: its later ones stand in line behind it."""

    line: deque[Message]
    out: int | None = None  # the offset of the one that is with the caller again
    times: dict[int, float] = field(default_factory=dict)  # by offset: not before this


@dataclass(order=True, slots=True)
class _Due:
    at: float
    number: int
    key: Any = field(compare=False)
    held: _Held = field(compare=False)


class KafkaSubscription:
    """See virtbus.bus.Subscription. Rebalance-safe: a partition that is taken away takes its messages along.

    Acknowledged offsets are committed in the background every 0.2 s, at a rebalance and at `close`; a kill
    in between delivers those messages again. Kafka keeps no count of deliveries: `redelivered` is true only
    for what this subscription was told to `retry`.
    """

    def __init__(
        self, settings: KafkaSettings, group: str | None, prefetch: int, exclusive: bool = False
    ) -> None:
        """Without a group: raises BusUnavailable or BusDenied when "now" can't be found out."""
        self._settings = settings
        self._group = group
        self._prefetch = max(1, prefetch)
        self._exclusive = exclusive and group is not None
        self._ousted_at: float | None = None  # since when an exclusive member has no partition any more
        self._tracks: dict[int, Track] = {}
        self._held: dict[tuple[int, bytes], _Held] = {}
        self._due: list[_Due] = []
        self._ready: deque[Message] = deque()
        self._counter = 0
        self._paused: bool | None = None  # None: some partitions may be, and others not
        self._polled = True  # since something that waited here was handed out
        self._dead_letters: Any = None
        self._watch = Watch()
        self._consumer: Any = None
        self._look_at = time.monotonic() + _LOOK_SECONDS
        if group is None:
            self._connect()

    def receive(self, timeout: float) -> Message | None:
        """See virtbus.bus.Subscription."""
        deadline = time.monotonic() + timeout
        if self._consumer is None:
            self._connect()
        if self._group is None and time.monotonic() >= self._look_at:
            self._take_new_partitions()
        while True:
            # What waits here and what the broker has take turns: a caller that is slower than its retries
            # come due would else hear of no new message, and of no rebalance, until the group casts it out.
            turn, self._polled = self._polled, True
            message = self._next_ready() if turn else None
            if message is not None:
                self._polled = False
                return message
            now = time.monotonic()
            wait = max(0.0, deadline - now) if turn else 0.0
            if self._due:
                wait = min(wait, max(0.0, self._due[0].at - now))
            self._throttle()
            try:
                polled = self._consumer.poll(min(wait, 0.5))
            except KafkaException as error:  # a fatal error is raised by poll instead of given to error_cb
                self._raise_for(error.args[0], over=True)
                raise translate(error.args[0], f"consuming from {self._settings.display}") from error
            if polled is not None and polled.error() is None:
                message = self._took(polled)
                if message is not None:
                    return message
            else:
                self._raise_for(None if polled is None else polled.error(), time.monotonic() >= deadline)
                if turn and time.monotonic() >= deadline and not self._due_now():
                    return None

    def ack(self, message: Message) -> None:
        """See virtbus.bus.Subscription."""
        handle = self._settle(message)
        if handle is None:
            return
        watermark = handle.track.done(handle.offset)
        if watermark is not None and self._group is not None:
            place = TopicPartition(handle.topic, handle.partition, watermark)
            try:
                self._consumer.store_offsets(offsets=[place])
            except KafkaException as error:
                # The partition went away this moment: its next owner delivers the message again.
                if error.args[0].code() != KafkaError._STATE:
                    emit(Trouble("storing a Kafka offset", oneline(error)))
        self._next_of_key(handle)

    def retry(self, message: Message, after: float) -> None:
        """See virtbus.bus.Subscription. It waits here; a kill before then delivers it again as well."""
        handle = self._settle(message)
        if handle is None:
            return
        handle = replace(handle, settled=False)
        again = replace(message, redelivered=True, handle=handle)
        name = self._name(handle)
        held = self._held.setdefault(name, _Held(deque()))
        if held.out == handle.offset:
            held.out = None
        # Others that the caller had before the first of their key came back take their places in line.
        held.line = deque(sorted([*held.line, again], key=_offset))
        held.times[handle.offset] = time.monotonic() + max(0.0, after)
        self._wait(name, held, held.times[handle.offset])

    def dead_letter(self, message: Message, reason: str) -> None:
        """See virtbus.bus.Subscription. It goes to the topic `<topic>.dead`, key and headers as they were."""
        handle: _Handle = message.handle  # type: ignore[assignment]
        if self._group is None:
            emit(Notice(f"put aside without a group, so only logged: {message.position}: {reason}"))
        elif not handle.settled and self._tracks.get(handle.partition) is handle.track:
            try:
                self._put_aside(message, handle, reason)
            except VirtbusError:
                self.retry(message, _DEAD_LETTER_AGAIN_SECONDS)  # no reconnection would bring it back
                raise
        self.ack(message)

    def close(self) -> None:
        """See virtbus.bus.Subscription."""
        consumer, self._consumer = self._consumer, None
        self._forget(list(self._tracks))
        if consumer is not None:
            _leave(consumer)
        if self._dead_letters is not None:
            self._dead_letters.purge()
            self._dead_letters = None

    # ---------------------------------------------------------------------------------------- messages

    def _took(self, polled: Any) -> Message | None:
        """A message from the broker, unless its key waits."""
        partition, offset, key = polled.partition(), polled.offset(), polled.key()
        track = self._tracks.get(partition)
        if track is None:  # assigned without a callback: never seen, but a message must not be lost for it
            track = self._tracks[partition] = Track()
        track.took(offset)
        headers = _headers(polled)
        handle = _Handle(track, polled.topic(), partition, offset, key, headers)
        fields: dict[str, object] = dict(headers)
        content_type = next((value for name, value in headers if name.lower() == "content-type"), None)
        message = Message(
            binding=Binding.KAFKA,
            headers=fields,
            content_type=None if content_type is None else content_type.decode("utf-8", "replace"),
            body=polled.value() or b"",
            key=None if key is None else key.decode("utf-8", "replace"),
            redelivered=False,
            user_id=None,
            position=f"{polled.topic()}[{partition}]@{offset}",
            handle=handle,
        )
        held = self._held.get(self._name(handle)) if key is not None else None
        if held is not None:
            held.line.append(message)
            return None
        if self._handed() > self._prefetch:  # came while the pause was on its way
            self._ready.append(message)
            return None
        return message

    def _next_ready(self) -> Message | None:
        """What waited here and may go now."""
        while self._due_now():
            due = heapq.heappop(self._due)
            held = due.held
            if self._held.get(due.key) is not held or not held.line or held.out is not None:
                continue
            first = _offset(held.line[0])
            if held.times.get(first, 0.0) > time.monotonic():  # a later one's time: it waits behind this
                self._wait(due.key, held, held.times[first])
                continue
            held.times.pop(first, None)
            held.out = first
            return held.line.popleft()
        while self._ready and self._handed() < self._prefetch:
            message = self._ready.popleft()
            handle: _Handle = message.handle  # type: ignore[assignment]
            if self._tracks.get(handle.partition) is not handle.track:
                continue
            waits = self._held.get(self._name(handle))
            if waits is None:
                return message
            waits.line.append(message)
        return None

    def _due_now(self) -> bool:
        return bool(self._due) and self._due[0].at <= time.monotonic()

    def _wait(self, name: tuple[int, bytes], held: _Held, at: float) -> None:
        self._counter += 1
        heapq.heappush(self._due, _Due(at, self._counter, name, held))

    def _settle(self, message: Message) -> _Handle | None:
        """The handle, once, and only while its partition is ours."""
        handle: _Handle = message.handle  # type: ignore[assignment]
        if handle.settled:
            return None
        handle.settled = True
        return handle if self._tracks.get(handle.partition) is handle.track else None

    def _next_of_key(self, handle: _Handle) -> None:
        """An acknowledged message lets the next one of its key go."""
        name = self._name(handle)
        held = self._held.get(name)
        if held is None or held.out != handle.offset:
            return
        held.out = None
        if held.line:
            self._wait(name, held, 0.0)
        else:
            del self._held[name]

    def _name(self, handle: _Handle) -> tuple[int, bytes]:
        """A message without a key is a key of its own."""
        return handle.partition, handle.key if handle.key is not None else b"@%d" % handle.offset

    # ------------------------------------------------------------------------------------ flow control

    def _outstanding(self) -> int:
        return sum(map(len, self._tracks.values()))

    def _waiting(self) -> int:
        return len(self._ready) + sum(len(held.line) for held in self._held.values())

    def _handed(self) -> int:
        """Messages that are with the caller."""
        return self._outstanding() - self._waiting()

    def _throttle(self) -> None:
        """Stop fetching while the caller has enough; polling goes on, so that the group keeps us."""
        spans = sum(track.span for track in self._tracks.values())
        full = self._handed() >= self._prefetch or spans >= self._prefetch * _HELD_FACTOR
        if full == self._paused or not self._tracks:
            return
        places = [TopicPartition(self._settings.options.topic, partition) for partition in self._tracks]
        try:
            (self._consumer.pause if full else self._consumer.resume)(places)
            self._paused = full
        except KafkaException as error:  # a rebalance came between; the next round does it
            emit(Trouble("pausing a Kafka partition", oneline(error)))

    # ------------------------------------------------------------------------------------- connection

    def _connect(self) -> None:
        settings, topic = self._settings, self._settings.options.topic
        Admin(settings).ensure(topic, declare=settings.options.declare)
        self._watch = Watch()
        group_id = f"virtbus.{self._group}" if self._group else f"virtbus.tap.{uuid.uuid4()}"
        config = settings.consumer(self._watch, group_id, self._prefetch)
        self._ousted_at = None
        if self._exclusive:
            # Static membership: the broker knows one member by this name, and fences off the older one.
            config["group.instance.id"] = group_id
        consumer: Any = make(Consumer, config)
        try:
            if self._group is not None:
                consumer.subscribe(
                    [topic], on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._revoked
                )
            else:
                places = self._end(consumer, topic)
                self._tracks = {place.partition: Track() for place in places}
                consumer.assign(places)
        except BaseException:
            consumer.close()
            raise
        self._consumer = consumer

    def _end(self, consumer: Any, topic: str) -> list[Any]:
        """Where each partition ends now."""
        doing = f'looking for the end of topic "{topic}"'
        deadline = time.monotonic() + _CALL_SECONDS
        while True:
            try:
                partitions = consumer.list_topics(topic, timeout=_CALL_SECONDS).topics[topic].partitions
                places = [TopicPartition(topic, partition) for partition in partitions]
                for place in places:
                    place.offset = consumer.get_watermark_offsets(place, timeout=_CALL_SECONDS)[1]
                return places
            except KafkaException as error:
                # A topic that was just made, or a broker that just came back, has no leader for a moment.
                if error.args[0].code() not in _NO_LEADER_YET or time.monotonic() > deadline:
                    raise translate(error.args[0], doing) from error
                time.sleep(0.1)

    def _take_new_partitions(self) -> None:
        """Everything in a partition that was added since is from after we began."""
        self._look_at = time.monotonic() + _LOOK_SECONDS
        topic = self._settings.options.topic
        try:
            found = self._consumer.list_topics(topic, timeout=1.0).topics[topic].partitions
            new = [number for number in found if number not in self._tracks]
            if new:
                self._consumer.incremental_assign([TopicPartition(topic, n, OFFSET_BEGINNING) for n in new])
        except KafkaException:  # the next look finds them
            return
        self._tracks |= {number: Track() for number in new}
        self._paused = None

    def _assigned(self, _consumer: Any, places: list[Any]) -> None:
        for place in places:
            self._tracks[place.partition] = Track()
        self._paused = None  # new partitions come unpaused, others stay as they are: `_throttle` looks again
        self._ousted_at = None

    def _revoked(self, consumer: Any, places: list[Any]) -> None:
        if consumer is not self._consumer:  # one that is being closed, in a thread of its own
            return
        # What was acknowledged is stored: librdkafka commits it before it gives the partition away.
        self._forget([place.partition for place in places])
        if self._exclusive and not self._tracks:
            self._ousted_at = time.monotonic()

    def _forget(self, partitions: list[int]) -> None:
        for partition in partitions:
            self._tracks.pop(partition, None)
        gone = set(partitions)
        self._held = {name: held for name, held in self._held.items() if name[0] not in gone}

    def _raise_for(self, error: Any, over: bool) -> None:
        """Raise what the caller has to know; the client itself goes on trying."""
        watch = self._watch
        doing = f"consuming from {self._settings.display}"
        denied = watch.denial(time.monotonic())
        if denied is not None:
            self._restart()
            raise translate(denied, doing)
        if self._is_ousted():
            raise GroupTakenOver(f"{doing}: a newer exclusive member of group {self._group} took over")
        if error is not None and error.code() not in (
            KafkaError._PARTITION_EOF,
            KafkaError._MAX_POLL_EXCEEDED,
        ):
            translated = translate(error, doing)
            if error.fatal() or isinstance(translated, BusDenied):
                self._restart()
                raise translated
            if is_missing(error):
                self._restart()
                raise BusUnavailable(str(translated)) from translated
        if watch.all_down and self._ousted_at is not None:
            self._ousted_at = time.monotonic()
        if over and watch.all_down:
            watch.all_down = False
            raise BusUnavailable(f"{doing}: {watch.last or 'no broker answers'}")

    def _is_ousted(self) -> bool:
        """Whether a newer exclusive member replaced us.

        librdkafka tells nobody that it was fenced off, not even by a revocation: its assignment is empty,
        and stays so. After a cut it would long have joined again.
        """
        if self._exclusive and self._tracks and not self._consumer.assignment():
            self._forget(list(self._tracks))
            self._ousted_at = time.monotonic()
        return self._ousted_at is not None and time.monotonic() - self._ousted_at > _OUSTED_SECONDS

    def _restart(self) -> None:
        """The next `receive` makes a new client, with credentials read anew."""
        if self._group is None:
            # Its place in the stream is only here: the same client goes on, with the password as it is now.
            if self._settings.mechanism not in (None, "OAUTHBEARER"):
                self._consumer.set_sasl_credentials(self._settings.username, self._settings.password())
            self._watch.forget()
            return
        consumer, self._consumer = self._consumer, None
        self._forget(list(self._tracks))
        _leave(consumer)

    # ----------------------------------------------------------------------------------- dead letters

    def _put_aside(self, message: Message, handle: _Handle, reason: str) -> None:
        settings = self._settings
        if self._dead_letters is None:
            Admin(settings).ensure(settings.dead_topic, declare=settings.options.declare)
            self._dead_letters = make(Producer, settings.producer(Watch()))
        headers = [
            *handle.headers,
            (REASON_HEADER, oneline(reason)[:1024].encode()),
            ("x-virtbus-position", message.position.encode()),
            ("x-virtbus-group", (self._group or "").encode()),
        ]
        outcome: list[Any] = []
        deadline = time.monotonic() + _DEAD_LETTER_SECONDS
        try:
            self._dead_letters.produce(
                settings.dead_topic,
                message.body,
                handle.key,
                headers=headers,
                on_delivery=lambda error, _message: outcome.append(error),
            )
            while not outcome and time.monotonic() < deadline:
                self._dead_letters.poll(0.1)
        except KafkaException as error:
            outcome.append(error.args[0])
        except BufferError:  # larger than what the client may hold
            outcome.append(KafkaError(KafkaError._QUEUE_FULL))
        if outcome and outcome[0] is None:  # not `== [None]`: a KafkaError can't be compared with None
            return
        self._dead_letters.purge()
        self._dead_letters = None
        doing = f'putting {message.position} aside in "{settings.dead_topic}"'
        failure: VirtbusError = BusUnavailable(f"{doing}: not confirmed in {_DEAD_LETTER_SECONDS:g} s")
        if outcome:
            failure = translate(outcome[0], doing)
        if isinstance(failure, RecordRefused):
            failure = BusDenied(f"{failure}: let that topic take what the other one does (max.message.bytes)")
        raise failure


def _headers(polled: Any) -> list[tuple[str, bytes]]:
    """A message's headers; none when confluent-kafka can't give them (a name not in UTF-8): no event."""
    try:
        found = _give_headers(polled)
        return [(name, value if value is not None else b"") for name, value in found or ()]
    except (SystemError, UnicodeDecodeError):
        return []


def _leave(consumer: Any) -> None:
    """Close a client, in bounded time: it may wait for minutes for a broker that is connected and silent.

    What it could not commit by then is delivered again, to somebody.
    """
    leaving = threading.Thread(target=consumer.close, name="virtbus-kafka-leave", daemon=True)
    leaving.start()
    leaving.join(_CLOSE_SECONDS)
    if leaving.is_alive():
        emit(Notice(f"left without the broker's answer within {_CLOSE_SECONDS:g} s"))


def _offset(message: Message) -> int:
    handle: _Handle = message.handle  # type: ignore[assignment]
    return handle.offset
