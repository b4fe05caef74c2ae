"""The lab itself: what every other lab test takes as the truth."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import need
from tests.lab.lab import PAUSED_IOERROR, RUNNING, SHUT_OFF, Lab, LabError, NbdDisk, ThinDisk, wait_until


def reasons(heard: list[dict[str, object]]) -> list[dict[str, object]]:
    return [each for each in heard if each["event"] == "io_error_reason"]


@pytest.mark.parametrize(("error", "disk_error"), [("EIO", "unspecified error"), ("ENOSPC", "no space")])
def test_a_guest_whose_disk_fails_is_paused_and_libvirt_reports_as_many_errors_as_were_injected(
    lab: Lab, error: str, disk_error: str
) -> None:
    with lab.listen() as listener:
        guest = lab.guest("db1", error=error).start()
        assert guest.state()[0] == RUNNING
        guest.fail()
        guest.wait_state(PAUSED_IOERROR)
        assert lab.virsh("domblkerror", "db1").strip() == f"vda: {disk_error}"
        callbacks = reasons(listener.heard())
    assert guest.injected() == 1
    assert [each["alias"] for each in callbacks] == ["virtio-disk0"]
    assert [each["path"] for each in callbacks] == ["disk0"]


def test_a_guest_goes_on_when_its_disk_is_healed_and_fails_again_when_not(lab: Lab) -> None:
    guest = lab.guest().start()
    guest.fail()
    guest.wait_state(PAUSED_IOERROR)
    guest.resume()
    guest.wait_state(PAUSED_IOERROR)
    wait_until(lambda: guest.injected() == 2, "the second error is injected", 5)
    guest.heal()
    guest.resume()
    guest.wait_state(RUNNING)
    time.sleep(0.3)
    assert guest.state()[0] == RUNNING
    assert guest.injected() == 2


def test_a_storm_injects_thousands_of_errors_and_the_guest_runs_on(lab: Lab) -> None:
    guest = lab.guest("storm", bus="ide", policy="report").start()
    guest.fail()
    wait_until(lambda: guest.injected() > 1000, "a thousand errors are injected", 20)
    assert guest.state()[0] == RUNNING


def test_reported_errors_come_at_a_gentle_pace_with_the_tick_boot_sector(lab: Lab) -> None:
    with lab.listen() as listener:
        guest = lab.guest("tick", bus="ide", policy="report", boot="tick").start()
        guest.fail()
        wait_until(lambda: guest.injected() >= 3, "three errors are injected", 10)
        before = guest.injected()
        time.sleep(2)
        paced = guest.injected() - before
        guest.heal()
        time.sleep(0.2)
        callbacks = reasons(listener.heard())
    assert {each["action"] for each in callbacks} == {2}  # VIR_DOMAIN_EVENT_IO_ERROR_REPORT
    assert 3 <= paced < 100  # 36 on a machine at rest, some more when ticks are made up for


def test_a_lab_has_a_name_and_a_disk_an_address_of_its_own_network(lab_lacks: list[str]) -> None:
    need(lab_lacks)
    with Lab(hostname="compute-7") as lab:
        assert lab.virsh("hostname").strip() == "compute-7"
        guest = lab.guest("remote", NbdDisk(address="10.61.0.7")).start()
        guest.fail()
        guest.wait_state(PAUSED_IOERROR)
        assert "<host name='10.61.0.7' port='10809'/>" in lab.virsh("dumpxml", "remote")


def test_a_thin_disk_runs_out_of_space_and_gets_some_more(lab: Lab) -> None:
    guest = lab.guest("thin", ThinDisk()).start()
    guest.fail()
    guest.wait_state(PAUSED_IOERROR)
    assert lab.virsh("domblkerror", "thin").strip() == "vda: no space"
    guest.heal()
    guest.resume()
    guest.wait_state(RUNNING)
    time.sleep(0.3)
    assert guest.state()[0] == RUNNING


def test_each_of_two_disks_fails_on_its_own(lab: Lab) -> None:
    guest = lab.guest("two", NbdDisk(), NbdDisk(error="ENOSPC", export="disk1")).start()
    guest.fail("vdb")
    guest.wait_state(PAUSED_IOERROR)
    assert lab.virsh("domblkerror", "two").strip() == "vdb: no space"
    assert (guest.injected("vda"), guest.injected("vdb")) == (0, 1)


def test_a_guest_may_carry_metadata_a_serial_port_in_a_file_and_an_unnamed_source(lab: Lab) -> None:
    guest = lab.guest(
        "rich",
        nbd_name="",
        title="Data & base",
        metadata='<a:x xmlns:a="urn:example"><a:y>1</a:y></a:x>',
        devices=lab.serial_to_file("serial.log"),
    ).start()
    xml = lab.virsh("dumpxml", "rich")
    assert "<a:y>1</a:y>" in xml
    assert "serial.log" in xml
    assert "name='disk0'" not in xml
    guest.fail()
    guest.wait_state(PAUSED_IOERROR)


def test_libvirtd_may_be_killed_restarted_and_frozen_while_guests_run(lab: Lab) -> None:
    guest = lab.guest().start()
    before, qemu = lab.libvirtd_pid, guest.pid
    lab.kill_libvirtd()
    with pytest.raises(LabError, match="failed to connect"):
        lab.virsh("list")
    lab.start_libvirtd()
    lab.restart_libvirtd()
    assert lab.libvirtd_pid != before
    assert guest.pid == qemu
    assert guest.state()[0] == RUNNING
    lab.freeze()
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(["virsh", "-c", lab.uri, "list"], timeout=1, check=False, capture_output=True)
    lab.thaw()
    guest.destroy()
    assert guest.state()[0] == SHUT_OFF


def test_the_machines_own_libvirt_is_not_touched(lab: Lab) -> None:
    machine = [Path(name) for name in ("/run/libvirt", "/var/lib/libvirt", "/etc/libvirt")]
    before = [sorted(map(str, folder.rglob("*"))) for folder in machine]
    lab.guest("alone").start()
    assert [sorted(map(str, folder.rglob("*"))) for folder in machine] == before
    assert "alone" not in subprocess.run(
        ["virsh", "-c", "qemu:///system", "list"], capture_output=True, text=True, check=False
    ).stdout  # fmt: skip


def test_any_user_reads_through_the_read_only_socket(lab: Lab) -> None:
    lab.guest("seen").start()
    listing = ["virsh", "-r", "-c", lab.uri_ro, "list", "--name"]
    names = subprocess.check_output(listing, text=True, user=65534, group=65534, env={})
    assert names.split() == ["seen"]


def test_nothing_is_left_when_the_test_process_is_killed(lab: Lab) -> None:
    # `lab` is asked for so that this is skipped, or fails, where no lab can be had.
    script = (
        "import json, time\n"
        "from tests.lab.lab import Lab\n"
        "with Lab() as lab:\n"
        "    guest = lab.guest().start()\n"
        "    print(json.dumps([str(lab.folder), lab.libvirtd_pid, guest.pid]), flush=True)\n"
        "    time.sleep(60)\n"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        folder, *pids = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    wait_until(lambda: not any(alive(pid) for pid in pids), f"processes {pids} are gone", 5)
    wait_until(lambda: not Path(folder).exists(), f"{folder} is gone", 5)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
