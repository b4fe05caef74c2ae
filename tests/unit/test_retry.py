"""Retries: jittered, bounded, and over at once when asked to stop."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from virtbus.errors import BusDenied, BusUnavailable
from virtbus.retry import CEILING_SECONDS, FIRST_BOUND_SECONDS, Backoff, no_waiting, retrying, start_over


def test_waits_grow_with_full_jitter_up_to_the_ceiling():
    waits = [[] for _ in range(12)]
    for _ in range(200):
        backoff = Backoff("test")
        for column in waits:
            column.append(backoff.next_wait())
    for attempt, column in enumerate(waits):
        bound = min(CEILING_SECONDS, 0.1 * 2**attempt)
        assert max(column) <= bound
        assert min(column) < 0.2 * bound  # full jitter: from zero, not around the bound


def test_a_reset_begins_again_with_short_waits():
    backoff = Backoff("test")
    for _ in range(20):
        backoff.next_wait()
    backoff.reset()
    assert backoff.next_wait() <= 0.1


def test_a_stop_ends_a_wait_at_once():
    stop = threading.Event()
    stop.set()
    told = []
    backoff = Backoff("test", hook=told.append)
    for _ in range(10):
        assert not backoff.wait(stop, "still down")
    assert [event.attempt for event in told] == list(range(1, 11))


def test_an_error_is_tried_again_until_the_work_is_done():
    told, calls = [], []
    with no_waiting():
        for attempt in retrying("test", sleep=lambda seconds: None, hook=told.append):
            with attempt:
                calls.append(1)
                if len(calls) < 4:
                    raise BusUnavailable("down")
    assert len(calls) == 4
    assert [(event.attempt, str(event.error)) for event in told] == [(1, "down"), (2, "down"), (3, "down")]


def test_a_fatal_error_is_raised_at_once():
    with pytest.raises(BusDenied):
        for attempt in retrying("test", sleep=lambda seconds: None, fatal=BusDenied):
            with attempt:
                raise BusDenied("wrong password")


def test_once_it_is_told_to_stop_a_failure_ends_the_loop_without_a_wait():
    waits, calls = [], []
    for attempt in retrying(
        "test", sleep=waits.append, stop=lambda: len(calls) == 3, hook=lambda event: None
    ):
        with attempt:
            calls.append(1)
            raise BusUnavailable("down")
    assert (len(calls), len(waits)) == (3, 2)


def test_waits_are_short_again_after_a_part_of_the_work_was_done():
    waits = []
    for attempt in retrying(
        "test", sleep=waits.append, stop=lambda: len(waits) == 20, hook=lambda event: None
    ):
        with attempt:
            start_over(attempt)
            raise BusUnavailable("the rest")
    assert max(waits) <= 0.1


def test_a_thousand_agents_do_not_come_back_as_a_herd():
    """The broker is away for 30 s: when it is back, the first successful attempts are spread over seconds."""
    back_at, arrivals = 30.0, []
    for _ in range(1000):
        backoff, now = Backoff("test"), 0.0
        while now < back_at:
            now += backoff.next_wait()
        arrivals.append(now - back_at)
    busiest = max(sum(start <= at < start + 0.1 for at in arrivals) for start in (n / 20 for n in range(200)))
    assert busiest < 60  # of 1,000 in a tenth of a second; all at once would be 1,000
    assert max(arrivals) <= CEILING_SECONDS


def test_a_backoff_that_was_made_in_one_thread_waits_in_another() -> None:
    backoff = Backoff("test")
    with ThreadPoolExecutor(1) as other:
        waits = [other.submit(backoff.next_wait).result() for _ in range(10)]
    assert all(0 <= wait <= FIRST_BOUND_SECONDS * 2**number for number, wait in enumerate(waits))
