"""What the scenarios of the consumer share: a group, poison, and all that can go wrong beside it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import amqp
import kombu

from tests.brokers.rabbitmq import RabbitMQ, erlang
from tests.faults.amqp_kit import close_connections
from virtbus import envelope
from virtbus.bus import BusOptions, open_bus
from virtbus.consumer import Consumer, Delivery
from virtbus.model import Record
from virtbus.sequences import MissingEvents
from virtbus.testing import ListFeed, records

GROUP = "g"
QUEUE = f"virtbus.{GROUP}"


def say(name: str, good: bool, /, **words: object) -> None:
    """The scenario's one line, and the end of its process."""
    print(name, *(f"{key}={value}" for key, value in words.items()), flush=True)
    sys.exit(0 if good else 1)


def make_group(url: str) -> None:
    """The group's queues, bound, before the first message."""
    with Consumer(url, group=GROUP) as consumer:
        consumer.receive(0.3)


def publish(url: str, items: Sequence[Record]) -> None:
    bus = open_bus(url, BusOptions())
    ListFeed(items).drain(bus)
    bus.close()


def publish_raw(url: str, body: bytes, headers: dict[str, object] | None = None) -> None:
    """Somebody else's message on the exchange."""
    with kombu.Connection(url) as connection:
        channel = connection.channel()
        channel.confirm_select()
        message = amqp.Message(body, application_headers=headers or {}, delivery_mode=2)
        channel.basic_publish_confirm(message, "virtbus.events", "other.a.b")


def waiting(url: str, queue: str = QUEUE) -> int:
    with kombu.Connection(url) as connection:
        return int(connection.channel().queue_declare(queue, passive=True).message_count)


def dead_ids(url: str) -> list[str | None]:
    """What lies in the group's dead letters, read by nothing of ours; empties them."""
    found: list[str | None] = []
    with kombu.Connection(url) as connection:
        channel = connection.channel()
        channel.auto_decode = False
        while (message := channel.basic_get(f"{QUEUE}.dead", no_ack=True)) is not None:
            found.append(message.properties.get("message_id"))
    return found


# ------------------------------------------------------------------------------------- poison


@dataclass
class Poison:
    """A message that can't be put aside while `trouble` lasts."""

    body: bytes = b"not an event"
    headers: dict[str, object] = field(default_factory=dict)
    trouble: Callable[[RabbitMQ, str], AbstractContextManager[str | None]] | None = None  # gives a URL


@contextmanager
def _full(broker: RabbitMQ, vhost: str) -> Iterator[None]:
    broker.policy(vhost, rf"^{QUEUE}\.dead$", max_length=1, overflow="reject-publish")
    url = broker.url(vhost)
    with kombu.Connection(url) as connection:
        channel = connection.channel()
        until = time.monotonic() + 10
        while waiting(url, f"{QUEUE}.dead") < 1 and time.monotonic() < until:
            channel.basic_publish(amqp.Message(b"old", delivery_mode=2), "", f"{QUEUE}.dead")
            time.sleep(0.1)
        for _ in range(3):
            channel.basic_publish(amqp.Message(b"old", delivery_mode=2), "", f"{QUEUE}.dead")
        time.sleep(0.3)
    yield


@contextmanager
def _gone(broker: RabbitMQ, vhost: str) -> Iterator[None]:
    with kombu.Connection(broker.url(vhost)) as connection:
        connection.channel().queue_delete(f"{QUEUE}.dead")
    yield


@contextmanager
def _alarm(broker: RabbitMQ, vhost: str) -> Iterator[None]:
    with broker.memory_alarm():
        yield


@contextmanager
def _refused(broker: RabbitMQ, vhost: str) -> Iterator[str]:
    """A user who may consume and declare, and write to no exchange but by binding."""
    name = f"reader-{vhost}"
    broker.user(name, vhost, configure=".*", write=r"^virtbus\.g", read=".*")
    yield broker.url(vhost, user=name, password="secret")


@contextmanager
def _cut(broker: RabbitMQ, vhost: str) -> Iterator[None]:
    """Every connection is closed again and again while the group works."""
    ended = threading.Event()

    def cut() -> None:
        for _ in range(5):
            if ended.wait(1.0):
                return
            close_connections(broker, vhost)

    thread = threading.Thread(target=cut)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


