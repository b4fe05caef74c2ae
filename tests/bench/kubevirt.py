"""What an agent costs a node of KubeVirt's pods: 1, 10 and 100 guests, each behind a daemon of its own.

Each guest is a real QEMU that was started paused, so that a hundred of them take no processor; its daemon is
what tests/lab/kubevirt.py starts (virtqemud, or libvirtd in session mode where that can't be built). A
hundred pods take 6 GiB.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.agent.process import AgentProcess
from tests.bench import peers
from tests.bench.measure import Row, cpu_seconds, memory
from tests.lab.kubevirt import Node, Pod

COUNTS = (1, 10, 100)
SECONDS = 60.0


def pod_with_guest(node: Node, number: int) -> Pod:
    """A pod whose guest stands still from its start on."""
    pod = node.pod("bench", f"vm-{number}")
    disk = pod.folder / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    disk.chmod(0o666)
    xml = pod.folder / "vm.xml"
    xml.write_text(
        f"<domain type='qemu'><name>bench_vm-{number}</name>"
        f"<metadata><kubevirt xmlns='http://kubevirt.io'><uid>{pod.vmi}</uid></kubevirt></metadata>"
        "<memory unit='MiB'>8</memory><vcpu>1</vcpu><os><type arch='x86_64' machine='pc'>hvm</type></os>"
        "<devices><disk type='file' device='disk'><driver name='qemu' type='raw' error_policy='stop'/>"
        f"<source file='{disk}'/><target dev='vda' bus='virtio'/><alias name='ua-rootdisk'/></disk>"
        "<controller type='usb' model='none'/><memballoon model='none'/></devices></domain>"
    )
    pod.virsh("create", "--paused", str(xml))
    return pod


def measured(node: Node, count: int, seconds: float) -> dict[str, float]:
    """One agent from its start to its rest, with so many pods on the node."""
    settings = f"[libvirt.discover]\nsockets = [{json.dumps(node.pattern)}]\nhost = 'node-1'\n"
    with tempfile.TemporaryDirectory(prefix="vbbench-", dir="/tmp") as folder:
        agent = AgentProcess(
            Path(folder), libvirt="qemu:///system", bus=f"embedded:{folder}/bus", settings=settings,
            command=[str(peers.agent_python()), "-m", "virtbus"], PYTHONDONTWRITEBYTECODE="",
        )  # fmt: skip
        with agent as one:
            begun = time.monotonic()
            one.until(lambda: one.log.count("libvirt connected") >= count, f"{count} connected", 300)
            took = time.monotonic() - begun
            one.until(lambda: one.log.count("version is known") >= count, f"{count} versions known", 300)
            known = time.monotonic() - begun
            time.sleep(15)  # threads that only the start needed have ended
            pid = one.process.pid
            spent, begun = cpu_seconds(pid), time.monotonic()
            time.sleep(seconds)
            cpu = (cpu_seconds(pid) - spent) / (time.monotonic() - begun) * 100
            proc = Path(f"/proc/{pid}")
            return {
                "up": took, "known": known, "cpu": cpu, "anon": memory(pid)["RssAnon"],
                "threads": len(list((proc / "task").iterdir())), "files": len(list((proc / "fd").iterdir())),
            }  # fmt: skip


def rows(rounds: int, *, counts: Sequence[int] = COUNTS, seconds: float = SECONDS) -> list[Row]:
    """What a further guest costs, and what the most of them cost together."""
    found: dict[int, list[dict[str, float]]] = {count: [] for count in counts}
    with Node() as node:
        for count in counts:
            while len(node.running) < count:
                pod_with_guest(node, len(node.running))
            for _ in range(rounds):
                found[count].append(measured(node, count, seconds))
    one, most = found[counts[0]], found[counts[-1]]
    further = counts[-1] - counts[0]

    def each(what: str) -> tuple[float, ...]:
        return tuple((b[what] - a[what]) / further for a, b in zip(one, most, strict=True))

    def told(name: str, words: str, what: str, unit: str) -> list[Row]:
        return [
            Row(
                f"kubevirt {name} {count}",
                f"{words}, {count} guests",
                tuple(f[what] for f in found[count]),
                unit,
            )
            for count in counts
        ]

    all_of = f"{counts[-1]} guests"
    return [
        *told("anon", "RssAnon", "anon", "MiB"),
        *told("threads", "threads", "threads", ""),
        *told("files", "open descriptors", "files", ""),
        Row("kubevirt guest anon", "RssAnon of a further guest", each("anon"), "MiB", 0.15, least=False),
        Row("kubevirt guest files", "descriptors of a further guest", each("files"), "", 2, least=False),
        # The crew that asks the daemons has more to do; no guest has a thread.
        Row("kubevirt guest threads", "threads of a further guest", each("threads"), "", 0.08, least=False),
        Row("kubevirt cpu", f"CPU of one core at rest, {all_of}", tuple(f["cpu"] for f in most), "%", 0.5,
            least=False),
        Row("kubevirt up", f"from exec until {all_of} are connected and looked at",
            tuple(f["up"] for f in most), "s", 10, least=False),
        Row("kubevirt known", "from exec until it is known of each which QEMU it has",
            tuple(f["known"] for f in most), "s"),
    ]  # fmt: skip
