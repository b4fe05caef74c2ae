"""Consuming from Kafka at least once: the client, the group, and what is reported when records are gone."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Container, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from confluent_kafka import (
    OFFSET_BEGINNING,
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    TopicPartition,
)
from confluent_kafka.admin import OffsetSpec  # type: ignore[attr-defined]

from virtbus.bus import Memory
from virtbus.bus.kafka.client import (
    Admin,
    Headers,
    TopicLook,
    Watch,
    headers_of,
    is_missing,
    make,
    message_of,
    oneline,
    topic_id,
    translate,
)
from virtbus.bus.kafka.letters import FOR_HEADER, KafkaLetterStore
from virtbus.bus.kafka.places import Losses, Place, Track
from virtbus.bus.kafka.settings import KafkaSettings
from virtbus.bus.subscription import Item, LineSubscription
from virtbus.errors import BusDenied, BusUnavailable, GroupTakenOver
from virtbus.model import Message
from virtbus.telemetry import Notice, Trouble, emit

_NO_LEADER_YET = frozenset({KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.LEADER_NOT_AVAILABLE})
_CALL_SECONDS = 5.0
_ASK_SECONDS = 1.0  # where an answer is only nice to have
_CLOSE_SECONDS = 5.0  # to leave the group and to commit what was acknowledged
# How often to look for another topic of the same name, for what retention took from a partition at rest and,
# where there is no group to report them to, for partitions that were added.
_LOOK_SECONDS = 20.0
# Without a partition for so long, while brokers answer, an exclusive member was replaced.
_OUSTED_SECONDS = 20.0
_LETTERS_SECONDS = 5.0  # for dead letters that are under way at `close`
_POLL_SECONDS = 0.5
# Messages that wait here for a retry or for the dead letters: at most so many times `prefetch`, or 50.
_HELD_FACTOR, _HELD_AT_LEAST = 10, 50
# Offsets kept in mind behind one that has no verdict for long: so much comes again after a kill.
_SPAN = 100_000


@dataclass(frozen=True, slots=True)
class _Origin:
    """Which record a message is, and how its partition stood then."""

    track: Track
    topic: str
    partition: int
    key: bytes | None
    headers: Headers


class KafkaSubscription(LineSubscription):
    """See virtbus.bus.Subscription. Rebalance-safe: a partition that is taken away takes its messages along.

    Acknowledged offsets are committed in the background every 0.2 s, at a rebalance and at `close`; a kill
    in between delivers those messages again. Kafka keeps no count of deliveries: `redelivered` is true only
    for what this subscription was told to `retry`.
    """

    def __init__(
        self,
        settings: KafkaSettings, group: str | None, prefetch: int, exclusive: bool = False,
        memory: Memory | None = None,
    ) -> None:  # fmt: skip
        """Without a group: raises BusUnavailable or BusDenied when "now" can't be found out."""
        super().__init__(group, prefetch, KafkaLetterStore(settings, group) if group is not None else None)
        self._settings = settings
        self._topic = settings.options.topic
        self._prefetch = max(1, prefetch)
        self._exclusive = exclusive and group is not None
        self._ousted_at: float | None = None  # since when an exclusive member has no partition any more
        self._tracks: dict[int, Track] = {}  # by assigned partition
        self._paused: bool | None = None  # None: some partitions may be, and others not
        self._polled = True  # since something that waited here was handed out
        self._losses = Losses(self._topic, memory or Memory())
        self._look = TopicLook(settings, self._topic, _LOOK_SECONDS)
        self._asked: list[tuple[Track, int | None]] = []  # how far each was read when the look began
        self._watch = Watch()
        self._consumer: Any = None
        if group is None:
            self._connect()

    def receive(self, timeout: float) -> Message | None:
        """See virtbus.bus.Subscription."""
        deadline = time.monotonic() + timeout
        if self._consumer is None:
            self._connect()
        while True:
            self._collect()
            # What waits here and what the broker has take turns: a caller that is slower than its retries
            # come due would else hear of no new message, and of no rebalance, until the group casts it out.
            turn, self._polled = self._polled, True
            now = time.monotonic()
            message = self._line.next(now) if turn else None
            if message is not None:
                self._polled = False
                return message
            self._throttle()
            polled = self._poll(min(deadline, self._line.due()) - now if turn else 0.0)
            if self._look.due(time.monotonic()):
                self._look_around(idle=polled is None)
                if self._consumer is None:  # another topic: what was polled comes again if it is of that one
                    self._connect()
                    continue
            if polled is not None and polled.error() is None:
                self._took(polled)
                message = self._line.next(time.monotonic())
                if message is not None:
                    return message
                continue
            now = time.monotonic()
            self._raise_for(None if polled is None else polled.error(), now >= deadline)
            if turn and now >= deadline and self._line.due() > now:
                return None

    def close(self) -> None:
        """See virtbus.bus.Subscription."""
        if self._letters is not None:
            self._letters.close(_LETTERS_SECONDS)
        if self._consumer is not None:
            self._collect()
            self._confirm_topic()
            self._leave()

    def _leave(self) -> None:
        consumer, self._consumer = self._consumer, None
        self._forget(list(self._tracks))
        _close(consumer)

    def _confirm_topic(self) -> None:
        """Where it is still the same topic all that was read was its: the next start need not doubt that."""
        positions = {partition: track.position for partition, track in self._tracks.items()}
        if self._group is None or not positions or self._watch.all_down:
            return
        if self._look.wait(_ASK_SECONDS) != self._losses.topic_id:
            return
        for partition, position in positions.items():
            if position is not None:
                self._store(partition, position, position)

    # ---------------------------------------------------------------------------------------- messages

    def _poll(self, wait: float) -> Any:
        longest = 0.05 if self._line.aside else _POLL_SECONDS  # to hear of dead letters that are stored
        try:
            return self._consumer.poll(max(0.0, min(wait, longest)))
        except KafkaException as error:  # a fatal error is raised by poll instead of given to error_cb
            self._raise_for(error.args[0], over=True)
            raise translate(error.args[0], f"consuming from {self._settings.display}") from error

    def _took(self, polled: Any) -> None:
        """A message from the broker came."""
        partition, offset = polled.partition(), polled.offset()
        track = self._tracks.get(partition)
        if track is None:  # assigned without a callback: never seen, but a message must not be lost for it
            track = self._assign(partition)
        elif track.following is not None and offset < track.following:
            self._losses.replaced(partition, track)
            self._look.soon()
            track = self._assign(partition, offset)  # what came before is another log's
        passed_over = track.took(offset)
        if passed_over is not None:
            ends = _ends(self._consumer, TopicPartition(polled.topic(), partition))
            self._losses.passed_over(partition, *passed_over, ends)
        headers, key = headers_of(polled), polled.key()
        lane = (partition, key if key is not None else offset)  # a message without a key is a key of its own
        item = Item(lane, offset, _Origin(track, polled.topic(), partition, key, headers))
        meant_for = next((value for name, value in headers if name == FOR_HEADER), None)
        if meant_for is not None and self._group is not None and meant_for != self._group.encode():
            self._done(item)  # a dead letter that another group sent back to itself
            return
        item.message = message_of(polled, headers, redelivered=meant_for is not None, handle=item)
        self._line.arrived(item)

    def _done(self, item: Item) -> None:
        origin = item.origin
        watermark = origin.track.done(item.number)
        if watermark is not None and self._group is not None:
            self._store(origin.partition, watermark, origin.track.sure)

    def _store(self, partition: int, following: int, sure: int | None) -> None:
        """Keep how far the group has read, here and with the next commit."""
        read = self._losses.read(partition, following, sure)
        place = TopicPartition(self._topic, partition, following, read.metadata())
        try:
            self._consumer.store_offsets(offsets=[place])
        except KafkaException as error:
            # The partition went away this moment: its next owner delivers the message again.
            if error.args[0].code() != KafkaError._STATE:
                emit(Trouble("storing a Kafka offset", oneline(error)))

    def _throttle(self) -> None:
        """Stop fetching while the caller has enough; polling goes on, so that the group keeps us."""
        line, most = self._line, max(self._prefetch * _HELD_FACTOR, _HELD_AT_LEAST)
        spans = sum(track.span for track in self._tracks.values())
        full = len(line.out) >= self._prefetch or line.held + line.ready >= most or spans >= max(_SPAN, most)
        if full == self._paused or not self._tracks:
            return
        places = [TopicPartition(self._topic, partition) for partition in self._tracks]
        try:
            (self._consumer.pause if full else self._consumer.resume)(places)
            self._paused = full
        except KafkaException as error:  # a rebalance came between; the next round does it
            emit(Trouble("pausing a Kafka partition", oneline(error)))

    # ------------------------------------------------------------------------------------- connection

    def _assign(self, partition: int, following: int | None = None) -> Track:
        """A partition is ours; what came from it before means nothing any more."""
        self._forget([partition])
        track = self._tracks[partition] = Track(following)
        return track

    def _forget(self, partitions: list[int]) -> None:
        """Partitions are gone, and with them what came from them."""
        for partition in partitions:
            self._tracks.pop(partition, None)
        gone = set(partitions)
        self._line.forget(lambda item: item.origin.partition in gone)
        if self._letters is not None:
            self._letters.forget(lambda item: item.origin.partition in gone)

    def _connect(self) -> None:
        settings, topic = self._settings, self._topic
        found = Admin(settings).ensure(topic, declare=settings.options.declare)
        self._losses.topic_id = topic_id(found)
        self._losses.without({each.id for each in found.partitions})
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
                places = _now(consumer, topic)
                for place in places:
                    self._assign(place.partition, place.offset)
                consumer.assign(places)
        except BaseException:
            consumer.close()
            raise
        self._consumer = consumer

    def _assigned(self, consumer: Any, places: list[Any]) -> None:
        """Partitions are ours: go on where the group left off."""
        begun = []
        for place, start, read in _starts(consumer, places, self._losses, self._settings):
            track = self._assign(place.partition, None if read is None else read.next)
            if read is not None and read.sure is not None:
                track.sure = read.sure
            if start is not None and read is not None:
                place.offset = start
                begun.append(TopicPartition(place.topic, place.partition, start, read.metadata()))
        consumer.incremental_assign(places)
        if begun:  # from here on the group has a place that retention can overtake
            consumer.store_offsets(offsets=begun)
        self._paused = None  # new partitions come unpaused, others stay as they are: `_throttle` looks again
        self._ousted_at = None

    def _revoked(self, consumer: Any, places: list[Any]) -> None:
        if consumer is not self._consumer:  # one that is being closed, in a thread of its own
            return
        # What was acknowledged is stored: librdkafka commits it before it gives the partition away.
        self._forget([place.partition for place in places])
        if self._exclusive and not self._tracks:
            self._ousted_at = time.monotonic()

    def _look_around(self, idle: bool) -> None:
        """Is it still the same topic, and, where nothing comes, has it lost what we were about to read?"""
        tracks = self._tracks
        if not self._look.is_asking:
            self._asked = [(track, track.position) for track in tracks.values()]
        found = self._look.poll(time.monotonic())
        if found is None or self._watch.all_down:
            return
        if found != self._losses.topic_id:
            for partition, track in tracks.items():
                self._losses.replaced(partition, track)
            if self._group is not None:
                self._restart()  # to take it from its beginning
                return
            self._losses.topic_id = found
            self._consumer.unassign()
            tracks.clear()
        for track, position in self._asked:
            track.sure = position
        if self._group is None:
            for partition in _added(self._consumer, self._topic, self._tracks):
                self._assign(partition)  # everything in it is from after we began
                self._paused = None
        if idle and not self._paused:
            _look_for_losses(self._consumer, self._topic, tracks, self._losses)

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
                self._look.soon()
                self._restart()
                raise BusUnavailable(str(translated)) from translated
        if watch.all_down and self._ousted_at is not None:
            self._ousted_at = time.monotonic()
        if over and watch.all_down:
            watch.all_down = False
            raise BusUnavailable(f"{doing}: {watch.last or 'no broker answers'}")

    def _is_ousted(self) -> bool:
        """Whether a newer exclusive member replaced us: librdkafka does not report that it was fenced off."""
        # Its assignment is empty, and stays so. After a cut it would long have joined again.
        if self._exclusive and self._tracks and not self._consumer.assignment():
            self._forget(list(self._tracks))
            self._ousted_at = time.monotonic()
        return self._ousted_at is not None and time.monotonic() - self._ousted_at > _OUSTED_SECONDS

    def _restart(self) -> None:
        """The next `receive` makes a new client, with credentials read again."""
        if self._group is None:
            # Its place in the stream is only here: the same client goes on, with the password as it is now.
            if self._settings.mechanism not in (None, "OAUTHBEARER"):
                self._consumer.set_sasl_credentials(self._settings.username, self._settings.password())
            self._watch.forget()
            return
        self._leave()


