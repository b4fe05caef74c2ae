"""Look-ups are asked until they are answered, also on a machine that has no more threads to give."""

from __future__ import annotations

import threading

import pytest

from tests.sources.simulated import SimulatedHost
from tests.waiting import wait_until
from virtbus.sources.crew import Crew
from virtbus.sources.lookups import Lookups, Want


def test_a_question_stays_open_while_no_worker_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def job(_link: object, uuid: str, _want: Want) -> Want:
        asked.append(uuid)
        return Want.NOTHING

    lookups = Lookups(SimulatedHost(1), job, Crew(), in_flight=1, deadline=10.0)
    lookups.resume()
    start = threading.Thread.start

    def refused(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    for number in range(3):
        lookups.request(f"guest{number}", Want.DESCRIPTION)
    lookups.check()
    assert asked == []
    monkeypatch.setattr(threading.Thread, "start", start)
    lookups.check()
    wait_until(lambda: asked == ["guest0", "guest1", "guest2"])
    lookups.pause()
