"""One agent on a node of KubeVirt's pods: real daemons, real guests whose disks fail on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.agent.test_agent import House
from tests.conftest import need
from tests.faultkit import wait_until
from tests.lab import chroot
from tests.lab.kubevirt import SOCKET, VOLUME, Node, connectable
from tests.lab.lab import PAUSED_IOERROR, missing
from virtbus.config import Discover
from virtbus.sources import SourceOptions
from virtbus.sources.many import ManySource

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(1200)]

Delivered = Callable[[str], list[dict[str, Any]]]


@pytest.fixture
def node() -> Iterator[Node]:
    need([*missing(inside=False), *chroot.missing()])
    with Node() as made:
        yield made


@pytest.fixture
def delivered(node: Node, tmp_path: Path) -> Iterator[Delivered]:
    """An agent on the node; the data of what it delivered, by the event's type."""
    house = House(tmp_path / "state")
    house.agent.source = ManySource(
        Discover(sockets=(f"{node.pods}/*/{VOLUME}/{SOCKET}",), host="node-1"),
        options=SourceOptions(grace_seconds=0.5),
    )
    house.start()
    yield lambda kind: [event["data"] for event in house.delivered(kind)]
    house.end()


def test_ten_guests_are_told_and_each_ones_end_loss_and_hang_is_its_own(
    node: Node, delivered: Delivered
) -> None:
    node.stale(300)
    pods = [node.pod("shop", f"web-{number}") for number in range(10)]
    guests = [pod.launch() for pod in pods]
    connected = {guest.uuid for guest in guests}
    for guest in guests:
        guest.fail("vda")
        guest.wait_state(PAUSED_IOERROR)
    wait_until(
        lambda: {each["domain"]["uuid"] for each in delivered("io_error.v1")} >= connected,
        what="all told",
        timeout=60,
    )
    for pod, guest in zip(pods, guests, strict=True):
        told = [each for each in delivered("io_error.v1") if each["domain"]["uuid"] == guest.uuid]
        assert {each["host"]["name"] for each in told} == {"node-1"}
        assert sum(each["occurrences"]["count"] for each in told) >= 1
        owner = told[-1]["domain"]["owner"]
        assert (owner["platform"], owner["id"]) == ("kubevirt", pod.vmi)
        assert (owner["project_name"], owner["name"]) == (pod.namespace, pod.name)
        assert told[-1]["device"]["source"]["volume"] == "rootdisk"

    # One hangs, one's daemon is replaced, one ends: its own guest's incident is resolved, nobody else's.
    pods[0].freeze()
    pods[1].replace_daemon()
    pods[2].end()
    wait_until(
        lambda: [one for one in delivered("io_error_resolved") if one["domain"]["uuid"] == guests[2].uuid],
        what="the ended pod's incident is resolved",
        timeout=60,
    )

    late = node.pod("shop", "late")
    guest = late.launch()
    guest.fail("vda")
    guest.wait_state(PAUSED_IOERROR)
    wait_until(
        lambda: guest.uuid in {e["domain"]["uuid"] for e in delivered("io_error.v1")},
        what="the late one",
        timeout=60,
    )
    wait_until(
        lambda: "source_lost" in {gap["reason"] for gap in delivered("gap")},
        what="the replaced daemon's gap", timeout=60,
    )  # fmt: skip
    assert {each["domain"]["uuid"] for each in delivered("io_error_resolved")} == {guests[2].uuid}
    pods[0].thaw()


def test_the_agent_connects_where_the_nodes_path_is_longer_than_an_address(node: Node) -> None:
    pod = node.pod("shop", "web")
    pattern = f"{node.pods}/*/{VOLUME}/{SOCKET}"
    source = ManySource(Discover(sockets=(pattern,)), options=SourceOptions())
    (check,) = source.probe()
    assert (check.status, check.summary) == ("ok", f"1 of 1 sockets answer ({pattern})")
    with connectable(pod.volume) as name:
        assert len(name) < 107
