"""Whose an error may have been that libvirt reports without its device: never guessed, also not later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.sources.simulated import Guest, SimulatedHost
from tests.sources.test_late_looks import Run, host_knows
from tests.sources.test_observer import until
from virtbus.model import IoError
from virtbus.sources.link import ACTION_REPORT, PAUSED, PAUSED_IOERROR

MIRROR = "<mirror type='file'><source file='/img/copy'/></mirror>"


def two_disks(guest: Guest, *copied: str) -> str:
    """The guest's XML with a second disk (alias b, target vdb), and a block job of these disks."""
    disks = "".join(
        f"<disk type='file' device='disk'><source file='/img/{alias}'/>{MIRROR if alias in copied else ''}"
        f"<target dev='vd{alias}'/><alias name='{alias}'/></disk>"
        for alias in ("a", "b")
    )
    head = f"<domain id='1'><name>{guest.name}</name><uuid>{guest.uuid}</uuid>"
    return f"{head}<devices>{disks}</devices></domain>"


@contextmanager
def copying(*copied: str, fresh: float = 0.0) -> Iterator[tuple[SimulatedHost, Guest, Run]]:
    """A guest whose description is known, and is `fresh` for so many seconds."""
    host = SimulatedHost(1)
    guest = next(iter(host.guests.values()))
    guest.xml = two_disks(guest, *copied)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("virtbus.sources.descriptions.FRESH_SECONDS", fresh)
        with Run(host, {}) as run:
            until(lambda: host_knows(run, guest))
            yield host, guest, run


def reread(host: SimulatedHost, guest: Guest, run: Run, xml: str) -> None:
    """Until this XML was read, and what it says was taken over."""
    guest.xml = xml
    before = run.observer.cache.get(guest.uuid)
    assert before is not None
    for handler in host.handlers():
        handler.changed(guest.uuid)

    def is_read() -> bool:
        entry = run.observer.cache.get(guest.uuid)
        return entry is not None and entry.read_at > before.read_at and entry.read_at >= entry.changed_at

    until(is_read)


def decided(run: Run, guest: Guest) -> None:
    """Until what was reported without a name has one, or will never get one."""
    until(lambda: not run.observer.check._cases[guest.uuid].has_nameless())


def test_the_disk_whose_copy_goes_on_is_not_blamed_for_the_error_of_the_one_whose_copy_ended() -> None:
    with copying("a", "b") as (host, guest, run):
        host.failures["xml"] = 1.0  # the description that follows the error is late
        host.io_error(guest, "", ACTION_REPORT, path="")
        for handler in host.handlers():
            handler.job_ended(guest.uuid, "vda", failed=True)
        reread(host, guest, run, two_disks(guest, "b"))
        decided(run, guest)
        assert run.aliases() == {None}
        assert run.counts() == [1]


def test_the_disk_whose_copy_is_known_is_not_blamed_for_one_whose_copy_began_since() -> None:
    """Nothing says that a copy begins."""
    with copying("a") as (host, guest, run):
        guest.xml = two_disks(guest, "a", "b")
        host.io_error(guest, "", ACTION_REPORT, path="")
        reread(host, guest, run, two_disks(guest, "a", "b"))
        decided(run, guest)
        assert run.aliases() == {None}


def test_the_disk_whose_copy_was_pivoted_before_the_description_is_named() -> None:
    with copying("a") as (host, guest, run):
        host.failures["xml"] = 1.0
        host.io_error(guest, "", ACTION_REPORT, path="")
        for handler in host.handlers():
            handler.job_ended(guest.uuid, "vda", failed=False)
        reread(host, guest, run, two_disks(guest).replace("/img/a", "/img/copy"))
        until(lambda: run.aliases() == {None, "a"})
        assert sum(run.counts()) == 1


def test_further_errors_of_a_copied_disk_are_of_one_incident_however_old_its_description_is() -> None:
    with copying("a") as (host, guest, run):
        host.io_error(guest, "", ACTION_REPORT, path="")
        until(lambda: run.aliases() == {None, "a"})
        for _ in range(3):
            host.io_error(guest, "", ACTION_REPORT, path="")
        until(lambda: sum(run.counts()) == 4)
        assert len({event.incident.id for event in run.events if isinstance(event, IoError)}) == 1


def test_a_disk_that_was_plugged_in_may_be_the_one_that_an_error_does_not_name() -> None:
    host = SimulatedHost(1)
    guest = next(iter(host.guests.values()))
    with Run(host, {}) as run:
        until(lambda: host_knows(run, guest))
        host.failures["xml"] = 1.0
        guest.xml = two_disks(guest)
        for handler in host.handlers():
            handler.changed(guest.uuid)  # DEVICE_ADDED
        host.io_error(guest, "", ACTION_REPORT, path="")
        reread(host, guest, run, two_disks(guest))
        decided(run, guest)
        assert run.aliases() == {None}


def test_a_guest_that_is_listed_as_paused_is_not_said_to_be_so_by_the_disk_that_is_copied() -> None:
    host = SimulatedHost(1)
    guest = next(iter(host.guests.values()))
    guest.xml = two_disks(guest, "a")
    guest.state, guest.reason = PAUSED, PAUSED_IOERROR
    host.failures["state"] = 1.0
    with Run(host, {}) as run:
        until(lambda: host_knows(run, guest))
        guest.disk_errors = {"vdb": 1}
        until(lambda: run.aliases() == {None, "b"})
        assert sum(run.counts()) == 1
