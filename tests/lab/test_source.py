"""The libvirt source on real guests: every error told once, with what is known about it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.lab.lab import (
    PAUSED_IOERROR,
    RUNNING,
    Guest,
    Lab,
    LabError,
    NbdDisk,
    ThinDisk,
    wait_until,
)
from tests.sources.simulated import Seen
from virtbus.observations import (
    Burst,
    Description,
    DeviceRemoved,
    DomainGone,
    DomainResumed,
    RawIoError,
    SourceLost,
    SourceReady,
)
from virtbus.sources import SourceOptions
from virtbus.sources.libvirt import LibvirtLink, LibvirtSource
from virtbus.sources.link import ACTION_PAUSE, ACTION_REPORT

GRACE = 0.5
NOVA = """
<nova:instance xmlns:nova="http://openstack.org/xmlns/libvirt/nova/1.1"><nova:name>web-1</nova:name>
<nova:owner><nova:user uuid="u1">alice</nova:user><nova:project uuid="p1">shop</nova:project></nova:owner>
</nova:instance>"""


@contextmanager
def observed(uri: str, **options: Any) -> Iterator[tuple[LibvirtSource, Seen]]:
    """A source that runs and is ready; what it tells is remembered."""
    source = LibvirtSource(uri, options=SourceOptions(grace_seconds=GRACE, **options))
    seen, stop = Seen(), threading.Event()
    thread = threading.Thread(target=source.run, args=(seen, stop))
    thread.start()
    try:
        seen.wait(SourceReady)
        yield source, seen
    finally:
        stop.set()
        thread.join(10)
        assert not thread.is_alive()


def errors(seen: Seen) -> list[tuple[str, str, int]]:
    """(origin, alias, count) of every error that was told, findings of a look too, in order."""
    told = []
    for item in seen.all:
        bursts: list[Burst | RawIoError] = list(item.findings) if isinstance(item, SourceReady) else []
        if isinstance(item, Burst | RawIoError):
            bursts.append(item)
        for burst in bursts:
            if isinstance(burst, RawIoError):
                told.append(("event", burst.alias, 1))
            elif burst.count:
                told.append((burst.origin.value, burst.raw.alias, burst.count))
    return told


def settle() -> None:
    """Long enough for a second telling of an error to come, if it did."""
    time.sleep(2.5 * GRACE)


def described(source: LibvirtSource, guest: Guest) -> Description:
    found = source.describe(guest.uuid)
    assert found is not None
    return found


# ------------------------------------------------------------------------------------- each scenario


@pytest.mark.parametrize(
    ("error", "reason", "disk_error"), [("EIO", "", "unspecified"), ("ENOSPC", "enospc", "no_space")]
)
def test_an_error_that_pauses_the_guest_is_told_once_with_all_that_is_known(
    lab: Lab, error: str, reason: str, disk_error: str
) -> None:
    guest = lab.guest("db1", error=error, metadata=NOVA).start()
    with observed(lab.uri_ro) as (source, seen):
        guest.fail()
        guest.wait_state(PAUSED_IOERROR)
        settle()
        assert errors(seen) == [("event", "virtio-disk0", 1)]
        (raw,) = seen.of(RawIoError)
        assert isinstance(raw, RawIoError)
        assert (raw.path, raw.action_code, raw.reason) == ("disk0", ACTION_PAUSE, reason)
        assert (raw.domain_name, raw.domain_uuid) == ("db1", guest.uuid)
        (more,) = seen.of(Burst)
        assert isinstance(more, Burst)
        assert (more.count, more.disk_error) == (0, disk_error)
        known = described(source, guest)
        assert known.domain.owner is not None
        assert (known.domain.state, known.domain.owner.project_name) == ("paused", "shop")
        device = known.devices["virtio-disk0"]
        assert device.source is not None
        assert device.policy is not None
        assert (device.target, device.bus, device.kind, device.policy.write) == (
            "vda",
            "virtio",
            "disk",
            "stop",
        )
        assert (device.source.type, device.source.protocol, device.source.path) == ("network", "nbd", "disk0")
    assert guest.injected() == 1


def test_an_error_of_an_unnamed_network_disk_is_told_although_libvirt_loses_it(lab: Lab) -> None:
    guest = lab.guest("unnamed", nbd_name="").start()
    with observed(lab.uri_ro) as (_, seen):
        guest.fail()
        guest.wait_state(PAUSED_IOERROR)
        settle()
        (told,) = errors(seen)
    # libvirt 11.1 and later deliver the event.
    assert told in [("lifecycle", "virtio-disk0", 1), ("event", "virtio-disk0", 1)]


def test_a_storms_count_is_what_was_injected_unless_the_hypervisor_merges(lab: Lab) -> None:
    guest = lab.guest("storm", bus="ide", policy="report").start()
    with observed(lab.uri_ro) as (source, seen):
        guest.fail()
        wait_until(lambda: guest.injected() > 3000, "a storm rages", 120)
        guest.heal()
        injected = 0

        def calm() -> bool:
            nonlocal injected
            before, injected = injected, guest.injected()
            return before == injected

        wait_until(calm, "the storm is over", 60)
        time.sleep(1.0)
        told = errors(seen)
    assert {(origin, alias) for origin, alias, _ in told} == {("event", "ide0-0-0")}
    count = sum(count for _, _, count in told)
    assert count <= injected if source.guests.on.hypervisor.merges else count == injected
    assert {item.action_code for item in seen.of(RawIoError) if isinstance(item, RawIoError)} == {
        ACTION_REPORT
    }


def test_an_ignored_error_is_told_with_action_none(lab: Lab) -> None:
    guest = lab.guest("ignoring", policy="ignore").start()
    with observed(lab.uri_ro) as (_, seen):
        guest.fail()
        raw = seen.wait(RawIoError)[0]
        guest.heal()
    assert isinstance(raw, RawIoError)
    assert raw.action_code == 0


def test_two_disks_that_fail_are_told_each_for_itself(lab: Lab) -> None:
    guest = lab.guest("two", NbdDisk(), NbdDisk(export="")).start()
    with observed(lab.uri_ro) as (_, seen):
        for target, alias in (("vda", "virtio-disk0"), ("vdb", "virtio-disk1")):
            guest.fail(target)
            guest.wait_state(PAUSED_IOERROR)
            settle()
            assert [told[1] for told in errors(seen)][-1] == alias
            guest.heal(target)
            guest.resume()
            guest.wait_state(RUNNING)
    assert [(alias, count) for _, alias, count in errors(seen)] == [("virtio-disk0", 1), ("virtio-disk1", 1)]


def test_a_device_that_is_no_disk_is_described(lab: Lab) -> None:
    guest = lab.guest("serial", devices=lab.serial_to_file("serial.log")).start()
    with observed(lab.uri_ro) as (source, _):
        device = described(source, guest).devices["serial0"]
    assert device.kind == "serial"
    assert device.source is not None
    assert device.source.path == str(lab.folder / "serial.log")


def test_a_disk_error_left_over_from_before_is_not_taken_for_a_new_one(lab: Lab) -> None:
    guest = lab.guest("two", NbdDisk(), NbdDisk(export="")).start()
    failed(guest, "vda")
    guest.heal("vda")
    guest.resume()  # QEMU keeps the disk error
    guest.wait_state(RUNNING)
    with observed(lab.uri_ro) as (_, seen):
        settle()
        failed(guest, "vdb")
        settle()
    assert [(alias, count) for _, alias, count in errors(seen)] == [("virtio-disk1", 1)]


# ----------------------------------------------------------------------------------------- evidence


def look_inside(lab: Lab, uri: str | None = None) -> dict[str, Any]:
    """One look by a process in the lab's own file system."""
    script = Path(__file__).with_name("look.py")
    return dict(json.loads(lab.run(sys.executable, str(script), uri or lab.uri_ro)))


