"""One agent on a node of KubeVirt's pods: real daemons, real guests whose disks fail on demand."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.agent.process import AgentProcess, virtbus
from tests.agent.test_agent import House
from tests.conftest import need
from tests.faults.seen_kit import seconds_of
from tests.lab.kubevirt import Node, Pod, connectable
from tests.lab.lab import PAUSED_IOERROR, RUNNING, Guest, missing
from tests.waiting import wait_until
from virtbus.config import Discover
from virtbus.seen import STANDSTILL_SECONDS
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


def test_an_agent_that_stood_still_tells_what_pods_went_through_meanwhile(node: Node, tmp_path: Path) -> None:
    """One fails, one ends in trouble, one comes and fails, one comes, fails and goes."""
    stays, ends, fine = (node.pod("shop", name) for name in ("stays", "ends", "fine"))
    guests = {pod: pod.launch() for pod in (stays, ends, fine)}
    settings = f"[libvirt.discover]\nsockets = [{json.dumps(node.pattern)}]\nhost = 'node-1'\n"
    bus = f"embedded://{tmp_path}/bus.db"
    with AgentProcess(tmp_path, libvirt="qemu:///system", bus=bus, settings=settings) as agent:
        agent.until(lambda: agent.log.count("libvirt connected") == 3, "all are connected", SECONDS)
        fail(guests[ends])
        agent.until(lambda: agent.metric("virtbus_incidents_open") == 1, "the first is told", SECONDS)
        began = time.time()
        os.kill(agent.process.pid, signal.SIGSTOP)
        fail(guests[stays])
        ends.end()
        comes, short = node.pod("shop", "comes"), node.pod("shop", "short")
        guests |= {pod: pod.launch() for pod in (comes, short)}
        fail(guests[comes])
        fail(guests[short])
        short.end()
        time.sleep(max(0.0, 2 * STANDSTILL_SECONDS - (time.time() - began)))
        os.kill(agent.process.pid, signal.SIGCONT)
        agent.until(lambda: agent.metric("virtbus_incidents_open") == 2 and agent.get("/readyz")[0] == 200,
                    "it sees again", SECONDS)  # fmt: skip
        go_on(guests[stays])
        fail(guests[stays])
        agent.until(lambda: agent.log.count("version is known") >= 3, "each hypervisor is known", SECONDS)
        agent.until(lambda: agent.status()["spool"]["pending"] == 0, "all is delivered", SECONDS)
        agent.stop()
    lines = virtbus("consume", "--bus", bus, "--group", "test", "--timeout", "2").stdout.splitlines()
    events = [json.loads(line) for line in lines]
    data = {kind: [each["data"] for each in events if kind in each["type"]] for kind in ("io_error", "gap")}
    counts: dict[str, int] = {}
    for one in data["io_error"]:
        uuid = one["domain"]["uuid"]
        counts[uuid] = counts.get(uuid, 0) + (one["occurrences"].get("count") or 0)
    expected = {stays: 2, ends: 1, comes: 1}
    assert counts == {guests[pod].uuid: count for pod, count in expected.items()}
    causes = {
        one["domain"]["uuid"]: one["resolution"]["cause"] for one in data["io_error"] if "resolution" in one
    }
    assert causes == {guests[ends].uuid: "domain_stopped"}
    frozen = [one for one in data["gap"] if one["reason"] == "agent_standstill"]
    assert all(seconds_of(one["started_at"]) <= began for one in frozen)
    for pod in (stays, ends, fine):
        assert [pod.uid in (one["detail"] or "") for one in frozen].count(True) == 1
    assert [one for one in frozen if str(node.pods) not in (one["detail"] or "")], (
        "and of pods that nobody saw"
    )
