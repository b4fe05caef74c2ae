"""Whose an error may have been that libvirt reports without its device: never guessed, also not later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest

from tests.sources.simulated import Guest, SimulatedHost
from tests.sources.test_late_looks import Run, host_knows
from tests.waiting import wait_until
from virtbus.model import IoError
from virtbus.sources.link import ACTION_REPORT, PAUSED, PAUSED_IOERROR


def two_disks(guest: Guest) -> str:
    """The guest's XML with two disks: a (vda) and b (vdb)."""
    disks = "".join(
        f"<disk type='file' device='disk'><source file='/img/{alias}'/><target dev='vd{alias}'/>"
        f"<alias name='{alias}'/></disk>"
        for alias in ("a", "b")
    )
    head = f"<domain id='1'><name>{guest.name}</name><uuid>{guest.uuid}</uuid>"
    return f"{head}<devices>{disks}</devices></domain>"


@contextmanager
def copying(*targets: str, fresh: float = 0.0) -> Iterator[tuple[SimulatedHost, Guest, Run]]:
    """A guest whose description is known, and is `fresh` for so many seconds; these disks are copied."""
    host = SimulatedHost(1)
    guest = next(iter(host.guests.values()))
    guest.xml, guest.jobs = two_disks(guest), set(targets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("virtbus.sources.descriptions.FRESH_SECONDS", fresh)
        patch.setattr("virtbus.sources.nameless.FRESH_SECONDS", fresh)
        with Run(host, {}) as run:
            wait_until(lambda: host_knows(run, guest))
            yield host, guest, run


def end(host: SimulatedHost, guest: Guest, target: str, *, failed: bool) -> None:
    """A copy ends."""
    guest.jobs = guest.jobs - {target}
    for handler in host.handlers():
        handler.job_ended(guest.uuid, target, failed=failed)
        handler.changed(guest.uuid)


def fail(host: SimulatedHost, guest: Guest) -> None:
    """An error's event without a name, and without a pause."""
    host.io_error(guest, "", ACTION_REPORT, path="")


def decided(run: Run, guest: Guest) -> None:
    """Until what was reported without a name has one, or will never get one."""
    wait_until(lambda: not run.observer.check._cases[guest.uuid].has_nameless())


def test_the_disk_whose_copy_goes_on_is_not_blamed_for_the_error_of_the_one_whose_copy_ended() -> None:
    with copying("vda", "vdb") as (host, guest, run):
        host.failures["xml"] = 1.0  # the description that follows the error is late
        fail(host, guest)
        end(host, guest, "vda", failed=True)
        decided(run, guest)
        assert run.aliases() == {None}
        assert run.counts() == [1]


def test_the_disk_that_is_known_to_be_copied_is_not_blamed_for_one_whose_job_began_since() -> None:
    """Nothing says that a copy or a backup begins."""
    with copying("vda") as (host, guest, run):
        fail(host, guest)
        wait_until(lambda: run.aliases() == {None, "a"})
        guest.jobs = {"vda", "vdb"}
        fail(host, guest)
        wait_until(lambda: sum(run.counts()) == 2)
        decided(run, guest)
        told = [
            (event.device.alias, event.occurrences.count)
            for event in run.events
            if isinstance(event, IoError)
        ]
        assert told[-1] == (None, 1)


def test_the_disk_whose_copy_was_pivoted_before_the_description_is_named() -> None:
    with copying("vda") as (host, guest, run):
        host.failures["xml"] = 1.0
        fail(host, guest)
        guest.xml = guest.xml.replace("/img/a", "/img/copy")
        end(host, guest, "vda", failed=False)
        wait_until(lambda: run.aliases() == {None, "a"})
        assert sum(run.counts()) == 1


def test_further_errors_of_a_copied_disk_are_of_one_incident_however_old_its_description_is() -> None:
    with copying("vda") as (host, guest, run):
        fail(host, guest)
        wait_until(lambda: run.aliases() == {None, "a"})
        for _ in range(3):
            fail(host, guest)
        wait_until(lambda: sum(run.counts()) == 4)
        assert len({event.incident.id for event in run.events if isinstance(event, IoError)}) == 1


@pytest.mark.parametrize("failures", [1.0, float("inf")], ids=["once", "always"])
def test_where_nobody_says_which_disks_have_a_job_none_is_blamed(failures: float) -> None:
    with copying("vda", fresh=60.0) as (host, guest, run):
        host.failures["has_job"] = failures
        fail(host, guest)
        wait_until(lambda: "has_job" not in host.failures or host.failures["has_job"] in (0.0, float("inf")))
        fail(host, guest)
        wait_until(lambda: sum(run.counts()) == 2)
        decided(run, guest)
        assert run.aliases() == {None}
        assert len({event.incident.id for event in run.events if isinstance(event, IoError)}) == 1


def test_a_storm_of_what_nobody_can_name_is_not_looked_at_each_time() -> None:
    with copying("vda", "vdb", fresh=3600.0) as (host, guest, run):
        fail(host, guest)
        decided(run, guest)
        calls: list[str] = []
        call = host.call
        with mock.patch.object(host, "call", lambda uuid: calls.append(uuid) or call(uuid)):
            for _ in range(1000):
                fail(host, guest)
            wait_until(lambda: sum(run.counts()) == 1001)
        assert run.aliases() == {None}
        assert len(calls) < 50


def test_a_disk_that_was_plugged_in_may_be_the_one_that_an_error_does_not_name() -> None:
    host = SimulatedHost(1)
    guest = next(iter(host.guests.values()))
    with Run(host, {}) as run:
        wait_until(lambda: host_knows(run, guest))
        host.failures["xml"] = 1.0
        guest.xml = two_disks(guest)
        for handler in host.handlers():
            handler.changed(guest.uuid)  # DEVICE_ADDED
        fail(host, guest)
        decided(run, guest)
        assert run.aliases() == {None}


def test_a_guest_that_is_listed_as_paused_is_not_said_to_be_so_by_the_disk_that_is_copied() -> None:
    host = SimulatedHost(1)
    guest = next(iter(host.guests.values()))
    guest.xml, guest.jobs = two_disks(guest), {"vda"}
    guest.state, guest.reason = PAUSED, PAUSED_IOERROR
    host.failures["state"] = 1.0
    with Run(host, {}) as run:
        wait_until(lambda: host_knows(run, guest))
        guest.disk_errors = {"vdb": 1}
        wait_until(lambda: run.aliases() == {None, "b"})
        assert sum(run.counts()) == 1
