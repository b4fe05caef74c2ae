"""The node of KubeVirt's pods: what an agent on it will see, and how it gets there."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.conftest import need
from tests.lab.kubevirt import Node, Pod, connectable
from tests.lab.lab import PAUSED_IOERROR, RUNNING, missing
from tests.sources.simulated import Seen
from virtbus.observations import RawIoError, SourceLost, SourceReady
from virtbus.sources import SourceOptions
from virtbus.sources.libvirt import LibvirtSource

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture
def node() -> Iterator[Node]:
    need(missing(inside=False))
    with Node() as made:
        yield made


@contextmanager
def observed(pod: Pod) -> Iterator[tuple[LibvirtSource, Seen]]:
    """A source on the pod's socket, as a process of the node finds it."""
    with connectable(pod.socket_on_node) as name:
        source = LibvirtSource(f"qemu:///session?socket={name}", options=SourceOptions(grace_seconds=0.5))
        seen, stop = Seen(), threading.Event()
        thread = threading.Thread(target=source.run, args=(seen, stop))
        thread.start()
        try:
            seen.wait(SourceReady)
            yield source, seen
        finally:
            stop.set()
            thread.join(10)


def test_each_pod_tells_of_its_own_guest_with_owner_and_volume(node: Node) -> None:
    pods = [node.pod("shop", f"web-{number}") for number in range(3)]
    guests = [pod.launch(volumes=("rootdisk", "data")) for pod in pods]
    with observed(pods[0]) as first, observed(pods[1]) as second, observed(pods[2]) as third:
        for guest, target in zip(guests, ("vda", "vdb", "vda"), strict=True):
            guest.fail(target)
            guest.wait_state(PAUSED_IOERROR)
        for pod, guest, volume, (source, seen) in zip(
            pods, guests, ("rootdisk", "data", "rootdisk"), (first, second, third), strict=True
        ):
            (raw,) = seen.wait(RawIoError)
            assert isinstance(raw, RawIoError)
            assert (raw.domain_name, raw.alias) == (guest.name, f"ua-{volume}")
            known = source.describe(guest.uuid)
            assert known is not None
            assert known.domain.owner is not None
            owner = known.domain.owner
            assert (owner.platform, owner.id) == ("kubevirt", pod.vmi)
            assert (owner.project_name, owner.name) == (pod.namespace, pod.name)
            described = known.devices[raw.alias].source
            assert described is not None
            assert described.volume == volume
            assert guest.injected() == 1


def test_a_pods_daemon_may_hang_and_be_replaced_while_another_tells(node: Node) -> None:
    hung, well = node.pod("shop", "hung"), node.pod("shop", "well")
    guest = well.launch()
    left = hung.launch()
    with observed(well) as (_, seen), observed(hung) as (_, lost):
        hung.freeze()
        guest.fail()
        guest.wait_state(PAUSED_IOERROR)
        seen.wait(RawIoError)
        hung.thaw()
        hung.replace_daemon()
        lost.wait(SourceLost)
        lost.wait(SourceReady, 2)
        assert left.state()[0] == RUNNING
        assert seen.of(SourceLost) == []


def test_a_pod_that_ends_leaves_nothing_on_the_node(node: Node) -> None:
    pod = node.pod("shop", "short")
    guest = pod.launch()
    pid = guest.pid
    node.stale(300)
    pod.end()
    assert not pod.volume.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert len(list(node.pods.iterdir())) == 300


def test_the_socket_lies_where_kubevirt_puts_it_and_its_name_is_too_long_for_an_address(node: Node) -> None:
    pod = node.pod("shop", "web")
    where = pod.socket_on_node.relative_to(node.pods)
    name = f"{node.daemon.stem}-sock"
    assert where == Path(pod.uid, "volumes/kubernetes.io~empty-dir/libvirt-runtime", name)
    assert pod.socket_on_node.is_socket()
    assert len(str(Path("/var/lib/kubelet/pods") / where.with_name("virtqemud-sock"))) == 121
    with closing(socket.socket(socket.AF_UNIX)) as client, pytest.raises(OSError, match="path too long"):
        client.connect(str(pod.socket_on_node))
    with closing(socket.socket(socket.AF_UNIX)) as client, connectable(pod.socket_on_node) as name:
        client.connect(name)
