"""A model of a broker with the manners of RabbitMQ's quorum queues; behind `virtbus.bus`."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence

from tests.sim.runtime import Process, Scheduler, Virtual
from virtbus import envelope
from virtbus.bus import DeadLetters, Feed, Memory
from virtbus.errors import BusUnavailable
from virtbus.model import Binding, Check, Confirmed, Deferred, Message, Outcome, Record, Unroutable

WINDOW = 8


@dataclasses.dataclass
class Arrival:
    """One record as the broker took it."""

    at: float
    host: str
    record: Record


class Broker:
    """What all connections share. It keeps what it confirmed, whatever happens to it."""

    def __init__(self, sched: Scheduler, virtual: Virtual) -> None:
        self.sched = sched
        self.up = True
        self.slow = 0.0
        self.unroutable = False  # nobody has bound a queue
        self.loses_confirms = 0.0  # how likely a connection ends between a record and its confirm
        self.log: list[Arrival] = []
        self.queue: deque[Message] = deque()
        self.generation = 0  # of connections
        self._changed = virtual.Condition()

    def stop(self, seconds: float) -> None:
        """Gone for so long; every connection ends."""
        self.up = False
        self.generation += 1
        with self._changed:
            self._changed.notify_all()
        self.sched.sleep(seconds)
        self.up = True

    def cut(self) -> None:
        """Every connection ends."""
        self.generation += 1
        with self._changed:
            self._changed.notify_all()

    def take(self, host: str, record: Record) -> None:
        """Durable from here on."""
        self.log.append(Arrival(self.sched.now, host, record))
        wire = envelope.to_amqp(record.attributes, record.body, structured=False)
        number = len(self.log)
        message = Message(
            binding=Binding.AMQP,
            headers=dict(wire.headers),
            content_type=wire.content_type,
            body=wire.body,
            key=record.key,
            redelivered=False,
            user_id=None,
            position=f"queue#{number}",
            handle=number,
            attempts=0,
        )
        with self._changed:
            self.queue.append(message)
            self._changed.notify_all()


class ModelBus:
    """One process's bus."""

    def __init__(self, broker: Broker, process: Process, host: str) -> None:
        self.broker, self.process, self.host = broker, process, host
        self.closed = False

    def publish(self, feed: Feed) -> Iterator[tuple[Record, Outcome]]:
        """See Bus."""
        broker, sched = self.broker, self.broker.sched
        sched.sleep(0.002 + broker.slow)
        if not broker.up or self.closed:
            raise BusUnavailable("connection refused")
        generation = broker.generation
        while taken := feed.take(WINDOW, frozenset()):
            waiting = list(taken)
            for record in taken:
                sched.sleep(sched.random.random() * 0.004 + broker.slow)
                if broker.generation != generation or not broker.up or self.closed:
                    for lost in waiting:
                        yield lost, Deferred(BusUnavailable("connection reset by peer"))
                    return
                if broker.unroutable and record.row:
                    waiting.remove(record)
                    yield record, Unroutable()
                    continue
                broker.take(self.host, record)
                sched.sleep(sched.random.random() * 0.002)
                if sched.random.random() < broker.loses_confirms:
                    for lost in waiting:
                        yield lost, Deferred(BusUnavailable("connection reset by peer"))
                    return
                waiting.remove(record)
                yield record, Confirmed()

    def tick(self) -> None:
        """See Bus."""

    def consume(
        self, group: str | None, *, prefetch: int = 100, exclusive: bool = False, memory: Memory | None = None
    ) -> ModelSubscription:
        """See Bus."""
        return ModelSubscription(self.broker, self.process, prefetch)

    def dead_letters(self, group: str) -> DeadLetters:
        raise NotImplementedError

    def probe(self) -> Sequence[Check]:
        return ()

    def close(self) -> None:
        self.closed = True


class ModelSubscription:
    """One member of the one group."""

    def __init__(self, broker: Broker, process: Process, prefetch: int) -> None:
        self._broker, self._prefetch = broker, prefetch
        self._generation = -1
        self._out: dict[object, Message] = {}
        self._waiting: list[tuple[float, Message]] = []
        self._closed = False
        process.at_death.append(self.close)

    def receive(self, timeout: float) -> Message | None:
        """See Subscription."""
        broker, sched = self._broker, self._broker.sched
        end = sched.now + timeout
        while not self._closed:
            if self._generation != broker.generation:
                self._give_back()
                if not broker.up:
                    raise BusUnavailable("connection refused")
                sched.sleep(0.005)
                self._generation = broker.generation
                continue
            for due, message in self._waiting:
                if due <= sched.now:
                    self._waiting.remove((due, message))
                    self._out[message.handle] = message
                    return message
            held = {message.key for _, message in self._waiting}
            found = next((message for message in broker.queue if message.key not in held), None)
            if found is not None and len(self._out) + len(self._waiting) < self._prefetch:
                broker.queue.remove(found)
                message = dataclasses.replace(found, attempts=(found.attempts or 0) + 1)
                self._out[message.handle] = message
                sched.sleep(0.0005)
                return message if self._generation == broker.generation else self.receive(end - sched.now)
            if sched.now >= end:
                return None
            with broker._changed:
                broker._changed.wait(min([end, *(due for due, _ in self._waiting)]) - sched.now)
        return None

    def ack(self, message: Message) -> None:
        """See Subscription."""
        self._broker.sched.perhaps(0.1)
        if self._generation == self._broker.generation:
            self._out.pop(message.handle, None)

    def retry(self, message: Message, after: float) -> None:
        """See Subscription."""
        if self._generation == self._broker.generation and self._out.pop(message.handle, None) is not None:
            self._waiting.append((self._broker.sched.now + after, message))

    def dead_letter(self, message: Message, reason: str) -> None:
        """See Subscription."""
        raise AssertionError(f"nothing is poison here: {reason}")

    def close(self) -> None:
        """See Subscription."""
        self._closed = True
        self._give_back()

    def _give_back(self) -> None:
        back = [*self._out.values(), *(message for _, message in self._waiting)]
        back.sort(key=lambda message: message.handle, reverse=True)  # type: ignore[arg-type, return-value]
        self._out, self._waiting = {}, []
        self._broker.queue.extendleft(dataclasses.replace(one, redelivered=True) for one in back)
