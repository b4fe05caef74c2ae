"""The queue between libvirt's thread and ours keeps counts and order, and stays small."""

import threading

from hypothesis import given
from hypothesis import strategies as st

from virtbus.intake import IntakeQueue, aggregate, callbacks_in
from virtbus.model import Burst, DomainResumed, RawIoError


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


def test_an_error_folded_before_a_resume_is_told_before_it():
    queue = IntakeQueue(limit=2)
    for at in range(5):
        queue.put(an_error(at=at))
    queue.put(DomainResumed("d", 6))
    queue.put(an_error(at=7))
    kinds = [type(item).__name__ for item in queue.drain(0)]
    assert kinds == ["RawIoError", "RawIoError", "Burst", "DomainResumed", "Burst"]


def test_more_different_errors_than_can_be_kept_are_counted_as_dropped():
    queue = IntakeQueue(limit=1, fold_limit=3)
    for number in range(10):
        queue.put(an_error(f"disk{number}"))
    assert sum(callbacks_in(item) for item in queue.drain(0)) == 4
    assert queue.take_dropped() == (6, 0)
    assert queue.take_dropped() == (0, 0)


def test_memory_stays_bounded_while_errors_and_resumes_alternate_and_what_is_lost_is_counted_apart():
    queue = IntakeQueue(limit=100, fold_limit=50)
    for at in range(10_000):
        queue.put(an_error(at=at))
        queue.put(DomainResumed("d", at))
        assert len(queue) <= 151
    kept = sum(callbacks_in(item) for item in queue.drain(0))
    errors, others = queue.take_dropped()
    assert kept + errors == 10_000
    assert others > 0


def test_a_waiting_drain_wakes_when_something_comes():
    queue = IntakeQueue()
    timer = threading.Timer(0.05, queue.put, [an_error()])
    timer.start()
    assert len(queue.drain(10)) == 1
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
    # Between two barriers no error appears twice, and none crosses one.
    counts = [[]]
    for item in folded:
        counts[-1].append(item) if isinstance(item, Burst) else counts.append([])
    wanted = [[]]
    for item in observations:
        wanted[-1].append(item) if isinstance(item, RawIoError) else wanted.append([])
    assert [sum(b.count for b in part) for part in counts] == [len(part) for part in wanted]
    assert all(len({(b.raw.alias, b.raw.reason) for b in part}) == len(part) for part in counts)
