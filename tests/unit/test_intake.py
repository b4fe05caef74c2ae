"""The queue between libvirt's thread and ours keeps counts and order, and stays small."""

import threading
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.waiting import wait_until
from virtbus.agent.queue import BATCH_LIMIT, IntakeQueue, aggregate, callbacks_in
from virtbus.model import Now
from virtbus.observations import (
    Burst,
    CallbackLost,
    DomainGone,
    DomainResumed,
    HostKnown,
    RawIoError,
    SourceGone,
    SourceLost,
    SourceReady,
    SourceSeen,
    Surveyed,
)
from virtbus.testing import a_host

T = 1_800_000_000 * 10**9


def an_error(alias="virtio-disk0", *, at=0, reason="", domain="d"):
    return RawIoError(domain, "guest", 1, "/disk", alias, 2, reason, at)


def test_what_was_put_comes_out_in_order():
    queue = IntakeQueue()
    items = [an_error(at=1), DomainResumed("d", 2), an_error(at=3)]
    for item in items:
        queue.put(item)
    assert queue.drain(0) == items
    assert queue.drain(0) == []


def test_a_long_queue_folds_equal_errors_and_keeps_their_number():
    queue = IntakeQueue(limit=10)
    for at in range(1000):
        queue.put(an_error(at=at))
    assert len(queue) == 11
    drained = queue.drain(0)
    assert sum(callbacks_in(item) for item in drained) == 1000
    assert drained[-1] == Burst(an_error(at=10), 990, 10, 999)


def test_what_gathers_waits_for_anything_but_the_same_errors():
    queue, counted = IntakeQueue(), [an_error(at=1), Burst(an_error("virtio-disk1"), 3, 1, 2)]
    assert not queue.gather(counted, 0)
    same = [an_error(at=2), an_error("virtio-disk1", at=3)]
    for item in same:
        queue.put(item)
    assert not queue.gather(counted, 0)
    for other in (an_error("virtio-disk2", at=4), an_error(reason="enospc", at=4), DomainResumed("d", 4)):
        queue.put(other)
        assert queue.gather(counted, 0)
        assert queue.drain(0) == [*same, other]
        assert not queue.gather(counted, 0)
        for item in same:
            queue.put(item)


def test_what_gathers_for_nothing_does_not_wait():
    assert not IntakeQueue().gather([DomainResumed("d", 1)], 3600)


def test_the_same_errors_end_a_wait_of_a_queue_that_is_empty():
    queue = IntakeQueue()
    assert not queue.gather([an_error(at=1)], 0)
    taken = []
    thread = threading.Thread(target=lambda: taken.extend(queue.drain(3600)), daemon=True)
    thread.start()
    wait_until(lambda: queue._filled._cond._waiters, "the wait")
    queue.put(an_error(at=2))
    thread.join(30)
    assert taken == [an_error(at=2)]


def test_an_error_folded_before_a_resume_is_told_before_it():
    queue = IntakeQueue(limit=2)
    for at in range(5):
        queue.put(an_error(at=at))
    queue.put(DomainResumed("d", 6))
    queue.put(an_error(at=7))
    kinds = [type(item).__name__ for item in queue.drain(0)]
    assert kinds == ["RawIoError", "RawIoError", "Burst", "DomainResumed", "Burst"]


def test_what_comes_after_a_part_was_drained_does_not_overtake_what_was_folded():
    queue = IntakeQueue(limit=BATCH_LIMIT + 5)
    for at in range(BATCH_LIMIT + 10):
        queue.put(an_error(at=at))
    assert len(queue.drain(0)) == BATCH_LIMIT
    queue.put(DomainResumed("d", BATCH_LIMIT + 10))
    rest = queue.drain(0)
    assert [callbacks_in(item) for item in rest] == [1] * 5 + [5, 0]


def test_more_different_errors_than_can_be_kept_apart_fold_into_one_counter_a_domain_without_a_device():
    queue = IntakeQueue(limit=1, fold_limit=3)
    for at in range(100):
        queue.put(an_error(f"disk{at % 10}", at=at))
    drained = queue.drain(0)
    assert sum(callbacks_in(item) for item in drained) == 100
    assert queue.take_dropped() == (0, 0)
    unnamed = drained[-1]
    assert (unnamed.raw.alias, unnamed.raw.path, unnamed.raw.domain_uuid) == ("", "", "d")
    assert (unnamed.count, unnamed.first_ns, unnamed.last_ns) == (69, 4, 99)


def test_a_storm_over_ten_thousand_devices_that_alternate_two_reasons_loses_no_count():
    queue = IntakeQueue()
    for at in range(60_000):
        device, reason = at % 10_000, "enospc" if at // 10_000 % 2 else ""
        queue.put(an_error(f"disk{device}", domain=f"d{device % 1000}", reason=reason, at=at))
    assert len(queue) <= 30_000
    assert sum(callbacks_in(item) for item in queue.drain(0)) == 60_000
    assert queue.take_dropped() == (0, 0)


