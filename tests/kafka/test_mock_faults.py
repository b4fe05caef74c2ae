"""Faults that a real broker does not make to order, from librdkafka's mock cluster: lost 0, order kept."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka import KafkaError

from tests.kafka.help import headers, opened, read, sized
from tests.kafka.mock import INIT_PRODUCER_ID, OFFSET_COMMIT, PRODUCE, MockCluster
from virtbus.bus.kafka.bus import KafkaBus
from virtbus.errors import BusDenied
from virtbus.model import Confirmed, Deferred, Outcome, Record, Refused
from virtbus.testing import ListFeed, records

TOPIC = "faults"
REBUILT_SECONDS = 5.0


@pytest.fixture
def mock() -> Iterator[MockCluster]:
    cluster = MockCluster(TOPIC)
    yield cluster
    cluster.close()


class TimedFeed(ListFeed):
    """Remembers how long it took from a record's failure to the next confirmation."""

    def __init__(self, items: list[Record]) -> None:
        super().__init__(items)
        self._failed: float | None = None
        self.longest = 0.0

    def settle(self, record: Record, outcome: Outcome, *, again: bool = True) -> None:
        now = time.monotonic()
        if not isinstance(outcome, Confirmed):
            self._failed = self._failed or now
        elif self._failed is not None:
            self.longest = max(self.longest, now - self._failed)
            self._failed = None
        super().settle(record, outcome, again=again)


def until_empty(bus: KafkaBus, feed: ListFeed, *, calls: int = 10) -> None:
    for _ in range(calls):
        feed.publish(bus, again=True)
        if not len(feed):
            return
    pytest.fail(f"{len(feed)} records left after {calls} calls")


def check(mock: MockCluster, items: list[Record]) -> None:
    """Nothing is lost, and within a key the first copies are in order."""
    seen: dict[bytes, list[int]] = {}
    for message in read(mock.url, TOPIC, len(items)):
        numbers = seen.setdefault(message.key(), [])
        number = int(headers(message)["ce_sequence"])
        if number not in numbers:
            numbers.append(number)
    assert sum(map(len, seen.values())) == len(items), "lost"
    assert all(numbers == sorted(numbers) for numbers in seen.values()), "out of order"


def deferred(outcomes: list[tuple[Record, Outcome]]) -> list[Exception]:
    return [outcome.error for _, outcome in outcomes if isinstance(outcome, Deferred)]


@pytest.mark.slow
def test_two_hundred_times_not_enough_replicas_loses_nothing(mock: MockCluster) -> None:
    items = records(400, keys=20)
    feed = ListFeed(items)
    mock.push_errors(PRODUCE, *[KafkaError.NOT_ENOUGH_REPLICAS] * 200)
    with opened(mock.url, TOPIC, confirm_timeout=4.0, extra={"retry.backoff.max.ms": "60"}) as bus:
        until_empty(bus, feed, calls=30)
    # The errors were answered to the first requests, one each: nothing was stored before all were.
    assert mock.requests(PRODUCE) > 200
    check(mock, items)


@pytest.mark.parametrize(
    ("code", "rebuilt"),
    [
        (KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER, True),
        (KafkaError.UNKNOWN_PRODUCER_ID, False),
        (KafkaError.INVALID_PRODUCER_EPOCH, True),
        (KafkaError.TOPIC_AUTHORIZATION_FAILED, True),
        (KafkaError.MSG_SIZE_TOO_LARGE, True),
        (KafkaError.UNKNOWN_TOPIC_OR_PART, False),
        (KafkaError.REQUEST_TIMED_OUT, False),
        (KafkaError.NOT_LEADER_FOR_PARTITION, False),
        (KafkaError.KAFKA_STORAGE_ERROR, False),
    ],
)
def test_an_error_in_the_middle_loses_nothing_and_the_producer_is_soon_rebuilt(
    mock: MockCluster, code: int, rebuilt: bool
) -> None:
    items = records(200, keys=10)
    feed = TimedFeed(items)
    # What is too large in a batch is sent alone, and refused there: a second error may be that one.
    times = 1 if code == KafkaError.MSG_SIZE_TOO_LARGE else 2
    with opened(mock.url, TOPIC) as bus:
        mock.push_errors(PRODUCE, *[KafkaError.NO_ERROR, code] * times)
        until_empty(bus, feed)
    if rebuilt:  # of the others librdkafka makes good by itself
        assert mock.requests(INIT_PRODUCER_ID) > 1, "a new producer asks for an id of its own"
    assert feed.longest < REBUILT_SECONDS
    assert not any(isinstance(outcome, Refused) for _, outcome in feed.outcomes)
    check(mock, items)


