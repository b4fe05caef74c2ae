"""An agent on many hypervisors: what one of them says, or fails to say, of a guest that another one has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.agent.test_agent import House
from tests.sources.simulated import Guest, SimulatedHost
from tests.sources.test_many import NAME, Denying, Refusing, Sockets, bind, guest_of
from tests.sources.test_observer import OPTIONS
from tests.waiting import wait_until
from virtbus.config import Discover
from virtbus.retry import no_waiting
from virtbus.sources.link import STOPPED, STOPPED_MIGRATED
from virtbus.sources.many import ManySource
from virtbus.telemetry import METRICS

UUID = "00000000-0000-0000-0000-0000000000aa"


class Node:
    """An agent, and pods with a guest each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pods = Sockets(folder / "pods")
        self.pods.folder.mkdir(parents=True, exist_ok=True)
        self.houses: list[House] = []

    def start(self, **more: Any) -> House:
        source = ManySource(
            Discover(sockets=(f"{self.pods.folder}/*/{NAME}",), host="node-1"),
            options=OPTIONS,
            connector=self.pods.connector,
        )
        self.houses.append(House(self.folder / "state", source=source, **more))
        return self.houses[-1].start()

    def pod(self, name: str, **more: object) -> SimulatedHost:
        """One whose guest has the same UUID as that of any other pod."""
        host = SimulatedHost()
        host.guests[UUID] = Guest(UUID, name, 1, **more)  # type: ignore[arg-type]
        return self.pods.add(name, host)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    one = Node(tmp_path)
    with no_waiting():
        yield one
        for host in one.pods.hosts.values():
            for event in (host.release, host.probed, host.answers):
                event.set()
            host.frozen.clear()
        for house in one.houses:
            house.agent.abort()
            house.agent.join()


def connected(house: House, host: SimulatedHost) -> bool:
    seen = house.agent.intake.sight.connections.get(host.uri)
    return seen is not None and seen.connected


def test_a_pod_that_was_killed_and_is_removed_late_ends_no_incident_of_its_guest_in_another_pod(
    node: Node,
) -> None:
    house = node.start()
    old = node.pod("old")
    wait_until(lambda: connected(house, old))
    old.down = True
    old.cut()
    wait_until(lambda: not connected(house, old))
    new = node.pod("new")
    wait_until(lambda: connected(house, new))
    new.io_error(guest_of(new))
    new.suspend(guest_of(new))
    house.wait("io_error.v1")
    node.pods.end("old")
    wait_until(lambda: old.uri not in house.agent.intake.sight.connections)
    new.io_error(guest_of(new), "other", path="/img/b")
    house.wait("io_error.v1", 2)
    assert house.delivered("resolved") == []
    assert house.agent.incidents.open_count == 2


def test_an_error_of_a_guest_that_has_left_another_pod_is_described_by_its_own(node: Node) -> None:
    house = node.start()
    old = node.pod("a")
    wait_until(lambda: connected(house, old))
    guest = guest_of(old)
    new = node.pod("b")
    wait_until(lambda: connected(house, new))
    del old.guests[UUID]
    old.lifecycle(guest, STOPPED, STOPPED_MIGRATED)
    wait_until(lambda: len(house.agent.queue) == 0)
    new.io_error(guest_of(new), action=2)
    (event,) = house.wait("io_error.v1")
    assert (event["data"]["domain"]["name"], event["data"]["domain"]["state"]) == ("b", "running")


def a_run_that_ended_in_trouble(node: Node, host: SimulatedHost) -> None:
    """An agent that saw the host's guest stand by an error, and is gone."""
    node.pods.add("pod", host)
    house = node.start()
    wait_until(lambda: connected(house, host))
    host.io_error(guest_of(host))
    host.suspend(guest_of(host))
    house.wait("io_error.v1")
    house.end()


def test_an_agent_that_no_socket_lets_in_is_not_ready_and_ends_no_incident(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("virtbus.sources.many.SURVEY_SECONDS", 0.0)
    host = Denying()
    host.guests[UUID] = Guest(UUID, "guest", 1)
    host.denies = False
    a_run_that_ended_in_trouble(node, host)
    host.denies = True
    house = node.start()
    house.wait("gap")
    wait_until(lambda: house.agent.intake.sight._surveyed)
    assert house.agent.not_ready() == ["source is starting"]
    assert house.agent.incidents.open_count == 1
    host.denies = False
    wait_until(lambda: house.agent.not_ready() == [])
    assert house.delivered("resolved") == []


def test_guests_that_are_not_seen_keep_an_agent_from_being_ready_whose_host_may_lack_libvirt(
    node: Node,
) -> None:
    house = node.start(libvirt_absent=lambda: True)
    house.wait("gap")
    assert house.agent.not_ready() == []
    host = node.pod("pod")
    wait_until(lambda: connected(house, host))
    assert "no libvirt" not in house.agent.summary()
    host.down = True
    host.cut()
    wait_until(lambda: house.agent.not_ready() == ["source is disconnected"])


def test_the_metric_says_connected_while_pods_come_and_go_and_on_a_node_without_any(node: Node) -> None:
    def shown() -> float | None:
        return METRICS.registry.get_sample_value("virtbus_source_connected")

    house = node.start()
    house.wait("gap")
    wait_until(lambda: house.agent.not_observing() == [], what="the survey of a node without guests")
    assert shown() == 1.0
    first, second = node.pod("first"), node.pod("second")
    wait_until(lambda: connected(house, first) and connected(house, second))
    node.pods.end("first")
    wait_until(lambda: first.uri not in house.agent.intake.sight.connections)
    assert shown() == 1.0, "the other one is"
    second.down = True
    second.cut()
    wait_until(lambda: shown() == 0.0, what="no guest is seen")
    node.pods.end("second")
    wait_until(lambda: shown() == 1.0, what="no guest is left")


def test_a_daemon_that_was_killed_and_starts_slowly_while_an_agent_starts_ends_no_incident_of_its_guest(
    node: Node,
) -> None:
    host = Refusing()
    host.guests[UUID] = Guest(UUID, "guest", 1)
    a_run_that_ended_in_trouble(node, host)
    host.down = True  # and its socket is left over
    house = node.start()
    wait_until(lambda: host.attempts == 4)
    host.down = False
    bind(Path(host.uri))
    wait_until(lambda: connected(house, host))
    assert house.agent.incidents.open_count == 1
    assert house.delivered("resolved") == []