def _now(consumer: Any, topic: str) -> list[Any]:
    """Where each partition of a topic ends now."""
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


def _starts(
    consumer: Any, places: list[Any], losses: Losses, settings: KafkaSettings
) -> Iterator[tuple[Any, int | None, Place | None]]:
    """(place, where to go on instead of its commit, how far it was read); reports what is lost on the way.

    Without an answer librdkafka asks again by itself, and what was passed over is seen at the next record.
    """
    found = {}
    with suppress(KafkaException):
        found = {one.partition: one for one in consumer.committed(places, timeout=_CALL_SECONDS)}
    for place in places:
        known, ends = found.get(place.partition), _ends(consumer, place, _CALL_SECONDS)
        start, read = None, None
        if known is not None and known.offset >= 0:
            read = Place.committed(known.offset, known.metadata or "")
            if ends is not None and read.next > ends[1]:  # before an open transaction the log is not over
                ends = _whole(settings, place, ends)
        if known is not None and ends is not None:
            start, read = losses.resume(place.partition, read, *ends)
        yield place, start, read


def _look_for_losses(consumer: Any, topic: str, tracks: dict[int, Track], losses: Losses) -> None:
    """Nothing is waiting here: has retention taken what was about to come?"""
    for partition, track in tracks.items():
        ends = _ends(consumer, TopicPartition(topic, partition))
        if ends is None:
            return
        if track.following is not None and ends[0] > track.following:
            losses.passed_over(partition, track.following, ends[0] - 1, ends)
            track.following = ends[0]


