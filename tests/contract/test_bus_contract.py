"""Every word of the contract in virtbus/bus/__init__.py, for every adapter, on a real broker."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager

import pytest

from tests.contract.rigs import Rig
from virtbus import envelope
from virtbus.bus import REASON_HEADER, Bus, Subscription
from virtbus.errors import BusDenied, BusUnavailable, ConfigError
from virtbus.model import Confirmed, Deferred, Message, Outcome, Record, Refused
from virtbus.testing import ListFeed, a_record, an_io_error, records

WAIT = 20.0  # seconds for what is to come


@contextmanager
def opened(rig: Rig, **options: object) -> Iterator[Bus]:
    bus = rig.open(**options)
    try:
        yield bus
    finally:
        bus.close()


@contextmanager
def joined(rig: Rig, bus: Bus, group: str | None, *, prefetch: int = 100) -> Iterator[Subscription]:
    """A subscription that stands: the broker knows of it, nothing has come."""
    subscription = bus.consume(group, prefetch=prefetch)
    try:
        assert subscription.receive(rig.quiet) is None
        yield subscription
    finally:
        subscription.close()


def receive(subscription: Subscription, count: int) -> list[Message]:
    """`count` messages, acknowledged."""
    got: list[Message] = []
    limit = time.monotonic() + WAIT
    while len(got) < count and time.monotonic() < limit:
        message = subscription.receive(1.0)
        if message is not None:
            subscription.ack(message)
            got.append(message)
    return got


def ids(messages: Sequence[Message]) -> list[str]:
    return [envelope.decode(message).attributes["id"] for message in messages]


class Observing(ListFeed):
    """Checks at every take what the bus promises a feed."""

    def __init__(self, items: Sequence[Record], window: int) -> None:
        super().__init__(items)
        self._window = window

    def take(self, limit: int, busy: AbstractSet[str]) -> Sequence[Record]:
        out_there = set(self._taken)
        assert out_there <= set(busy), "a key whose record has no outcome yet was not busy"
        assert limit <= self._window - len(out_there), "more than the window"
        return super().take(limit, busy)


# ------------------------------------------------------------------------------------- publish


def test_every_record_gets_exactly_one_outcome_and_arrives_unchanged(rig: Rig) -> None:
    items = records(50, keys=7)
    with opened(rig) as bus, joined(rig, bus, "a") as subscription:
        feed = ListFeed(items)
        outcomes = feed.publish(bus)
        got = receive(subscription, 50)
    assert outcomes == [Confirmed()] * 50
    assert sorted(record.id for record, _ in feed.outcomes) == sorted(record.id for record in items)
    by_id = {record.id: record for record in items}
    for message in got:
        decoded = envelope.decode(message)
        sent = by_id.pop(decoded.attributes["id"])
        assert decoded.attributes == dict(sent.attributes)
        assert decoded.body == sent.body
    assert not by_id


def test_an_empty_feed_ends_publish_at_once_without_an_outcome(rig: Rig) -> None:
    with opened(rig) as bus:
        assert ListFeed(records(1)).publish(bus) != []
        assert ListFeed().publish(bus) == []


def test_a_key_is_busy_until_its_outcome_and_the_window_is_never_exceeded(rig: Rig) -> None:
    with opened(rig, window=5) as bus, joined(rig, bus, "a"):
        feed = Observing(records(60, keys=9), window=5)
        assert len(feed.publish(bus)) == 60
        assert feed.most_taken <= 5


def test_order_is_kept_within_each_key(rig: Rig) -> None:
    items = records(120, keys=4)
    with opened(rig) as bus, joined(rig, bus, "a") as subscription:
        ListFeed(items).publish(bus)
        got = receive(subscription, 120)
    for key in {record.key for record in items}:
        sequences = [int(envelope.decode(one).attributes["sequence"]) for one in got if one.key == key]
        assert sequences == sorted(sequences)
        assert len(sequences) == 30


def test_a_refused_record_has_its_error_and_the_others_go_on(rig: Rig) -> None:
    big = a_record(an_io_error(), row=1)
    big = Record(1, big.epoch, 1, big.id, "big", big.attributes, b'"' + b"x" * 70_000 + b'"', big.created_ns)
    small = records(3, keys=3)
    with opened(rig, max_record_bytes=65_536) as bus, joined(rig, bus, "a") as subscription:
        feed = ListFeed([big, *small])
        outcomes = {record.id: outcome for record, outcome in _until_empty(feed, bus)}
        got = receive(subscription, 3)
        assert subscription.receive(rig.quiet) is None
    assert isinstance(outcomes[big.id], Refused)
    assert str(outcomes[big.id].error)  # type: ignore[union-attr]
    assert sorted(ids(got)) == sorted(record.id for record in small)


def _until_empty(feed: ListFeed, bus: Bus) -> list[tuple[Record, Outcome]]:
    for _ in range(10):
        feed.publish(bus, again=True)
        if not len(feed):
            break
    return feed.outcomes


def test_without_a_broker_publish_raises_and_takes_nothing(rig: Rig) -> None:
    bus = rig.unreachable()
    feed = ListFeed(records(3))
    try:
        with pytest.raises(BusUnavailable):
            feed.publish(bus)
    finally:
        bus.close()
    assert feed.took == []


def test_publish_can_be_called_again_and_again(rig: Rig) -> None:
    with opened(rig) as bus, joined(rig, bus, "a") as subscription:
        for number in range(5):
            assert ListFeed(records(2, keys=2)).publish(bus) == [Confirmed()] * 2, number
        assert len(receive(subscription, 10)) == 10


def test_close_from_another_thread_ends_a_running_publish(rig: Rig) -> None:
    bus = rig.open()
    endless, begun = _Endless(), threading.Event()
    with joined(rig, bus, "a"):
        pass

    def publish() -> None:
        for record, outcome in bus.publish(endless):
            endless.settle(record, outcome, again=False)
            begun.set()

    thread = threading.Thread(target=publish)
    thread.start()
    assert begun.wait(60)
    bus.close()
    thread.join(timeout=10.0)
    assert not thread.is_alive()
    assert not endless._taken, "a record without an outcome"
    assert {type(outcome) for _, outcome in endless.outcomes} <= {Confirmed, Deferred}


class _Endless(ListFeed):
    """A feed that is never empty."""

    def take(self, limit: int, busy: AbstractSet[str]) -> Sequence[Record]:
        if len(self) < 50:
            for record in records(50, keys=10):
                self.add(record)
        return super().take(limit, busy)


def test_close_is_idempotent_and_publish_after_it_raises(rig: Rig) -> None:
    bus = rig.open()
    ListFeed(records(1)).publish(bus)
    bus.close()
    bus.close()
    feed = ListFeed(records(1))
    with pytest.raises(BusUnavailable):
        feed.publish(bus)
    assert feed.took == []


def test_tick_never_raises_and_never_sleeps(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    bus = rig.open()
    bus.tick()  # nothing is connected
    monkeypatch.undo()
    assert ListFeed(records(1)).publish(bus) != []
    monkeypatch.setattr(time, "sleep", slept.append)
    for _ in range(5):
        bus.tick()
    assert slept == []
    monkeypatch.undo()
    bus.close()
    bus.tick()


# ------------------------------------------------------------------------------------- consume


def test_two_groups_each_get_everything(rig: Rig) -> None:
    items = records(10, keys=3)
    with opened(rig) as bus, joined(rig, bus, "a") as first, joined(rig, bus, "b") as second:
        ListFeed(items).publish(bus)
        assert sorted(ids(receive(first, 10))) == sorted(record.id for record in items)
        assert sorted(ids(receive(second, 10))) == sorted(record.id for record in items)


def test_members_of_a_group_share_its_messages(rig: Rig) -> None:
    items = records(30, keys=10)
    with opened(rig) as bus, joined(rig, bus, "a") as first:
        second = bus.consume("a")
        second.receive(rig.quiet)
        ListFeed(items).publish(bus)
        got: list[Message] = []
        limit = time.monotonic() + WAIT
        while len(got) < 30 and time.monotonic() < limit:
            for member in (first, second):
                message = member.receive(0.2)
                if message is not None:
                    member.ack(message)
                    got.append(message)
        second.close()
    assert sorted(set(ids(got))) == sorted(record.id for record in items)


def test_a_group_keeps_what_is_published_while_nobody_of_it_is_there(rig: Rig) -> None:
    items = records(5, keys=2)
    with opened(rig) as bus:
        with joined(rig, bus, "a"):
            pass
        ListFeed(items).publish(bus)
        later = bus.consume("a")
        got = receive(later, 5)
        later.close()
    assert sorted(ids(got)) == sorted(record.id for record in items)


def test_without_a_group_everything_comes_from_now_on(rig: Rig) -> None:
    before, after = records(3), records(4)
    with opened(rig) as bus, joined(rig, bus, "keeper"):
        ListFeed(before).publish(bus)
        with joined(rig, bus, None) as tap, joined(rig, bus, None) as other:
            ListFeed(after).publish(bus)
            assert ids(receive(tap, 4)) == [record.id for record in after]
            assert ids(receive(other, 4)) == [record.id for record in after]


def test_receive_gives_nothing_after_its_timeout(rig: Rig) -> None:
    with opened(rig) as bus, joined(rig, bus, "a") as subscription:
        assert subscription.receive(0.5) is None


def test_what_was_acknowledged_never_comes_again(rig: Rig) -> None:
    with opened(rig) as bus:
        with joined(rig, bus, "a") as subscription:
            ListFeed(records(5, keys=2)).publish(bus)
            assert len(receive(subscription, 5)) == 5
        with joined(rig, bus, "a"):
            pass  # `joined` asserts that nothing comes


def test_what_was_not_acknowledged_comes_again_to_somebody(rig: Rig) -> None:
    items = records(4)
    with opened(rig) as bus:
        with joined(rig, bus, "a") as subscription:
            ListFeed(items).publish(bus)
            first = subscription.receive(WAIT)
            assert first is not None
            subscription.ack(first)
            assert subscription.receive(WAIT) is not None  # and no verdict
        later = bus.consume("a")
        got = receive(later, 3)
        later.close()
    assert ids(got) == [record.id for record in items[1:]]


LONG = 3600.0  # a wait that ends in no test


def test_a_retried_message_and_what_is_behind_it_stay_away_while_other_keys_go_on(rig: Rig) -> None:
    held, others = records(3), [a_record(an_io_error(), row=row) for row in range(5, 9)]
    with opened(rig) as bus, joined(rig, bus, "a") as subscription:
        ListFeed(held).publish(bus)
        message = subscription.receive(WAIT)
        assert message is not None
        assert ids([message]) == [held[0].id]
        subscription.retry(message, LONG)
        ListFeed(others).publish(bus)
        assert ids(receive(subscription, 4)) == [record.id for record in others]
        assert subscription.receive(1.0) is None


def test_a_retried_message_comes_again_in_front_of_its_key(rig: Rig) -> None:
    held, free = records(3), a_record(an_io_error(), row=9)
    with opened(rig) as bus, joined(rig, bus, "a") as subscription:
        ListFeed([*held, free]).publish(bus)
        message = subscription.receive(WAIT)
        while message is not None and message.key != held[0].key:
            subscription.ack(message)
            message = subscription.receive(WAIT)
        assert message is not None
        assert ids([message]) == [held[0].id]
        subscription.retry(message, 1.0)
        order: list[str] = []
        limit = time.monotonic() + WAIT
        while len(order) < 3 and time.monotonic() < limit:
            message = subscription.receive(1.0)
            if message is None:
                continue
            subscription.ack(message)
            if message.key == held[0].key:
                order += ids([message])
    assert order == [record.id for record in held]


@pytest.mark.parametrize("waits", [(1.5, 0.0), (0.0, 1.5)], ids=["first longer", "second longer"])
@pytest.mark.parametrize("turned", [False, True], ids=["in order", "the second before the first"])
def test_two_that_wait_come_again_in_order_and_nothing_of_their_key_before_either(
    rig: Rig, waits: tuple[float, float], turned: bool
) -> None:
    items = records(4)
    with opened(rig) as bus, joined(rig, bus, "a") as subscription:
        retry_two(subscription, items, bus, waits, turned)
        assert ids(receive(subscription, 4)) == [record.id for record in items]


@pytest.mark.parametrize(
    ("waits", "first"), [((LONG, 0.0), 0), ((0.0, LONG), 1)], ids=["first longer", "second longer"]
)
@pytest.mark.parametrize("turned", [False, True], ids=["in order", "the second before the first"])
def test_of_two_that_wait_neither_comes_before_its_time(
    rig: Rig, waits: tuple[float, float], first: int, turned: bool
) -> None:
    items = records(4)
    with opened(rig) as bus, joined(rig, bus, "a") as subscription:
        retry_two(subscription, items, bus, waits, turned)
        assert ids(receive(subscription, first)) == [record.id for record in items[:first]]
        assert subscription.receive(1.0) is None


def retry_two(
    subscription: Subscription, items: list[Record], bus: Bus, waits: tuple[float, float], turned: bool
) -> None:
    """Publish all of one key, and give the first two back, in their order or `turned`."""
    ListFeed(items).publish(bus)
    out: list[Message] = []
    while len(out) < 2:
        message = subscription.receive(WAIT)
        assert message is not None
        out.append(message)
    for index in (1, 0) if turned else (0, 1):
        subscription.retry(out[index], waits[index])


def test_a_message_can_be_retried_more_than_once(rig: Rig) -> None:
    item = records(1)[0]
    with opened(rig) as bus, joined(rig, bus, "a") as subscription:
        ListFeed([item]).publish(bus)
        for _ in range(3):
            message = subscription.receive(WAIT)
            assert message is not None
            subscription.retry(message, 0.1)
        assert ids(receive(subscription, 1)) == [item.id]


def test_a_dead_letter_is_put_aside_as_it_came_with_its_reason_and_never_comes_again(rig: Rig) -> None:
    items = records(2)
    with opened(rig) as bus:
        with joined(rig, bus, "a") as subscription:
            ListFeed(items).publish(bus)
            message = subscription.receive(WAIT)
            assert message is not None
            subscription.dead_letter(message, "not for us: é")
            assert ids(receive(subscription, 1)) == [items[1].id]
        with joined(rig, bus, "a"):
            pass
    dead = rig.dead_letters("a", 1)
    assert [letter.body for letter in dead] == [items[0].body]
    assert dead[0].headers[REASON_HEADER] == "not for us: é"
    assert ids(dead) == [items[0].id]


def with_dead_letters(rig: Rig, bus: Bus, count: int) -> list[Record]:
    """A group "a" that has put the first `count` of five aside, with the reasons 0, 1, …"""
    items = records(5, keys=5)
    with joined(rig, bus, "a") as subscription:
        ListFeed(items).publish(bus)
        for number in range(5):
            message = subscription.receive(WAIT)
            assert message is not None
            if ids([message])[0] in [record.id for record in items[:count]]:
                subscription.dead_letter(message, f"reason {number}")
            else:
                subscription.ack(message)
    return items


def test_dead_letters_are_counted_and_listed_and_a_look_changes_nothing(rig: Rig) -> None:
    with opened(rig) as bus:
        with bus.dead_letters("a") as letters:
            assert letters.count() == 0
        items = with_dead_letters(rig, bus, 3)
        for _ in range(3):
            with bus.dead_letters("a") as letters:
                assert letters.count() == 3
                found = list(letters.read())
                assert list(letters.read()) == []
            assert sorted(str(letter.id) for letter in found) == sorted(record.id for record in items[:3])
            assert all(letter.reason.startswith("reason ") for letter in found)
            assert {letter.source for letter in found} == {items[0].attributes["source"]}
            assert all(letter.size_bytes == len(letter.message.body) for letter in found)
        with bus.dead_letters("a") as letters:
            assert len(list(letters.read(2))) == 2
        with bus.dead_letters("other") as letters:
            assert letters.count() == 0


def test_a_look_that_follows_at_once_sees_every_dead_letter(rig: Rig) -> None:
    """What a look has read must be back when it lets go, not when the broker comes to it."""
    with opened(rig) as bus:
        with_dead_letters(rig, bus, 3)
        for look in range(40):
            with bus.dead_letters("a") as letters:
                assert letters.count() == 3, f"look {look}"
                assert len(list(letters.read())) == 3


def test_a_dead_letter_that_is_sent_back_comes_to_its_group_alone_as_it_was(rig: Rig) -> None:
    with opened(rig) as bus, joined(rig, bus, "b") as other:
        items = with_dead_letters(rig, bus, 2)
        receive(other, 5)
        with bus.dead_letters("a") as letters:
            for letter in letters.read():
                if letter.id == items[0].id:
                    letters.send_back(letter)
        with bus.dead_letters("a") as letters:
            assert [letter.id for letter in letters.read()] == [items[1].id]
        member = bus.consume("a")
        (again,) = receive(member, 1)
        assert ids([again]) == [items[0].id]
        assert again.body == items[0].body
        assert REASON_HEADER not in again.headers
        member.close()
        assert other.receive(rig.quiet) is None


def test_a_dead_letter_that_is_dropped_is_gone_and_the_others_stay(rig: Rig) -> None:
    with opened(rig) as bus:
        items = with_dead_letters(rig, bus, 3)
        with bus.dead_letters("a") as letters:
            for letter in letters.read():
                if letter.id == items[1].id:
                    letters.drop(letter)
            assert letters.count() == 2
        with bus.dead_letters("a") as letters:
            left = [str(letter.id) for letter in letters.read()]
        assert sorted(left) == sorted([items[0].id, items[2].id])


def test_a_message_tells_its_key_and_decodes_in_either_content_mode(rig: Rig) -> None:
    for structured in (False, True):
        item = a_record()
        with opened(rig, structured=structured) as bus, joined(rig, bus, "a") as subscription:
            ListFeed([item]).publish(bus)
            (message,) = receive(subscription, 1)
        assert message.key == item.key
        assert message.position
        assert (message.content_type or "").startswith("application/cloudevents") is structured
        decoded = envelope.decode(message)
        assert decoded.attributes["id"] == item.id
        assert (
            decoded.data
            == envelope.decode_structured(envelope.structured_json(item.attributes, item.body)).data
        )


def test_prefetch_bounds_what_is_handed_out_without_a_verdict(rig: Rig) -> None:
    with opened(rig) as bus, joined(rig, bus, "a", prefetch=3) as subscription:
        ListFeed(records(10, keys=10)).publish(bus)
        got = [subscription.receive(2.0) for _ in range(3)]
        assert None not in got
        assert subscription.receive(rig.quiet) is None
        subscription.ack(got[0])  # type: ignore[arg-type]
        assert subscription.receive(WAIT) is not None


def test_a_group_name_that_no_broker_could_carry_is_refused(rig: Rig) -> None:
    with opened(rig) as bus:
        for name in ("", "a b", "x.dead", "a/b", "ü", "x" * 200):
            with pytest.raises(ConfigError, match="consumer group"):
                bus.consume(name)


def test_a_subscription_without_a_broker_raises_at_its_timeout(rig: Rig) -> None:
    bus = rig.unreachable()
    with pytest.raises(BusUnavailable):
        bus.consume("a").receive(1.0)
    bus.close()


def test_closing_a_subscription_twice_is_harmless(rig: Rig) -> None:
    with opened(rig) as bus, joined(rig, bus, "a") as subscription:
        subscription.close()
        subscription.close()


# ------------------------------------------------------------------------------------- probe


def test_probe_of_a_broker_that_is_there_fails_nothing_and_changes_nothing(rig: Rig) -> None:
    with opened(rig) as bus, joined(rig, bus, "a") as subscription:
        checks = bus.probe()
        assert subscription.receive(rig.quiet) is None
    assert checks
    assert all(check.status in ("ok", "warning", "skipped") and check.exit_code == 0 for check in checks)


def test_probe_of_a_broker_that_is_not_there_says_so_with_an_exit_code(rig: Rig) -> None:
    bus = rig.unreachable()
    failed = [check for check in bus.probe() if check.status == "failed"]
    bus.close()
    assert failed
    assert failed[0].exit_code in (BusUnavailable.exit_code, BusDenied.exit_code)
    assert failed[0].summary
