"""One agent on a node of KubeVirt's pods: real daemons, real guests whose disks fail on demand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.agent.test_agent import House
from tests.conftest import need
from tests.faultkit import wait_until
from tests.lab.kubevirt import Node, Pod, connectable
from tests.lab.lab import PAUSED_IOERROR, RUNNING, Guest, missing
from virtbus.config import Discover
from virtbus.sources import SourceOptions
from virtbus.sources.many import ManySource

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(1200)]

SECONDS = 90.0  # for what has to come on a busy machine


@pytest.fixture
def node() -> Iterator[Node]:
    need(missing(inside=False))
    with Node() as made:
        yield made


class Agent:
    """An agent of a node, and what it delivered."""

    def __init__(self, folder: Path, name: str, *patterns: str) -> None:
        discover = Discover(sockets=patterns, host=name)
        self.house = House(folder, source=ManySource(discover, options=SourceOptions(grace_seconds=0.5)))
        self.house.start()

    def of(self, kind: str, guest: Guest | None = None) -> list[dict[str, Any]]:
        data = [event["data"] for event in self.house.delivered(kind)]
        return [one for one in data if guest is None or one["domain"]["uuid"] == guest.uuid]

    def counted(self, guest: Guest) -> int:
        return sum(one["occurrences"]["count"] for one in self.of("io_error.v1", guest))

    def owner(self, guest: Guest) -> dict[str, Any] | None:
        return next((one["domain"]["owner"] for one in reversed(self.of("io_error.v1", guest))), None)

    def wait(self, what: str, *guests: Guest) -> None:
        """Each of them has been told as often as its disk failed, and whose it is."""
        wait_until(lambda: all(self.counted(guest) >= guest.injected() > 0 and self.owner(guest)
                               for guest in guests), what=what, timeout=SECONDS)  # fmt: skip

    def resolved(self, guest: Guest) -> list[str]:
        return [one["resolution"]["cause"] for one in self.of("io_error_resolved", guest)]

    def gaps(self) -> list[str]:
        """What each gap says of the connection that was not seen."""
        return [one["detail"] for one in self.of("gap") if one["reason"] == "source_lost"]

    def lost_of(self, pod: Pod) -> int:
        """How often this pod's connection was lost."""
        return sum(pod.uid in detail and "was not reached before" not in detail for detail in self.gaps())


@contextmanager
def running(folder: Path, name: str, *patterns: str) -> Iterator[Agent]:
    agent = Agent(folder, name, *patterns)
    try:
        yield agent
    finally:
        agent.house.end()


@pytest.fixture
def agent(node: Node, tmp_path: Path) -> Iterator[Agent]:
    with running(tmp_path / "state", "node-1", node.pattern) as made:
        yield made


def fail(guest: Guest) -> None:
    guest.fail()
    guest.wait_state(PAUSED_IOERROR, seconds=SECONDS)


def go_on(guest: Guest) -> None:
    """The storage is well again, and the guest runs."""
    guest.heal()
    guest.resume()
    guest.wait_state(RUNNING, seconds=SECONDS)


def test_ten_guests_are_told_with_node_vmi_and_volume_and_counted_exactly(node: Node, agent: Agent) -> None:
    node.stale(300)
    pods = [node.pod("shop", f"web-{number}") for number in range(10)]
    guests = [pod.launch() for pod in pods]
    for guest in guests:
        fail(guest)
    agent.wait("all are told", *guests)
    for guest in guests[:3]:
        go_on(guest)
        fail(guest)
    agent.wait("three are told again", *guests)
    for pod, guest in zip(pods, guests, strict=True):
        told = agent.of("io_error.v1", guest)
        assert agent.counted(guest) == guest.injected() == (2 if guest in guests[:3] else 1)
        assert {each["host"]["name"] for each in told} == {"node-1"}
        owner = agent.owner(guest)
        assert owner is not None
        assert (owner["platform"], owner["id"]) == ("kubevirt", pod.vmi)
        assert (owner["project_name"], owner["name"]) == (pod.namespace, pod.name)
        assert told[-1]["device"]["source"]["volume"] == "rootdisk"
    # Ends of pods are told of their guests alone.
    for pod in pods[:2]:
        pod.end()
    wait_until(
        lambda: all(agent.resolved(guest) == ["domain_stopped"] for guest in guests[:2]),
        what="the ended pods' incidents are resolved", timeout=SECONDS,
    )  # fmt: skip
    assert [guest for guest in guests[2:] if agent.resolved(guest)] == []