def _ends(consumer: Any, place: Any, timeout: float = _ASK_SECONDS) -> tuple[int, int] | None:
    """The oldest offset that a partition still holds, and the next that it gives; None: no answer."""
    try:
        found: tuple[int, int] = consumer.get_watermark_offsets(place, timeout=timeout)
    except KafkaException:
        return None
    return found


def _whole(settings: KafkaSettings, place: Any, ends: tuple[int, int]) -> tuple[int, int] | None:
    """`ends` with what open transactions hold back."""
    where = TopicPartition(place.topic, place.partition)

    def ask(client: Any) -> Any:
        asked = {where: OffsetSpec.latest()}  # type: ignore[no-untyped-call]
        return client.list_offsets(asked, isolation_level=IsolationLevel.READ_UNCOMMITTED)[where]

    try:
        found: Any = Admin(settings).call(f"looking for the end of {place.topic}[{place.partition}]", ask)
    except (BusUnavailable, BusDenied):
        return None
    return ends[0], max(ends[1], found.offset)


def _added(consumer: Any, topic: str, known: Container[int]) -> list[int]:
    """The partitions of a topic beyond those that are known, assigned from their beginning."""
    try:
        found = consumer.list_topics(topic, timeout=_ASK_SECONDS).topics[topic].partitions
        new = [number for number in found if number not in known]
        if new:
            consumer.incremental_assign([TopicPartition(topic, number, OFFSET_BEGINNING) for number in new])
    except KafkaException:  # the next look finds them
        return []
    return new


def _close(consumer: Any) -> None:
    """Close a client, in bounded time: it may wait for minutes for a broker that says nothing.

    What it could not commit by then is delivered again, to somebody.
    """
    leaving = threading.Thread(target=consumer.close, name="virtbus-kafka-leave", daemon=True)
    leaving.start()
    leaving.join(_CLOSE_SECONDS)
    if leaving.is_alive():
        emit(Notice(f"left without the broker's answer within {_CLOSE_SECONDS:g} s"))
