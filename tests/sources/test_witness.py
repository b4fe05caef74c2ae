"""The witness asks again after whatever its question failed with."""

from __future__ import annotations

import threading

import pytest

from tests.faultkit import wait_until
from virtbus.errors import SourceUnavailable
from virtbus.model import Clock, Observation, SourceSeen
from virtbus.sources.session import Session, Shared
from virtbus.sources.witness import Witness


@pytest.mark.parametrize("failure", [SourceUnavailable("timed out"), MemoryError("no memory")])
def test_a_question_that_failed_is_asked_again(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    monkeypatch.setattr("virtbus.sources.witness.PROVE_SECONDS", 0.01)
    shared = Shared(Clock(), 1.0)
    told: list[Observation] = []
    session = Session(shared, told.append)
    session.heard.set()
    failures = [failure, failure]

    class Link:
        def heard(self, then: object) -> None:
            if failures:
                raise failures.pop()
            assert callable(then)
            then()

    stop = threading.Event()

    def tick() -> None:  # the source thread's part
        while not stop.wait(0.01):
            session.tick = shared.clock()

    thread = threading.Thread(target=tick)
    thread.start()
    with Witness(session, shared, Link()):  # type: ignore[arg-type]
        wait_until(lambda: any(isinstance(each, SourceSeen) for each in told))
    stop.set()
    thread.join()
    assert failures == []
