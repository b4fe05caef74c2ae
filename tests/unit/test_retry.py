"""Retries: jittered, bounded, and over at once when asked to stop."""

import threading
import time

import pytest

from virtbus.errors import BusDenied, BusUnavailable
from virtbus.retry import CEILING_SECONDS, Backoff, no_waiting, until_done


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
    backoff = Backoff("test", hook=lambda event: None)
    for _ in range(10):
        backoff.next_wait()
    threading.Timer(0.05, stop.set).start()
    begun = time.monotonic()
    while backoff.wait(stop, "still down"):
        pass
    assert time.monotonic() - begun < 5


def test_retryable_errors_are_tried_again_and_others_raised_at_once():
    told, calls = [], []

    def call():
        calls.append(1)
        if len(calls) < 4:
            raise BusUnavailable("down")
        return "up"

    with no_waiting():
        assert until_done(call, stage="test", stop=threading.Event(), hook=told.append) == "up"
    assert [event.attempt for event in told] == [1, 2, 3]

    def denied():
        raise BusDenied("wrong password")

    with pytest.raises(BusDenied):
        until_done(denied, stage="test", stop=threading.Event())


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
