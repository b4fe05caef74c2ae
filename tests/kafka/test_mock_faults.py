"""Faults that a real broker does not make to order, from librdkafka's mock cluster: lost 0, order kept."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from confluent_kafka import KafkaError

from tests.kafka.help import headers, opened, read
from tests.kafka.mock import INIT_PRODUCER_ID, PRODUCE, MockCluster
from virtbus.bus.kafka import KafkaBus
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
    check(mock, items)


@pytest.mark.parametrize(
    "code",
    [
        KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER,
        KafkaError.UNKNOWN_PRODUCER_ID,
        KafkaError.INVALID_PRODUCER_EPOCH,
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.MSG_SIZE_TOO_LARGE,
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError.REQUEST_TIMED_OUT,
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.KAFKA_STORAGE_ERROR,
    ],
)
def test_an_error_in_the_middle_loses_nothing_and_the_producer_is_soon_rebuilt(
    mock: MockCluster, code: int
) -> None:
    items = records(200, keys=10)
    feed = ListFeed(items)
    with opened(mock.url, TOPIC) as bus:
        mock.push_errors(PRODUCE, KafkaError.NO_ERROR, code, KafkaError.NO_ERROR, code)
        begun = time.monotonic()
        until_empty(bus, feed)
        assert time.monotonic() - begun < REBUILT_SECONDS
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
        ListFeed(records(1)).publish(bus)
        mock.down(1)
        begun = time.monotonic()
        outcomes = feed.publish(bus, again=True)
        assert time.monotonic() - begun < 10.0
        assert all(isinstance(outcome, Deferred) for outcome in outcomes)
        mock.up(1)
        begun = time.monotonic()
        until_empty(bus, feed)
        assert time.monotonic() - begun < REBUILT_SECONDS


def test_closing_while_the_broker_is_away_ends_in_time_and_names_what_was_not_delivered(
    mock: MockCluster,
) -> None:
    feed = ListFeed(records(20, keys=5))
    with opened(mock.url, TOPIC) as bus:
        ListFeed(records(1)).publish(bus)
        mock.down(1)
        thread = threading.Thread(target=feed.publish, args=(bus,), kwargs={"again": True})
        thread.start()
        time.sleep(0.3)
        begun = time.monotonic()
        bus.close()
        thread.join(1.0)
        assert not thread.is_alive()
        assert 4.0 < time.monotonic() - begun < 10.0
    assert len(feed.outcomes) == 5, "one a key was taken"
    assert {type(outcome) for _, outcome in feed.outcomes} == {Deferred}
    assert "closed" in str(deferred(feed.outcomes)[0])