def test_a_daemon_that_hangs_and_two_that_are_replaced_at_once_blind_nobody_else(
    node: Node, agent: Agent
) -> None:
    hung, first, second, well = (node.pod("shop", name) for name in ("hung", "first", "second", "well"))
    guests = [pod.launch() for pod in (hung, first, second, well)]
    for guest in guests:
        fail(guest)
    agent.wait("all are told", *guests)
    for guest in guests:
        go_on(guest)

    hung.freeze()
    for pod in (first, second):  # both sockets are others within a second
        pod.kill_libvirtd()
    for pod in (first, second):
        pod.start_libvirtd()
    wait_until(lambda: agent.lost_of(first) == agent.lost_of(second) == 1, what="two gaps", timeout=SECONDS)
    for guest in guests[1:]:
        fail(guest)
    agent.wait("the others are told while one hangs", *guests[1:])
    assert agent.lost_of(hung) == agent.lost_of(well) == 0
    hung.thaw()
    fail(guests[0])
    agent.wait("the one that hung is told again", guests[0])
    assert [agent.counted(guest) for guest in guests] == [guest.injected() for guest in guests] == [2] * 4
    assert all(agent.resolved(guest) == [] for guest in guests)


def test_sockets_that_nobody_or_nothing_answers_on_are_in_nobodys_way(node: Node, tmp_path: Path) -> None:
    node.stale(300)
    with node.silent(), node.silent(), running(tmp_path / "state", "node-1", node.pattern) as agent:
        late = node.pod("shop", "late")
        guest = late.launch()
        fail(guest)
        agent.wait("told", guest)
        (check,) = ManySource(Discover(sockets=(node.pattern,)), options=SourceOptions()).probe()
        assert check.status == "warning"
        assert check.summary.startswith("1 of 153 sockets answer")
        assert "2 say nothing" in check.summary
        assert agent.counted(guest) == 1
        assert all(late.uid in detail for detail in agent.gaps())  # it may have run before we reached it


def test_a_guest_that_migrates_is_one_domain_that_two_agents_tell_apart(node: Node, tmp_path: Path) -> None:
    source, target = node.pod("shop", "vm-1"), node.pod("shop", "vm-1")
    with (
        running(tmp_path / "a", "node-a", str(source.socket_on_node)) as left,
        running(tmp_path / "b", "node-b", str(target.socket_on_node)) as right,
    ):
        guest = source.launch()
        fail(guest)
        left.wait("told by the first", guest)
        go_on(guest)
        source.virsh(
            "migrate", "--live", "--unsafe", guest.name, "--desturi", target.uri,
            "--migrateuri", f"unix://{target.run_folder.parent}/m.sock",
        )  # fmt: skip
        wait_until(
            lambda: left.resolved(guest) == ["migrated"],
            what="the first agent's incident ends",
            timeout=SECONDS,
        )
        guest.fail()  # the same disk, under the guest that is the other daemon's now
        wait_until(
            lambda: right.counted(guest) == guest.injected() - 1 > 0 and right.owner(guest),
            what="told by the second", timeout=SECONDS,
        )  # fmt: skip
        assert left.counted(guest) == 1
        told = [each.of("io_error.v1", guest)[-1] for each in (left, right)]
        assert [one["host"]["name"] for one in told] == ["node-a", "node-b"]
        assert told[0]["incident"]["id"] != told[1]["incident"]["id"]
        assert {one["domain"]["owner"]["name"] for one in told} == {"vm-1"}
        assert right.resolved(guest) == []


def test_the_agent_connects_where_the_nodes_path_is_longer_than_an_address(node: Node) -> None:
    pod = node.pod("shop", "web")
    source = ManySource(Discover(sockets=(node.pattern,)), options=SourceOptions())
    (check,) = source.probe()
    assert (check.status, check.summary) == ("ok", f"1 of 1 sockets answer ({node.pattern})")
    with connectable(pod.socket_on_node) as name:
        assert len(name) < 107
