"""AmqpBus against a peer that lies, delays, refuses and falls silent: each ends in the right outcome."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from tests.faultkit import FakeAmqpConnection, FakeAmqpPeer, Published, TcpFaultProxy
from tests.waiting import wait_until
from virtbus.bus import BusOptions
from virtbus.bus.amqp.bus import AmqpBus
from virtbus.errors import BusDenied, BusUnavailable
from virtbus.model import Confirmed, Deferred, Outcome, Record, Refused, Unroutable
from virtbus.telemetry import METRICS
from virtbus.testing import ListFeed, records

Script = Callable[[FakeAmqpConnection, Published], None]


@contextmanager
def publisher(peer: FakeAmqpPeer, **options: object) -> Iterator[AmqpBus]:
    bus = AmqpBus(peer.url, options=BusOptions(**{"confirm_timeout": 5.0, **options}))  # type: ignore[arg-type]
    try:
        yield bus
    finally:
        bus.close()


def outcomes_of(bus: AmqpBus, items: Sequence[Record]) -> list[Outcome]:
    """One `publish`, the outcomes in the order of the records."""
    feed = ListFeed(items)
    feed.publish(bus)
    by_id = {record.id: outcome for record, outcome in feed.outcomes}
    return [by_id[record.id] for record in items if record.id in by_id]


def kinds(outcomes: Sequence[Outcome]) -> list[str]:
    return [type(outcome).__name__ for outcome in outcomes]


# ------------------------------------------------------------------------------------- what is sent


def test_a_record_goes_out_mandatory_with_its_id_and_the_user_who_logged_in() -> None:
    (item,) = records(1)
    with FakeAmqpPeer() as peer, publisher(peer) as bus:
        assert outcomes_of(bus, [item]) == [Confirmed()]
    (published,) = peer.published
    assert published.message_id == item.id
    assert published.user_id == "guest"
    assert published.mandatory
    assert published.exchange == "virtbus.events"
    assert published.routing_key == f"io_error.6f1c3f5e-8f4e-4f0e-9c39-0c5b2c7b1a11.{item.key}"
    assert published.body == item.body
    assert b"\x02" + bytes((36,)) + item.id.encode() in published.header  # delivery mode 2, then the id


def test_a_body_larger_than_a_frame_arrives_whole() -> None:
    (item,) = records(1)
    body = b'"' + bytes(range(97, 123)) * 20_000 + b'"'
    big = Record(1, item.epoch, 1, item.id, item.key, item.attributes, body, item.created_ns)
    with FakeAmqpPeer() as peer, publisher(peer) as bus:
        assert outcomes_of(bus, [big]) == [Confirmed()]
    assert peer.published[0].body == body


A_RECORD = Record(
    row=1,
    epoch="e",
    seq=1,
    id="0197a0f0-0000-7000-8000-000000000001",
    key="dé",
    attributes={
        "specversion": "1.0",
        "id": "0197a0f0-0000-7000-8000-000000000001",
        "source": "/virtbus/agents/a.b",
        "type": "io.virtbus.domain.io_error.v1",
        "partitionkey": "dé",
        "datacontenttype": "application/json",
    },
    body=b'{"n":1}',
    created_ns=1_767_225_600_000_000_000,
)
# class, weight and body size; flags; then each property as AMQP 0-9-1, 4.2.6.1 orders them.
HEADER = b"".join(
    (
        bytes.fromhex("003c 0000 0000000000000007 b0d0"),
        b"\x10application/json",
        b"\x00\x00\x00\xcc",
        b"\x05ce-idS\x00\x00\x00\x240197a0f0-0000-7000-8000-000000000001",
        b"\x0fce-partitionkeyS\x00\x00\x00\x03d\xc3\xa9",
        b"\x09ce-sourceS\x00\x00\x00\x13/virtbus/agents/a.b",
        b"\x0ece-specversionS\x00\x00\x00\x031.0",
        b"\x07ce-typeS\x00\x00\x00\x1dio.virtbus.domain.io_error.v1",
        b"\x0ccontent-typeS\x00\x00\x00\x10application/json",
        b"\x02",
        b"\x240197a0f0-0000-7000-8000-000000000001",
        (1_767_225_600).to_bytes(8, "big"),
        b"\x05guest",
    )
)


def test_a_record_is_these_bytes_on_the_wire_and_no_others() -> None:
    """The contract with consumers in any language; checked with kombu 5.7.0 and py-amqp 5.4.2."""
    with FakeAmqpPeer() as peer, publisher(peer) as bus:
        assert outcomes_of(bus, [A_RECORD]) == [Confirmed()]
    (published,) = peer.published
    assert published.header == HEADER
    assert published.routing_key == "io_error.a_b.dé"
    assert published.body == A_RECORD.body


@pytest.mark.parametrize(
    ("name", "value"),
    [("subject", "s" * 140_000), ("x" * 300, "1")],
    ids=["more than a frame", "a name that is too long"],
)
def test_what_amqp_can_not_carry_is_refused_and_the_next_goes_on(name: str, value: str) -> None:
    bad = A_RECORD._replace(attributes={**A_RECORD.attributes, name: value})
    good = A_RECORD._replace(row=2, id="2", key="other")
    with FakeAmqpPeer() as peer, publisher(peer) as bus:
        assert kinds(outcomes_of(bus, [bad, good])) == ["Refused", "Confirmed"]
    assert [published.connection for published in peer.published] == [1]


# ------------------------------------------------------------------------------------- acks


def test_one_multiple_ack_confirms_all_before_it() -> None:
    def script(connection: FakeAmqpConnection, published: Published) -> None:
        if published.tag == 8:
            connection.ack(8, multiple=True)

    with FakeAmqpPeer(script) as peer, publisher(peer) as bus:
        assert outcomes_of(bus, records(8, keys=8)) == [Confirmed()] * 8


def test_reordered_acks_each_confirm_their_own_record() -> None:
    def script(connection: FakeAmqpConnection, published: Published) -> None:
        if published.tag == 4:
            for tag in (3, 1, 4, 2):
                connection.ack(tag)

    items = records(4, keys=4)
    with FakeAmqpPeer(script) as peer, publisher(peer) as bus:
        feed = ListFeed(items)
        feed.publish(bus)
    assert [record.row for record, _ in feed.outcomes] == [3, 1, 4, 2]
    assert kinds([outcome for _, outcome in feed.outcomes]) == ["Confirmed"] * 4


def test_a_missing_ack_is_deferred_at_the_deadline_although_heartbeats_go_on() -> None:
    stop = threading.Event()

    def script(connection: FakeAmqpConnection, published: Published) -> None:
        if published.tag == 1:

            def beat() -> None:
                while not stop.wait(0.05):
                    connection.send_raw(b"\x08\x00\x00\x00\x00\x00\x00\xce")

            threading.Thread(target=beat, daemon=True).start()

    with FakeAmqpPeer(script) as peer, publisher(peer, confirm_timeout=0.5) as bus:
        (outcome,) = outcomes_of(bus, records(1))
        stop.set()
    assert isinstance(outcome, Deferred)
    assert isinstance(outcome.error, BusUnavailable)


def test_a_late_ack_of_one_record_never_confirms_the_next() -> None:
    late: list[FakeAmqpConnection] = []

    def script(connection: FakeAmqpConnection, published: Published) -> None:
        if connection.number == 1:
            late.append(connection)
        else:
            late[0].ack(1)  # of the first connection: the record timed out long ago

    first, second = records(2)
    with FakeAmqpPeer(script) as peer, publisher(peer, confirm_timeout=0.3) as bus:
        assert kinds(outcomes_of(bus, [first])) == ["Deferred"]
        assert kinds(outcomes_of(bus, [second])) == ["Deferred"]
    assert [published.connection for published in peer.published] == [1, 2]


@pytest.mark.parametrize("lie", ["a tag never sent", "a tag already settled", "tag zero"])
def test_an_ack_of_what_is_not_under_way_ends_the_connection(lie: str) -> None:
    def script(connection: FakeAmqpConnection, published: Published) -> None:
        if published.tag == 1:
            connection.ack(1)
        if published.tag == 2:
            connection.ack({"a tag never sent": 99, "a tag already settled": 1, "tag zero": 0}[lie])

    with FakeAmqpPeer(script) as peer, publisher(peer) as bus:
        feed = ListFeed(records(2))
        outcomes = feed.publish(bus)
        assert kinds(outcomes) == ["Confirmed", "Deferred"]
        peer.script = lambda connection, published: connection.ack(published.tag)
        assert kinds(outcomes_of(bus, records(1))) == ["Confirmed"]
        assert len(peer.connections) == 2


# ------------------------------------------------------------------------------------- nacks and returns


def test_a_nacked_record_is_parked_and_the_others_are_confirmed_on_the_same_connection() -> None:
    def script(connection: FakeAmqpConnection, published: Published) -> None:
        (connection.nack if published.tag == 2 else connection.ack)(published.tag)

    with FakeAmqpPeer(script) as peer, publisher(peer) as bus:
        assert kinds(outcomes_of(bus, records(3, keys=3))) == ["Confirmed", "Nacked", "Confirmed"]
        assert len(peer.connections) == 1


def test_a_returned_record_is_unroutable_although_its_ack_follows() -> None:
    def script(connection: FakeAmqpConnection, published: Published) -> None:
        if published.tag == 2:
            connection.return_(published)
        connection.ack(published.tag)

    with FakeAmqpPeer(script) as peer, publisher(peer) as bus:
        assert kinds(outcomes_of(bus, records(3, keys=3))) == ["Confirmed", "Unroutable", "Confirmed"]
        assert len(peer.connections) == 1


def test_returns_are_matched_by_id_also_under_one_multiple_ack() -> None:
    def script(connection: FakeAmqpConnection, published: Published) -> None:
        held.append(published)
        if published.tag == 5:
            connection.return_(held[3])
            connection.return_(held[0])
            connection.ack(5, multiple=True)

    held: list[Published] = []
    with FakeAmqpPeer(script) as peer, publisher(peer) as bus:
        outcomes = outcomes_of(bus, records(5, keys=5))
    assert kinds(outcomes) == ["Unroutable", "Confirmed", "Confirmed", "Unroutable", "Confirmed"]


# ------------------------------------------------------------------------------------- refusals


def refusing(bad: set[str], code: int, text: str, *, whole: bool = False) -> Script:
    """Close the channel (or the connection) over the records of `bad`, confirm all others."""

    def script(connection: FakeAmqpConnection, published: Published) -> None:
        if published.message_id in bad:
            (connection.close_connection if whole else connection.close_channel)(code, text)
            connection.silent = True
        else:
            connection.ack(published.tag)

    return script


@pytest.mark.parametrize(("code", "whole"), [(406, False), (311, False), (501, True), (502, True)])
def test_the_one_record_that_closes_the_channel_is_refused_and_the_rest_is_confirmed(
    code: int, whole: bool
) -> None:
    items = records(12, keys=12)
    with FakeAmqpPeer() as peer, publisher(peer) as bus:
        peer.script = refusing({items[5].id}, code, "message size 9 is larger than 5", whole=whole)
        feed = ListFeed(items)
        for _ in range(5):
            feed.publish(bus, again=True)
            if not len(feed):
                break
    final = {record.id: outcome for record, outcome in feed.outcomes}
    assert isinstance(final[items[5].id], Refused)
    assert [kinds([final[one.id]]) for one in items if one is not items[5]] == [["Confirmed"]] * 11
    assert not peer.vouches_for(items[5].id)
    assert len(peer.connections) <= (4 if whole else 3)


def test_a_record_that_went_with_a_broken_connection_once_is_not_given_up() -> None:
    (item,) = records(1)
    with FakeAmqpPeer() as peer, publisher(peer) as bus:
        peer.script = lambda connection, published: connection.close_connection(501, "FRAME_ERROR")
        feed = ListFeed([item])
        assert kinds(feed.publish(bus, again=True)) == ["Deferred"]
        peer.script = lambda connection, published: connection.ack(published.tag)
        assert kinds(feed.publish(bus)) == ["Confirmed"]


def test_garbage_that_reads_like_a_refusal_refuses_nothing() -> None:
    # A basic.return with a header field of no known type: py-amqp calls that a syntax error, 502, of its own.
    method = bytes.fromhex("01 0001 00000009 003c0032 0138 00 00 00 ce")
    header = bytes.fromhex("02 0001 00000015 003c 0000 0000000000000000 2000 00000003 01615a ce")
    with FakeAmqpPeer() as peer, publisher(peer) as bus:
        peer.script = lambda connection, published: connection.send_raw(method + header)
        assert kinds(outcomes_of(bus, records(1))) == ["Deferred"]


def test_two_records_that_close_the_channel_are_both_found() -> None:
    items = records(12, keys=12)
    bad = {items[2].id, items[9].id}
    with FakeAmqpPeer() as peer, publisher(peer) as bus:
        peer.script = refusing(bad, 406, "PRECONDITION_FAILED")
        feed = ListFeed(items)
        for _ in range(8):
            feed.publish(bus, again=True)
    assert not len(feed)
    assert {record.id for record, outcome in feed.outcomes if isinstance(outcome, Refused)} == bad


def test_a_user_id_mismatch_is_never_a_records_fault() -> None:
    items = records(3, keys=3)
    text = "PRECONDITION_FAILED - user_id property set to 'guest' but authenticated user was 'agent'"
    with FakeAmqpPeer() as peer, publisher(peer) as bus:
        peer.script = refusing({one.id for one in items}, 406, text)
        for _ in range(3):
            for outcome in outcomes_of(bus, items):
                assert isinstance(outcome, Deferred)
                assert isinstance(outcome.error, BusDenied)
                assert "bus.username" in str(outcome.error)


def test_a_missing_exchange_defers_all_and_says_what_to_do() -> None:
    items = records(3, keys=3)
    with FakeAmqpPeer() as peer, publisher(peer) as bus:
        peer.script = refusing({one.id for one in items}, 404, "NOT_FOUND - no exchange 'virtbus.events'")
        outcomes = outcomes_of(bus, items)
    assert kinds(outcomes) == ["Deferred"] * 3
    assert "bus.declare" in str(outcomes[0].error)  # type: ignore[union-attr]


def test_a_refused_exchange_defers_all_as_denied() -> None:
    items = records(2, keys=2)
    with FakeAmqpPeer() as peer, publisher(peer) as bus:
        peer.script = refusing({one.id for one in items}, 403, "ACCESS_REFUSED - access to exchange refused")
        outcomes = outcomes_of(bus, items)
    assert [isinstance(outcome.error, BusDenied) for outcome in outcomes] == [True, True]  # type: ignore[union-attr]


def test_a_refused_routing_key_parks_its_key_and_the_others_go_on() -> None:
    items = records(6, keys=6)
    with FakeAmqpPeer() as peer, publisher(peer) as bus:
        peer.script = refusing({items[1].id}, 403, "ACCESS_REFUSED - access to topic 'x' in exchange refused")
        feed = ListFeed(items)
        feed.publish(bus, again=True)
        for _ in range(2):
            for record, outcome in bus.publish(feed):
                feed.settle(record, outcome, again=not isinstance(outcome, Unroutable))
    assert [record.id for record, outcome in feed.outcomes if isinstance(outcome, Unroutable)] == [
        items[1].id
    ]
    assert sum(isinstance(outcome, Confirmed) for _, outcome in feed.outcomes) == 5


def test_a_record_over_the_limit_is_refused_without_asking_the_broker() -> None:
    items = records(3, keys=3)
    big = Record(9, "e", 9, "big", "big", items[0].attributes, b"x" * 2000, 0)
    with FakeAmqpPeer() as peer, publisher(peer, max_record_bytes=1999) as bus:
        outcomes = outcomes_of(bus, [*items, big])
    assert kinds(outcomes) == ["Confirmed"] * 3 + ["Refused"]
    assert len(peer.published) == 3


# ------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("how", ["hang up", "connection.close 320", "garbage", "half a frame"])
def test_whatever_ends_the_connection_all_unconfirmed_are_deferred_and_go_out_again(how: str) -> None:
    def script(connection: FakeAmqpConnection, published: Published) -> None:
        if connection.number > 1:
            connection.ack(published.tag)
        elif published.tag == 3:
            if how == "connection.close 320":
                connection.close_connection(320, "CONNECTION_FORCED - broker shut down")
            elif how == "garbage":
                connection.send_raw(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            elif how == "half a frame":
                connection.send_raw(b"\x01\x00\x01\x00\x00")
                connection.hang_up()
            else:
                connection.hang_up()

    items = records(3, keys=3)
    with FakeAmqpPeer(script) as peer, publisher(peer) as bus:
        feed = ListFeed(items)
        assert kinds(feed.publish(bus, again=True)) == ["Deferred"] * 3
        assert feed.drain(bus, timeout=5.0) == 3
        assert [one.message_id for one in peer.published[3:]] == [item.id for item in items]


def test_a_silent_broker_is_found_by_heartbeats() -> None:
    with FakeAmqpPeer() as peer, TcpFaultProxy(peer.host, peer.port) as proxy:
        url = f"amqp://{proxy.host}:{proxy.port}//"
        bus = AmqpBus(url, options=BusOptions(heartbeat=1, confirm_timeout=60))
        peer.script = lambda connection, published: proxy.black_hole()
        (outcome,) = outcomes_of(bus, records(1))
        bus.close()
    assert isinstance(outcome, Deferred)
    assert "heartbeat" in str(outcome.error)


def test_an_idle_connection_that_died_is_found_by_tick() -> None:
    with FakeAmqpPeer() as peer, publisher(peer) as bus:
        outcomes_of(bus, records(1))
        peer.connections[0].hang_up()
        wait_until(lambda: bus.tick() or METRICS.bus_connected._value.get() == 0, what="the loss")
        assert kinds(outcomes_of(bus, records(1))) == ["Confirmed"]
        assert len(peer.connections) == 2


def test_a_broker_that_accepts_and_says_nothing_is_unavailable_in_time() -> None:
    with FakeAmqpPeer() as peer, TcpFaultProxy(peer.host, peer.port) as proxy:
        proxy.black_hole()
        bus = AmqpBus(
            f"amqp://user:s3cret@{proxy.host}:{proxy.port}//", options=BusOptions(connect_timeout=0.5)
        )
        feed = ListFeed(records(1))
        with pytest.raises(BusUnavailable, match="no answer in time") as caught:
            feed.publish(bus)
        assert "s3cret" not in str(caught.value)
        assert feed.took == []
        bus.close()


# ------------------------------------------------------------------------------------- blocked


def test_a_blocked_connection_waits_without_publishing_or_losing_its_place() -> None:
    def script(connection: FakeAmqpConnection, published: Published) -> None:
        if published.tag == 1:
            connection.block("low on memory")
            threading.Timer(1.0, unblock, [connection]).start()
        else:
            connection.ack(published.tag)

    def unblock(connection: FakeAmqpConnection) -> None:
        seen.append(len(peer.published))
        seen.append(METRICS.bus_blocked._value.get())
        connection.unblock()
        connection.ack(1)

    seen: list[float] = []
    with FakeAmqpPeer(script) as peer, publisher(peer, window=1, confirm_timeout=0.5) as bus:
        assert ListFeed(records(5, keys=5)).publish(bus) == [Confirmed()] * 5
        assert seen == [1, 1.0]  # one record went out before the alarm, none under it; the gauge shows it
        assert METRICS.bus_blocked._value.get() == 0
        assert len(peer.connections) == 1


def test_publish_returns_within_a_second_while_blocked_so_that_the_caller_keeps_control() -> None:
    with FakeAmqpPeer() as peer, publisher(peer) as bus:
        assert outcomes_of(bus, records(1)) == [Confirmed()]
        peer.connections[0].block()
        wait_until(lambda: bus.tick() or METRICS.bus_blocked._value.get() == 1, what="blocked")
        feed = ListFeed(records(3, keys=3))
        assert feed.publish(bus) == []
        assert feed.took == []
        peer.connections[0].unblock()
        assert feed.drain(bus, timeout=5.0) == 3


# ------------------------------------------------------------------------------------- the caller


def test_a_publish_that_is_abandoned_in_the_middle_leaves_no_trace_on_the_next() -> None:
    with FakeAmqpPeer() as peer, publisher(peer) as bus:
        running = bus.publish(ListFeed(records(50, keys=50)))
        next(running)
        running.close()  # type: ignore[attr-defined]
        assert outcomes_of(bus, records(3, keys=3)) == [Confirmed()] * 3


def test_an_error_of_the_feed_reaches_the_caller() -> None:
    class Broken(ListFeed):
        def take(self, limit: int, busy: object) -> Sequence[Record]:
            raise RuntimeError("the feed broke")

    with FakeAmqpPeer() as peer, publisher(peer) as bus:
        with pytest.raises(RuntimeError, match="the feed broke"):
            Broken(records(1)).publish(bus)
        assert outcomes_of(bus, records(1)) == [Confirmed()]


def test_the_next_broker_of_the_list_is_tried_when_one_is_away() -> None:
    with FakeAmqpPeer() as peer:
        for _ in range(4):  # the first choice is random
            bus = AmqpBus(f"amqp://127.0.0.1:1//;{peer.url}", options=BusOptions(connect_timeout=1.0))
            assert outcomes_of(bus, records(1)) == [Confirmed()]
            bus.close()