def test_errors_of_more_domains_than_can_be_kept_are_counted_as_dropped():
    queue = IntakeQueue(limit=1, fold_limit=3)
    for number in range(10):
        queue.put(an_error(domain=f"guest-{number}"))
    assert sum(callbacks_in(item) for item in queue.drain(0)) == 6
    assert queue.take_dropped() == (4, 0)
    assert queue.take_dropped() == (0, 0)


def test_memory_stays_bounded_while_errors_and_resumes_alternate_and_what_is_lost_is_counted_apart():
    queue = IntakeQueue(limit=100, fold_limit=50)
    for at in range(10_000):
        queue.put(an_error(at=at))
        queue.put(DomainResumed("d", at))
        assert len(queue) <= 150 + 2  # the counter and the last resume
    kept = sum(callbacks_in(item) for item in queue.drain(0))
    errors, others = queue.take_dropped()
    assert kept + errors == 10_000
    assert others > 0


@pytest.mark.parametrize("ends", [DomainResumed("d", 9), DomainGone("d", 9, "undefined")])
@pytest.mark.parametrize("ends_well", [True, False])
def test_where_errors_and_resumes_have_no_room_the_last_word_about_a_domain_is_the_last(ends, ends_well):
    queue = IntakeQueue(limit=4, fold_limit=4)
    for at in range(1000):
        queue.put(an_error(at=at))
        queue.put(DomainResumed("other", at))
        queue.put(DomainResumed("d", at))
    queue.put(an_error(at=1000))
    if ends_well:
        queue.put(ends)
    drained = queue.drain(0)
    of_domain = [item for item in drained if getattr(item, "domain_uuid", "d") == "d"]
    assert (of_domain[-1] == ends) is ends_well
    assert (callbacks_in(of_domain[-1]) > 0) is not ends_well
    assert sum(callbacks_in(item) for item in drained) == 1001
    assert queue.take_dropped()[1] > 0  # what was superseded is told
    queue.put(an_error(at=1001))
    assert queue.drain(0) == [an_error(at=1001)]


def test_more_last_words_than_can_be_kept_are_counted_as_dropped():
    queue = IntakeQueue(limit=1, fold_limit=3)
    for number in range(20):
        queue.put(an_error(at=number))
        queue.put(DomainGone(f"guest-{number}", number, "undefined"))
        assert len(queue) <= 1 + 3 * 3
    errors, others = queue.take_dropped()
    kept = queue.drain(0)
    assert sum(callbacks_in(item) for item in kept) + errors == 20
    assert sum(isinstance(item, DomainGone) for item in kept) + others == 20


def test_what_is_kept_stays_bounded_while_libvirt_flaps_and_a_gap_still_spans_it_all():
    queue = IntakeQueue(100, 100)
    for round_ in range(10):
        for number in range(2000):
            queue.put(an_error(f"disk{number}", domain=f"guest{number}"))
            assert len(queue) <= 400
        queue.put(SourceLost(round_, "flaps"))
        queue.put(SourceReady(a_host(), round_, (), findings=(Burst(an_error(), 1, round_, round_),)))
        assert len(queue) <= 400
    drained = queue.drain(0)
    (lost,) = [item for item in drained if isinstance(item, SourceLost)]
    (ready,) = [item for item in drained if isinstance(item, SourceReady)]
    assert (lost.at_ns, ready.at_ns, len(ready.findings)) == (0, 9, 10)
    assert drained.index(lost) < drained.index(ready)
    assert sum(callbacks_in(item) for item in drained) + queue.take_dropped()[0] == 20_000


def test_a_proof_stands_behind_all_that_was_folded_before_it():
    queue = IntakeQueue(limit=2)
    for at in range(5):
        queue.put(an_error(at=at))
    queue.put(SourceSeen(Now(5, 5.0)))
    queue.put(an_error(at=6))
    drained = queue.drain(0)
    assert [callbacks_in(item) for item in drained if not isinstance(item, SourceSeen)] == [1, 1, 4]
    assert SourceSeen(Now(5, 5.0)) in drained


def test_a_proof_stays_behind_what_was_folded_before_it_also_where_a_batch_ends_between_them(monkeypatch):
    monkeypatch.setattr("virtbus.agent.queue.BATCH_LIMIT", 4)
    queue = IntakeQueue(limit=2)
    for alias in ("disk0", "disk1", "disk2", "disk3"):
        queue.put(an_error(alias, at=1))
    queue.put(SourceSeen(Now(5, 5.0)))
    queue.put(an_error("disk2", at=6))  # its counter moves behind the proof, with the error before it
    queue.put(DomainResumed("guest-1", 7))  # a barrier: all of it is queued
    before = queue.drain(0)
    assert [type(item) for item in before] == [RawIoError, RawIoError, Burst, Burst]
    assert not queue.emptied
    assert [type(item) for item in queue.drain(0)] == [SourceSeen, DomainResumed]
    assert queue.emptied