def test_a_missing_permission_is_the_operators_affair(mock: MockCluster) -> None:
    feed = ListFeed(records(5, keys=5))
    mock.push_errors(PRODUCE, KafkaError.TOPIC_AUTHORIZATION_FAILED)
    with opened(mock.url, TOPIC) as bus:
        feed.publish(bus, again=True)
    assert deferred(feed.outcomes)
    assert isinstance(deferred(feed.outcomes)[0], BusDenied)


def test_a_producer_that_may_not_be_idempotent_is_denied_and_not_silent(mock: MockCluster) -> None:
    feed = ListFeed(records(5, keys=5))
    mock.push_errors(INIT_PRODUCER_ID, KafkaError.CLUSTER_AUTHORIZATION_FAILED)
    with opened(mock.url, TOPIC) as bus:
        outcomes = feed.publish(bus, again=True)
        assert all(isinstance(outcome, Deferred) for outcome in outcomes)
        assert isinstance(deferred(feed.outcomes)[0], BusDenied)
        until_empty(bus, feed)


def test_a_record_that_is_refused_alone_is_refused_and_the_rest_arrive(mock: MockCluster) -> None:
    items = records(5, keys=5)
    feed = ListFeed(items[:1])
    with opened(mock.url, TOPIC) as bus:
        mock.push_errors(PRODUCE, *[KafkaError.INVALID_RECORD] * 2)  # once in a batch, once alone
        until_empty(bus, feed)
        rest = ListFeed(items[1:])
        until_empty(bus, rest)
    assert [type(outcome) for _, outcome in feed.outcomes] == [Deferred, Refused]
    assert [outcome for _, outcome in rest.outcomes] == [Confirmed()] * 4


def test_a_broker_that_goes_silent_defers_after_the_confirm_timeout(mock: MockCluster) -> None:
    feed = ListFeed(records(20, keys=5))
    with opened(mock.url, TOPIC, confirm_timeout=1.0) as bus:
        assert ListFeed(records(1)).drain(bus) == 1
        mock.down(1)
        outcomes = feed.publish(bus, again=True)
        assert all(isinstance(outcome, Deferred) for outcome in outcomes)
        mock.up(1)
        until_empty(bus, feed)


def test_closing_while_the_broker_is_away_ends_in_time_and_names_what_was_not_delivered(
    mock: MockCluster,
) -> None:
    feed = ListFeed(records(20, keys=5))
    with opened(mock.url, TOPIC) as bus:
        assert ListFeed(records(1)).drain(bus) == 1
        mock.down(1)
        thread = threading.Thread(target=feed.publish, args=(bus,), kwargs={"again": True})
        thread.start()
        time.sleep(0.3)
        bus.close()
        thread.join(30.0)
        assert not thread.is_alive()
    assert len(feed.outcomes) == 5, "one a key was taken"
    assert {type(outcome) for _, outcome in feed.outcomes} == {Deferred}
    assert "closed" in str(deferred(feed.outcomes)[0])