def test_a_full_file_system_under_the_image_confirms_no_space_and_free_blocks_say_nothing(lab: Lab) -> None:
    guest = lab.guest("thin", ThinDisk()).start()
    guest.fail()
    guest.wait_state(PAUSED_IOERROR)
    (found,) = look_inside(lab)["findings"]
    assert (found["alias"], found["reason"]) == ("virtio-disk0", "enospc")
    assert found["evidence"]["file_system"] == "confirms"
    guest.heal()  # there is space again, and the guest is still paused for the lack of it
    (found,) = look_inside(lab)["findings"]
    assert found["evidence"]["file_system"] == "inconclusive"


def test_an_image_that_is_not_ours_to_see_is_not_judged_by_another_file_system(lab: Lab) -> None:
    guest = lab.guest("thin", ThinDisk()).start()
    guest.fail()
    guest.wait_state(PAUSED_IOERROR)
    source = LibvirtSource(lab.uri_ro, options=SourceOptions(lookup_deadline_seconds=60.0))
    (found,) = source.snapshot().findings  # from outside the lab's namespace
    assert {item.check: item.verdict for item in found.evidence}["file_system"] == "unavailable"


# -------------------------------------------------------------------------------- the daemon comes and goes


@pytest.mark.slow
def test_a_daemon_that_freezes_under_look_ups_again_and_again_crashes_nobody(lab: Lab) -> None:
    """libvirt's client crashes where a connection with two calls ends (CVE-2024-4418; Debian 12 has it)."""
    guest, script = lab.guest("db1").start(), Path(__file__).with_name("asking.py")
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(lab.run, sys.executable, str(script), lab.uri_ro, guest.uuid, "40")
        while not wait([asking], timeout=0.5).done:
            lab.freeze()
            wait([asking], timeout=3.0)  # keepalive gives up after two seconds
            lab.thaw()
        assert int(asking.result()) > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_fifty_restarts_of_libvirtd_lose_no_pause_and_tell_none_twice(lab: Lab) -> None:
    guest = lab.guest("db1").start()
    with observed(lab.uri_ro) as (_, seen):
        sizes = []
        for round_ in range(1, 51):
            lab.kill_libvirtd()
            seen.wait(SourceLost, round_)
            guest.fail()  # while nobody listens
            # A daemon that comes up just as QEMU stops may never learn of it (docs/libvirt.md).
            wait_until(lambda: guest.injected() >= round_, "QEMU has met the error", 20)  # noqa: B023
            lab.start_libvirtd()
            seen.wait(SourceReady, round_ + 1)
            guest.wait_state(PAUSED_IOERROR)
            wait_until(lambda: len(errors(seen)) >= round_, f"the pause of round {round_} is told", 5)  # noqa: B023
            guest.heal()
            guest.resume()
            seen.wait(lambda item: isinstance(item, DomainResumed), 1)
            guest.wait_state(RUNNING)
            sizes.append(resident_bytes())
        settle()
        assert [count for _, _, count in errors(seen)] == [1] * 50
        assert len(seen.of(SourceLost)) == 50
        assert guest.injected() == 50
    assert sizes[-1] - sizes[9] < 4 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
