"""A node of a cluster as KubeVirt lays it out: a libvirt daemon a virt-launcher pod, one guest in each.

    with Node() as node:
        pod = node.pod("shop", "web-1")              # its daemon answers, its guest is not started yet
        guest = pod.launch()                          # a real guest whose disk fails on demand
        guest.fail("vda")
        ...
        pod.end()                                     # the pod is deleted: guest, daemon and folder are gone

`node.pods` is what an agent looks into, /var/lib/kubelet/pods of a real node: below it each pod's socket is
`<pod uid>/volumes/kubernetes.io~empty-dir/libvirt-runtime/virtqemud-sock`. All daemons run in session mode
under one uid, as for guests that don't run as root. Where virtqemud can't be built, this machine's libvirtd
stands in, in session mode, and says so; LAB_KUBEVIRT_DAEMON=libvirtd asks for that.

That path is longer than the 107 bytes that a Unix socket's address holds, on a real node too (121 bytes): the
daemon binds it by a short name of its pod's own mount namespace, and whoever connects from outside needs a
short name as well: `connectable` gives one.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from tests.lab import chroot
from tests.lab.lab import Daemon, Disk, Guest, Lab, LabError, NbdDisk, Process
from tests.lab.modular import SESSION_USER, SESSION_VIRTQEMUD, modular_root

VOLUME = "volumes/kubernetes.io~empty-dir/libvirt-runtime"
STAND_IN = Daemon("libvirtd", "libvirt", user=SESSION_USER)


def daemon() -> tuple[Path | None, Daemon]:
    """The root folder and the daemon of a node: virtqemud, or what stands in for it."""
    why = "LAB_KUBEVIRT_DAEMON asks for it"
    if os.environ.get("LAB_KUBEVIRT_DAEMON") != STAND_IN.name:
        lacks = chroot.missing()
        try:
            if not lacks:
                return modular_root(), SESSION_VIRTQEMUD
        except LabError as error:
            lacks = [str(error)]
        if os.environ.get("VIRTBUS_CI") == "1":
            raise LabError(f"virtqemud can't be built: {'; '.join(lacks)}")
        why = f"virtqemud can't be built: {'; '.join(lacks)}"
    print(f"STAND-IN: libvirtd in session mode instead of virtqemud ({why})", file=sys.__stderr__)
    return None, STAND_IN


@contextmanager
def connectable(socket: Path) -> Iterator[str]:
    """A name of a pod's socket that is short enough for an address, in this process."""
    folder = os.open(socket.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{socket.name}"
    finally:
        os.close(folder)


class Node(Lab):
    """The node: namespaces for all of its pods, and no daemon of its own."""

    def __init__(self) -> None:
        root, which = daemon()
        super().__init__(root=root, daemon=which)
        self.pods = self.folder / "pods"
        self.running: list[Pod] = []

    def start_libvirtd(self) -> None:
        """No daemon runs on the node itself."""
        self.pods.mkdir(exist_ok=True)

    def pod(self, namespace: str, name: str, *, vmi: str = "") -> Pod:
        """A virt-launcher pod whose daemon answers; `vmi` is the uid of its VirtualMachineInstance."""
        made = Pod(self, namespace, name, vmi=vmi or str(uuid.uuid4()))
        made.start_libvirtd()
        self.running.append(made)
        return made

    @property
    def pattern(self) -> str:
        """What finds the sockets of all pods."""
        return f"{self.pods}/*/{VOLUME}/{self.daemon.stem}-sock"

    def stale(self, count: int) -> None:
        """Folders of pods that are gone, as a node has them: a socket nobody listens on in every second."""
        for number in range(count):
            folder = self.pods / str(uuid.uuid4()) / VOLUME
            folder.mkdir(parents=True)
            if number % 2:
                self.bind(folder).close()

    def bind(self, folder: Path) -> socket.socket:
        """A socket in a pod's folder that no daemon bound."""
        made = socket.socket(socket.AF_UNIX)
        with connectable(folder / f"{self.daemon.stem}-sock") as name:
            made.bind(name)
        return made

    @contextmanager
    def silent(self) -> Iterator[Path]:
        """A pod whose socket accepts and never says a word; its socket."""
        folder = self.pods / str(uuid.uuid4()) / VOLUME
        folder.mkdir(parents=True)
        with closing(self.bind(folder)) as server:
            server.listen(64)
            yield folder / f"{self.daemon.stem}-sock"


class Pod(Lab):
    """One pod: a daemon of its own in the node's namespaces. A Lab whose daemon is `virtqemud`."""

    def __init__(self, node: Node, namespace: str, name: str, *, vmi: str) -> None:
        # Not Lab's: the namespaces, their first process and what it started are the node's.
        self.node, self.root, self.hostname, self.ports = node, node.root, node.hostname, node.ports
        self._init, self._spawned = node._init, node._spawned
        self._daemon: Process | None = None
        self.guests: list[Guest] = []
        self.namespace, self.name, self.vmi, self.uid = namespace, name, vmi, str(uuid.uuid4())
        # Short names, for the paths of Unix sockets; the pod's folder is the one that others know.
        self.folder = node.folder / f"p{len(node.running)}-{self.uid[:4]}"
        (self.folder / "log").mkdir(parents=True)
        self._place(self.folder, node.daemon)
        self.volume = node.pods / self.uid / VOLUME
        self.volume.mkdir(parents=True)
        self.run_folder.parent.mkdir(parents=True)
        self.run_folder.symlink_to(self.volume)

    @property
    def socket_on_node(self) -> Path:
        """The socket as the node knows it; too long to connect to by this name."""
        return self.volume / self.socket.name

    def launch(self, *disks: Disk, volumes: tuple[str, ...] = ("rootdisk",)) -> Guest:
        """The pod's guest, started: named, marked and its disks aliased as KubeVirt does."""
        metadata = f'<kubevirt xmlns="http://kubevirt.io"><uid>{self.vmi}</uid></kubevirt>'
        chosen = disks or tuple(NbdDisk(export=volume, alias=f"ua-{volume}") for volume in volumes)
        return self.guest(f"{self.namespace}_{self.name}", *chosen, metadata=metadata).start()

    def replace_daemon(self) -> None:
        """The daemon dies and is started again, as virt-launcher does; its socket is a new one."""
        self.kill_libvirtd(signal.SIGKILL)
        self.start_libvirtd()

    def end(self) -> None:
        """The pod is deleted: its guests, then its daemon, then its folder."""
        for guest in self.guests:
            try:
                guest.destroy()
            except LabError:  # it was off
                continue
        if self._daemon is not None:
            self.kill_libvirtd(signal.SIGTERM)
        shutil.rmtree(self.node.pods / self.uid)
        self.node.running.remove(self)