def test_closing_ends_in_time_though_the_local_queue_is_full(mock: MockCluster) -> None:
    feed = ListFeed(records(50, keys=50))
    with opened(mock.url, TOPIC, window=100, extra={"queue.buffering.max.messages": "10"}) as bus:
        assert ListFeed(records(1)).drain(bus) == 1
        mock.down(1)
        thread = threading.Thread(target=feed.publish, args=(bus,))
        thread.start()
        time.sleep(0.3)
        bus.close()
        thread.join(3.0)
        assert not thread.is_alive()
    assert len(feed.outcomes) == 50
    assert {type(outcome) for _, outcome in feed.outcomes} == {Deferred}


def test_a_producer_that_is_thrown_away_leaves_no_thread_behind(mock: MockCluster) -> None:
    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    with opened(mock.url, TOPIC) as bus:
        ListFeed(records(1)).publish(bus)
        before, thrown_away = threads(), 0
        while thrown_away < 20:
            # A request that the producer before had sent already may meet the error in place of this one's.
            mock.push_errors(PRODUCE, KafkaError.TOPIC_AUTHORIZATION_FAILED)
            outcomes = ListFeed(records(3, keys=3)).publish(bus)
            thrown_away += any(isinstance(outcome, Deferred) for outcome in outcomes)
        assert threads() <= before


def test_a_broker_half_a_second_away_defers_nothing(mock: MockCluster) -> None:
    items = records(100, keys=50)
    mock.delay(500)
    with opened(mock.url, TOPIC) as bus:
        feed = ListFeed(items)
        assert feed.publish(bus) == [Confirmed()] * 100
    mock.delay(0)
    check(mock, items)


def test_a_record_that_the_client_can_never_hold_says_so_and_is_not_lost(mock: MockCluster) -> None:
    extra = {"queue.buffering.max.kbytes": "1"}
    feed = ListFeed([sized(1, 5000)])
    with opened(mock.url, TOPIC, extra=extra) as bus:
        (outcome,) = feed.publish(bus, again=True)
    assert isinstance(outcome, Deferred)
    assert isinstance(outcome.error, BusDenied)
    assert "queue.buffering.max.kbytes" in str(outcome.error)


def test_one_partition_whose_broker_is_away_delays_its_own_keys_only() -> None:
    mock = MockCluster(TOPIC, brokers=2)
    items = records(120, keys=40)
    feed = ListFeed(items)
    try:
        for partition in range(4):
            mock.lead(TOPIC, partition, 2 if partition == 0 else 1)
        with opened(mock.url, TOPIC, window=20, confirm_timeout=1.0) as bus:
            assert ListFeed(records(1)).drain(bus) == 1
            mock.down(2)
            feed.publish(bus, again=True)
            stuck = {record.key for record, outcome in feed.outcomes if isinstance(outcome, Deferred)}
            assert 0 < len(stuck) < 20
            assert len(feed) == 3 * len(stuck), "others waited, too"
            mock.up(2)
            until_empty(bus, feed)
        check(mock, items)
    finally:
        mock.close()


def test_commits_of_offsets_that_fail_are_made_good_by_later_ones(mock: MockCluster) -> None:
    with opened(mock.url, TOPIC) as bus:
        ListFeed(records(8)).drain(bus)
        mock.push_errors(
            OFFSET_COMMIT,
            *[KafkaError.COORDINATOR_LOAD_IN_PROGRESS] * 3,
            KafkaError.GROUP_AUTHORIZATION_FAILED,
            KafkaError.REBALANCE_IN_PROGRESS,
        )
        subscription = bus.consume("g")
        got = 0
        limit = time.monotonic() + 30
        while got < 8 and time.monotonic() < limit:
            message = subscription.receive(0.5)
            if message is not None:
                subscription.ack(message)
                got += 1
                time.sleep(0.3)  # a commit each
        subscription.close()
        assert got == 8
        assert mock.requests(OFFSET_COMMIT) > 5
        later = bus.consume("g")
        assert later.receive(3.0) is None
        later.close()
