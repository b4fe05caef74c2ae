"""Look-ups are asked until they are answered, also on a machine that has no more threads to give."""

from __future__ import annotations

import threading

import pytest

from tests.sources.simulated import SimulatedHost
from tests.waiting import wait_until
from virtbus.sources.crew import Crew
from virtbus.sources.link import Link
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


def test_each_call_has_a_connection_of_its_own_and_one_is_kept_for_the_next() -> None:
    links: list[Link] = []
    go_on = threading.Event()

    def job(link: Link, _uuid: str, _want: Want) -> Want:
        links.append(link)
        go_on.wait(10)
        return Want.NOTHING

    host = SimulatedHost(1)
    lookups = Lookups(host, job, Crew(), in_flight=3, deadline=10.0)
    lookups.resume()
    for number in range(4):
        lookups.request(f"guest{number}", Want.DESCRIPTION)
    wait_until(lambda: len(links) == 3)
    assert len({id(link) for link in links}) == 3
    go_on.set()
    wait_until(lambda: len(links) == 4 and sum(link.alive() for link in links[:3]) == 1)
    assert links[3] in links[:3]
    lookups.request("guest5", Want.DESCRIPTION)
    wait_until(lambda: len(links) == 5 and not lookups.busy())
    assert links[4].alive()
    lookups.pause()
    assert not any(link.alive() for link in host.links)
