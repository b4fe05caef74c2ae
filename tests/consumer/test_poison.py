"""What is no event of ours goes to the dead letters, also where these can't take it at first."""

from __future__ import annotations

import struct

import amqp
import kombu
import pytest

from tests.waiting import wait_until
from virtbus.bus import CUT_HEADER, BusOptions, open_bus
from virtbus.bus.embedded import EmbeddedSubscription
from virtbus.bus.subscription import Line
from virtbus.consumer import Consumer
from virtbus.envelope import MAX_DECODE_BYTES
from virtbus.errors import BusUnavailable
from virtbus.telemetry import METRICS
from virtbus.testing import ListFeed, records


def poison_and_events(url: str, count: int) -> list[str]:
    """Publish a message that no schema takes, then `count` events; their ids."""
    first, *events = records(count + 1, keys=count + 1)
    bus = open_bus(url, BusOptions())
    ListFeed([first._replace(body=b"nonsense"), *events]).drain(bus)
    bus.close()
    return [record.id for record in events]


def received(consumer: Consumer, count: int) -> list[str]:
    found = []
    for _ in range(count):
        delivery = consumer.receive(20.0)
        assert delivery is not None
        found.append(delivery.id)
        delivery.ack()
    return found


@pytest.mark.rabbitmq
def test_a_poison_message_whose_dead_letter_queue_is_gone_is_waited_out(amqp_url: str) -> None:
    with Consumer(amqp_url, group="g") as consumer, kombu.Connection(amqp_url) as other:
        assert consumer.receive(0.3) is None
        other.channel().queue_delete("virtbus.g.dead")
        sent = poison_and_events(amqp_url, 2)
        assert received(consumer, 2) == sent
        assert consumer.receive(1.0) is None
        assert other.channel().basic_get("virtbus.g.dead") is not None


def test_a_broker_that_goes_away_at_a_poison_message_is_waited_out(tmp_path, monkeypatch) -> None:
    put_aside, failures = EmbeddedSubscription.dead_letter, [BusUnavailable("gone for a moment")] * 2

    def gone_at_first(self, message, reason):
        if failures:
            self._drop()
            raise failures.pop()
        put_aside(self, message, reason)

    monkeypatch.setattr(EmbeddedSubscription, "dead_letter", gone_at_first)
    url = f"embedded://{tmp_path}/bus.db"
    with Consumer(url, group="g") as consumer:
        assert consumer.receive(0.1) is None
        sent = poison_and_events(url, 2)
        assert received(consumer, 2) == sent
        assert consumer.receive(0.2) is None
    bus = open_bus(url)
    with bus.dead_letters("g") as letters:
        assert letters.count() == 1
    bus.close()


def table(*items: bytes) -> bytes:
    """A header table of AMQP 0-9-1."""
    inside = b"".join(b"\x01k" + item for item in items)
    return struct.pack(">I", len(inside)) + inside


def nested(levels: int) -> bytes:
    inside = b"V"
    for _ in range(levels):
        inside = b"F" + table(inside)
    return table(inside)


_HEADERS, _ENCODING, _TIMESTAMP, _APP = 0x2000, 0x4000, 0x0040, 0x0008
# (property flags, property values) that RabbitMQ passes on as they are, and the body beside them
MALICE = {
    "a timestamp after all time": (_TIMESTAMP, struct.pack(">Q", 2**64 - 1), b"{}"),
    "a timestamp in a year of eight digits": (_TIMESTAMP, struct.pack(">Q", 2**50), b"{}"),
    "a header with such a timestamp": (_HEADERS, table(b"T" + struct.pack(">Q", 2**64 - 1)), b"{}"),
    "headers nested 5,000 deep": (_HEADERS, nested(5000), b"{}"),
    "no body beside them": (_HEADERS, nested(5000), b""),
    "a body that decodes to half a character": (_ENCODING, b"\x0eunicode_escape", rb"\ud800"),
    "a body in a quadratic encoding": (_ENCODING, b"\x08punycode", b"a" * 200_000 + b"-" + b"b" * 200_000),
    "a name in Latin-1": (_APP, b"\x01\xe9", b"{}"),
}