def test_a_frozen_libvirtd_is_found_within_thirty_seconds_and_all_is_told_after_it(lab: Lab) -> None:
    guest = lab.guest("db1").start()
    with observed(lab.uri_ro) as (_, seen):
        lab.freeze()
        frozen = time.monotonic()
        (lost,) = seen.wait(SourceLost, seconds=40)
        found_after = time.monotonic() - frozen
        guest.fail()
        time.sleep(1)
        lab.thaw()
        guest.wait_state(PAUSED_IOERROR)
        seen.wait(SourceReady, 2)
        wait_until(lambda: bool(errors(seen)), "the error of the frozen time is told", 10)
        settle()
    assert found_after < 30, found_after
    assert isinstance(lost, SourceLost)
    assert "keepalive" in lost.why
    assert [count for _, _, count in errors(seen)] == [1]


# ------------------------------------------------------------------------------------- what ends an incident


def failed(guest: Guest, target: str = "") -> None:
    guest.fail(target)
    guest.wait_state(PAUSED_IOERROR)


def causes(seen: Seen) -> list[str]:
    return [item.cause for item in seen.of(DomainGone) if isinstance(item, DomainGone)]


def test_a_resume_is_told(lab: Lab) -> None:
    guest = lab.guest().start()
    with observed(lab.uri_ro) as (_, seen):
        failed(guest)
        guest.heal()
        guest.resume()
        seen.wait(DomainResumed)