POISONS: dict[str, Poison] = {
    "no event": Poison(),
    "headers that fill a frame": Poison(b"{}", {"trace": "t" * 130_950}),
    "many headers that fill a frame": Poison(b"{}", {f"h{n}": "t" * 1000 for n in range(128)}),
    "dead letters full": Poison(trouble=_full),
    "dead letters gone": Poison(trouble=_gone),
    "dead letters refused": Poison(trouble=_refused),
    "memory alarm": Poison(trouble=_alarm),
    "connections cut": Poison(trouble=_cut),
}


@dataclass
class Neighbours:
    """What became of the good events beside a bad one."""

    sent: int
    handed_out: int
    in_dead: int


def beside_poison(
    broker: RabbitMQ, name: str, *, bad: int = 1, good: int = 50, seconds: float = 60.0
) -> Neighbours:
    """`bad` times poison before `good` events, with a delivery limit, while it can't be put aside."""
    poison = POISONS[name]
    vhost = broker.vhost()
    url = broker.url(vhost)
    make_group(url)
    broker.policy(vhost, rf"^{QUEUE}$", delivery_limit=20)
    items = records(good, keys=good)
    for _ in range(bad):
        publish_raw(url, poison.body, poison.headers)
    publish(url, items)
    handed: set[str] = set()

    def work(at: str) -> None:
        with Consumer(at, group=GROUP) as consumer:
            until = time.monotonic() + seconds
            while len(handed) < good and time.monotonic() < until:
                delivery = consumer.receive(0.5)
                if delivery is not None:
                    handed.add(delivery.id)
                    delivery.ack()

    if poison.trouble is None:
        work(url)
    else:
        with poison.trouble(broker, vhost) as other:
            work(other or url)
    found = Neighbours(good, len(handed), len({record.id for record in items} & set(dead_ids(url))))
    broker.drop_vhost(vhost)
    return found


# ------------------------------------------------------------------------------------- an event that kills


def die(consumer: Consumer) -> None:
    """What the broker sees of a killed process: the connection goes without a word."""
    subscription = consumer._grip.subscription
    assert subscription is not None
    link = subscription._link  # type: ignore[attr-defined]
    subscription._closed.set()  # type: ignore[attr-defined]
    if link is not None:
        link.discard()


def beside_killer(
    broker: RabbitMQ, *, good: int = 60, limit: int | None = 20, deaths: int = 40
) -> Neighbours:
    """The first event kills whoever handles it, for ever; the others are good. `limit`: a broker's policy."""
    vhost = broker.vhost()
    url = broker.url(vhost)
    make_group(url)
    if limit is not None:
        broker.policy(vhost, rf"^{QUEUE}$", delivery_limit=limit)
    killer, *items = records(good + 1, keys=good + 1)
    publish(url, [killer, *items])
    handed: set[str] = set()
    for _ in range(deaths):
        consumer = Consumer(url, group=GROUP, max_attempts=20)
        died = False
        while (delivery := _next(consumer)) is not None:
            if delivery.id == killer.id:
                die(consumer)
                died = True
                break
            handed.add(delivery.id)
            delivery.ack()
        if not died:
            consumer.close()
            break
    dead = set(dead_ids(url))
    found = Neighbours(good, len(handed), len({record.id for record in items} & dead))
    assert killer.id in dead, "the event that kills is put aside in the end"
    broker.drop_vhost(vhost)
    return found


def _next(consumer: Consumer) -> Delivery | None:
    until = time.monotonic() + 5.0
    while time.monotonic() < until:
        delivery = consumer.receive(1.0)
        if delivery is not None:
            return delivery
    return None


def one_and_die(url: str, folder: str) -> None:
    """One effect, its ack, and the end."""
    consumer = Consumer(url, group=GROUP, dedupe=Path(folder) / "seen.db")
    delivery = consumer.receive(30.0)
    assert delivery is not None
    with (Path(folder) / "effects").open("a", encoding="ascii") as out:
        out.write(f"{delivery.id}\n")
    delivery.ack()
    os.kill(os.getpid(), signal.SIGKILL)


# ------------------------------------------------------------------------------------- deaf


def _delete_exchange(broker: RabbitMQ, vhost: str) -> None:
    with kombu.Connection(broker.url(vhost)) as connection:
        channel = connection.channel()
        channel.exchange_delete("virtbus.events")
        channel.exchange_declare("virtbus.events", type="topic", durable=True, auto_delete=False)


def _delete_queue(broker: RabbitMQ, vhost: str) -> None:
    with kombu.Connection(broker.url(vhost)) as connection:
        connection.channel().queue_delete(QUEUE)


def _unbind(broker: RabbitMQ, vhost: str) -> None:
    with kombu.Connection(broker.url(vhost)) as connection:
        connection.channel().queue_unbind(QUEUE, "virtbus.events", "#")


