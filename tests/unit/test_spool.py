"""The spool's promises, one by one, on real files."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from tests.faults.spool_kit import (
    AGENT,
    START_NS,
    Book,
    HandClock,
    crash,
    domain_uuid,
    gap,
    gaps_of,
    invalid,
    io_error,
    open_spool,
    ranges_of,
    records,
    resolved,
)
from virtbus.errors import BusUnavailable, ConfigError, RecordRefused, SpoolBusy, SpoolCorrupt, SpoolFull
from virtbus.model import Confirmed, Deferred, IoError, Refused, SequenceRange, Unroutable, to_datetime
from virtbus.seen import Moment
from virtbus.spool import SpoolLimits, faults, files, mirror, opening, requests, settling
from virtbus.telemetry import METRICS
from virtbus.words import Origin, Phase

NOBODY = frozenset()
UPDATED = Phase.UPDATED
OLDER = "019b76da-a800-7000-8000-000000000001"  # an epoch of long ago


@pytest.fixture
def clock():
    return HandClock()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def spool(folder, clock):
    spool = open_spool(folder, clock=clock)
    yield spool
    spool.close()


# ------------------------------------------------------------------------------- folder and lock


def test_folder_and_files_are_private_whatever_the_umask_is(folder):
    before = os.umask(0)
    try:
        spool = open_spool(folder)
        spool.commit([io_error()])
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    spool.close()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert set(modes.values()) == {0o600}
    assert {"spool.db", "lock"} <= modes.keys()


def test_a_second_process_is_told_who_holds_the_spool(spool, folder):
    code = (
        "import sys; from tests.faults.spool_kit import open_spool; from pathlib import Path\n"
        "from virtbus.errors import SpoolBusy\n"
        "try: open_spool(Path(sys.argv[1]))\n"
        "except SpoolBusy as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert f"process {os.getpid()} (" in said.stdout
    assert "pytest" in said.stdout


def test_a_failed_second_start_leaves_the_holder_in_the_lock_file(spool, folder):
    with pytest.raises(SpoolBusy):
        open_spool(folder)
    assert files.read_holder(folder).pid == os.getpid()


def test_a_look_at_who_holds_the_spool_keeps_no_agent_from_starting(folder, monkeypatch):
    folder.mkdir()
    (folder / files.LOCK).touch()
    look = os.open(folder / files.LOCK, os.O_RDONLY)
    fcntl.flock(look, fcntl.LOCK_SH)  # as doctor and `spool status` do, for a moment
    sleeps = []
    over = SimpleNamespace(sleep=lambda seconds: sleeps.append(seconds) or os.close(look))
    monkeypatch.setattr(files, "time", over)
    open_spool(folder).close()
    assert len(sleeps) == 1


def test_a_folder_that_can_not_be_made_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"state_dir .*file/state can't be made: Not a directory"):
        open_spool(tmp_path / "file" / "state")


# --------------------------------------------------------------------------- ids, sequences, epochs


def test_sequences_count_from_one_in_each_epoch(folder, clock):
    first = open_spool(folder, clock=clock)
    stamps = first.commit([io_error(1), io_error(2)]) + first.commit([io_error(1)])
    first.close()
    second = open_spool(folder, clock=clock)
    more = second.commit([io_error(1)])
    second.close()
    assert [stamp.sequence for stamp in stamps + more] == [1, 2, 3, 1]
    assert first.epoch != second.epoch
    assert {stamp.epoch for stamp in stamps} == {first.epoch}


def test_a_record_is_what_was_stamped_and_keeps_it_over_a_restart(folder, clock):
    spool = open_spool(folder, clock=clock)
    (stamp,) = spool.commit([io_error(7)])
    (before,) = spool.take(10, NOBODY)
    spool.close()
    spool = open_spool(folder, clock=clock)
    (after,) = spool.take(10, NOBODY)
    spool.close()
    assert after == before
    assert (after.id, after.epoch, after.seq, after.key) == (stamp.id, stamp.epoch, 1, domain_uuid(7))
    assert after.attributes["sequence"] == "000000000001"
    assert json.loads(after.body)["domain"]["name"] == "guest-7"


def test_a_clock_that_jumps_back_an_hour_repeats_no_id_and_no_sequence(spool, clock):
    stamps = spool.commit([io_error(1)])
    clock.jump(-3600)
    stamps += spool.commit([io_error(1)])
    clock.jump(7200)
    stamps += spool.commit([io_error(1)])
    assert [stamp.sequence for stamp in stamps] == [1, 2, 3]
    assert len({stamp.id for stamp in stamps}) == 3
    assert sorted(stamp.id for stamp in stamps) == [stamp.id for stamp in stamps]


def test_ages_are_measured_and_not_read_off_the_wall(spool, clock):
    spool.commit([io_error(1)])
    clock.pass_time(10)
    clock.jump(3600)
    assert spool.stats().oldest_seconds == pytest.approx(10)
    clock.jump(-7200)
    assert spool.stats().oldest_seconds == pytest.approx(10)


def test_a_heartbeat_is_never_spooled(spool):
    from virtbus.model import Heartbeat

    with pytest.raises(TypeError, match="never spooled"):
        spool.commit([Heartbeat.__new__(Heartbeat)])
    assert spool.stats().committed_sequence == 0


# ----------------------------------------------------------------------------------- incident states


def test_states_and_events_are_one_transaction(folder, clock, monkeypatch):
    spool = open_spool(folder, clock=clock)
    spool.commit([io_error(1)], {"a": b"1", "b": b"2"})

    def killed(point):
        if point == "before_commit":
            raise RuntimeError(point)

    monkeypatch.setattr(faults, "hook", killed)
    with pytest.raises(RuntimeError):
        spool.commit([io_error(2)], {"a": b"changed", "b": None})
    monkeypatch.undo()
    assert spool.states() == {"a": b"1", "b": b"2"}
    assert spool.stats().committed_sequence == spool.stats().pending == 1
    spool.commit([io_error(2)], {"a": b"changed", "b": None})
    spool.close()
    spool = open_spool(folder, clock=clock)
    assert spool.states() == {"a": b"changed"}
    assert spool.stats().pending == 2
    spool.close()


# ------------------------------------------------------------------------------- taking and settling


def test_at_most_one_record_of_a_key_is_out_and_the_oldest_keys_come_first(spool):
    spool.commit([io_error(1), io_error(2), io_error(1), io_error(3)])
    taken = spool.take(2, NOBODY)
    assert [record.seq for record in taken] == [1, 2]
    assert [record.seq for record in spool.take(10, NOBODY)] == [4]
    spool.settle([(taken[0], Confirmed())])
    assert [record.seq for record in spool.take(10, NOBODY)] == [3]


def test_a_key_that_is_busy_is_passed_over(spool):
    spool.commit([io_error(1), io_error(2)])
    assert [record.seq for record in spool.take(10, {domain_uuid(1)})] == [2]
    assert [record.seq for record in spool.take(10, NOBODY)] == [1]


def test_a_deferred_record_comes_again_before_what_follows_in_its_key(spool):
    spool.commit([io_error(1), io_error(1)])
    (first,) = spool.take(10, NOBODY)
    spool.settle([(first, Deferred(OSError("cut")))])
    (again,) = spool.take(10, NOBODY)
    assert (again.id, again.attempts) == (first.id, 1)


def test_an_unroutable_key_waits_twice_as_long_each_time_and_the_others_go_on(spool, clock):
    spool.commit([io_error(1), io_error(2)])
    waits = []
    for _ in range(8):
        (record,) = [each for each in spool.take(10, NOBODY) if each.key == domain_uuid(1)]
        spool.settle([(record, Unroutable())])
        waited = 0
        while not spool.take(10, {domain_uuid(2)}) and waited < 100:
            clock.pass_time(1)
            waited += 1
        spool.settle([(record, Deferred(OSError("give it back")))])
        waits.append(waited)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]


def test_one_confirmed_key_after_a_wait_lets_all_parked_keys_try_at_once(spool, clock):
    spool.commit([io_error(number) for number in range(5)])
    for _ in range(4):
        spool.settle([(record, Unroutable()) for record in spool.take(10, NOBODY)])
        clock.pass_time(8)
    taken = spool.take(10, NOBODY)
    assert len(taken) == 5
    spool.settle([(record, Unroutable()) for record in taken])
    clock.pass_time(15.9)
    assert spool.take(10, NOBODY) == []
    clock.pass_time(0.2)
    first = spool.take(1, NOBODY)
    spool.settle([(record, Unroutable()) for record in spool.take(10, NOBODY)])
    assert spool.stats().parked_keys == 4
    spool.settle([(first[0], Confirmed())])
    assert len(spool.take(10, NOBODY)) == 4


def test_what_was_in_flight_at_a_kill_is_pending_again(folder, tmp_path, clock):
    spool = open_spool(folder, clock=clock)
    spool.commit([io_error(1), io_error(2)])
    out = spool.take(10, NOBODY)
    after = open_spool(crash(folder, tmp_path / "after"), clock=clock)
    assert after.take(10, NOBODY) == out
    spool.close()
    after.close()


def test_wait_returns_when_something_is_committed(spool):
    stop = threading.Event()
    threading.Timer(0.2, lambda: spool.commit([io_error()])).start()
    # The hand-held clock stands still: only the commit can have ended the wait.
    assert spool.wait(20.0, stop)


def test_a_commit_wakes_who_waits_only_where_there_is_something_to_take(spool, monkeypatch):
    woken = Mock()
    monkeypatch.setattr(spool._mirror.changed, "notify_all", woken)
    spool.commit([], {"incident/guest/disk": b"counted"})
    assert not woken.called
    spool.commit([io_error()])
    assert woken.called


def test_wait_ends_when_stop_is_set_and_it_is_woken(spool):
    stop = threading.Event()

    def end() -> None:
        stop.set()
        spool.wake()

    threading.Timer(0.1, end).start()
    assert not spool.wait(20.0, stop)


def test_the_confirmed_sequence_is_the_end_of_the_unbroken_front(spool):
    spool.commit([io_error(number) for number in range(4)])
    one, two, three, _ = spool.take(10, NOBODY)
    spool.settle([(one, Confirmed()), (three, Confirmed())])
    assert spool.stats().confirmed_sequence == 1
    spool.settle([(two, Confirmed())])
    assert spool.stats().confirmed_sequence == 3


def test_settling_waits_in_memory_while_a_commit_hangs_and_taking_does_not_wait(spool):
    spool.commit([io_error(1), io_error(2)])
    one, two = spool.take(10, NOBODY)
    with spool._mirror.writing:  # as a commit whose fsync hangs: to wait for it would be for ever
        spool.settle([(one, Confirmed())])
        assert spool.stats().unsettled == 1
        assert spool.take(10, NOBODY) == []
    spool.settle([(two, Confirmed())])
    assert (spool.stats().unsettled, spool.stats().pending) == (0, 0)


def test_closing_does_not_wait_for_a_commit_that_hangs_and_keeps_the_lock(folder, monkeypatch):
    spool = open_spool(folder)
    spool.commit([io_error(1)])
    reached, disk_is_back = threading.Event(), threading.Event()

    def hang(point):
        if point == "before_commit":
            reached.set()
            assert disk_is_back.wait(30)

    monkeypatch.setattr(faults, "hook", hang)
    hung = threading.Thread(target=spool.commit, args=([io_error(2)],))
    hung.start()
    assert reached.wait(10)
    spool.close()
    assert hung.is_alive()  # it was not waited for
    with pytest.raises(SpoolBusy):
        open_spool(folder)
    disk_is_back.set()
    hung.join()
    monkeypatch.undo()
    spool._lock_file.close()  # as the end of the process does
    after = open_spool(folder)
    found = records(after)
    after.close()
    spool._committer._file.db.close()
    assert [(each.epoch, each.seq) for each in found] == [(spool.epoch, 1), (spool.epoch, 2)]


def test_nothing_more_is_taken_while_too_much_is_unsettled(spool, monkeypatch):
    monkeypatch.setattr(settling, "MAX_UNSETTLED", 2)
    spool.commit([io_error(number) for number in range(3)])
    taken = spool.take(2, NOBODY)
    with spool._mirror.writing:
        spool.settle([(record, Confirmed()) for record in taken])
        assert spool.take(10, NOBODY) == []
    assert len(spool.take(10, NOBODY)) == 1


def test_what_is_with_the_publisher_counts_while_the_disk_does_not_take_what_is_settled(spool, monkeypatch):
    monkeypatch.setattr(settling, "MAX_UNSETTLED", 4)
    spool.commit([io_error(number) for number in range(10)])
    taken = spool.take(6, NOBODY)
    assert len(taken) == 6, "a larger window is the bus's own matter"
    with spool._mirror.writing:
        spool.settle([(record, Confirmed()) for record in taken[:4]])
        assert spool.take(10, NOBODY) == []
        spool.give_back(BusUnavailable("gone"))
    taken = spool.take(2, NOBODY)
    with spool._mirror.writing:
        spool.settle([(taken[0], Confirmed())])
        assert (spool.stats().unsettled, len(spool.take(10, NOBODY))) == (1, 2)


# ------------------------------------------------------------------------------------- dead letters


def test_an_invalid_event_keeps_its_sequence_and_a_gap_event_names_it(spool):
    stamps = spool.commit([io_error(1), invalid(), io_error(2)])
    assert [stamp.sequence for stamp in stamps] == [1, 2, 3]
    found = records(spool)
    assert [record.seq for record in found] == [1, 3, 4]
    (data,) = gaps_of(found)
    assert data["reason"] == "dead_letter"
    assert ranges_of(data) == [(spool.epoch, 2, 2)]
    assert (data["missing_events"], data["missing_occurrences"]) == (1, 1)
    assert "action_code" in data["detail"]
    assert spool.stats().dead == 1


def test_gap_events_of_the_spools_own_are_counted_when_they_are_committed(spool, monkeypatch):
    def count():
        value = METRICS.registry.get_sample_value
        by_reason = value("virtbus_gaps_total", {"reason": "dead_letter"}) or 0
        return by_reason, value("virtbus_events_total", {"type": "gap", "origin": "", "phase": ""}) or 0

    def refuse(point):
        if point == "before_commit":
            raise sqlite3.OperationalError("disk I/O error")

    before = count()
    monkeypatch.setattr(faults, "hook", refuse)
    with pytest.raises(SpoolFull):
        spool.commit([invalid()])
    assert count() == before
    monkeypatch.undo()
    spool.commit([invalid(), gap()])
    assert count() == (before[0] + 1, before[1] + 1)


def test_a_refused_event_is_named_by_the_next_commit_also_after_a_kill(folder, tmp_path, clock):
    spool = open_spool(folder, clock=clock)
    spool.commit([io_error(1, count=5), io_error(2)])
    one, two = spool.take(10, NOBODY)
    spool.settle([(one, Refused(ValueError("too large"))), (two, Confirmed())])
    assert (spool.stats().pending, spool.stats().dead, spool.stats().unnamed) == (0, 1, 1)
    after = open_spool(crash(folder, tmp_path / "after"), clock=clock)
    after.commit([gap()])
    start, named = gaps_of(records(after))
    assert start["reason"] == "agent_down"
    assert (named["reason"], named["detail"], named["missing_occurrences"]) == ("dead_letter", "too large", 5)
    assert ranges_of(named) == [(spool.epoch, 1, 1)]
    spool.close()
    after.close()


def test_a_loss_that_the_callers_own_gap_event_names_is_not_named_twice(spool):
    spool.commit([io_error(1)])
    (record,) = spool.take(10, NOBODY)
    spool.settle([(record, Refused(ValueError("no")))])
    (loss,) = spool._mirror.losses.values()
    spool.commit([gap("dead_letter", missing=loss.ranges, occurrences=loss.occurrences)])
    assert len(gaps_of(records(spool))) == 1
    assert spool.stats().unnamed == 0


def test_alive_names_a_loss_when_nothing_else_is_committed(spool, clock):
    spool.commit([io_error(1)])
    (record,) = spool.take(10, NOBODY)
    spool.settle([(record, Refused(ValueError("no")))])
    assert spool.alive(Moment.of(clock()))
    assert [data["reason"] for data in gaps_of(records(spool))] == ["dead_letter"]


def test_a_refused_gap_event_is_parked_and_keeps_what_it_names(spool, clock):
    spool.commit([gap()])
    (record,) = spool.take(10, NOBODY)
    spool.settle([(record, Refused(ValueError("no")))])
    assert (spool.stats().dead, spool.stats().parked_keys) == (0, 1)
    clock.pass_time(2)
    assert spool.take(10, NOBODY)[0].id == record.id


# ------------------------------------------------------------------------------------------ fullness


def small(spools):
    return SpoolLimits(max_bytes=spools * 2048)


def test_the_line_of_a_refused_gap_event_names_it(spool, monkeypatch):
    told = []
    monkeypatch.setattr("virtbus.spool.settling.emit", told.append)
    spool.commit([gap()])
    (record,) = spool.take(1, NOBODY)
    spool.settle([(record, Refused(ValueError("no")))])
    assert [line.event_id for line in told] == [record.id]


def test_updates_give_way_first_then_resolutions_then_openings_and_gaps_never(folder, clock):
    spool = open_spool(folder, limits=small(8), clock=clock)
    spool.commit([gap(), io_error(1), resolved(1), io_error(2, phase=UPDATED, count=4)])
    gone: list[int] = []
    for _ in range(20):
        spool.commit([gap("source_lost")])
        now = {record.seq for record in peek(spool)}
        gone += [seq for seq in (4, 3, 2, 1) if seq not in now and seq not in gone]
    spool.close()
    assert gone[:3] == [4, 3, 2]
    assert spool_bytes(spool) <= 8 * 2048 + 4096


def peek(spool):
    db = sqlite3.connect(spool.path)
    rows = db.execute("SELECT seq, class, epoch FROM events ORDER BY position").fetchall()
    db.close()
    return [type("Row", (), {"seq": seq, "rank": rank, "epoch": epoch}) for seq, rank, epoch in rows]


def spool_bytes(spool):
    return spool.stats().bytes


def test_every_counted_error_is_published_or_counted_as_missing(folder, clock):
    spool = open_spool(folder, limits=small(20), clock=clock)
    committed = 0
    for number in range(200):
        events = [io_error(number % 5, phase=UPDATED if number % 3 else Phase.OPENED, count=number)]
        events += [io_error(9, origin=Origin.RECONCILE)] if number % 10 == 0 else []
        spool.commit(events)
        committed += number
    found = records(spool)
    published = sum(
        json.loads(record.body)["occurrences"]["count"]
        for record in found
        if record.attributes["type"].endswith("io_error.v1") and json.loads(record.body)["origin"] == "event"
    )
    missing = sum(data["missing_occurrences"] for data in gaps_of(found))
    spool.close()
    assert 0 < published < committed
    assert published + missing == committed


def test_every_sequence_that_gave_way_is_named_and_nothing_else(folder, clock):
    spool, book = open_spool(folder, limits=small(20), clock=clock), Book()
    for number in range(300):
        book.promise(spool.commit([io_error(number % 5, phase=UPDATED if number % 2 else Phase.OPENED)]))
    for record in records(spool):
        book.went_out(record)
        book.arrived(record)
    last = spool.stats().committed_sequence
    confirmed = {(record_epoch, seq) for record_epoch, seq, _ in book.sent.values()}
    spool.close()
    assert book.unaccounted() == []
    assert not book.named & confirmed
    assert len(confirmed) + len(book.named) == last


def test_a_record_in_flight_never_gives_way(folder, clock):
    spool = open_spool(folder, limits=small(6), clock=clock)
    spool.commit([io_error(1, phase=UPDATED)])
    (record,) = spool.take(1, NOBODY)
    for _ in range(20):
        spool.commit([io_error(2, phase=UPDATED)])
    assert record.seq in {row.seq for row in peek(spool)}
    spool.close()


def test_a_spool_full_of_gap_events_merges_them_and_stays_bounded(folder, clock):
    spool, book = open_spool(folder, limits=small(40), clock=clock), Book()
    for number in range(400):
        book.promise(
            spool.commit([gap(occurrences=1, missing=(SequenceRange(OLDER, number + 1, number + 1),))])
        )
    assert spool.stats().bytes <= 45 * 2048
    found = records(spool)
    for record in found:
        book.arrived(record)
    spool.close()
    assert book.unaccounted() == []
    assert {(OLDER, number + 1) for number in range(400)} <= book.named
    assert sum(data["missing_occurrences"] for data in gaps_of(found)) == 400


def test_a_gap_event_that_can_not_hold_all_ranges_gets_company(spool):
    missing = tuple(SequenceRange(OLDER, 2 * number, 2 * number) for number in range(1, 1001))
    spool.commit([gap("spool_damaged", missing=missing)])
    found = records(spool)
    assert all(len(record.body) < 58_000 and "truncated" in str(record.body) for record in found)
    named = [item for data in gaps_of(found) for item in ranges_of(data)]
    assert sorted(named) == [(OLDER, item.first, item.last) for item in missing]
    assert sum(data["missing_events"] for data in gaps_of(found)) == 1000


def test_an_age_limit_counts_time_that_passed_and_not_what_a_clock_says(folder, clock):
    limits = SpoolLimits(max_bytes=64 << 20, max_age_seconds=100)
    spool = open_spool(folder, limits=limits, clock=clock)
    spool.commit([io_error(1, count=3)])
    clock.jump(86_400)
    spool.commit([io_error(2)])
    assert spool.stats().pending == 2
    clock.pass_time(101)
    spool.commit([io_error(3)])
    found = records(spool)
    (data,) = gaps_of(found)
    spool.close()
    assert (data["reason"], data["missing_occurrences"]) == ("spool_expired", 4)
    assert ranges_of(data) == [(spool.epoch, 1, 2)]


# -------------------------------------------------------------------------------------- what was found


def test_a_first_start_finds_nothing_before_it(spool):
    assert spool.opening.fresh
    assert (spool.opening.previous, spool.opening.damage, spool.opening.missing) == (None, None, ())


def test_a_restart_tells_the_last_run_and_its_last_sign_of_life(folder, clock):
    first = open_spool(folder, clock=clock)
    first.commit([io_error(1), io_error(2)])
    clock.pass_time(12)
    first.alive(Moment.of(clock()))
    alive = clock.wall_ns
    first.close()
    clock.pass_time(500)
    open_spool(folder, clock=clock).close()  # a run that committed nothing has nothing to answer for
    second = open_spool(folder, clock=clock)
    second.close()
    assert not second.opening.fresh
    assert second.opening.previous == type(second.opening.previous)(first.epoch, 2)
    assert second.opening.last_alive_ns == alive


@pytest.mark.parametrize("restarts", [1, 2])
def test_a_clock_that_was_set_forward_in_a_gap_hides_no_stamp_from_before(
    folder, clock, monkeypatch, restarts
):
    monkeypatch.setattr("virtbus.spool.opening.boot_id", lambda: "one")
    first = open_spool(folder, clock=clock)
    first.commit([io_error(1)])
    through = Moment.of(clock())
    first.alive(through)
    seen = clock.wall_ns
    clock.pass_time(60)
    clock.jump(3600)
    first.alive(through)  # nothing new was seen since
    first.close()
    for _ in range(restarts):
        again = open_spool(folder, clock=clock)
        # The source's own stamp of the same moment, by a clock read a moment later: microseconds off.
        again.commit([io_error(1)])
        opened = Moment.stamped(again.opening.last_alive_ns, clock())
        again.alive(opened._replace(booted_ns=opened.booted_ns - 1000))
        again.close()
        assert again.opening.last_alive_ns == seen + 3600 * 10**9
        assert again.opening.stamps_since_ns == seen
    again = open_spool(folder, clock=clock)
    again.commit([io_error(2)])
    again.alive(Moment.of(clock()))
    again.close()
    last = open_spool(folder, clock=clock)
    last.close()
    assert last.opening.stamps_since_ns == clock.wall_ns


@pytest.mark.parametrize(("step", "off", "placed"), [(0, 60, True), (3600, 60, True), (-3600, 60, False)])
def test_a_clock_that_was_set_back_over_a_reboot_can_not_tell_the_last_sign_of_life(
    folder, clock, monkeypatch, step, off, placed
):
    monkeypatch.setattr("virtbus.spool.opening.boot_id", lambda: "one")
    first = open_spool(folder, clock=clock)
    first.commit([io_error(1)])
    first.alive(Moment.of(clock()))
    alive = clock.wall_ns
    first.close()
    monkeypatch.setattr("virtbus.spool.opening.boot_id", lambda: "two")
    clock.pass_time(off)
    clock.jump(step)
    clock.monotonic = 5.0  # since the boot
    second = open_spool(folder, clock=clock)
    second.close()
    assert second.opening.placed is placed
    assert second.opening.last_alive_ns == min(alive, clock.wall_ns - 5 * 10**9)


def test_the_last_sign_of_life_is_when_observing_ended_and_not_when_the_drain_did(folder, clock):
    first = open_spool(folder, clock=clock)
    first.commit([io_error(1)])
    clock.pass_time(3)
    first.alive(Moment.of(clock()))
    ended = clock.wall_ns
    clock.pass_time(30)  # the drain, with a broker that is away
    first.close()
    second = open_spool(folder, clock=clock)
    second.close()
    assert second.opening.last_alive_ns == ended


def test_no_sign_of_life_goes_past_a_commit_that_failed(folder, clock, monkeypatch):
    first = open_spool(folder, clock=clock)
    first.commit([io_error(1)])
    safe = clock.wall_ns
    clock.pass_time(3)

    def refuse(point):
        if point == "before_commit":
            raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(faults, "hook", refuse)
    with pytest.raises(SpoolFull):
        first.commit([io_error(2)])
    monkeypatch.undo()
    clock.pass_time(20)
    first.alive(Moment.of(clock()))  # the caller ends with what it could not commit
    first.close()
    second = open_spool(folder, clock=clock)
    second.close()
    assert second.opening.last_alive_ns == safe


def test_a_spool_that_was_removed_is_not_taken_for_a_first_start(folder, clock):
    spool = open_spool(folder, clock=clock)
    spool.commit([io_error(1)])
    spool.close()
    spool.path.unlink()
    after = open_spool(folder, clock=clock)
    after.close()
    assert not after.opening.fresh
    assert "gone" in after.opening.damage
    assert after.opening.previous.epoch == spool.epoch


def test_a_run_that_the_file_does_not_know_any_more_is_told(folder, tmp_path, clock):
    spool = open_spool(folder, clock=clock)
    spool.commit([io_error(1)])
    spool.close()
    after = open_spool(folder, clock=clock)
    after.commit([io_error(2)])
    lost = crash(folder, tmp_path / "lost")
    (lost / "spool.db-wal").unlink()  # as SQLite does with a log whose first frame is damaged
    found = open_spool(lost, clock=clock)
    found.close()
    after.close()
    assert after.epoch in found.opening.damage
    assert (found.opening.previous.epoch, found.opening.previous.last_sequence) == (after.epoch, 0)


def test_a_flipped_bit_in_a_body_is_found_at_the_start_and_the_rest_is_rescued(folder, clock):
    spool = open_spool(folder, clock=clock)
    spool.commit([io_error(number) for number in range(10)])
    spool.close()
    data = bytearray(spool.path.read_bytes())
    at = data.index(b'"name":"guest-4"')
    data[at + 9] ^= 1
    spool.path.write_bytes(data)
    with closing(sqlite3.connect(spool.path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    after = open_spool(folder, clock=clock)
    opening = after.opening
    after.commit([gap(missing=opening.missing)])
    found = records(after)
    after.close()
    assert opening.missing == (SequenceRange(spool.epoch, 5, 5),)
    assert opening.rescued == 9
    assert opening.set_aside is not None
    assert opening.set_aside.read_bytes()[at + 9] == data[at + 9]
    assert [record.seq for record in found if record.epoch == spool.epoch] == [1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert ranges_of(gaps_of(found)[0]) == [(spool.epoch, 5, 5)]


def the_first_of_two_is_named(spool):
    found = records(spool)
    spool.commit(())
    found += records(spool)
    assert [record.seq for record in found] == [2, 3]
    (data,) = gaps_of(found)
    assert (data["reason"], ranges_of(data)) == ("spool_damaged", [(spool.epoch, 1, 1)])


def test_a_row_that_rots_while_the_agent_runs_is_never_taken_and_is_named(spool, clock):
    spool.commit([io_error(1), io_error(2)])
    db = sqlite3.connect(spool.path)
    db.execute("UPDATE events SET body = replace(body, 'guest-1', 'guest-7') WHERE seq = 1")
    db.commit()
    db.close()
    the_first_of_two_is_named(spool)
    assert spool.stats().dead == 1


def test_a_gap_event_that_rots_is_named_with_all_that_it_named(spool):
    spool.commit([invalid()])
    db = sqlite3.connect(spool.path)
    db.execute("UPDATE events SET body = x'00' WHERE class = 3")
    db.commit()
    db.close()
    assert records(spool) == []
    spool.commit(())
    (data,) = gaps_of(records(spool))
    assert ranges_of(data) == [(spool.epoch, 1, 2)]


def rot(spool, where, column="names", value="x'01' || substr(names, 2)"):
    """Change rows as a flipped bit does: under the checksum, unseen by SQLite."""
    with closing(sqlite3.connect(spool.path)) as db:
        assert db.execute(f"UPDATE events SET {column} = {value} WHERE {where}").rowcount > 0
        db.commit()


def test_a_refusal_in_words_that_are_no_unicode_is_settled(spool):
    spool.commit([io_error(1), io_error(2)])
    (first, second) = spool.take(10, NOBODY)
    spool.settle([(first, Refused(RecordRefused("no \udcff way"))), (second, Confirmed())])
    assert (spool.stats().dead, spool.stats().pending, spool.stats().unsettled) == (1, 0, 0)


def test_a_fault_while_reading_gives_back_what_was_chosen(spool, monkeypatch):
    spool.commit([io_error(1), io_error(2)])
    with monkeypatch.context() as patch:
        patch.setattr("virtbus.spool.files.read_events", Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            spool.take(10, NOBODY)
    assert spool.stats().in_flight == 0
    assert [record.seq for record in spool.take(10, NOBODY)] == [1, 2]


def test_text_that_rots_into_no_utf8_is_named_and_its_neighbours_are_taken(spool):
    spool.commit([io_error(1), io_error(2), io_error(3)])
    rot(spool, "seq = 2", "attributes", "CAST(x'ff' || substr(CAST(attributes AS BLOB), 2) AS TEXT)")
    found = records(spool)
    spool.commit(())
    found += records(spool)
    assert [record.seq for record in found] == [1, 3, 4]
    (data,) = gaps_of(found)
    assert (data["reason"], ranges_of(data)) == ("spool_damaged", [(spool.epoch, 2, 2)])
    assert spool.stats().dead == 1


def test_two_gap_events_that_rot_are_named_with_all_that_they_named(spool):
    spool.commit([gap(missing=(SequenceRange(OLDER, 1, 4),)), gap(), io_error(1)])
    spool.commit([invalid()])
    rot(spool, "class = 3")
    found = records(spool)
    spool.commit([io_error(2)])
    found += records(spool)
    assert [each.seq for each in found if each.attributes["type"] == IoError.TYPE] == [3, 6]
    (data,) = gaps_of(found)
    assert ranges_of(data) == [(spool.epoch, 1, 2), (spool.epoch, 4, 5)]


def test_a_gap_event_that_rots_in_a_full_spool_is_not_merged_and_is_named(folder, clock):
    spool, book = open_spool(folder, limits=small(40), clock=clock), Book()
    for number in range(30):
        book.promise(spool.commit([gap(missing=(SequenceRange(OLDER, number + 1, number + 1),))]))
    rot(spool, "seq = 3")
    for _ in range(60):
        book.promise(spool.commit([gap()]))
    assert spool.stats().bytes <= 45 * 2048
    for _ in range(2):
        for record in records(spool):
            book.arrived(record)
        spool.commit(())
    spool.close()
    assert book.unaccounted() == []


@pytest.mark.parametrize(("column", "value"), [("seq", "seq + 1000"), ("seq", "x'00'"), ("count", "'many'")])
def test_an_event_that_rots_does_not_give_way_under_a_wrong_number(folder, clock, column, value):
    spool, book = open_spool(folder, limits=small(40), clock=clock), Book()
    book.promise(spool.commit([io_error(number, phase=UPDATED) for number in range(30)]))
    rot(spool, "seq = 3", column, value)
    for number in range(30, 60):
        book.promise(spool.commit([io_error(number, phase=UPDATED)]))
    for _ in range(2):
        for record in records(spool):
            book.arrived(record)
        spool.commit(())
    spool.close()
    assert book.unaccounted() == []
    assert (spool.epoch, 1003) not in book.named


def test_an_operators_drop_leaves_an_event_that_rotted_to_be_named_as_damaged(spool, clock):
    spool.commit([gap(), io_error(1)])
    rot(spool, "seq = 1")
    wish(spool, requests.DROP)
    clock.pass_time(11)
    assert spool.alive(Moment.of(clock()))
    found = records(spool)
    spool.commit(())
    found += records(spool)
    said = {data["reason"]: ranges_of(data) for data in gaps_of(found)}
    assert said["spool_damaged"] == [(spool.epoch, 1, 1)]
    assert said["operator_dropped"] == [(spool.epoch, 2, 2)]


def drop_dead(spool, clock):
    """An operator drops every dead letter."""
    spool.commit([invalid()])
    wish(spool, requests.DROP, "dead")
    clock.pass_time(11)
    assert spool.alive(Moment.of(clock()))


def evict_dead(spool, clock):
    """The spool is full, and dead letters go first."""
    for number in range(10, 60):
        spool.commit([io_error(number)])


def dead_in(spool):
    with closing(sqlite3.connect(spool.path)) as db:
        return mirror.stored(db, "dead")


@pytest.mark.parametrize("leave", [drop_dead, evict_dead])
@pytest.mark.parametrize("size", ["bytes * 1000", "-bytes", "x'00'", "'many'", "9e300"])
@pytest.mark.parametrize("table", ["events", "dead"])
def test_a_size_that_rots_does_not_change_what_a_spool_holds(folder, clock, leave, size, table):
    with closing(open_spool(folder, limits=small(40), clock=clock)) as spool:
        spool.commit([io_error(1), io_error(2), invalid()])
        if table == "events":
            rot(spool, "seq = 1", "bytes", size)
            records(spool)
            assert spool.stats().dead == 2
        else:
            with closing(sqlite3.connect(spool.path)) as db:
                db.execute(f"UPDATE dead SET bytes = {size}")
                db.commit()
        leave(spool, clock)
        stats = spool.stats()
        assert (stats.dead, stats.dead_bytes) == dead_in(spool) == (0, 0)
        spool.commit([io_error(3)])
        assert spool.stats().bytes > 0


def test_a_row_that_is_gone_is_named_and_is_no_dead_letter(spool, clock):
    spool.commit([io_error(1), io_error(2)])
    with closing(sqlite3.connect(spool.path)) as db:
        db.execute("DELETE FROM events WHERE seq = 1")
        db.commit()
    letters = METRICS.registry.get_sample_value("virtbus_dead_letters_total", {"why": "damaged"})
    the_first_of_two_is_named(spool)
    assert (spool.stats().dead, spool.stats().dead_bytes) == dead_in(spool) == (0, 0)
    assert METRICS.registry.get_sample_value("virtbus_dead_letters_total", {"why": "damaged"}) == letters


def test_an_error_while_settling_leaves_no_transaction_that_shuts_out_commits(spool, monkeypatch):
    spool.commit([io_error(1)])
    (record,) = spool.take(1, NOBODY)

    def fail(point):
        if point == "during_settle":
            raise RuntimeError("a bug")

    monkeypatch.setattr(faults, "hook", fail)
    with pytest.raises(RuntimeError):
        spool.settle([(record, Confirmed())])
    monkeypatch.undo()
    spool.commit([io_error(2)])
    assert [each.seq for each in records(spool)] == [2]
    assert spool.stats().unsettled == 0


def test_damage_to_what_no_checksum_covers_loses_no_event(folder, clock):
    spool = open_spool(folder, clock=clock)
    spool.commit([io_error(1), io_error(2)])
    (one,) = spool.take(1, NOBODY)
    spool.settle([(one, Refused(ValueError("no")))])
    spool.close()
    db = sqlite3.connect(spool.path)
    db.execute("PRAGMA writable_schema=ON")
    db.execute("UPDATE sqlite_master SET sql = replace(replace(sql, 'why TEXT NOT NULL', 'why TEXT'),"
               " 'attempts INTEGER NOT NULL', 'attempts INTEGER')")  # fmt: skip
    db.commit()
    db.close()
    db = sqlite3.connect(spool.path)
    db.execute("UPDATE dead SET why = NULL")
    db.execute("UPDATE events SET attempts = NULL")
    db.commit()
    db.close()
    after = open_spool(folder, clock=clock)
    assert (after.opening.rescued, after.opening.missing) == (1, ())
    assert [record.attempts for record in records(after) if record.key == domain_uuid(2)] == [0]
    assert after.stats().dead == 1
    after.close()


def test_damage_is_told_again_until_a_gap_event_was_committed(folder, clock):
    open_spool(folder, clock=clock).close()
    (folder / "spool.db").write_bytes(b"not a database" * 1000)
    first = open_spool(folder, clock=clock)
    first.close()  # killed before it told anybody
    second = open_spool(folder, clock=clock)
    second.commit([gap()])
    second.close()
    third = open_spool(folder, clock=clock)
    third.close()
    assert first.opening.damage == second.opening.damage
    assert first.opening.set_aside == second.opening.set_aside
    assert third.opening.damage is None


def test_a_rescue_that_was_killed_is_finished_by_the_next_start(folder, tmp_path, clock, monkeypatch):
    spool = open_spool(folder, clock=clock)
    spool.commit([io_error(number) for number in range(5)])
    spool.close()
    data = bytearray(spool.path.read_bytes())
    data[data.index(b'"name":"guest-4"') + 9] ^= 1
    spool.path.write_bytes(data)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(opening, "_set_aside", killed)
    with pytest.raises(KeyboardInterrupt):
        open_spool(folder, clock=clock)
    monkeypatch.undo()
    after = open_spool(folder, clock=clock)
    after.close()
    assert after.opening.rescued == 4
    assert after.stats().pending == 4
    assert not list(folder.glob("*.rescued*")) + list(folder.glob("*.new*"))


def test_only_the_newest_damaged_files_are_kept(folder, clock):
    for _ in range(5):
        open_spool(folder, clock=clock).close()
        (folder / "spool.db").write_bytes(b"x" * 8192)
        clock.pass_time(1)
    open_spool(folder, clock=clock).close()
    assert len(list(folder.glob("spool.db.damaged-*"))) == 2


# ------------------------------------------------------------------------------------------- versions


def test_an_unknown_major_version_is_refused_and_left_alone(folder, clock):
    open_spool(folder, clock=clock).close()
    db = sqlite3.connect(folder / "spool.db", isolation_level=None)
    db.execute("PRAGMA journal_mode=DELETE").fetchall()
    files.put(db, "meta", "version", "2000")
    db.execute("PRAGMA user_version=2000")
    db.close()
    before = (folder / "spool.db").read_bytes()
    with pytest.raises(SpoolCorrupt, match=r"format 2\.0, and this release knows 1: start the release"):
        open_spool(folder, clock=clock)
    assert (folder / "spool.db").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["lock", "spool.db"]


def test_a_flipped_bit_in_the_version_is_damage_and_not_the_future(folder, clock):
    spool = open_spool(folder, clock=clock)
    spool.commit([io_error(1)])
    spool.close()
    data = bytearray(spool.path.read_bytes())
    data[61] ^= 0x80  # PRAGMA user_version, in the file's header
    spool.path.write_bytes(data)
    after = open_spool(folder, clock=clock)
    after.close()
    assert after.opening.rescued == 1
    assert "version" in after.opening.damage


LATER = (
    *files.MIGRATIONS,
    "ALTER TABLE events ADD COLUMN priority INTEGER; CREATE TABLE notes (text TEXT)",
)


def test_an_older_file_is_migrated_and_the_previous_release_still_uses_it(folder, clock, monkeypatch):
    spool = open_spool(folder, clock=clock)
    spool.commit([io_error(1)], {"a": b"1"})
    spool.close()
    monkeypatch.setattr(files, "MIGRATIONS", LATER)
    newer = open_spool(folder, clock=clock)
    newer.commit([io_error(2)])
    newer.close()
    assert newer.format == "1.1"
    monkeypatch.undo()
    older = open_spool(folder, clock=clock)
    older.commit([io_error(3)], {"b": b"2"})
    assert older.opening.damage is None
    assert older.states() == {"a": b"1", "b": b"2"}
    assert [record.key for record in records(older)] == [domain_uuid(number) for number in (1, 2, 3)]
    older.close()
    assert older.format == "1.1"


def test_a_migration_that_was_killed_is_done_by_the_next_start(folder, clock, monkeypatch):
    open_spool(folder, clock=clock).close()
    monkeypatch.setattr(files, "MIGRATIONS", (*files.MIGRATIONS, LATER[-1] + "; SELECT nonsense(1)"))
    with closing(files.connect(folder / "spool.db")) as db, pytest.raises(Exception, match="nonsense"):
        files.migrate(db, 0)
    monkeypatch.setattr(files, "MIGRATIONS", LATER)
    after = open_spool(folder, clock=clock)
    after.close()
    assert (after.format, after.opening.damage) == ("1.1", None)


# --------------------------------------------------------------------------------------------- wishes


def wish(spool, action, table="events"):
    db = sqlite3.connect(spool.path, isolation_level=None)
    rows = [row for (row,) in db.execute(f"SELECT position FROM {table}")]
    requests.submit(db, action, rows)
    db.close()


def test_what_an_operator_drops_is_named(spool, clock):
    spool.commit([io_error(1, count=4), io_error(2)])
    (out,) = spool.take(1, NOBODY)
    wish(spool, requests.DROP)
    clock.pass_time(11)
    spool.alive(Moment.of(clock()))
    spool.commit(())
    assert spool.stats().pending == 2  # what is in flight stays until it is settled, and the gap event came
    spool.settle([(out, Confirmed())])
    (data,) = gaps_of(records(spool))
    assert (data["reason"], ranges_of(data)) == ("operator_dropped", [(spool.epoch, 2, 2)])


def test_a_refused_event_can_be_sent_again_with_the_same_id(spool, clock):
    spool.commit([io_error(1)])
    (record,) = spool.take(1, NOBODY)
    spool.settle([(record, Refused(ValueError("not yet")))])
    wish(spool, requests.RETRY, "dead")
    clock.pass_time(11)
    spool.alive(Moment.of(clock()))
    again = [each for each in records(spool) if each.key == domain_uuid(1)]
    assert [(each.id, each.body) for each in again] == [(record.id, record.body)]
    assert spool.stats().dead == 0


def dead_letter_of_a_settled_run(folder, clock):
    """A run that is settled, with events 3 and 6 of 8 refused, and two younger runs."""
    spool = open_spool(folder, clock=clock)
    stamps = spool.commit([io_error(number) for number in range(8)])
    taken = spool.take(100, NOBODY)
    spool.settle([(each, Refused(ValueError("no")) if each.seq in (3, 6) else Confirmed()) for each in taken])
    spool.commit(())
    records(spool)
    spool.close()
    for _ in range(2):
        younger = open_spool(folder, clock=clock)
        younger.commit([gap()])
        records(younger)
        younger.close()
    return stamps


def retry_all(folder, limit=-1):
    with closing(sqlite3.connect(folder / "spool.db", isolation_level=None)) as db:
        rows = db.execute("SELECT position FROM dead ORDER BY position LIMIT ?", (limit,)).fetchall()
        requests.submit(db, requests.RETRY, [row for (row,) in rows])
        assert sum(requests.grant_all(db)) == len(rows)


def test_a_dead_letter_of_a_run_long_settled_is_sent_again_over_restarts(folder, clock):
    stamps = dead_letter_of_a_settled_run(folder, clock)
    retry_all(folder)
    for _ in range(2):  # not taken by the first run; the second finds it whole too
        spool = open_spool(folder, clock=clock)
        assert (spool.opening.damage, spool.opening.missing, spool.opening.set_aside) == (None, (), None)
        spool.commit([gap()])
        spool.close()
    spool = open_spool(folder, clock=clock)
    again = [each.id for each in records(spool) if each.epoch == stamps[0].epoch]
    spool.close()
    assert again == [stamps[2].id, stamps[5].id]


def test_a_run_is_forgotten_when_its_last_dead_letter_is_gone(folder, clock):
    epoch = dead_letter_of_a_settled_run(folder, clock)[0].epoch
    retry_all(folder)
    spool = open_spool(folder, clock=clock)
    records(spool)
    spool.close()
    spool = open_spool(folder, clock=clock)
    spool.close()
    with closing(sqlite3.connect(folder / "spool.db")) as db:
        assert epoch not in {row[0] for row in db.execute("SELECT epoch FROM runs")}


def test_an_invalid_event_is_never_sent_even_when_asked(spool, clock):
    spool.commit([invalid()])
    wish(spool, requests.RETRY, "dead")
    clock.pass_time(11)
    spool.alive(Moment.of(clock()))
    assert len(gaps_of(found := records(spool))) == len(found) == 1


def wish_on_disk(folder, action, *positions):
    with closing(sqlite3.connect(folder / "spool.db", isolation_level=None)) as db:
        requests.submit(db, action, positions)


def test_a_dropped_gap_event_leaves_its_counts_and_its_interval_to_the_one_that_names_it(folder, clock):
    spool = open_spool(folder, clock=clock)
    dropped = replace(gap(), missing_occurrences=500, started_at=to_datetime(START_NS - 60 * 10**9))
    (stamp,) = spool.commit([dropped])
    spool.close()
    wish_on_disk(folder, requests.DROP, 1)
    with closing(sqlite3.connect(folder / "spool.db", isolation_level=None)) as db:
        assert list(requests.grant_all(db)) == [1]
    clock.pass_time(5)
    spool = open_spool(folder, clock=clock)
    spool.commit(())
    (data,) = gaps_of(records(spool))
    spool.close()
    assert (data["reason"], data["missing_occurrences"]) == ("operator_dropped", 500)
    assert ranges_of(data) == [(stamp.epoch, 1, 1)]
    assert data["started_at"] == "2025-12-31T23:59:00.000000Z"
    assert data["ended_at"] >= "2026-01-01T00:00:00.000000Z"


def test_a_wish_means_the_event_that_lay_there_and_not_what_takes_its_place_after_a_restart(
    folder, tmp_path, clock
):
    spool = open_spool(folder, clock=clock)
    spool.commit([io_error(1)])
    wish_on_disk(folder, requests.DROP, 1)
    records(spool)  # it is confirmed meanwhile
    after = crash(folder, tmp_path / "after")
    spool.close()
    spool = open_spool(after, clock=clock)
    (stamp,) = spool.commit([gap()])
    clock.pass_time(11)
    spool.alive(Moment.of(clock()))
    assert [record.id for record in records(spool)] == [stamp.id]
    spool.close()


# ---------------------------------------------------------------------------------------- one writer


def unlink_lock(folder):
    (folder / "lock").unlink()


def replace_lock(folder):
    (folder / "lock").unlink()
    (folder / "lock").touch()


def replace_database(folder):
    shutil.copy(folder / "spool.db", folder / "copy")
    (folder / "copy").rename(folder / "spool.db")


def move_folder(folder):
    folder.rename(folder.with_name("moved"))


@pytest.mark.parametrize("harm", [unlink_lock, replace_lock, replace_database, move_folder])
def test_a_folder_that_is_not_the_one_that_was_locked_is_written_no_longer(folder, clock, harm):
    spool = open_spool(folder, clock=clock)
    spool.commit([io_error(1)])
    harm(folder)
    with pytest.raises(SpoolFull, match="stop this agent, see that no other one uses the folder"):
        spool.commit([io_error(2)])
    assert not spool.alive(Moment.of(clock()))  # at once, not after ten seconds
    assert "is gone" in str(spool.refusal) or "is another file now" in str(spool.refusal)
    assert spool.take(10, NOBODY) == []
    spool.close()


def test_a_folder_that_was_moved_and_comes_back_is_used_again(folder, clock):
    spool = open_spool(folder, clock=clock)
    spool.commit([io_error(1)])
    move_folder(folder)
    assert not spool.alive(Moment.of(clock()))
    folder.with_name("moved").rename(folder)
    assert spool.alive(Moment.of(clock()))
    spool.commit([io_error(2)])
    clock.pass_time(2)
    assert len(records(spool)) == 2
    spool.close()


def test_of_two_agents_on_one_folder_the_second_is_the_only_writer(folder, clock):
    first = open_spool(folder, clock=clock)
    stamps = first.commit([io_error(1)])
    unlink_lock(folder)
    second = open_spool(folder, clock=clock)
    stamps += second.commit([io_error(2)])
    for harmless in (unlink_lock, lambda folder: None):
        with pytest.raises(SpoolFull, match="another agent"):
            first.commit([io_error(3)])
        harmless(folder)
    first.close()
    second.close()
    third = open_spool(folder, clock=clock)
    assert (third.opening.damage, third.opening.missing) == (None, ())
    assert [record.id for record in records(third)] == [stamp.id for stamp in stamps]
    third.close()


def test_a_run_that_began_later_ends_the_writing_of_an_earlier_one_whatever_the_files_look_like(
    folder, clock, monkeypatch
):
    monkeypatch.setattr(files.Lock, "check", lambda self, database: None)
    first = open_spool(folder, clock=clock)
    first.commit([io_error(1)])
    unlink_lock(folder)
    second = open_spool(folder, clock=clock)
    with pytest.raises(SpoolFull, match="another agent has begun to write here"):
        first.commit([io_error(2)])
    first.close()
    second.commit([io_error(3)])
    assert len(records(second)) == 2
    second.close()


def test_a_start_reads_what_an_earlier_agent_committed_and_shuts_it_out_meanwhile(folder, clock, monkeypatch):
    first = open_spool(folder, clock=clock)
    stamps = first.commit([io_error(1)])
    load, refused = opening.load, []

    def commits_meanwhile(*words):
        with pytest.raises(SpoolFull) as error:  # by one whose lock file was removed
            first.commit([io_error(2)])
        refused.append(str(error.value))
        return load(*words)

    monkeypatch.setattr(opening, "load", commits_meanwhile)
    monkeypatch.setattr(files, "Lock", NoLock)
    second = open_spool(folder, clock=clock)
    assert "another program holds a lock on it" in refused[0]
    assert [record.id for record in records(second)] == [stamp.id for stamp in stamps]
    with pytest.raises(SpoolFull, match="another agent has begun to write here"):
        first.commit([io_error(2)])
    second.close()
    first.close()


class NoLock(files.Lock):
    """A lock that a second process took although the first one still writes."""

    def __init__(self, state_dir):
        (state_dir / "lock").rename(state_dir / "lock.first")
        super().__init__(state_dir)
        (state_dir / "lock.first").rename(state_dir / "lock")

    def check(self, database):
        return None


# ------------------------------------------------------------------------------------------- the size


def test_the_file_shrinks_again_after_a_backlog(folder, clock):
    spool = open_spool(folder, clock=clock)
    for _ in range(10):
        spool.commit([io_error(number) for number in range(300)])
    high = spool.path.stat().st_size + (folder / "spool.db-wal").stat().st_size
    while batch := spool.take(100, NOBODY):
        spool.settle([(record, Confirmed()) for record in batch])
        clock.pass_time(1.1)
        spool.wait(0.0, threading.Event())  # as the publisher does between two batches
    spool.close()
    assert high > 5 << 20
    assert spool.path.stat().st_size < high / 4


def test_the_order_of_the_confirmations_does_not_cost_writes(tmp_path):
    def written(order):  # bytes of the log that settling 400 events at once makes
        state_dir = tmp_path / repr(order)
        state_dir.mkdir()
        spool = open_spool(state_dir)
        spool.commit([io_error(number) for number in range(400)])
        batch = spool.take(400, NOBODY)
        log = state_dir / "spool.db-wal"
        before = log.stat().st_size
        spool.settle([(record, Confirmed()) for record in order(batch)])
        after = log.stat().st_size
        spool.close()
        return after - before

    in_order = written(list)
    assert in_order > 0
    assert written(lambda batch: random.Random(1).sample(batch, len(batch))) == in_order


def test_file_and_log_stay_bounded_under_a_storm_that_nobody_takes(folder, clock):
    spool = open_spool(folder, limits=SpoolLimits(max_bytes=2 << 20), clock=clock)
    for number in range(150):
        spool.commit([io_error(number % 50, phase=UPDATED) for _ in range(40)])
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert spool.stats().bytes <= (2 << 20) + 65536
    spool.close()
    assert spool.path.stat().st_size <= 4 << 20
    assert size <= (4 << 20) + (10 << 20)


def test_the_agent_id_stands_in_the_source(spool):
    spool.commit([io_error(1)])
    assert records(spool)[0].attributes["source"] == f"/virtbus/agents/{AGENT}"
