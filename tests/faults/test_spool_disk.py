"""The spool on disks that are full, broken or read-only: real ones, so these tests need root (mount)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

import pytest

from tests.faults import disks
from tests.faults.disks import fill, sh
from tests.faults.spool_kit import HandClock, io_error, open_spool, records
from virtbus.errors import SpoolFull
from virtbus.model import Clock, Confirmed
from virtbus.seen import Moment
from virtbus.words import Phase

NOBODY = frozenset()

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="needs root: mounts a small tmpfs and a loop device"
)


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 4 MiB, mounted."""
    with disks.small_disk(tmp_path) as disk:
        yield disk.at


@pytest.fixture
def bad_disk(tmp_path):
    """(mount point, break it, mend it): see tests/faults/disks.py."""
    with disks.failing_disk(tmp_path) as disk:
        yield disk.at, disk.harm, disk.mend


def test_a_full_disk_refuses_the_commit_and_takes_it_as_soon_as_there_is_room(small_disk):
    spool = open_spool(small_disk / "state")
    before = spool.commit([io_error(1)])
    filler = fill(small_disk)
    refused = 0
    while refused < 3:  # what the log still had room for is taken
        try:
            before += spool.commit([io_error(1), io_error(2)], {"a": b"new"})
        except SpoolFull as error:
            refused += "the disk is full: make room" in str(error)
    stats = spool.stats()
    filler.unlink()
    after = spool.commit([io_error(3)], {"a": b"newer"})
    assert stats.committed_sequence == before[-1].sequence
    assert [stamp.sequence for stamp in before + after] == list(range(1, len(before) + 2))
    found = records(spool)
    assert {record.id for record in found} == {stamp.id for stamp in before + after}
    assert spool.states() == {"a": b"newer"}
    spool.close()


def test_a_full_disk_loses_no_settlement_and_sends_nothing_twice(small_disk):
    clock = HandClock()
    spool = open_spool(small_disk / "state", clock=clock)
    for _ in range(20):
        spool.commit([io_error(number) for number in range(30)])
    filler = fill(small_disk)
    sent: list[str] = []
    for _ in range(2000):
        batch = spool.take(10, NOBODY)
        sent += [record.id for record in batch]
        spool.settle([(record, Confirmed()) for record in batch])
        clock.pass_time(1.1)
        if not batch and not spool.stats().unsettled:
            break
    filler.unlink()
    while batch := spool.take(10, NOBODY) or spool.stats().unsettled:
        clock.pass_time(1.1)
        if isinstance(batch, list):
            sent += [record.id for record in batch]
            spool.settle([(record, Confirmed()) for record in batch])
    assert len(sent) == len(set(sent)) == 600
    spool.close()
    again = open_spool(small_disk / "state", clock=clock)
    assert again.stats().pending == 0
    again.close()


def test_a_start_on_a_full_disk_is_refused_and_touches_nothing(small_disk):
    spool = open_spool(small_disk / "state")
    spool.commit([io_error(1)])
    spool.close()
    filler = fill(small_disk)
    with pytest.raises(SpoolFull):
        open_spool(small_disk / "state")
    filler.unlink()
    after = open_spool(small_disk / "state")
    assert after.opening.damage is None
    assert len(records(after)) == 1
    after.close()


def test_a_disk_with_errors_refuses_commits_and_is_used_again_when_it_is_mended(bad_disk):
    disk, broken, mended = bad_disk
    clock = HandClock()
    spool = open_spool(disk / "state", clock=clock)
    stamps = spool.commit([io_error(1)])
    broken()
    errors: list[str] = []
    for _ in range(400):
        try:
            stamps += spool.commit([io_error(number, padding=3000) for number in range(10)])
        except SpoolFull as error:
            errors.append(str(error))
            if len(errors) == 5:
                break
    assert any("IOERR" in error and "check it" in error for error in errors), errors
    mended()
    limit, back = time.monotonic() + 60, None
    while back is None and time.monotonic() < limit:
        try:
            back = spool.commit([io_error(2)])
        except SpoolFull as error:
            errors.append(str(error))
            time.sleep(0.1)
    assert back is not None, errors[-1]
    assert back[0].sequence == stamps[-1].sequence + 1
    clock.pass_time(5)
    found = records(spool)
    spool.close()
    assert {record.id for record in found} == {stamp.id for stamp in stamps + back}