def test_a_guest_that_is_destroyed_while_it_fails_is_told_as_stopped(lab: Lab) -> None:
    guest = lab.guest().start()
    with observed(lab.uri_ro) as (source, seen):
        failed(guest)
        guest.destroy()
        seen.wait(DomainGone)
        assert causes(seen) == ["domain_stopped"]
        # The source's own thread takes it over from the callback.
        wait_until(lambda: described(source, guest).domain.state == "shut off", "its last state", 10)


def test_a_disk_that_is_unplugged_while_it_fails_is_told_by_its_alias(lab: Lab) -> None:
    scsi = "<controller type='scsi' index='0' model='virtio-scsi'/>"
    guest = lab.guest("plug", NbdDisk(), NbdDisk(bus="scsi", export="disk1"), devices=scsi).start()
    with observed(lab.uri_ro) as (source, seen):
        alias = next(a for a, d in described(source, guest).devices.items() if d.target == "sda")
        failed(guest, "sda")
        lab.virsh("detach-disk", "plug", "sda")
        (removed,) = seen.wait(DeviceRemoved)
        assert isinstance(removed, DeviceRemoved)
        assert (removed.domain_uuid, removed.alias) == (guest.uuid, alias)
        wait_until(lambda: alias not in described(source, guest).devices, "the description forgets it", 5)


def test_a_guest_that_migrates_away_is_told_as_migrated(lab: Lab) -> None:
    lab.guest("traveller").start()
    with Lab() as other, observed(lab.uri_ro) as (_, seen):
        lab.virsh(
            "migrate", "--live", "--unsafe", "traveller", "--desturi", other.uri,
            "--migrateuri", f"unix://{lab.folder}/migrate.sock", "--disks-uri", f"unix://{lab.folder}/nbd.sock",
        )  # fmt: skip
        seen.wait(DomainGone)
        assert causes(seen) == ["migrated"]


# ------------------------------------------------------------------------------------------ refusals, URIs


def test_a_probe_of_a_healthy_libvirt_is_all_ok(lab: Lab) -> None:
    checks = LibvirtSource(lab.uri_ro).probe()
    assert {check.name: check.status for check in checks if check.name != "error counts"} == {
        "libvirt": "ok",
        "libvirt events": "ok",
    }


def test_a_probe_without_a_daemon_says_what_to_do(lab: Lab) -> None:
    lab.kill_libvirtd()
    (check,) = LibvirtSource(lab.uri_ro).probe()
    assert (check.status, check.exit_code) == ("failed", 69)
    assert "start libvirtd" in (check.remedy or "")


