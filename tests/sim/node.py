"""A model of a KubeVirt node: each guest with a daemon of its own, behind a socket that comes and goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tests.sim.hypervisor import Daemon, Error, Guest, Hypervisor, ModelLink, Quirks, Stood
from tests.sim.runtime import HostClock, Scheduler, Virtual
from virtbus.sources.many import Identity

SOCKET = "virtqemud-sock"
RESTART_SECONDS = 1.0  # until virt-launcher starts a virtqemud again that ended
NODES: dict[str, Node] = {}  # by the pattern of their sockets, while a world is played


class Pod(Daemon):
    """One guest's daemon; a guest that starts again has another pod."""

    def __init__(self, node: Node, guest: Guest, folder: Path) -> None:
        super().__init__(node.sched, node.virtual, node.host, node.quirks)
        self.guests[guest.uuid] = guest
        self.folder = folder
        self.uri = str(folder / SOCKET)
        self.socket: Identity | None = None  # what listens there


class Node:
    """Every pod of a host; it is asked as a `Daemon` is that has all guests."""

    def __init__(
        self, sched: Scheduler, virtual: Virtual, host: str, quirks: Quirks, root: Path, clock: HostClock
    ) -> None:
        self.sched, self.virtual, self.host, self.quirks, self._clock = sched, virtual, host, quirks, clock
        self._root = root / f"{host}-pods"
        self.pattern = f"{self._root}/*/{SOCKET}"
        NODES[self.pattern] = self
        self.guests: dict[str, Guest] = {}
        self.away: dict[str, list[tuple[float, float]]] = {}
        self.changed: list[Callable[[], None]] = []  # who watches the folders
        self.owners: dict[str, str] = {}  # socket → whose it is or was
        self._pods: dict[str, Pod] = {}  # by uuid, of guests that are here
        self._ended: list[Pod] = []
        self._number = 0

    # ---- what an agent sees

    def look(self) -> dict[str, Identity]:
        """See virtbus.sources.many.look."""
        return {pod.uri: pod.socket for pod in self._pods.values() if pod.socket is not None}

    def connector(self, path: str) -> Pod:
        """The daemon of a socket, even if that is gone meanwhile."""
        return next(pod for pod in (*self._pods.values(), *self._ended) if pod.uri == path)

    # ---- what happens to it

    @property
    def works(self) -> bool:
        return all(pod.works for pod in self._pods.values())

    @property
    def links(self) -> Sequence[ModelLink]:
        return [link for pod in self._all for link in pod.links]

    @property
    def errors(self) -> Sequence[Error]:
        return sorted((error for pod in self._all for error in pod.errors), key=lambda error: error.at)

    @property
    def stood(self) -> Sequence[Stood]:
        return [stood for pod in self._all for stood in pod.stood]

    @property
    def _all(self) -> list[Pod]:
        return [*self._ended, *self._pods.values()]

    @property
    def failing_until(self) -> float:
        return max((pod.failing_until for pod in self._pods.values()), default=0.0)

    @failing_until.setter
    def failing_until(self, at: float) -> None:
        for pod in self._pods.values():
            pod.failing_until = at

    def _begin(self, guest: Guest) -> Pod:
        self._number += 1
        folder = self._root / str(self._number)
        folder.mkdir(parents=True)
        pod = self._pods[guest.uuid] = Pod(self, guest, folder)
        pod.away = self.away
        self.owners[pod.uri] = guest.uuid
        self._listen(pod)
        return pod

    def _listen(self, pod: Pod) -> None:
        self._number += 1
        pod.appeared_ns = self._clock.wall_ns(self.sched.now)
        pod.socket = (1, self._number, pod.appeared_ns)
        self._tell()

    def _tell(self) -> None:
        for changed in list(self.changed):
            changed()

    def restart(self, seconds: float) -> None:
        """The daemon of one pod ends, and comes again with another socket."""
        pod = self._any()
        if pod is None:
            return
        pod.socket = None
        self._tell()
        pod.restart(min(seconds, RESTART_SECONDS))
        self._again(pod)

    def _again(self, pod: Pod) -> None:
        if pod in self._pods.values():
            self._listen(pod)

    def die(self, stalls: float, seconds: float) -> None:
        """One pod's."""
        pod = self._any()
        if pod is not None:
            pod.die(stalls, min(seconds, RESTART_SECONDS))
            self._again(pod)

    def hang(self, seconds: float) -> None:
        """One pod's."""
        pod = self._any()
        if pod is not None:
            pod.hang(seconds)

    def _any(self) -> Pod | None:
        pods = [pod for pod in self._pods.values() if pod.works]
        return self.sched.random.choice(pods) if pods else None

    # ---- what guests do

    def error(self, guest: Guest, alias: str, *, pause: bool, events: int = 1) -> None:
        self._pods[guest.uuid].error(guest, alias, pause=pause, events=events)

    def hide(self, guest: Guest, alias: str) -> None:
        self._pods[guest.uuid].hide(guest, alias)

    def suspend(self, guest: Guest) -> None:
        if guest.here:
            self._pods[guest.uuid].suspend(guest)

    def resume(self, guest: Guest) -> None:
        if guest.here:
            self._pods[guest.uuid].resume(guest)

    def leave(self, guest: Guest) -> None:
        """The pod ends: its daemon, its socket and its folder go."""
        pod = self._pods.pop(guest.uuid)
        pod.leave(guest)
        self._end(pod)

    def _end(self, pod: Pod) -> None:
        self._ended.append(pod)
        pod.up, pod.socket = False, None
        pod.folder.rmdir()
        for link in list(pod.links):
            link.cut("End of file while reading data", 0.0)
        self._tell()

    def enter(self, guest: Guest) -> None:
        """Another pod."""
        self._begin(guest).enter(guest)

    def rename(self, guest: Guest, name: str) -> None:
        """A VirtualMachineInstance can't be renamed."""

    def unplug(self, guest: Guest, alias: str) -> None:
        self._pods[guest.uuid].unplug(guest, alias)

    def plug(self, guest: Guest, alias: str) -> None:
        if guest.here:
            self._pods[guest.uuid].plug(guest, alias)

    def lifecycle(self, guest: Guest, event: int, detail: int) -> None:
        self._pods[guest.uuid].lifecycle(guest, event, detail)

    def take(self, guest: Guest) -> None:
        """A guest comes from another node; its pod is there first."""
        self.guests[guest.uuid] = guest
        self._begin(guest)

    def give(self, guest: Guest, to: Hypervisor) -> Guest:
        pod = self._pods.pop(guest.uuid)
        there = pod.give(guest, to)
        self._end(pod)
        return there


class Watch:
    """virtbus.sources.many.Watch."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._nodes: list[Node] = []

    def add(self, folder: str) -> None:
        """Here `folder` is the pattern: see `look`."""
        node = NODES[folder]
        if node not in self._nodes:
            self._nodes.append(node)
            node.changed.append(self._changed)

    def close(self) -> None:
        for node in self._nodes:
            node.changed.remove(self._changed)


def look(patterns: Sequence[str], watch: Callable[[str], None]) -> dict[str, Identity]:
    """virtbus.sources.many.look."""
    (pattern,) = patterns
    watch(pattern)
    return NODES[pattern].look()