class _Crafted(amqp.Message):
    """A message whose properties are bytes of our own."""

    def __init__(self, flags: int, values: bytes, body: bytes) -> None:
        super().__init__(body)
        self.raw = struct.pack(">H", flags) + values

    def _serialize_properties(self) -> bytes:
        return self.raw


def publish_crafted(url: str, message: amqp.Message, key: str | bytes = "io_error.x.y") -> None:
    with kombu.Connection(url) as other:
        channel = other.channel()
        channel.confirm_select()
        channel.basic_publish_confirm(message, "virtbus.events", key)


def survives(url: str, message: amqp.Message, key: str | bytes = "io_error.x.y") -> None:
    """The message goes to the dead letters, and the event behind it is delivered."""
    before = METRICS.bus_reconnects._value.get()
    with Consumer(url, group="g") as consumer:
        assert consumer.receive(0.3) is None
        publish_crafted(url, message, key)
        bus = open_bus(url, BusOptions())
        (event,) = records(1)
        ListFeed([event]).drain(bus)
        bus.close()
        assert received(consumer, 1) == [event.id]
        assert consumer.receive(0.3) is None
    assert METRICS.bus_reconnects._value.get() == before + 2  # the consumer's and the publisher's, once each
    with kombu.Connection(url) as other:
        channel = other.channel()
        channel.auto_decode = False
        assert channel.basic_get("virtbus.g.dead") is not None
        assert channel.queue_declare("virtbus.g", passive=True).message_count == 0


@pytest.mark.rabbitmq
@pytest.mark.parametrize("name", MALICE)
def test_a_message_made_to_break_its_reader_is_put_aside(name: str, amqp_url: str) -> None:
    survives(amqp_url, _Crafted(*MALICE[name]))


@pytest.mark.rabbitmq
def test_messages_larger_than_any_event_are_not_kept_in_memory(
    amqp_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    keep = Line.next

    def look(self, now):
        held.extend(len(item.message.body) for item in self._ready)
        return keep(self, now)

    monkeypatch.setattr(Line, "next", look)
    with Consumer(amqp_url, group="g") as consumer, kombu.Connection(amqp_url) as other:
        assert consumer.receive(0.3) is None
        other.channel().queue_delete("virtbus.g.dead")  # what the broker itself puts aside would be lost
        for _ in range(5):
            publish_crafted(amqp_url, amqp.Message(b"x" * (MAX_DECODE_BYTES + 1)))
        bus = open_bus(amqp_url, BusOptions())
        (event,) = records(1)
        ListFeed([event]).drain(bus)
        bus.close()
        assert received(consumer, 1) == [event.id]
        bus = open_bus(amqp_url, BusOptions())
        with bus.dead_letters("g") as letters:
            wait_until(
                lambda: consumer.receive(0.3) is None and letters.count() == 5,
                timeout=60,
                what="five letters",
            )
            dead = list(letters.read())
        bus.close()
    assert max(held) <= MAX_DECODE_BYTES
    for letter in dead:
        assert letter.reason.endswith(f"{MAX_DECODE_BYTES + 1} bytes are more than the 1048576 that are read")
        assert letter.size_bytes < 100_000
        assert f"of {MAX_DECODE_BYTES + 1} bytes" in str(letter.message.headers[CUT_HEADER])


@pytest.mark.rabbitmq
def test_a_routing_key_that_is_no_text_breaks_no_reader(amqp_url: str) -> None:
    survives(amqp_url, amqp.Message(b"{}"), b"io_error.\xff\xfe.y")


@pytest.mark.rabbitmq
def test_the_dead_letter_of_json_in_another_charset_says_which(amqp_url: str) -> None:
    (event,) = records(1)
    headers = {f"ce-{name}": value for name, value in event.attributes.items()}
    theirs = amqp.Message(
        b'{"a":"\xe9"}',
        application_headers=headers,
        content_type="application/json; charset=latin-1",
        content_encoding="nobody-knows",
    )
    survives(amqp_url, theirs)
    bus = open_bus(amqp_url, BusOptions())
    with bus.dead_letters("g") as letters:
        (letter,) = letters.read()
    bus.close()
    assert letter.reason is not None
    assert letter.reason.endswith("its charset is 'latin-1'; JSON is sent as UTF-8")
