"""`make matrix`: what changes a guest beneath an open error, on four releases of libvirt and QEMU.

Snapshot, eject, blockcopy, pull backup, unplug, crash, suspend, and a restart of the agent with a hung QEMU.
The agent and the consumer are the installed commands; each scenario has a guest of its own, and `told` is the
sum of all its counts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.agent.process import COMMAND, AgentProcess
from tests.conftest import need
from tests.lab import chroot
from tests.lab.lab import PAUSED_IOERROR, Guest, Lab, LabError, NbdDisk, missing, wait_until
from virtbus.sources.libvirt import LibvirtSource

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(1200)]

QUIET_SECONDS = 3.0
SETTINGS = f"[incidents]\nquiet_seconds = {QUIET_SECONDS}\nmax_window_seconds = 1.0\n"
NO_BACKUP = ("bullseye",)  # its libvirt refuses backups without the checkpoints of a later QEMU
CDROM = "<disk type='file' device='cdrom'><source file='{}'/><target dev='sda' bus='sata'/><readonly/></disk>"


@dataclass
class Told:
    """What came of one scenario's guest."""

    injected: int = 0
    errors: list[dict[str, Any]] = field(default_factory=list)
    resolved: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """The sum of all counts."""
        return sum(each["occurrences"]["count"] for each in self.errors)

    @property
    def aliases(self) -> set[str | None]:
        """The devices that the events name."""
        return {each["device"]["alias"] for each in self.errors}

    @property
    def incidents(self) -> int:
        """How many incidents they are."""
        return len({each["incident"]["id"] for each in self.errors})


class Watch:
    """An agent that can be restarted, and a consumer of its bus."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.folder = lab, folder
        self.bus = f"embedded://{folder}/bus.db"
        self._events: list[dict[str, Any]] = []
        self.agent = self._start()
        self._consumer = subprocess.Popen(
            [*COMMAND, "consume", "--bus", self.bus, "--group", "matrix"], stdout=subprocess.PIPE
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _start(self) -> AgentProcess:
        return AgentProcess(self.folder, libvirt=self.lab.uri_ro, bus=self.bus, settings=SETTINGS).ready(60)

    def _read(self) -> None:
        assert self._consumer.stdout is not None
        self._events.extend(map(json.loads, self._consumer.stdout))

    def restart(self) -> None:
        """End the agent and start it again."""
        self.agent.stop()
        self.agent = self._start()

    def of(self, guest: Guest, kind: str) -> list[dict[str, Any]]:
        """The data of a guest's events of one kind: "io_error" or "io_error_resolved"."""
        return [
            event["data"]
            for event in list(self._events)
            if event["type"] == f"io.virtbus.domain.{kind}.v1"
            and event["data"]["domain"]["uuid"] == guest.uuid
        ]

    def until(
        self, guest: Guest, what: str, check: Callable[[list[dict[str, Any]]], bool], kind: str
    ) -> None:
        """Wait for a guest's events."""
        wait_until(lambda: check(self.of(guest, kind)), lambda: f"{what}: {self.of(guest, kind)}", 60)

    def told(self, guest: Guest, **facts: Any) -> Told:
        """What came of a guest that is destroyed now, if it is still there."""
        if guest.state()[0] not in (0, 5):
            guest.destroy()
        errors = self.of(guest, "io_error")
        self.until(guest, "the end is told", lambda found: bool(found) or not errors, "io_error_resolved")
        return Told(guest.injected(), self.of(guest, "io_error"), self.of(guest, "io_error_resolved"), facts)

    def close(self) -> None:
        """End both."""
        self.agent.stop()
        self._consumer.terminate()
        self._consumer.wait(30)
        self._reader.join(10)
        assert self._consumer.stdout is not None
        self._consumer.stdout.close()


def fail_paused(watch: Watch, guest: Guest, target: str = "") -> None:
    """The disk fails, the guest is paused, and the first event of it arrives."""
    guest.fail(target)
    guest.wait_state(PAUSED_IOERROR)
    watch.until(guest, "the error is told", bool, "io_error")


def named(errors: list[dict[str, Any]]) -> bool:
    """Whether the last event names its device."""
    return bool(errors) and errors[-1]["device"]["alias"] is not None


def snapshot(watch: Watch) -> Told:
    """A disk-only snapshot, of which no event tells; then a read of the image below fails."""
    guest = watch.lab.guest("snapshot", NbdDisk(reads=True, read_policy="stop")).start()
    guest.suspend()
    overlay = watch.lab.folder / "overlay.qcow2"
    watch.lab.virsh("snapshot-create-as", guest.name, "--disk-only", "--no-metadata",
                    "--diskspec", f"vda,snapshot=external,file={overlay}")  # fmt: skip
    guest.fail()
    guest.resume()
    guest.wait_state(PAUSED_IOERROR)
    watch.until(
        guest, "the overlay is told",
        lambda found: bool(found) and bool(found[-1]["device"]["source"]["backing"]), "io_error",
    )  # fmt: skip
    return watch.told(guest)


