"""The witness asks again after whatever its question failed with."""

from __future__ import annotations

import threading

import pytest

from tests.waiting import wait_until
from virtbus.errors import SourceUnavailable
from virtbus.model import Clock, Now
from virtbus.observations import Observation, SourceSeen
from virtbus.sources.crew import Crew, Witness
from virtbus.sources.link import RESUMED, SUSPENDED, SUSPENDED_IOERROR
from virtbus.sources.session import Session, Shared


@pytest.mark.parametrize("failure", [SourceUnavailable("timed out"), MemoryError("no memory")])
def test_a_question_that_failed_is_asked_again(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    monkeypatch.setattr("virtbus.sources.crew.PROVE_SECONDS", 0.01)
    clock = Clock()
    told: list[Observation] = []
    woken = threading.Event()
    session = Session(Shared(clock, 1.0), told.append, wake=woken.set)
    failures = [failure, failure]

    class Link:
        def heard(self, then: object) -> None:
            if failures:
                raise failures.pop()
            assert callable(then)
            then()

    crew = Crew()
    witness = Witness(session, Link(), crew, clock(), quiet=3600.0)  # type: ignore[arg-type]
    session.hear()
    stop = threading.Event()

    def step() -> None:  # the source thread's part: it comes when it is woken or when the witness said
        while not stop.is_set():
            woken.wait(max(0.0, witness.step(clock()) - clock().monotonic))
            woken.clear()

    thread = threading.Thread(target=step)
    thread.start()
    wait_until(lambda: any(isinstance(each, SourceSeen) for each in told))
    stop.set()
    woken.set()
    thread.join()
    assert failures == []


def test_what_waits_for_a_decision_may_have_happened_since_the_last_answer_before_it_came() -> None:
    """A daemon that stood still says late what failed long before."""
    now = [Now(0, 100.0)]
    told: list[Observation] = []
    session = Session(Shared(lambda: now[0], 1.0), told.append)

    def proves(asked: float, answered: float) -> SourceSeen:
        now[0] = Now(0, answered)
        session.saw(Now(0, asked))
        assert isinstance(told[-1], SourceSeen)
        return told[-1]

    assert proves(110.0, 110.1).undecided == 0.0
    now[0] = Now(0, 130.0)  # its guest stands since 112, say
    session.lifecycle("u", "db1", 1, SUSPENDED, SUSPENDED_IOERROR)
    for asked, answered in ((120.0, 130.1), (130.2, 130.3)):
        assert asked - proves(asked, answered).undecided == 110.0
    now[0] = Now(0, 140.0)
    session.lifecycle("u", "db1", 1, RESUMED, 0)
    for at in (140.0, 142.0):  # it waits for a look once
        session._shared.check.due(at, {})
    assert proves(150.0, 150.1).undecided == 0.0


def test_a_call_for_which_there_is_no_thread_is_made_when_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = threading.Thread.start
    refusals = [RuntimeError("can't start new thread")]

    def starts(thread: threading.Thread) -> None:
        if refusals:
            raise refusals.pop()
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", starts)
    crew, called = Crew(), threading.Event()
    crew.run(called.set)
    assert not called.is_set()
    assert crew.check() is None  # it waits no longer
    assert called.wait(10)
