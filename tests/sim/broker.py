"""Models of brokers behind `virtbus.bus`: RabbitMQ's quorum queues and Kafka's partitions.

What both are held to stands in tests/sim/test_conformance.py, which puts the same script to the real brokers.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence

from tests.sim.runtime import Process, Scheduler, Virtual
from virtbus import envelope
from virtbus.bus import DeadLetters, Feed, Memory
from virtbus.errors import BusUnavailable
from virtbus.model import Binding, Check, Confirmed, Deferred, Message, Outcome, Record, Unroutable

WINDOW = 8
PARTITIONS = 3
LETTER_RETRY_SECONDS = 1.0


@dataclasses.dataclass
class Arrival:
    """One record as the broker took it."""

    at: float
    host: str
    record: Record


class Broker:
    """What all connections share. It keeps what it confirmed, whatever happens to it."""

    def __init__(self, sched: Scheduler, virtual: Virtual, kind: str = "amqp") -> None:
        self.sched, self.kind = sched, kind
        self.up = True
        self.slow = 0.0
        self.unroutable = False  # nobody has bound a queue
        self.refuses_letters = False  # the dead-letter queue is gone, or publishers are blocked
        self.loses_confirms = 0.0  # how likely a connection ends between a record and its confirm
        self.log: list[Arrival] = []
        self.groups: dict[str, Queue | Topic] = {}
        self.letters: list[tuple[str, Message, str]] = []  # group, message, reason
        self.generation = 0  # of connections
        self.changed = virtual.Condition()
        self.returned: Counter[str] = Counter()  # event ids that went back to the group of the reactors
        self.messages: list[Message] = []

    def stop(self, seconds: float) -> None:
        """Gone for so long; every connection ends."""
        self.up = False
        self.cut()
        self.sched.sleep(seconds)
        self.up = True

    def cut(self) -> None:
        """Every connection ends."""
        self.generation += 1
        self.changed.notify_all()  # without its lock: a process may die here

    def group(self, name: str) -> Queue | Topic:
        """Where a group stands; one that is new gets everything from its first event on."""
        if name not in self.groups:
            made = self.groups[name] = Topic() if self.kind == "kafka" else Queue()
            for message in self.messages:
                made.put(message)
        return self.groups[name]

    def take(self, host: str, record: Record) -> None:
        """Durable from here on."""
        self.log.append(Arrival(self.sched.now, host, record))
        wire = envelope.to_amqp(record.attributes, record.body, structured=False)
        self.put(dict(wire.headers), wire.content_type, record.body, record.key)

    def put(self, headers: dict[str, object], content_type: str | None, body: bytes, key: str | None) -> None:
        """A message, whoever sent it."""
        number = len(self.messages) + 1
        message = Message(
            binding=Binding.AMQP,
            headers=headers,
            content_type=content_type,
            body=body,
            key=key,
            redelivered=False,
            user_id=None,
            position=f"queue#{number}",
            handle=number,
            attempts=None if self.kind == "kafka" else 0,
        )
        self.messages.append(message)
        for group in self.groups.values():
            group.put(message)
        self.changed.notify_all()  # without its lock: a process may die here


class Queue:
    """A group's quorum queue: what is not acknowledged goes back to its place when its connection ends."""

    def __init__(self) -> None:
        self.waiting: deque[Message] = deque()
        self.out: dict[object, Message] = {}
        self.active: object = None  # its exclusive consumer

    def __len__(self) -> int:
        return len(self.waiting) + len(self.out)

    def put(self, message: Message) -> None:
        self.waiting.append(message)

    def next(self, held: set[str | None]) -> Message | None:
        """The next message whose key is not held back."""
        found = next(
            (message for message in self.waiting if message.key is None or message.key not in held), None
        )
        if found is None:
            return None
        self.waiting.remove(found)
        message = dataclasses.replace(found, attempts=(found.attempts or 0) + 1)
        self.out[message.handle] = message
        return message

    def settle(self, message: Message) -> None:
        self.out.pop(message.handle, None)

    def give_back(self) -> list[Message]:
        """Whatever its member had comes again; what that is."""
        back = [*self.out.values(), *self.waiting]
        back.sort(key=lambda message: message.handle)  # type: ignore[arg-type, return-value]
        out, self.out = self.out, {}
        self.waiting = deque(
            dataclasses.replace(one, redelivered=True) if one.handle in out else one for one in back
        )
        return list(out.values())