def test_a_read_only_disk_is_told_and_the_start_works_when_it_is_writable(small_disk):
    spool = open_spool(small_disk / "state")
    spool.commit([io_error(1, phase=Phase.UPDATED)])
    spool.close()
    sh("mount", "-o", "remount,ro", small_disk)
    with pytest.raises(SpoolFull, match="Read-only file system"):
        open_spool(small_disk / "state")
    sh("mount", "-o", "remount,rw", small_disk)
    after = open_spool(small_disk / "state")
    assert (after.opening.damage, len(records(after))) == (None, 1)
    after.close()


def test_a_disk_that_turned_read_only_refuses_commits_and_takes_them_when_it_is_writable(tmp_path):
    """A write to SQLite's mapped index would be a SIGBUS there: the process that lives on is the test."""
    with disks.read_only_files(tmp_path) as disk:
        clock = HandClock()
        spool = open_spool(disk.at / "state", clock=clock)
        stamps = spool.commit([io_error(1)])
        os.sync()  # from now on a write to a mapped page asks the file system again
        disk.harm()
        for _ in range(3):
            with pytest.raises(SpoolFull, match="read-only: remount it"):
                spool.commit([io_error(2)])
        assert spool.take(10, NOBODY) == []
        disk.mend()
        clock.pass_time(1.1)
        stamps += spool.commit([io_error(3)])
        assert {record.id for record in records(spool)} == {stamp.id for stamp in stamps}
        spool.close()


def test_closing_on_a_disk_that_the_kernel_turned_read_only_ends_quietly(tmp_path):
    with disks.read_only_disk(tmp_path) as disk:
        ended = subprocess.run(
            [sys.executable, "-c", CLOSE_ON_READ_ONLY, str(disk.at)], check=False, capture_output=True
        )
        assert (ended.returncode, ended.stdout.splitlines()[-1]) == (0, b"closed"), ended.stderr
        disk.mend()
        again = open_spool(disk.at / "state")
        assert len(records(again)) == 20
        again.close()


CLOSE_ON_READ_ONLY = """
import os, subprocess, sys
from pathlib import Path
from tests.faults.spool_kit import io_error, open_spool
spool = open_spool(Path(sys.argv[1]) / "state")
spool.commit([io_error(number) for number in range(20)])
os.sync()
subprocess.run(["mount", "-o", "remount,abort", sys.argv[1]], check=True)
spool.close()
print("closed")
"""


def test_a_disk_that_was_replaced_under_the_spool_is_left_to_the_next_agent(small_disk, tmp_path):
    """As after a lazy unmount and a mount of a copy: whoever locks the new folder must be its only writer."""
    spool = open_spool(small_disk / "state")
    stamps = spool.commit([io_error(1)])
    away = tmp_path / "away"
    shutil.copytree(small_disk / "state", away)
    sh("umount", "-l", small_disk)
    shutil.copytree(away, small_disk / "state")
    with pytest.raises(SpoolFull, match="stop this agent, see that no other one uses the folder"):
        spool.commit([io_error(2)])
    assert not spool.alive(Moment.of(Clock()()))
    second = open_spool(small_disk / "state")
    stamps += second.commit([io_error(3)])
    with pytest.raises(SpoolFull, match="another"):
        spool.commit([io_error(2)])
    spool.close()
    found = records(second)
    second.close()
    assert {record.id for record in found} == {stamp.id for stamp in stamps}
    sh("mount", "-t", "tmpfs", "-o", "size=4m", "virtbus-test", small_disk)