def test_an_observation_is_made_as_nobody_over_the_read_only_socket(lab: Lab) -> None:
    guest = lab.guest("seen").start()
    script = Path(__file__).with_name("look.py")
    done = subprocess.run(
        [sys.executable, str(script), lab.uri_ro, "65534"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [domain["name"] for domain in json.loads(done.stdout)["domains"]] == [guest.name]


# SIOCSIFFLAGS with IFF_UP: the lab's network has a loopback device, and it is down.
LOOPBACK_UP = (
    "import fcntl, socket, struct;fcntl.ioctl(socket.socket(), 0x8914, struct.pack('16sh14x', b'lo', 1))"
)


def listen_on_network(lab: Lab, settings: str) -> None:
    """Start libvirtd anew, with a network listener inside the lab."""
    lab.run(sys.executable, "-c", LOOPBACK_UP)
    conf = lab.folder / "etc" / "libvirtd.conf"
    conf.write_text(conf.read_text() + settings)
    lab.kill_libvirtd()
    lab.spawn("libvirtd", "--listen", log=lab.folder / "log" / "libvirtd.log")
    wait_until(lambda: lab.socket.exists(), "libvirtd listens", 20)


def names_seen(lab: Lab, uri: str) -> list[str]:
    end = time.monotonic() + 20
    while True:
        try:
            return [domain["name"] for domain in look_inside(lab, uri)["domains"]]
        except LabError:  # it listens on the Unix socket first
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def test_libvirt_is_observed_over_tcp(lab: Lab) -> None:
    lab.guest("far").start()
    listen_on_network(lab, 'listen_tls = 0\nlisten_tcp = 1\nauth_tcp = "none"\nlisten_addr = "127.0.0.1"\n')
    assert names_seen(lab, "qemu+tcp://127.0.0.1/system") == ["far"]


def test_libvirt_is_observed_over_tls_and_a_stranger_is_refused(lab: Lab) -> None:
    lab.guest("far").start()
    ours, theirs = lab.folder / "pki", lab.folder / "strangers"
    authority = write_pki(ours)
    write_pki(theirs)
    listen_on_network(
        lab,
        'listen_tls = 1\nlisten_tcp = 0\nauth_tls = "none"\nlisten_addr = "127.0.0.1"\n'
        f'ca_file = "{authority}"\ncert_file = "{ours}/servercert.pem"\nkey_file = "{ours}/serverkey.pem"\n',
    )
    assert names_seen(lab, f"qemu+tls://127.0.0.1/system?pkipath={ours}") == ["far"]
    with pytest.raises(LabError, match="certificate"):
        look_inside(lab, f"qemu+tls://127.0.0.1/system?pkipath={theirs}")


def write_pki(folder: Path) -> Path:
    """A certificate authority, and a certificate for both sides, as libvirt's client wants them named."""
    folder.mkdir()
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "cacert.pem"))
    for side in ("server", "client"):
        made = authority.issue_cert("127.0.0.1")
        made.private_key_pem.write_to_path(str(folder / f"{side}key.pem"))
        made.cert_chain_pems[0].write_to_path(str(folder / f"{side}cert.pem"))
    return folder / "cacert.pem"


def test_a_guest_whose_qemu_hangs_does_not_keep_others_from_being_told_and_described(lab: Lab) -> None:
    stuck, failing = lab.guest("stuck").start(), lab.guest("failing").start()
    os.kill(stuck.pid, signal.SIGSTOP)  # asking it for its disk errors now hangs in libvirtd
    try:
        with observed(lab.uri_ro) as (source, seen):
            failed(failing)
            seen.wait(RawIoError, seconds=5)
            settle()
            assert errors(seen) == [("event", "virtio-disk0", 1)]
            assert "virtio-disk0" in described(source, failing).devices
            assert "virtio-disk0" in described(source, stuck).devices
    finally:
        os.kill(stuck.pid, signal.SIGCONT)


def test_of_two_copied_disks_the_one_whose_copy_goes_on_is_not_blamed(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libvirt 9.0 names no device during a copy; the XML that shows whose copy runs is read late."""
    disks = [NbdDisk(export=name, policy="report") for name in ("one", "two")]
    guest = lab.guest("copied", *disks).start()
    for target in guest.disks:
        words = ("--format", "raw", "--transient-job", "--wait", "--verbose")
        lab.virsh("blockcopy", guest.name, target, str(lab.folder / f"{target}.img"), *words)
    failed = next(iter(guest.disks))
    answers, read = threading.Event(), LibvirtLink.xml
    answers.set()

    def late(link: LibvirtLink, uuid: str) -> str:
        answers.wait(30)
        return read(link, uuid)

    monkeypatch.setattr(LibvirtLink, "xml", late)
    with observed(lab.uri_ro) as (source, seen):
        answers.clear()
        guest.fail(failed)
        seen.wait(RawIoError)
        guest.heal(failed)
        lab.virsh("blockjob", guest.name, failed, "--abort")
        entry = source.cache.get
        wait_until(
            lambda: (known := entry(guest.uuid)) and known.read_at < known.changed_at,
            "its end is heard of",
            20,
        )
        answers.set()
        wait_until(lambda: not source.check._cases[guest.uuid].has_nameless(), "whose it was is decided", 20)
        assert {alias for _, alias, _ in errors(seen)} <= {"", "virtio-disk0"}  # newer ones name it
        assert all(item.raw.alias != "virtio-disk1" for item in seen.of(Burst) if isinstance(item, Burst))