class Topic:
    """A group's place in each partition: all behind the first unsettled message comes again."""

    def __init__(self) -> None:
        self.partitions: list[list[Message]] = [[] for _ in range(PARTITIONS)]
        self.position = [0] * PARTITIONS
        self.committed = [0] * PARTITIONS
        self.settled: list[set[int]] = [set() for _ in range(PARTITIONS)]
        self.active: object = None

    def __len__(self) -> int:
        return sum(len(part) - done for part, done in zip(self.partitions, self.committed, strict=True))

    def put(self, message: Message) -> None:
        number = zlib.crc32((message.key or "").encode()) % PARTITIONS
        offset = len(self.partitions[number])
        place = f"topic[{number}]@{offset}"
        self.partitions[number].append(dataclasses.replace(message, position=place, handle=(number, offset)))

    def next(self, held: set[str | None]) -> Message | None:
        """The next message of a partition in which no key is held back."""
        for number, part in enumerate(self.partitions):
            at = self.position[number]
            if at < len(part) and not any(
                zlib.crc32((key or "").encode()) % PARTITIONS == number for key in held
            ):
                self.position[number] += 1
                return part[at]
        return None

    def settle(self, message: Message) -> None:
        number, offset = message.handle  # type: ignore[misc]
        self.settled[number].add(offset)
        while self.committed[number] in self.settled[number]:
            self.settled[number].remove(self.committed[number])
            self.committed[number] += 1

    def give_back(self) -> list[Message]:
        """Whatever lies behind the first that is not settled comes again; what that is."""
        places = zip(self.partitions, self.committed, self.position, strict=True)
        back = [message for part, first, last in places for message in part[first:last]]
        self.position = list(self.committed)
        self.settled = [set() for _ in range(PARTITIONS)]
        return back


class ModelBus:
    """One process's bus."""

    def __init__(self, broker: Broker, process: Process, host: str) -> None:
        self.broker, self.process, self.host = broker, process, host
        self.closed = False
        self.reach: Callable[[str], None] = lambda step: None  # where its process may be killed

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
                if sched.random.random() < broker.loses_confirms / 3:  # before all of it was sent
                    for lost in waiting:
                        yield lost, Deferred(BusUnavailable("connection reset by peer"))
                    return
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
        assert group is not None
        return ModelSubscription(self, group, prefetch, exclusive)

    def dead_letters(self, group: str) -> DeadLetters:
        raise NotImplementedError

    def probe(self) -> Sequence[Check]:
        return ()

    def close(self) -> None:
        self.closed = True


class ModelSubscription:
    """One member of a group; others stand by while it is active."""

    def __init__(self, bus: ModelBus, group: str, prefetch: int, exclusive: bool) -> None:
        self._bus, self._broker, self._name = bus, bus.broker, group
        self._prefetch, self._exclusive = prefetch, exclusive
        self._generation = -1
        self._out: dict[object, Message] = {}
        self._waiting: list[tuple[float, Message]] = []  # for their retry
        self._letters: list[tuple[float, Message, str]] = []
        self._closed = False
        bus.process.at_death.append(self.close)

    @property
    def _group(self) -> Queue | Topic:
        return self._broker.group(self._name)

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
            self._put_aside()
            group = self._group
            if group.active is None:
                group.active = self
            if group.active is self:
                for due, message in self._waiting:
                    if due <= sched.now:
                        self._waiting.remove((due, message))
                        message = dataclasses.replace(
                            message, attempts=message.attempts and message.attempts + 1
                        )
                        self._out[message.handle] = message
                        return message
                held = {message.key for _, message in self._waiting}
                if len(self._out) + len(self._waiting) + len(self._letters) < self._prefetch:
                    found = group.next(held)
                    if found is not None:
                        self._out[found.handle] = found
                        sched.sleep(0.0005)
                        if self._generation == broker.generation:
                            return found
                        continue
            if sched.now >= end:
                return None
            due_next = [end, *(due for due, _ in self._waiting), *(due for due, _, _ in self._letters)]
            with broker.changed:
                broker.changed.wait(min(due_next) - sched.now)
        return None

    def ack(self, message: Message) -> None:
        """See Subscription."""
        self._bus.reach("ack")
        self._broker.sched.perhaps(0.1)
        if self._generation == self._broker.generation and self._out.pop(message.handle, None) is not None:
            self._group.settle(message)
        self._bus.reach("acked")

    def retry(self, message: Message, after: float) -> None:
        """See Subscription."""
        if self._generation == self._broker.generation and self._out.pop(message.handle, None) is not None:
            self._waiting.append((self._broker.sched.now + after, message))

    def dead_letter(self, message: Message, reason: str) -> None:
        """See Subscription."""
        if self._generation == self._broker.generation and self._out.pop(message.handle, None) is not None:
            self._letters.append((self._broker.sched.now, message, reason))
            self._put_aside()

    def close(self) -> None:
        """See Subscription."""
        self._closed = True
        self._give_back()

    def _put_aside(self) -> None:
        now = self._broker.sched.now
        for due, message, reason in list(self._letters):
            if due <= now:
                self._letters.remove((due, message, reason))
                if self._broker.refuses_letters:
                    self._letters.append((now + LETTER_RETRY_SECONDS, message, reason))
                else:
                    self._broker.letters.append((self._name, message, reason))
                    self._group.settle(message)

    def _give_back(self) -> None:
        self._out, self._waiting, self._letters = {}, [], []
        group = self._broker.groups.get(self._name)
        if group is not None and group.active is self:
            group.active = None
            back = group.give_back()
            if self._exclusive:
                self._broker.returned.update(str(message.headers.get("ce-id")) for message in back)
            self._broker.changed.notify_all()  # without its lock: a process may die here
