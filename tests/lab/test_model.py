"""The simulation's model of libvirt says to one script what a real libvirtd with a real guest says."""

from __future__ import annotations

from collections.abc import Callable

from tests.lab.lab import PAUSED_IOERROR, RUNNING, Lab
from tests.sim import scripts
from tests.sim.hypervisor import BOOKWORM, Daemon, Guest
from tests.waiting import wait_until
from virtbus.sources import SourceOptions
from virtbus.sources.libvirt import LibvirtConnector

UUID = "00000001-0000-4000-8000-000000000001"


def to_the_model(virtual, process) -> list[str]:
    daemon = Daemon(virtual.scheduler, virtual, "host-1", BOOKWORM)
    guest = daemon.guests[UUID] = Guest(UUID, "db1", 1)

    def wait(true: Callable[[], bool]) -> None:
        while not true():
            virtual.scheduler.sleep(0.02)

    return scripts.hypervisor(
        daemon,
        UUID,
        fail=lambda: daemon.error(guest, "virtio-disk0", pause=True),
        pause=lambda: daemon.suspend(guest),
        resume=lambda: daemon.resume(guest),
        destroy=lambda: daemon.leave(guest),
        restart=lambda: daemon.restart(0.1),
        until=wait,
    )


def test_the_model_of_libvirt_is_like_a_real_libvirtd(lab: Lab) -> None:
    guest = lab.guest("db1", error="EIO", policy="stop")
    guest.start()
    guest.wait_state(RUNNING)

    def fail() -> None:
        guest.fail()
        guest.wait_state(PAUSED_IOERROR)

    def resume() -> None:
        guest.heal()
        guest.resume()
        guest.wait_state(RUNNING)

    said = scripts.hypervisor(
        LibvirtConnector(lab.uri, SourceOptions()),
        str(guest.uuid),
        fail=fail,
        pause=guest.suspend,
        resume=resume,
        destroy=guest.destroy,
        restart=lab.restart_libvirtd,
        until=wait_until,
    )
    with scripts.simulated(to_the_model) as model_said:
        assert said == model_said