def _vhost_again(broker: RabbitMQ, vhost: str) -> None:
    broker.drop_vhost(vhost)
    broker.eval(
        f'rabbit_vhost:add(<<{erlang(vhost)}>>, <<"tests">>), rabbit_auth_backend_internal:set_permissions('
        f'<<"guest">>, <<{erlang(vhost)}>>, <<".*">>, <<".*">>, <<".*">>, <<"tests">>).'
    )


DEAFENING: dict[str, Callable[[RabbitMQ, str], None]] = {
    "exchange": _delete_exchange,
    "queue": _delete_queue,
    "binding": _unbind,
    "vhost": _vhost_again,
}


@dataclass
class Deaf:
    """How a group came back: what came after the repair, and what was lost before it."""

    noticed_seconds: float
    after: int
    after_lost: int
    before_lost: int
    named: int


def deafened(broker: RabbitMQ, what: str, *, rate: float = 50.0, after: float = 5.0) -> Deaf:
    """Delete `what` under load; a group that checks gaps must hear again, and name what it missed."""
    vhost = broker.vhost()
    url = broker.url(vhost)
    told: list[MissingEvents] = []
    consumer = Consumer(url, group=GROUP, check_gaps=True, reorder_seconds=3.0, on_missing=told.append)
    consumer.receive(0.3)
    items = records(5_000, keys=100)
    ended, sent = threading.Event(), []

    def agent() -> None:
        for record in items:
            if ended.wait(1.0 / rate):
                return
            _send(url, record)
            sent.append((time.monotonic(), record.id))

    thread = threading.Thread(target=agent)
    thread.start()
    handed: dict[str, float] = {}

    def listen(done: Callable[[], bool], seconds: float) -> None:
        until = time.monotonic() + seconds
        while not done() and time.monotonic() < until:
            delivery = consumer.receive(0.2)
            if delivery is not None:
                handed[delivery.id] = time.monotonic()
                delivery.ack()

    listen(lambda: len(handed) >= 50, 30)
    DEAFENING[what](broker, vhost)
    broke = time.monotonic()
    # Heard again: an event that was sent a moment after, for the queue still holds some from before.
    listen(lambda: any(at > broke + 0.5 and name in handed for at, name in list(sent)), 60)
    first = next((at for at, name in sent if at > broke + 0.5 and name in handed), float("inf"))
    listen(lambda: False, after)
    ended.set()
    thread.join()
    _close_channel(url)
    listen(lambda: all(name in handed for at, name in sent if at >= first), 20)
    listen(lambda: False, 5.0)  # the window of the gap check
    consumer.close()
    lost_after = sum(at >= first and name not in handed for at, name in sent)
    lost_before = sum(at < first and name not in handed for at, name in sent)
    named = sum((one.last or one.first) - one.first + 1 for one in told)
    broker.drop_vhost(vhost)
    return Deaf(first - broke, sum(at >= first for at, _ in sent), lost_after, lost_before, named)


def _send(url: str, record: Record) -> None:
    """As an agent whose exchange may be gone for a moment: tries until it is confirmed, routed or not."""
    wire = envelope.to_amqp(record.attributes, record.body)
    while True:
        try:
            channel = _channel(url)
            message = amqp.Message(
                wire.body, application_headers=dict(wire.headers), content_type=wire.content_type,
                message_id=record.id, delivery_mode=2,
            )  # fmt: skip
            channel.basic_publish_confirm(message, "virtbus.events", envelope.routing_key(record.attributes))
        except (OSError, amqp.exceptions.AMQPError):
            _close_channel(url)
            time.sleep(0.05)
        else:
            return


def _close_channel(url: str) -> None:
    connection, _ = _channels.pop(url, (None, None))
    if connection is not None:
        connection.collect()


_channels: dict[str, tuple[amqp.Connection, amqp.Channel]] = {}


def _channel(url: str) -> amqp.Channel:
    if url not in _channels:
        parts = kombu.Connection(url)
        # py-amqp's own: kombu loses sight of a connection whose log-in was refused, and of its socket.
        connection = amqp.Connection(
            f"{parts.hostname}:{parts.port}", parts.userid, parts.password, virtual_host=parts.virtual_host
        )
        try:
            connection.connect()
            channel = connection.channel()
            channel.exchange_declare("virtbus.events", type="topic", durable=True, auto_delete=False)
            channel.confirm_select()
        except BaseException:
            connection.collect()
            raise
        _channels[url] = connection, channel
    return _channels[url][1]