def eject(watch: Watch) -> Told:
    """A CD is ejected: what the description says before and after."""
    image = watch.lab.folder / "cd.iso"
    image.write_bytes(bytes(1 << 16))
    guest = watch.lab.guest("eject", devices=CDROM.format(image)).start()
    source, stop = LibvirtSource(watch.lab.uri_ro), threading.Event()
    thread = threading.Thread(target=source.run, args=(lambda _observation: None, stop))
    thread.start()

    def path() -> str | None:
        found = source.describe(guest.uuid)
        device = None if found is None else next(d for d in found.devices.values() if d.kind == "cdrom")
        return "unknown" if device is None or device.source is None else device.source.path

    try:
        wait_until(lambda: path() == str(image), lambda: f"the CD is described: {path()}", 20)
        watch.lab.virsh("change-media", guest.name, "sda", "--eject", "--force", "--live")
        wait_until(lambda: path() is None, lambda: f"the drive is described as empty: {path()}", 20)
        after = path()
    finally:
        stop.set()
        thread.join(20)
    return watch.told(guest, after=after)


def blockcopy(watch: Watch) -> Told:
    """An error while the disk is being mirrored: libvirt 9.0 gives neither path nor alias."""
    guest = watch.lab.guest("blockcopy").start()
    copy = watch.lab.folder / "copy.img"
    watch.lab.virsh("blockcopy", guest.name, "vda", str(copy), "--format", "raw", "--transient-job")
    wait_until(lambda: "<mirror" in watch.lab.virsh("dumpxml", guest.name), "the copy runs", 20)
    fail_paused(watch, guest)
    watch.until(guest, "the device is named", named, "io_error")
    return watch.told(guest)


def backup(watch: Watch) -> Told:
    """An error while the disk is being read by a pull backup."""
    guest = watch.lab.guest("backup").start()
    order = watch.lab.folder / "backup.xml"
    folder = watch.lab.folder
    order.write_text(
        f"<domainbackup mode='pull'><server transport='unix' socket='{folder}/backup.sock'/><disks>"
        f"<disk name='vda' type='file'><scratch file='{folder}/scratch.img'/></disk></disks></domainbackup>"
    )
    try:
        watch.lab.virsh("backup-begin", guest.name, str(order))
    except LabError as error:
        guest.destroy()
        return Told(facts={"refused": str(error)})
    fail_paused(watch, guest)
    watch.until(guest, "the device is named", named, "io_error")
    return watch.told(guest)


def unplug(watch: Watch) -> Told:
    """The disk that failed is unplugged while its guest stands still; then the agent is restarted."""
    guest = watch.lab.guest("unplug", NbdDisk(), NbdDisk(bus="scsi", export="disk1")).start()
    fail_paused(watch, guest, "sda")
    watch.until(guest, "the device is named", named, "io_error")
    watch.lab.virsh("detach-disk", guest.name, "sda", "--live")
    wait_until(lambda: "'sda'" not in watch.lab.virsh("dumpxml", guest.name), "the disk is gone", 20)
    watch.restart()
    time.sleep(2 * QUIET_SECONDS)
    resolved_while_paused = len(watch.of(guest, "io_error_resolved"))
    guest.resume()
    watch.until(guest, "the end is told", bool, "io_error_resolved")
    return watch.told(guest, resolved_while_paused=resolved_while_paused)


def crash(watch: Watch) -> Told:
    """QEMU dies under an open incident."""
    guest = watch.lab.guest("crash").start()
    fail_paused(watch, guest)
    os.kill(guest.pid, signal.SIGKILL)
    watch.until(guest, "the end is told", bool, "io_error_resolved")
    return watch.told(guest)


def suspend(watch: Watch) -> Told:
    """An operator suspends a guest after a reported error: its silence proves nothing."""
    guest = watch.lab.guest("suspend", bus="ide", policy="report", boot="tick").start()
    guest.fail()
    watch.until(guest, "the error is told", bool, "io_error")
    guest.suspend()
    guest.heal()
    time.sleep(3 * QUIET_SECONDS)
    before = len(watch.of(guest, "io_error_resolved"))
    guest.resume()
    watch.until(guest, "the end is told", bool, "io_error_resolved")
    return watch.told(guest, resolved_while_suspended=before)


def hung_restart(watch: Watch) -> Told:
    """The agent is restarted while the paused guest's QEMU hangs, and the look comes late."""
    guest = watch.lab.guest("hung-restart").start()
    fail_paused(watch, guest)
    watch.until(guest, "the device is named", named, "io_error")
    pid = guest.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        watch.restart()
        watch.restart()
    finally:
        os.kill(pid, signal.SIGCONT)
    time.sleep(QUIET_SECONDS)
    return watch.told(guest)