def test_the_hosts_name_finds_room_where_nothing_else_does():
    queue = IntakeQueue(limit=1, fold_limit=2)
    for number in range(20):
        queue.put(an_error(domain=f"guest-{number}"))
        queue.put(HostKnown(a_host(name=f"host-{number}"), number))
        assert len(queue) <= 1 + 3 * 2
    assert [item.host.name for item in queue.drain(0) if isinstance(item, HostKnown)][-1:] == ["host-19"]


def test_a_connections_end_finds_room_where_nothing_else_does():
    """Nobody else says it: the connection would be waited for as long as the agent runs."""
    queue = IntakeQueue(limit=1, fold_limit=4)
    for number in range(20):
        queue.put(an_error(domain=f"guest-{number}"))
        queue.put(DomainGone(f"guest-{number}", number, "undefined"))
    queue.put(SourceGone(20, "/a", frozenset({"guest-1"})))
    queue.put(SourceReady(a_host(), 21, (), connection="/a", whole=False))
    queue.put(SourceGone(22, "/a", frozenset({"guest-2"})))
    queue.put(Surveyed(23, a_host(), frozenset()))
    *_, ready, gone, survey = queue.drain(0)
    assert isinstance(ready, SourceReady)
    assert gone == SourceGone(22, "/a", frozenset({"guest-1", "guest-2"}))
    assert isinstance(survey, Surveyed)


@pytest.mark.parametrize("step", [0, -3600, 3600])
def test_two_losses_that_are_kept_as_one_begin_with_the_first_whatever_the_clock_did_between(step):
    queue = IntakeQueue(limit=1, fold_limit=4)
    for number in range(8):
        queue.put(an_error(domain=f"guest-{number}"))
    first = SourceLost(T, "first", booted_ns=T - 100 * 10**9)
    second_ns = T + (50 + step) * 10**9
    queue.put(first)
    queue.put(SourceLost(second_ns, "second", booted_ns=second_ns - 150 * 10**9))
    (lost,) = [item for item in queue.drain(0) if isinstance(item, SourceLost)]
    assert (lost.at_ns, lost.booted_ns) == (first.at_ns, first.booted_ns)


def test_callbacks_that_nobody_could_read_are_counted_and_take_no_room():
    queue = IntakeQueue()
    for at in range(1000):
        queue.put(CallbackLost(at, "not UTF-8"))
    assert (len(queue), queue.take_unread(), queue.take_unread()) == (0, (1000, "not UTF-8"), (0, ""))


def test_a_waiting_drain_wakes_when_something_comes():
    queue = IntakeQueue()
    timer = threading.Timer(0.05, queue.put, [an_error()])
    timer.start()
    assert len(queue.drain(3600.0)) == 1  # only the error can have ended the wait
    timer.join()


def test_folding_while_draining_loses_no_count():
    queue = IntakeQueue(limit=50)
    total = 20_000
    seen = 0
    writer = threading.Thread(
        target=lambda: [queue.put(an_error(f"disk{n % 7}", at=n)) for n in range(total)]
    )
    writer.start()
    while writer.is_alive() or len(queue):
        seen += sum(callbacks_in(item) for item in queue.drain(0.01))
    writer.join()
    assert seen == total
    assert queue.take_dropped() == (0, 0)


_observations = st.lists(
    st.one_of(
        st.builds(
            an_error,
            st.sampled_from(["a", "b"]),
            at=st.integers(0, 9),
            reason=st.sampled_from(["", "enospc"]),
        ),
        st.builds(DomainResumed, st.just("d"), st.integers(0, 9)),
    )
)


@given(_observations)
def test_aggregation_keeps_every_count_and_every_barrier(observations):
    folded = aggregate(observations)
    assert sum(callbacks_in(item) for item in folded) == sum(callbacks_in(item) for item in observations)
    barriers = [item for item in observations if isinstance(item, DomainResumed)]
    assert [item for item in folded if isinstance(item, DomainResumed)] == barriers
    # Between two barriers each error appears once, with its number, and none crosses one.
    counts = [[]]
    for item in folded:
        counts[-1].append(item) if isinstance(item, Burst) else counts.append([])
    wanted = [Counter()]
    for item in observations:
        if isinstance(item, RawIoError):
            wanted[-1][item.alias, item.reason] += 1
        else:
            wanted.append(Counter())
    assert [{(b.raw.alias, b.raw.reason): b.count for b in part} for part in counts] == wanted
    assert [len(part) for part in counts] == [len(part) for part in wanted]