SCENARIOS: dict[str, Callable[[Watch], Told]] = {
    "snapshot": snapshot,
    "eject": eject,
    "blockcopy": blockcopy,
    "backup": backup,
    "unplug": unplug,
    "crash": crash,
    "suspend": suspend,
    "hung-restart": hung_restart,
}


@contextmanager
def watched(lab: Lab) -> Iterator[Watch]:
    """An agent and a consumer of a lab."""
    with tempfile.TemporaryDirectory(prefix="virtbus-changes-", dir="/tmp") as folder:
        watch = Watch(lab, Path(folder))
        try:
            yield watch
        finally:
            watch.close()


_suites: dict[str, dict[str, Told]] = {}


@pytest.fixture(params=chroot.SUITES)
def suite(request: pytest.FixtureRequest) -> tuple[str, dict[str, Told]]:
    """A suite after all of its scenarios; they run once."""
    need([*missing(inside=False), *chroot.missing()])
    name = str(request.param)
    if name not in _suites:
        with Lab(root=chroot.suite_root(name)) as lab, watched(lab) as watch:
            _suites[name] = {scenario: run(watch) for scenario, run in SCENARIOS.items()}
    return name, _suites[name]


@pytest.fixture(scope="module", autouse=True)
def table(request: pytest.FixtureRequest) -> Iterator[None]:
    """Print what was found, after the last test."""
    yield
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or not _suites:
        return
    row = "{:9} {:13} {:>8} {:>6} {:>6}  {:16} {}"
    lines = [row.format("suite", "scenario", "injected", "told", "events", "device", "end")]
    for name, found in _suites.items():
        for scenario, told in found.items():
            devices = "+".join(sorted(str(alias) for alias in told.aliases))
            ends = "+".join(f"{e['resolution']['cause']}/{e['domain']['state']}" for e in told.resolved)
            figures = (told.injected, told.count, len(told.errors))
            lines.append(row.format(name, scenario, *figures, devices, ends or told.facts.get("refused", "")))
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture is not None else nullcontext():
        for line in ("", *lines):
            reporter.write_line(line)


Suite = tuple[str, dict[str, Told]]


def test_after_a_snapshot_the_overlay_is_told_as_the_source_and_its_image_below(suite: Suite) -> None:
    told = suite[1]["snapshot"]
    last = told.errors[-1]["device"]["source"]
    assert last["path"].endswith("/overlay.qcow2")
    assert [image.startswith("nbd://") for image in last["backing"]] == [True]
    assert (told.count, told.incidents) == (told.injected, 1)


def test_an_ejected_cd_is_no_source_any_more(suite: Suite) -> None:
    assert suite[1]["eject"].facts == {"after": None}


@pytest.mark.parametrize("scenario", ["blockcopy", "backup"])
def test_an_error_under_a_block_job_is_one_incident_of_its_disk_and_counted_once(
    suite: Suite, scenario: str
) -> None:
    name, found = suite
    told = found[scenario]
    assert ("refused" in told.facts) == (scenario == "backup" and name in NO_BACKUP)
    if "refused" not in told.facts:
        assert (told.count, told.incidents) == (1, 1)
        assert told.errors[-1]["device"]["alias"] == "virtio-disk0"


def test_a_standstill_by_an_unplugged_disk_is_told_once_and_until_the_guest_runs(suite: Suite) -> None:
    told = suite[1]["unplug"]
    assert (told.count, told.incidents, told.facts["resolved_while_paused"]) == (1, 1, 0)
    assert [each["resolution"]["cause"] for each in told.resolved] == ["device_removed"]


def test_a_qemu_that_dies_ends_its_incident_with_the_domain_shut_off(suite: Suite) -> None:
    told = suite[1]["crash"]
    ends = [(each["resolution"]["cause"], each["domain"]["state"]) for each in told.resolved]
    assert (told.count, ends) == (1, [("domain_stopped", "shut off")])


def test_a_suspended_guest_does_not_recover_by_its_silence(suite: Suite) -> None:
    told = suite[1]["suspend"]
    assert told.facts["resolved_while_suspended"] == 0
    ends = [(each["resolution"]["cause"], each["domain"]["state"]) for each in told.resolved]
    assert ends == [("quiet", "running")]


def test_an_error_is_told_once_over_restarts_of_the_agent_with_a_hung_qemu(suite: Suite) -> None:
    told = suite[1]["hung-restart"]
    assert (told.injected, told.count, told.incidents) == (1, 1, 1)
    assert told.errors[-1]["device"]["alias"] == "virtio-disk0"
