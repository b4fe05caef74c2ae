"""The pairing of pauses and events: every error is told, and told once, whatever comes first."""

from __future__ import annotations

import heapq
import math
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virtbus.model import Device, DeviceSource, ErrorPolicy, Evidence, Now
from virtbus.observations import Burst, RawIoError
from virtbus.sources.crosscheck import ACTION_UNKNOWN, CrossCheck, Verdict
from virtbus.sources.evidence import FreeSpace, Look, gather, read_messages
from virtbus.sources.findings import late_event
from virtbus.sources.link import (
    ACTION_PAUSE,
    ACTION_REPORT,
    PAUSED,
    PAUSED_IOERROR,
    PAUSED_UNKNOWN,
    RUNNING,
    STOPPED,
    Space,
)
from virtbus.sources.nameless import MOST_WAITING
from virtbus.words import Origin

GRACE = 1.0
UUID = "4a1e599b-c22b-493a-85b4-40a340b65693"
S = 1_000_000_000
DEVICES = {
    "virtio-disk0": Device("virtio-disk0", target="vda", policy=ErrorPolicy("stop", "report")),
    "virtio-disk1": Device("virtio-disk1", target="vdb", policy=ErrorPolicy("report", "report")),
}
# As libvirt up to 9.0 has them: the second disk's events are lost.
UNNAMED = {
    **DEVICES,
    "virtio-disk1": replace(DEVICES["virtio-disk1"], source=DeviceSource("network", protocol="nbd")),
}
PAUSED_USER, RUNNING_UNPAUSED = 1, 5  # virDomainPausedReason, virDomainRunningReason
IO_PAUSE = Look(PAUSED, PAUSED_IOERROR, {"vda": 1})
RUNS = Look(RUNNING, 1)


def raw(
    alias: str = "virtio-disk0", at: float = 0.0, action: int = ACTION_PAUSE, reason: str = ""
) -> RawIoError:
    return RawIoError(UUID, "db1", 1, "disk0", alias, action, reason, int(at * S))


def suspend(check: CrossCheck, at: float, *, by_io_error: bool = True) -> None:
    check.suspended(UUID, "db1", 1, by_io_error=by_io_error, mono=at, ns=int(at * S))


def look_at(check: CrossCheck, found: Look, at: float = 9.0) -> list[Burst]:
    return check.looked(UUID, replace(found, asked_at=at), DEVICES)


def decide(check: CrossCheck, at: float) -> list[Burst]:
    return [burst for decision in check.due(at, {UUID: DEVICES}) for burst in decision.bursts]


def findings(check: CrossCheck, at: float) -> list[Burst]:
    return [burst for burst in decide(check, at) if burst.count]


def reconcile(
    check: CrossCheck, look: Look, at: float, since: float | None = None, until: float = math.inf
) -> list[Burst]:
    stamps = None if since is None else (int(since * S), until * S)
    return check.reconcile(UUID, "db1", 1, look, DEVICES, stamps=stamps, mono=at, ns=int(at * S))


# ------------------------------------------------------------------------------------------ one error


def test_an_event_followed_by_its_pause_is_told_by_the_event_alone() -> None:
    check = CrossCheck(GRACE)
    assert check.event(raw(), 0.0) is Verdict.TELL
    suspend(check, 0.0)
    look_at(check, IO_PAUSE)
    assert findings(check, 5.0) == []


def test_a_pause_that_comes_before_its_event_waits_for_it() -> None:
    check = CrossCheck(GRACE)
    suspend(check, 0.0, by_io_error=False)
    look_at(check, Look(PAUSED, PAUSED_UNKNOWN, {"vda": 1}))
    assert findings(check, 0.9) == []
    assert check.event(raw(at=0.9), 0.9) is Verdict.TELL
    assert findings(check, 5.0) == []


def test_a_pause_whose_event_never_comes_is_told_with_the_device_that_a_look_found() -> None:
    check = CrossCheck(GRACE)
    suspend(check, 2.0)
    look_at(check, Look(PAUSED, PAUSED_IOERROR, {"vdb": 2}))
    assert findings(check, 2.9) == []
    (found,) = findings(check, 3.0)
    assert (found.origin, found.count, found.raw.alias) == (Origin.LIFECYCLE, 1, "virtio-disk1")
    assert (found.raw.action_code, found.raw.reason, found.disk_error) == (ACTION_PAUSE, "enospc", "no_space")
    assert found.first_ns == 2 * S
    assert [item.check for item in found.evidence][:3] == ["lifecycle", "state", "disk_errors"]


@pytest.mark.parametrize("looked", [True, False])
def test_a_pause_whose_late_event_alone_can_explain_it_is_not_seen_through_before(looked: bool) -> None:
    """Whoever is killed before the event comes has not seen this error: it has to lie in the gap."""
    check = CrossCheck(GRACE)
    check.baseline(UUID, "db1", 1, {"virtio-disk0": 1})
    suspend(check, 5.0, by_io_error=False)
    if looked:
        look_at(check, Look(PAUSED, PAUSED_UNKNOWN, {"vda": 1}))
    assert findings(check, 6.0) == findings(check, 7.0) == []
    assert check.undecided() == []
    assert check.undecided_since(7.5) == 5.0
    assert check.undecided_since(15.5) is None, "not for ever: it may be an operator's"
    assert check.event(raw(at=7.6), 7.6) is Verdict.TELL
    assert check.undecided_since(7.7) is None


def test_a_finding_whose_event_may_be_late_is_not_seen_through_before() -> None:
    """The event may say that more than one request failed: whoever ends before it comes has not seen that."""
    check = CrossCheck(GRACE)
    suspend(check, 5.0)
    look_at(check, Look(PAUSED, PAUSED_IOERROR, {"vda": 1}))
    assert len(findings(check, 6.0)) == 1
    assert check.undecided_since(6.5) == 5.0
    assert check.undecided_since(16.5) is None, "it was lost"
    assert [check.event(raw(at=6.6), 6.6) for _ in range(2)] == [Verdict.KNOWN, Verdict.TELL]
    assert check.undecided_since(6.7) is None


def test_a_pause_that_no_disk_can_explain_is_seen_through() -> None:
    check = CrossCheck(GRACE)
    suspend(check, 5.0, by_io_error=False)
    look_at(check, Look(PAUSED, PAUSED_UNKNOWN, {}))
    assert findings(check, 6.0) == []
    assert check.undecided_since(6.5) is None
    suspend(check, 8.0, by_io_error=False)
    assert findings(check, 9.0) == findings(check, 10.0) == []
    check.resumed(UUID, 10.1)
    assert check.undecided_since(10.2) is None


def test_a_pause_of_unknown_reason_with_a_disk_error_is_a_pause_by_io_error() -> None:
    check = CrossCheck(GRACE)
    suspend(check, 0.0, by_io_error=False)
    look_at(check, Look(PAUSED, PAUSED_UNKNOWN, {"vda": 1}))
    assert [burst.raw.alias for burst in findings(check, 1.0)] == ["virtio-disk0"]


@pytest.mark.parametrize("look", [Look(PAUSED, 1, {}), Look(PAUSED, PAUSED_UNKNOWN, {}), Look(RUNNING, 1)])
def test_an_operators_pause_is_no_error(look: Look) -> None:
    check = CrossCheck(GRACE)
    suspend(check, 0.0, by_io_error=False)
    look_at(check, look)
    assert findings(check, 5.0) == []


def test_without_a_look_the_pause_is_told_late_and_without_a_device() -> None:
    check = CrossCheck(GRACE)
    suspend(check, 0.0)
    assert findings(check, 1.0) == []
    (found,) = findings(check, 2.0)
    assert found.raw.alias == ""
    assert found.evidence[-1] == Evidence("state", "unavailable", "the look-up did not end in time")


def test_an_event_that_comes_after_its_finding_adds_facts_and_no_count() -> None:
    check = CrossCheck(GRACE)
    suspend(check, 0.0)
    look_at(check, IO_PAUSE)
    assert len(findings(check, 1.0)) == 1
    late = raw(at=1.5, reason="message")
    assert check.event(late, 1.5) is Verdict.KNOWN
    assert late_event(late, found=False).count == 0
    assert check.event(raw(at=1.6), 1.6) is Verdict.TELL


def test_a_second_disk_of_the_same_pause_is_found_although_the_first_had_its_event() -> None:
    check = CrossCheck(GRACE)
    check.event(raw("virtio-disk0"), 0.0)
    suspend(check, 0.0)
    look_at(check, Look(PAUSED, PAUSED_IOERROR, {"vda": 1, "vdb": 1}))
    assert [(b.raw.alias, b.count) for b in findings(check, 1.0)] == [("virtio-disk1", 1)]


def test_a_disk_error_that_an_earlier_pause_left_is_not_told_again() -> None:
    check = CrossCheck(GRACE)
    check.event(raw(), 0.0)
    suspend(check, 0.0)
    look_at(check, IO_PAUSE, 0.1)
    findings(check, 1.0)
    check.resumed(UUID)
    check.event(raw("virtio-disk1", 5.0), 5.0)
    suspend(check, 5.0)
    look_at(check, Look(PAUSED, PAUSED_IOERROR, {"vda": 1, "vdb": 1}), 5.1)
    assert findings(check, 6.0) == []


def test_a_disk_error_of_a_pause_that_no_look_saw_is_not_blamed_for_the_next_pause() -> None:
    check = CrossCheck(GRACE)
    check.event(raw("virtio-disk1"), 0.0)
    suspend(check, 0.0)
    check.resumed(UUID)
    look_at(check, Look(RUNNING, 1), at=0.5)
    decide(check, GRACE)
    check.event(raw("virtio-disk0"), 100.0)
    suspend(check, 100.0)
    look_at(check, replace(IO_PAUSE, disk_errors={"vda": 1, "vdb": 1}), 100.5)
    assert findings(check, 100.0 + GRACE) == []


def paused_by_one_with_two_in_error(check: CrossCheck) -> list[tuple[str, Origin]]:
    """An event tells of the first disk; the look finds an error of the second as well."""
    check.event(raw("virtio-disk0", 5.0), 5.0)
    suspend(check, 5.0)
    look_at(check, Look(PAUSED, PAUSED_IOERROR, {"vda": 1, "vdb": 1}), 5.1)
    return [(burst.raw.alias, burst.origin) for burst in findings(check, 6.0)]


def test_a_second_disk_whose_error_may_be_older_than_the_connection_is_a_finding_of_a_look() -> None:
    check = CrossCheck(GRACE)
    check.keep_only(frozenset({UUID}))  # the question about errors that are left over is not answered yet
    assert paused_by_one_with_two_in_error(check) == [("virtio-disk1", Origin.RECONCILE)]


@pytest.mark.parametrize("answered", ["baseline", "start", "look"])
def test_a_second_disk_of_a_guest_whose_old_errors_are_known_is_told_as_missed(answered: str) -> None:
    check = CrossCheck(GRACE)
    check.keep_only(frozenset({UUID}))
    if answered == "baseline":
        check.baseline(UUID, "db1", 1, {})
    elif answered == "start":
        check.gone(UUID)
    else:
        reconcile(check, IO_PAUSE, 1.0)
        check.resumed(UUID)
    assert paused_by_one_with_two_in_error(check) == [("virtio-disk1", Origin.LIFECYCLE)]


def test_a_new_connection_knows_nothing_of_old_disk_errors() -> None:
    check = CrossCheck(GRACE)
    check.baseline(UUID, "db1", 1, {"virtio-disk0": 1})
    check.keep_only(frozenset({UUID}))
    assert paused_by_one_with_two_in_error(check) == [("virtio-disk1", Origin.RECONCILE)]


def test_a_pause_that_no_event_explains_is_told_as_missed_whatever_is_left_over() -> None:
    check = CrossCheck(GRACE)
    check.keep_only(frozenset({UUID}))
    suspend(check, 5.0)
    look_at(check, Look(PAUSED, PAUSED_IOERROR, {"vda": 1, "vdb": 1}), 5.1)
    assert [burst.origin for burst in findings(check, 6.0)] == [Origin.LIFECYCLE, Origin.RECONCILE]


def test_a_pause_after_a_resume_that_fell_into_a_gap_is_told() -> None:
    check = CrossCheck(GRACE)
    suspend(check, 0.0)
    decide(check, GRACE)
    assert findings(check, 2 * GRACE)
    check.listed_running(UUID)
    suspend(check, 100.0)
    look_at(check, IO_PAUSE, 100.5)
    assert len(findings(check, 100.0 + GRACE)) == 1


def test_a_disk_error_that_was_there_while_the_guest_ran_is_not_told() -> None:
    check = CrossCheck(GRACE)
    check.baseline(UUID, "db1", 1, {"virtio-disk0": 1})
    suspend(check, 5.0)
    look_at(check, Look(PAUSED, PAUSED_IOERROR, {"vda": 1, "vdb": 1}), 5.1)
    assert [burst.raw.alias for burst in findings(check, 6.0)] == ["virtio-disk1"]


@pytest.mark.parametrize(("behind", "resumed"), [(0.3, 0.5), (0.3, 5.0), (3.0, 5.0)])
def test_a_disk_whose_event_came_behind_the_look_is_not_blamed_for_the_next_pause(
    behind: float, resumed: float
) -> None:
    check = CrossCheck(GRACE)
    check.event(raw(), 0.0)
    suspend(check, 0.0)
    look_at(check, IO_PAUSE, 0.1)
    told: list[Burst] = []
    steps: dict[float, Callable[[], object]] = {
        # A request that was on its way when the guest was paused.
        behind: lambda: check.event(raw("virtio-disk1", at=behind), behind),
        GRACE: lambda: told.extend(findings(check, GRACE)),
        resumed: lambda: check.resumed(UUID),
    }
    for at in sorted(steps):
        steps[at]()
    check.event(raw(at=60.0), 60.0)
    suspend(check, 60.0)
    look_at(check, Look(PAUSED, PAUSED_IOERROR, {"vda": 1, "vdb": 1}), 60.1)
    assert told + findings(check, 61.0) == []


@pytest.mark.parametrize("looked", [False, True])
def test_a_pause_that_a_busy_host_hears_of_late_is_told_by_its_event_alone(looked: bool) -> None:
    check = CrossCheck(GRACE)
    for at in (0.0, 30.0):
        check.event(raw(at=at), at)
        assert check.doubtful(at + 1.5) == [UUID]
        if looked:
            assert not check.runs(UUID, replace(IO_PAUSE, asked_at=at + 1.6))
            assert check.doubtful(at + 20.0) == []
        suspend(check, at + 2.5)
        look_at(check, IO_PAUSE, at + 2.6)
        assert findings(check, at + 4.0) == []
        check.resumed(UUID)


def test_an_event_whose_guest_was_seen_running_explains_no_later_pause() -> None:
    check = CrossCheck(GRACE)
    check.event(raw(), 0.0)
    assert check.runs(UUID, replace(RUNS, asked_at=1.6))
    suspend(check, 2.5)
    look_at(check, IO_PAUSE, 2.6)
    assert [burst.raw.alias for burst in findings(check, 4.0)] == ["virtio-disk0"]


def test_the_same_disk_that_fails_again_without_an_event_is_told_again() -> None:
    check = CrossCheck(GRACE)
    for at in (0.0, 5.0):
        suspend(check, at)
        look_at(check, IO_PAUSE, at + 0.1)
        assert [burst.raw.alias for burst in findings(check, at + 1)] == ["virtio-disk0"]
        check.resumed(UUID)


def test_which_of_two_disks_with_old_errors_failed_again_is_not_guessed() -> None:
    check = CrossCheck(GRACE)
    check.baseline(UUID, "db1", 1, {"virtio-disk0": 1, "virtio-disk1": 1})
    suspend(check, 5.0)
    look_at(check, Look(PAUSED, PAUSED_IOERROR, {"vda": 1, "vdb": 1}), 5.1)
    assert [burst.raw.alias for burst in findings(check, 6.0)] == [""]


def test_an_operators_pause_of_a_guest_with_an_old_disk_error_is_no_error() -> None:
    check = CrossCheck(GRACE)
    check.baseline(UUID, "db1", 1, {"virtio-disk0": 1})
    suspend(check, 5.0, by_io_error=False)
    look_at(check, Look(PAUSED, PAUSED_UNKNOWN, {"vda": 1}), 5.1)
    assert findings(check, 6.0) == []


def test_two_quick_pauses_without_events_are_two_errors() -> None:
    check = CrossCheck(GRACE)
    suspend(check, 0.0)
    look_at(check, IO_PAUSE, 0.1)
    check.resumed(UUID)
    suspend(check, 0.3)
    look_at(check, IO_PAUSE, 0.4)
    assert [(b.count, b.first_ns) for b in findings(check, 1.3)] == [(1, 0), (1, 300_000_000)]


def test_pauses_that_are_reported_at_once_are_as_many_errors_as_there_were() -> None:
    """A daemon that hung says all when it goes on: the last pause, which was looked at, is decided first."""
    check = CrossCheck(GRACE)
    for _ in range(2):
        suspend(check, 0.0)
        check.resumed(UUID, 0.0)
    suspend(check, 0.0)
    look_at(check, IO_PAUSE, 0.5)
    assert len(findings(check, 1.5)) == 1
    assert len(findings(check, 3.0)) == 2


def test_a_pause_that_ended_before_it_was_told_says_that_the_guest_runs() -> None:
    check = CrossCheck(GRACE)
    suspend(check, 0.0)
    look_at(check, IO_PAUSE)
    check.resumed(UUID)
    (decision,) = check.due(1.0, {UUID: DEVICES})
    assert [burst.count for burst in decision.bursts] == [1]
    assert decision.over


@pytest.mark.parametrize("left", [0.2, 1.5], ids=["undecided", "already reported"])
@pytest.mark.parametrize(
    ("number", "after", "verdict"), [(1, 0.5, Verdict.KNOWN), (2, 0.5, Verdict.TELL), (1, 60.0, Verdict.TELL)]
)
def test_an_event_that_comes_after_its_guest_left_is_not_told_twice(
    number: int, after: float, verdict: Verdict, left: float
) -> None:
    check = CrossCheck(GRACE)
    suspend(check, 0.0)
    look_at(check, IO_PAUSE, 0.1)
    found = decide(check, left)
    found += [
        one
        for one in check.lifecycle(UUID, "db1", 1, STOPPED, 0, Now(100 * S, left))
        if isinstance(one, Burst)
    ]
    assert [one.count for one in found] == [1]
    late = raw(at=left + after)._replace(domain_id=number)
    assert check.event(late, left + after) is verdict
    assert check.event(late, left + after + 0.1) is Verdict.TELL, "it is one error's event, not more"


def test_an_event_soon_after_a_guest_left_that_had_stood_for_long_is_an_error_of_its_own() -> None:
    check = CrossCheck(GRACE)
    suspend(check, 0.0)
    look_at(check, IO_PAUSE, 0.1)
    assert len(findings(check, 1.5)) == 1
    check.lifecycle(UUID, "db1", 1, STOPPED, 0, Now(100 * S, 60.0))
    assert check.event(raw(at=60.5), 60.5) is Verdict.TELL


def test_a_pause_of_a_guest_that_leaves_is_told_at_once() -> None:
    check = CrossCheck(GRACE)
    suspend(check, 0.0)
    assert [burst.count for burst in check.gone(UUID)] == [1]
    assert len(check) == 0
    assert check.next_due() is None


def test_a_paused_guests_event_brings_its_evidence_later_without_a_count() -> None:
    check = CrossCheck(GRACE)
    check.event(raw(reason="enospc"), 0.0)
    suspend(check, 0.0)
    look_at(check, Look(PAUSED, PAUSED_IOERROR, {"vda": 2}))
    (more,) = decide(check, 1.0)
    assert (more.count, more.origin, more.raw.alias, more.disk_error) == (
        0,
        Origin.EVENT,
        "virtio-disk0",
        "no_space",
    )


def test_reported_errors_are_looked_at_once_a_minute_and_device() -> None:
    check = CrossCheck(GRACE)
    verdicts = [check.event(raw(action=ACTION_REPORT), at) for at in (0.0, 1.0, 59.9, 60.0)]
    assert verdicts == [Verdict.TELL_AND_LOOK, Verdict.TELL, Verdict.TELL, Verdict.TELL_AND_LOOK]
    (more,) = look_at(check, Look(RUNNING, 1))
    assert (more.count, more.raw.action_code) == (0, ACTION_REPORT)
    assert look_at(check, Look(RUNNING, 1)) == []


# ----------------------------------------------------------------------------------- after a reconnect


def test_a_guest_found_paused_is_a_finding() -> None:
    (found,) = reconcile(CrossCheck(GRACE), IO_PAUSE, 5.0)
    assert (found.origin, found.raw.alias, found.count) == (Origin.RECONCILE, "virtio-disk0", 1)


def test_a_guest_found_paused_without_a_disk_error_is_a_finding_without_a_device() -> None:
    (found,) = reconcile(CrossCheck(GRACE), Look(PAUSED, PAUSED_IOERROR, {}), 5.0)
    assert found.raw.alias == ""


def test_a_pause_that_was_told_before_the_cut_is_not_found_again() -> None:
    check = CrossCheck(GRACE)
    check.event(raw(), 0.0)
    suspend(check, 0.0)
    look_at(check, IO_PAUSE)
    decide(check, 1.0)
    assert reconcile(check, IO_PAUSE, 5.0, since=2.0) == []
    assert reconcile(check, IO_PAUSE, 9.0, since=6.0) == []


def test_a_pause_that_waited_for_its_event_when_the_connection_went_is_told_once() -> None:
    check = CrossCheck(GRACE)
    suspend(check, 0.0)
    assert len(reconcile(check, IO_PAUSE, 0.5, since=0.1)) == 1
    assert findings(check, 9.0) == []


def test_an_error_found_before_its_event_and_pause_arrive_is_told_once() -> None:
    check = CrossCheck(GRACE)
    assert len(reconcile(check, IO_PAUSE, 0.0)) == 1
    assert check.event(raw(), 0.01) is Verdict.FOUND
    suspend(check, 0.01)
    look_at(check, IO_PAUSE)
    assert findings(check, 9.0) == []


def test_a_pause_found_before_it_arrives_without_its_event_is_told_once() -> None:
    check = CrossCheck(GRACE)
    assert len(reconcile(check, IO_PAUSE, 0.0)) == 1
    suspend(check, 0.01)
    look_at(check, IO_PAUSE)
    assert findings(check, 9.0) == []


def test_a_guest_that_ran_and_failed_again_while_we_were_away_is_found() -> None:
    check = CrossCheck(GRACE)
    check.event(raw(at=1), 1.0)
    suspend(check, 1.0)
    look_at(check, IO_PAUSE)
    decide(check, 2.0)
    assert reconcile(check, Look(RUNNING, 1), 5.0, since=3.0) == []  # resumed, unseen
    assert len(reconcile(check, IO_PAUSE, 9.0, since=6.0)) == 1


def line(target: str, second: int, text: str = "Input/output error") -> str:
    stamp = f"1970-01-01 00:00:{second:02}.000+0000"
    return f"I/O error: disk='{target}', index='1', path='disk0', timestamp='{stamp}', message='{text}'"


def test_an_error_that_libvirt_remembers_from_the_gap_is_found_with_its_time_and_text() -> None:
    look = Look(RUNNING, 1, None, read_messages([line("vdb", 7)]))
    (found,) = reconcile(CrossCheck(GRACE), look, 20.0, since=5.0)
    assert (found.raw.alias, found.first_ns, found.message) == ("virtio-disk1", 7 * S, "Input/output error")
    assert found.raw.action_code == ACTION_REPORT  # what its policy asks for


def test_what_was_done_about_a_remembered_error_is_not_guessed() -> None:
    look = Look(RUNNING, 1, None, read_messages([line("vda", 7)]))
    (found,) = reconcile(CrossCheck(GRACE), look, 20.0, since=5.0)
    assert found.raw.action_code == ACTION_UNKNOWN


@pytest.mark.parametrize("since", [None, 7.0, 8.0])
def test_a_remembered_error_from_before_the_gap_is_no_finding(since: float | None) -> None:
    look = Look(RUNNING, 1, None, read_messages([line("vdb", 7)]))
    assert reconcile(CrossCheck(GRACE), look, 20.0, since=since) == []


def test_a_remembered_error_that_an_event_told_of_is_no_finding() -> None:
    check = CrossCheck(GRACE)
    check.event(raw("virtio-disk1", at=7.5, action=ACTION_REPORT), 7.5)
    look = Look(RUNNING, 1, None, read_messages([line("vdb", 7)]))
    assert reconcile(check, look, 20.0, since=5.0) == []


def test_a_clock_set_back_since_the_last_event_hides_no_remembered_error() -> None:
    check = CrossCheck(GRACE)
    check.slack_ns = 0
    messages = read_messages([line("vda", 30)])
    assert messages[0].at_ns is not None
    remembered, at = Look(RUNNING, 1, messages=messages), messages[0].at_ns / S
    check.event(raw(at=at + 3600.0, action=ACTION_REPORT), 1.0)  # an hour ahead, by the clock of then
    assert len(reconcile(check, remembered, at + 5.0, since=at - 5.0)) == 1
    assert reconcile(check, remembered, at + 6.0, since=at - 5.0) == []


def test_a_first_look_that_was_asked_before_the_pause_does_not_end_it() -> None:
    check = CrossCheck(GRACE)
    suspend(check, 2.0, by_io_error=False)
    assert reconcile(check, Look(RUNNING, 1, asked_at=1.9), 2.1) == []
    look_at(check, Look(PAUSED, PAUSED_UNKNOWN, {"vda": 1}), 2.2)
    assert check.event(raw(at=2.5), 2.5) is Verdict.TELL
    assert findings(check, 5.0) == []


@pytest.mark.parametrize("heard", [True, False])
def test_the_message_of_another_image_from_before_the_clock_was_set_back_hides_none(heard: bool) -> None:
    check = CrossCheck(GRACE)
    check.slack_ns = 0
    messages = read_messages([line("vda", 50), line("vda", 30)], 35 * S)
    if heard:
        check.event(raw(at=50.0, action=ACTION_REPORT), 1.0)  # by the clock of then
    (found,) = reconcile(check, Look(RUNNING, 1, messages=messages), 35.0, since=25.0)
    assert (found.first_ns, found.stamp_ns) == (30 * S, 30 * S)


def test_a_message_that_was_told_by_a_clock_that_was_set_back_is_not_told_again() -> None:
    check = CrossCheck(GRACE)
    check.slack_ns = 0
    messages = read_messages([line("vda", 50), line("vda", 20)], 30 * S)
    check.event(raw(at=20.0, action=ACTION_REPORT), 20.0)  # behind that of 50, by the clock of then
    look = Look(RUNNING, 1, messages=messages)
    assert reconcile(check, look, 30.0, since=19.0, until=30.0) == []


@pytest.mark.parametrize("stops_first", [True, False])
def test_a_first_look_that_comes_late_takes_no_event_that_waits_for_a_name(stops_first: bool) -> None:
    check = CrossCheck(GRACE)
    check.event(raw("virtio-disk1", at=1.0, action=ACTION_REPORT), 1.0)
    if stops_first:
        suspend(check, 5.0, by_io_error=True)
    for _ in range(3):
        assert check.event(raw("", at=5.0), 5.0) is Verdict.HOLD
    late = Look(PAUSED, PAUSED_IOERROR, {"vdb": 1}, asked_at=5.1)
    assert reconcile(check, late, 5.2, since=0.5) == []
    if not stops_first:
        suspend(check, 5.3, by_io_error=True)
    look_at(check, late, 5.3)
    assert [(burst.raw.alias, burst.count) for burst in findings(check, 7.0)] == [("virtio-disk1", 1)] * 3


def test_the_evidence_for_an_error_comes_with_the_look_that_is_whole() -> None:
    check = CrossCheck(GRACE)
    check.event(raw(action=ACTION_REPORT), 0.0)
    look_at(check, Look(RUNNING, 1, complete=False))
    (burst,) = look_at(check, Look(RUNNING, 1, messages=read_messages([line("vda", 30)])), 12.0)
    assert burst.message == "Input/output error"
    assert look_at(check, Look(RUNNING, 1), 15.0) == []


def test_a_paused_guests_finding_has_the_time_that_libvirt_remembers() -> None:
    look = Look(PAUSED, PAUSED_IOERROR, {"vda": 1}, read_messages([line("vda", 7)]))
    (found,) = reconcile(CrossCheck(GRACE), look, 20.0)
    assert (found.first_ns, found.last_ns, found.message) == (7 * S, 7 * S, "Input/output error")


def test_a_guest_that_was_started_anew_unseen_begins_without_a_past() -> None:
    check = CrossCheck(GRACE)
    check.event(raw(), 0.0)
    suspend(check, 0.0)
    look = check.reconcile(UUID, "db1", 2, IO_PAUSE, DEVICES, stamps=None, mono=5.0, ns=5 * S)
    assert len(look) == 1


def test_a_device_that_is_plugged_in_anew_begins_without_a_past() -> None:
    check = CrossCheck(GRACE)
    both = Look(PAUSED, PAUSED_IOERROR, {"vda": 1, "vdb": 1})
    for alias in DEVICES:
        check.event(raw(alias), 0.0)
    suspend(check, 0.0)
    look_at(check, both)
    assert findings(check, 10.0) == []
    check.resumed(UUID)
    check.removed(UUID, "virtio-disk1")
    suspend(check, 20.0)
    look_at(check, both, 21.0)
    assert [burst.raw.alias for burst in findings(check, 30.0)] == ["virtio-disk1"]


def test_devices_that_come_fail_and_go_leave_nothing() -> None:
    check = CrossCheck(GRACE)

    def fail_and_go(number: int) -> None:
        check.event(raw(f"ua-{number}", action=ACTION_REPORT), float(number))
        check.removed(UUID, f"ua-{number}")

    fail_and_go(0)
    tracemalloc.start()
    try:
        for number in range(10_000):
            fail_and_go(number)
        assert tracemalloc.get_traced_memory()[0] < 100_000  # each one kept is 350 bytes
    finally:
        tracemalloc.stop()


def test_domains_that_are_gone_are_forgotten_and_their_open_pause_told() -> None:
    check = CrossCheck(GRACE)
    suspend(check, 0.0)
    assert len(check.keep_only(frozenset({"another"}))) == 1
    assert len(check) == 0


# ---------------------------------------------------------------------- an event later than its resume


def a_late_event(check: CrossCheck, at: float) -> None:
    suspend(check, at - 0.6)
    check.resumed(UUID)
    assert check.event(raw(at=at), at) is Verdict.TELL


def test_a_guest_that_an_event_called_paused_after_its_resume_is_looked_at_and_runs() -> None:
    check = CrossCheck(GRACE)
    a_late_event(check, 5.0)
    assert check.next_doubt() == 6.0
    assert check.doubtful(5.9) == []
    assert check.doubtful(6.0) == [UUID]
    assert not check.runs(UUID, Look(RUNNING, 1, asked_at=4.9))  # it may have been paused since
    assert check.runs(UUID, Look(RUNNING, 1, asked_at=6.0))
    assert check.next_doubt() is None
    assert not check.runs(UUID, Look(RUNNING, 1, asked_at=7.0))  # said once


def test_a_look_that_gets_no_answer_is_asked_for_again() -> None:
    check = CrossCheck(GRACE)
    a_late_event(check, 5.0)
    assert check.doubtful(6.0) == [UUID]
    assert check.doubtful(15.9) == []
    assert check.doubtful(16.0) == [UUID]


def test_a_guest_that_a_look_finds_paused_stays_so() -> None:
    check = CrossCheck(GRACE)
    a_late_event(check, 5.0)
    assert not check.runs(UUID, replace(IO_PAUSE, asked_at=6.0))
    assert check.next_doubt() is None


@pytest.mark.parametrize("pause_first", [True, False])
def test_an_event_with_its_pause_leaves_no_doubt(pause_first: bool) -> None:
    check = CrossCheck(GRACE)
    if pause_first:
        suspend(check, 0.0)
    check.event(raw(), 0.1)
    if not pause_first:
        suspend(check, 0.2)
    check.event(raw(), 0.3)
    assert check.next_doubt() is None


def test_a_further_event_of_a_guest_that_stands_still_leaves_no_doubt() -> None:
    check = CrossCheck(GRACE)
    check.event(raw(), 0.0)
    suspend(check, 0.0)
    look_at(check, IO_PAUSE)
    assert findings(check, 10.0) == []
    check.event(raw(at=11.0), 11.0)
    assert check.next_doubt() is None


def test_a_resume_or_the_guests_end_leaves_no_doubt() -> None:
    check = CrossCheck(GRACE)
    check.event(raw(), 0.0)
    check.resumed(UUID)
    assert check.next_doubt() is None
    check.event(raw(), 1.0)
    check.gone(UUID)
    assert check.next_doubt() is None


# --------------------------------------------------------------------- errors without their device's name


def test_an_event_without_a_device_is_named_by_the_look_and_counted_once() -> None:
    check = CrossCheck(GRACE)
    assert check.event(raw("", reason="enospc"), 0.0) is Verdict.TELL
    suspend(check, 0.0)
    look_at(check, IO_PAUSE, 0.1)
    (named,) = decide(check, 1.0)
    assert (named.count, named.raw.alias, named.raw.reason) == (0, "virtio-disk0", "enospc")


def test_of_two_disks_that_a_look_finds_the_nameless_event_is_one_and_the_other_is_told() -> None:
    check = CrossCheck(GRACE)
    check.event(raw(""), 0.0)
    suspend(check, 0.0)
    look_at(check, Look(PAUSED, PAUSED_IOERROR, {"vda": 1, "vdb": 1}), 0.1)
    assert sorted(burst.count for burst in decide(check, 1.0)) == [0, 1]


def test_a_further_nameless_event_of_a_guest_waits_for_the_look_and_is_told_with_its_device() -> None:
    """It may be of the device that was told before, or of another one."""
    check = CrossCheck(GRACE)
    check.event(raw(""), 0.0)
    assert check.event(raw("", at=0.1), 0.1) is Verdict.HOLD
    suspend(check, 0.2)
    assert check.undecided_since(0.3) == 0.2
    look_at(check, Look(PAUSED, PAUSED_IOERROR, {"vda": 1, "vdb": 1}))
    bursts = decide(check, 2.0)
    assert [(each.raw.alias, each.count, each.origin) for each in bursts] == [
        ("virtio-disk0", 0, Origin.EVENT), ("virtio-disk1", 1, Origin.EVENT),
    ]  # fmt: skip
    check.resumed(UUID)
    assert check.event(raw("", at=5.0), 5.0) is Verdict.HOLD
    suspend(check, 5.0)
    look_at(check, Look(PAUSED, PAUSED_IOERROR, {"vda": 1}), 5.5)
    assert [(each.raw.alias, each.count) for each in findings(check, 7.0)] == [("virtio-disk0", 1)]


def test_a_nameless_event_that_was_held_is_told_also_where_its_pause_never_comes() -> None:
    check = CrossCheck(GRACE)
    check.event(raw(""), 0.0)
    check.event(raw("", at=0.1), 0.1)
    assert check.next_due() == 0.1 + GRACE
    assert [(each.raw.alias, each.count) for each in findings(check, 2.0)] == [("", 1)]
    check.event(raw("", at=3.0), 3.0)
    assert [(each.raw.alias, each.count) for each in check.gone(UUID)] == [("", 1)]


@pytest.mark.parametrize("action", [ACTION_REPORT, ACTION_PAUSE])
def test_where_a_disk_left_after_a_nameless_event_the_one_that_stayed_is_not_blamed(action: int) -> None:
    """It was one of two, and may have been the other."""
    check = CrossCheck(GRACE)
    check.event(raw("", action=action), 0.0)
    check.removed(UUID, "virtio-disk1")
    assert check.described(UUID, "virtio-disk0", frozenset(), 0.1) == []
    check.resumed(UUID)
    assert check.described(UUID, "virtio-disk0", frozenset(), 10.0) == []
    check.event(raw("", action=action, at=20.0), 20.0)
    assert named(check.described(UUID, "virtio-disk0", frozenset(), 20.1)) == [("virtio-disk0", 0)]


def named(bursts: list[Burst]) -> list[tuple[str, int]]:
    return [(burst.raw.alias, burst.count) for burst in bursts]


def test_an_old_disk_error_is_no_reason_to_name_the_one_that_stayed() -> None:
    check = CrossCheck(GRACE)
    check.baseline(UUID, "db1", 1, {"virtio-disk0": 1})
    check.event(raw(""), 10.0)
    suspend(check, 10.0)
    check.removed(UUID, "virtio-disk1")
    look_at(check, Look(PAUSED, PAUSED_IOERROR, {"vda": 1}), 10.5)
    assert {alias for alias, _ in named(decide(check, 12.0))} == {""}


def nameless_report(check: CrossCheck, *copied: str, at: float = 0.0) -> Verdict:
    """An error's event without a name, while these disks had a block job as far as anybody knows."""
    verdict = check.event(raw("", at, action=ACTION_REPORT), at)
    check.suspect(UUID, frozenset(copied))
    return verdict


A, B = "virtio-disk0", "virtio-disk1"


@pytest.mark.parametrize("known", [(A, B), (B,), ()], ids=["both copies", "one copy", "no copy"])
def test_of_two_disks_that_were_copied_the_one_whose_copy_goes_on_is_not_blamed(
    known: tuple[str, ...],
) -> None:
    """Whatever was known of the copies at the error: the one that ended since is told of at its end."""
    check = CrossCheck(GRACE)
    nameless_report(check, *known)
    check.suspect(UUID, frozenset({A}))  # its copy ended
    assert check.described(UUID, "", frozenset({B}), 0.1) == []
    assert check.described(UUID, "", frozenset({B}), 5.0) == [], "nor later"
    assert check.described(UUID, "", frozenset(), 6.0) == []
    nameless_report(check, B, at=20.0)
    assert named(check.described(UUID, "", frozenset({B}), 20.1)) == [(B, 0)], (
        "a later one is of its own time"
    )


def test_the_only_disk_that_was_copied_is_named_also_when_its_copy_has_ended() -> None:
    check = CrossCheck(GRACE)
    nameless_report(check, A)
    check.suspect(UUID, frozenset({A}))
    assert named(check.described(UUID, "", frozenset(), 0.1)) == [(A, 0)]


def test_a_disk_whose_copy_began_later_is_not_blamed_for_what_no_description_explained() -> None:
    check = CrossCheck(GRACE)
    nameless_report(check)
    assert check.described(UUID, "", frozenset(), 0.1) == []  # a backup of one of the two, say
    assert check.described(UUID, "", frozenset({A}), 60.0) == []


def test_each_error_without_a_name_is_of_its_own_time() -> None:
    """The disks are read after each, unless that has just shown nothing."""
    check = CrossCheck(GRACE)
    assert [nameless_report(check, at=at) for at in (0.0, 5.0)] == [Verdict.TELL_AND_LOOK] * 2
    assert check.described(UUID, "", frozenset(), 5.1) == []
    assert nameless_report(check, at=5.2) in (Verdict.TELL, Verdict.TELL_AND_LOOK)
    assert check.described(UUID, "", frozenset({A}), 3600.0) == []
    assert not check.has_nameless(UUID)


def test_a_pauses_device_is_named_by_the_look_before_any_copy_and_by_the_copy_where_that_is_of_no_use() -> (
    None
):
    for wrong, expected in (({"vdb": 1}, B), ({}, A)):
        check = CrossCheck(GRACE)
        check.event(raw(""), 0.0)
        check.suspect(UUID, frozenset({A}))
        suspend(check, 0.0)
        assert check.described(UUID, "", frozenset({A}), 0.1) == []
        look_at(check, Look(PAUSED, PAUSED_IOERROR, wrong), 0.1)
        found = [burst for burst in decide(check, 1.0) if burst.raw.alias]
        found += check.described(UUID, "", frozenset({A}), 1.0)
        assert named(found) == [(expected, 0)]


def test_a_pause_without_an_event_is_not_of_the_disk_that_is_copied() -> None:
    check = CrossCheck(GRACE)
    assert len(check.listed(UUID, "db1", 1, alias="", mono=0.0, ns=0)) == 1
    assert check.described(UUID, "", frozenset({A}), 0.1) == []
    assert named(check.described(UUID, A, frozenset(), 0.2)) == [], "there were two"


def test_a_further_error_without_a_name_waits_for_the_description_and_is_counted_once() -> None:
    check = CrossCheck(GRACE)
    assert nameless_report(check, A) is Verdict.TELL_AND_LOOK
    assert named(check.described(UUID, "", frozenset({A}), 0.1)) == [(A, 0)]
    assert [nameless_report(check, A, at=at) for at in (5.0, 5.1)] == [Verdict.HOLD] * 2
    assert (check.undecided_since(5.1), check.next_due()) == (5.0, 5.0 + GRACE)
    assert named(check.described(UUID, "", frozenset({A}), 5.2)) == [(A, 1), (A, 1)]
    assert nameless_report(check, A, at=8.0) is Verdict.HOLD
    assert named(check.described(UUID, "", frozenset({A, B}), 8.1)) == [("", 1)]
    assert nameless_report(check, A, B, at=8.2) is Verdict.TELL, "it is read that nobody can tell"
    assert nameless_report(check, A, B, at=20.0) is Verdict.HOLD
    assert named(findings(check, 20.0 + GRACE)) == [("", 1)], "and no description came"
    assert nameless_report(check, A, B, at=30.0) is Verdict.HOLD
    assert named(check.gone(UUID)) == [("", 1)]


def test_few_errors_wait_for_a_description() -> None:
    check = CrossCheck(GRACE)
    check.event(raw(A, action=ACTION_REPORT), 0.0)
    verdicts = [nameless_report(check, at=1.0) for _ in range(2 * MOST_WAITING)]
    assert verdicts.count(Verdict.HOLD) == MOST_WAITING
    assert len(findings(check, 9.0)) == MOST_WAITING


def test_a_nameless_event_after_its_finding_is_not_counted_again() -> None:
    check = CrossCheck(GRACE)
    suspend(check, 0.0)
    look_at(check, IO_PAUSE, 0.1)
    assert len(findings(check, 1.0)) == 1
    assert check.event(raw("", at=1.5), 1.5) is Verdict.KNOWN


def test_a_look_that_comes_after_a_nameless_finding_names_it_without_a_count() -> None:
    check = CrossCheck(GRACE)
    suspend(check, 0.0)
    assert findings(check, 1.0) == []
    (nameless,) = findings(check, 2.0)
    assert nameless.raw.alias == ""
    (named,) = look_at(check, IO_PAUSE, 60.0)
    assert (named.count, named.raw.alias, named.disk_error) == (0, "virtio-disk0", "unspecified")
    assert look_at(check, IO_PAUSE, 61.0) == []


def test_a_look_that_comes_late_still_brings_the_evidence_of_an_event() -> None:
    check = CrossCheck(GRACE)
    check.event(raw(), 0.0)
    suspend(check, 0.0)
    assert decide(check, 1.0) == []
    assert decide(check, 2.0) == []
    (more,) = look_at(check, IO_PAUSE, 60.0)
    assert (more.count, more.raw.alias, more.disk_error) == (0, "virtio-disk0", "unspecified")


def test_a_guest_that_is_listed_as_paused_is_told_before_any_look_and_refined_by_it() -> None:
    check = CrossCheck(GRACE)
    (found,) = check.listed(UUID, "db1", 1, alias="", mono=5.0, ns=5 * S)
    assert (found.origin, found.count, found.raw.alias) == (Origin.RECONCILE, 1, "")
    assert check.listed(UUID, "db1", 1, alias="", mono=6.0, ns=6 * S) == []
    (named,) = reconcile(check, replace(IO_PAUSE, asked_at=9.0), 9.0)
    assert (named.count, named.raw.alias) == (0, "virtio-disk0")


def test_the_pause_of_a_listed_guest_and_its_event_may_still_arrive() -> None:
    check = CrossCheck(GRACE)
    assert len(check.listed(UUID, "db1", 1, alias="", mono=5.0, ns=5 * S)) == 1
    suspend(check, 5.1)
    assert check.event(raw(at=5.2), 5.2) is Verdict.FOUND
    assert findings(check, 20.0) == []


def test_a_listed_guest_whose_event_came_before_is_not_told_again() -> None:
    check = CrossCheck(GRACE)
    check.event(raw(), 0.0)
    suspend(check, 0.0)
    assert check.listed(UUID, "db1", 1, alias="", mono=0.5, ns=S) == []


def test_of_several_kept_messages_the_newest_speaks() -> None:
    """libvirt keeps one message an image, the top image first, whichever failed last."""
    kept = read_messages([line("vda", 9, "old"), line("vda", 30, "new"), line("vda", 12, "older")])
    look = Look(PAUSED, PAUSED_IOERROR, {"vda": 1}, kept)
    (found,) = reconcile(CrossCheck(GRACE), look, 50.0, since=20.0)
    assert (found.message, found.first_ns, found.stamp_ns) == ("new", 30 * S, 30 * S)
    assert [item.found for item in found.evidence if item.check == "messages"] == ["new"]


def test_only_disks_are_found_by_target() -> None:
    devices = {
        "net0": Device("net0", target="vda", kind="interface"),
        "virtio-disk0": Device("virtio-disk0", target="vda", kind="disk"),
        "net1": Device("net1", target="vda", kind="interface"),
    }
    (found,) = CrossCheck(GRACE).reconcile(UUID, "db1", 1, IO_PAUSE, devices, stamps=None, mono=5.0, ns=5 * S)
    assert found.raw.alias == "virtio-disk0"


# ----------------------------------------------------------------------------------------- any history


@dataclass(frozen=True)
class Failure:
    """One error of a guest, and what becomes of its traces."""

    named: bool  # its disk has a name: its event comes
    lateness: float  # of the event after the pause, as a part of `hold`; below the grace time
    event_first: bool
    hold: float  # how long the guest stays paused
    calm: float  # how long it runs then
    look_delay: float  # as a part of `hold`: a look at a guest that runs again finds nothing


failures = st.builds(
    Failure,
    named=st.booleans(),
    lateness=st.floats(0, 0.9),
    event_first=st.booleans(),
    hold=st.floats(0.05, 4),
    calm=st.floats(0.02, 3),
    look_delay=st.floats(0.001, 0.9),
)


@settings(max_examples=500)
@given(st.lists(failures, max_size=8))
def test_any_history_tells_each_error_once(history: list[Failure]) -> None:
    check, told = CrossCheck(GRACE), {"virtio-disk0": 0, "virtio-disk1": 0, "": 0}
    wrong: set[str] = set()
    agenda: list[tuple[float, int, str, Failure]] = []
    at, order = 10.0, 0
    for failure in history:
        event_at = at if failure.event_first else at + min(failure.lateness * failure.hold, 0.9)
        for when, what in (
            *(((event_at, "event"),) if failure.named else ()),
            (at, "suspended"),
            (at + min(failure.look_delay * failure.hold, 0.9), "look"),
            (at + failure.hold, "resumed"),
        ):
            first = what == "event" and failure.event_first
            heapq.heappush(agenda, (when, order - 10 * first, what, failure))
            order += 1
        at += failure.hold + failure.calm

    def settle(until: float) -> None:
        while (due := check.next_due()) is not None and due <= until:
            for decision in check.due(due, {UUID: UNNAMED}):
                for burst in decision.bursts:
                    told[burst.raw.alias] += burst.count

    while agenda:
        now, _, what, failure = heapq.heappop(agenda)
        settle(now)
        alias = "virtio-disk0" if failure.named else "virtio-disk1"
        surely = failure.event_first or not failure.named
        if what == "event":
            told[alias] += check.event(raw(alias, now), now) is Verdict.TELL
        elif what == "suspended":
            suspend(check, now, by_io_error=surely)
        elif what == "look":
            reason = PAUSED_IOERROR if surely else PAUSED_UNKNOWN
            wrong.add("vda" if failure.named else "vdb")  # QEMU keeps them
            look_at(check, Look(PAUSED, reason, dict.fromkeys(wrong, 1)), now)
        else:
            check.resumed(UUID)
    settle(1e9)
    assert told == {
        "virtio-disk0": sum(failure.named for failure in history),
        "virtio-disk1": sum(not failure.named for failure in history),
        "": 0,
    }


@pytest.mark.parametrize("looked", [True, False], ids=["looked at", "no look"])
def test_an_operators_pause_soon_after_an_error_is_no_error(looked: bool) -> None:
    """The error's own pause is over by then, and its event came in time or late."""
    check = CrossCheck(GRACE)
    suspend(check, 0.0)
    look_at(check, IO_PAUSE, 0.1)
    told = check.event(raw(at=0.2), 0.2) is Verdict.TELL
    check.resumed(UUID, 0.3)
    suspend(check, 0.6, by_io_error=False)
    if looked:
        look_at(check, Look(PAUSED, PAUSED_UNKNOWN, {"vda": 1}), 0.7)
    assert told + sum(burst.count for due in (1.0, 1.6, 2.6) for burst in findings(check, due)) == 1


@pytest.mark.parametrize("lasts", [0.3, 3.0], ids=["undecided", "decided"])
def test_an_error_soon_after_an_operators_pause_is_one(lasts: float) -> None:
    """Its event comes before its own pause, which libvirt then says is by an I/O error."""
    check, told = CrossCheck(GRACE), 0
    suspend(check, 0.0, by_io_error=False)
    for due in (1.0, 2.0):
        told += sum(burst.count for burst in findings(check, due) if due < lasts)
    check.resumed(UUID, lasts)
    told += check.event(raw(at=lasts + 0.4), lasts + 0.4) is Verdict.TELL
    suspend(check, lasts + 0.41)
    look_at(check, IO_PAUSE, lasts + 0.5)
    while (due := check.next_due()) is not None:
        told += sum(burst.count for burst in findings(check, due))
    assert told == 1


def test_pauses_of_unknown_reason_take_no_memory_for_ever() -> None:
    """Each may be by an error whose event is late; a guest may be paused for years."""
    check = CrossCheck(GRACE)
    for number in range(100):
        suspend(check, 60.0 * number, by_io_error=False)
        decide(check, 60.0 * number + 30.0)
        decide(check, 60.0 * number + 40.0)
        check.resumed(UUID, 60.0 * number + 50.0)
    assert len(check.cases[UUID].unsaid) == 1


def test_an_operators_pause_soon_after_a_late_event_is_no_error_if_a_look_says_so() -> None:
    check = CrossCheck(GRACE)
    suspend(check, 0.0)
    look_at(check, IO_PAUSE, 0.1)
    assert sum(burst.count for burst in findings(check, 1.0)) == 1
    check.resumed(UUID, 1.1)
    assert check.event(raw(at=1.2), 1.2) is Verdict.KNOWN
    suspend(check, 1.5, by_io_error=False)
    look_at(check, Look(PAUSED, PAUSED_USER, {"vda": 1}), 1.6)
    assert sum(burst.count for burst in findings(check, 2.5)) == 0


@pytest.mark.parametrize("answered", [0.05, 0.3], ids=["before it left", "behind"])
def test_an_old_error_of_a_disk_that_is_unplugged_before_a_pause_is_decided_is_none(answered: float) -> None:
    check = CrossCheck(GRACE)
    check.baseline(UUID, "db1", 1, {"virtio-disk0": 1})
    check.event(raw("virtio-disk0", at=-60.0, action=ACTION_REPORT), -60.0)
    check.baseline(UUID, "db1", 1, {"virtio-disk0": 1})
    assert check.event(raw("virtio-disk1", at=0.0), 0.0) is Verdict.TELL
    suspend(check, 0.01)
    found = replace(Look(PAUSED, PAUSED_IOERROR, {"vda": 1, "vdb": 1}), asked_at=0.03)
    if answered < 0.2:
        check.looked(UUID, found, DEVICES)
    check.resumed(UUID, 0.1)
    check.removed(UUID, "virtio-disk0")
    if answered > 0.2:
        check.looked(UUID, found, DEVICES)
    assert findings(check, 1.1) == []


def test_a_first_look_at_a_later_pause_leaves_it_to_its_event() -> None:
    """Which of two old disk errors came anew only the event says; libvirt had not been asked before."""
    check = CrossCheck(GRACE)
    check.keep_only(frozenset({UUID}))
    assert check.event(raw(at=0.0), 0.0) is Verdict.TELL
    suspend(check, 0.01)
    assert findings(check, 1.1) == []
    assert findings(check, 2.1) == []
    check.resumed(UUID, 3.0)
    suspend(check, 10.0, by_io_error=False)
    look = replace(Look(PAUSED, PAUSED_UNKNOWN, {"vda": 1, "vdb": 1}), asked_at=10.05)
    assert reconcile(check, look, 10.1) == []
    check.looked(UUID, look, DEVICES)
    assert check.event(raw(at=10.6), 10.6) is Verdict.TELL
    assert [(found.raw.alias, found.origin) for found in findings(check, 11.1)] == [
        ("virtio-disk1", Origin.RECONCILE)  # which the memory of incidents knows to be an old one
    ]


@dataclass(frozen=True)
class Stop:
    """A pause; its event comes `late` seconds after it (None: before it, or never where libvirt loses it).

    A late one is of a pause that libvirt can't give a reason for; by an operator there is no event at all.
    """

    lasts: float
    calm: float  # how long the guest runs then
    late: float | None
    looked: bool
    operator: bool


stops = st.builds(
    Stop,
    lasts=st.floats(0.1, 5.0),
    calm=st.floats(0.1, 5.0),
    late=st.floats(0.0, 3.0) | st.none(),
    looked=st.booleans(),
    operator=st.booleans(),
)


@settings(max_examples=1000)
@given(st.lists(stops, max_size=6), st.booleans())
def test_any_history_of_late_or_lost_events_counts_each_error_and_where_each_pause_was_looked_at_once(
    history: list[Stop], loses: bool
) -> None:
    """QEMU from 9.2 on holds events back for a second: they may come behind the grace time and the next
    resume. libvirt up to 9.0 loses those of some disks, whose errors it hears of all the same; no other does.
    """
    check, told, order, at = CrossCheck(GRACE), 0, 0, 10.0
    agenda: list[tuple[float, int, str]] = []
    event_at, paused = 0.0, False
    for stop in history:
        # Events come in their order; one that is before its pause is the reason that libvirt gives.
        comes_at = max(event_at, at + (-0.01 if loses or stop.late is None else stop.late))
        steps = [(at, "suspended" if comes_at < at and not stop.operator else "stopped")]
        if not stop.operator and not (loses and stop.late is None):
            event_at = comes_at
            steps.append((event_at, "event"))
        if stop.looked and not stop.operator:
            steps.append((at + min(0.05, stop.lasts / 2), "look"))
        steps.append((at + stop.lasts, "resumed"))
        if stop.looked and stop.operator:  # in time, or when the guest runs again
            steps.append((at + min(0.15, stop.calm / 2 + stop.lasts), "look at an operator's"))
        for when, what in steps:
            heapq.heappush(agenda, (when, order, what))
            order += 1
        at += stop.lasts + stop.calm
    while agenda:
        now, _, what = heapq.heappop(agenda)
        while (due := check.next_due()) is not None and due <= now:
            told += sum(burst.count for burst in findings(check, due))
        if what == "event":
            told += check.event(raw(at=now), now) is Verdict.TELL
        elif what in ("suspended", "stopped"):
            suspend(check, now, by_io_error=what == "suspended")
            paused = True
        elif what == "resumed":
            check.resumed(UUID, now)
            paused = False
        else:
            look = Look(PAUSED, PAUSED_IOERROR if what == "look" else PAUSED_USER, {"vda": 1})
            seen = look if paused else Look(RUNNING, RUNNING_UNPAUSED)
            told += sum(burst.count for burst in look_at(check, seen, now))
    while (due := check.next_due()) is not None:
        told += sum(burst.count for burst in findings(check, due))
    errors = sum(not stop.operator for stop in history)
    assert told >= errors
    # A finding without a name explains no event of a guest that goes on: it may be of another disk.
    assert told == errors or not all(stop.looked for stop in history)


@dataclass(frozen=True)
class Nameless:
    """A pause by errors of one or both disks; libvirt names the device of each, or of none."""

    disks: tuple[str, ...]
    named: bool
    again: int  # so many events more of the first disk
    lateness: float  # of the events after the pause; negative: before it
    looked: bool


nameless = st.builds(
    Nameless,
    disks=st.sampled_from([("vda",), ("vdb",), ("vda", "vdb"), ("vdb", "vda")]),
    named=st.booleans(),
    again=st.integers(0, 2),
    lateness=st.floats(-0.4, 0.4),
    looked=st.booleans(),
)


@settings(max_examples=500)
@given(st.lists(nameless, min_size=1, max_size=6))
def test_any_history_of_events_without_a_device_counts_each_of_them_once(history: list[Nameless]) -> None:
    check, told, expected = CrossCheck(GRACE), 0, 0
    wrong: set[str] = set()
    for number, failure in enumerate(history):
        at = 10.0 * number + 10.0
        events = [*failure.disks, *[failure.disks[0]] * failure.again]
        expected += len(events)

        def come(events: list[str], at: float, *, named: bool) -> int:
            aliases = {"vda": "virtio-disk0", "vdb": "virtio-disk1"}
            verdicts = [check.event(raw(aliases[disk] if named else "", at), at) for disk in events]
            return sum(verdict in (Verdict.TELL, Verdict.TELL_AND_LOOK) for verdict in verdicts)

        if failure.lateness < 0:
            told += come(events, at + failure.lateness, named=failure.named)
        suspend(check, at)
        if failure.lateness >= 0:
            told += come(events, at + failure.lateness, named=failure.named)
        wrong |= set(failure.disks)
        if failure.looked:
            look_at(check, Look(PAUSED, PAUSED_IOERROR, dict.fromkeys(sorted(wrong), 1)), at + 0.5)
        for due in (at + 1.0, at + 2.0):
            told += sum(burst.count for burst in findings(check, due))
        check.resumed(UUID)
        left_over = {"vda": "virtio-disk0", "vdb": "virtio-disk1"}
        check.baseline(UUID, "db1", 1, {left_over[disk]: 1 for disk in sorted(wrong)})  # asked at each resume
    assert told == expected


# -------------------------------------------------------------------------------- messages and evidence


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (line("vda", 3), [("vda", 3 * S, "Input/output error")]),
        (line("vda", 3, "it's 'odd'"), [("vda", 3 * S, "it's 'odd'")]),
        ("I/O error: disk='vda', something new", [("vda", None, "I/O error: disk='vda', something new")]),
        ("I/O error: disk='vda', timestamp='9999-99-99 00:00:00.000+0000'", None),
        ("tainted: custom monitor control", []),
        ("", []),
    ],
)
def test_messages_are_read_as_far_as_they_can_be(
    text: str, expected: list[tuple[object, ...]] | None
) -> None:
    read = [(m.target, m.at_ns, m.text) for m in read_messages([text])]
    assert read == ([("vda", None, text)] if expected is None else expected)


@given(st.text(max_size=200))
def test_any_message_is_survived(text: str) -> None:
    read_messages([text, f"I/O error: disk='{text}', timestamp='{text}'"])


def verdict(check_name: str, look: Look, device: Device, reason: str = "enospc") -> str:
    evidence = gather(look, device, reason, lifecycle=False, pause=True)
    return next(item.verdict for item in evidence if item.check == check_name)


def test_a_full_file_system_confirms_no_space() -> None:
    look = Look(PAUSED, 5, {"vda": 2}, None, {"vda": Space(10, 5, 10)}, {"vda": FreeSpace(0, "/img")})
    assert verdict("file_system", look, DEVICES["virtio-disk0"]) == "confirms"


def test_a_file_system_with_space_left_does_not_contradict_no_space() -> None:
    """It may lack metadata blocks, quota, or space in the pool below it."""
    look = Look(PAUSED, 5, {"vda": 2}, None, {"vda": Space(10, 5, 10)}, {"vda": FreeSpace(1 << 30, "/img")})
    assert verdict("file_system", look, DEVICES["virtio-disk0"]) == "inconclusive"


def test_a_pause_alone_does_not_confirm_that_space_was_short() -> None:
    look = Look(PAUSED, 5, {"vda": 1})
    evidence = gather(look, DEVICES["virtio-disk0"], "enospc", lifecycle=True, pause=True)
    assert "confirms" not in {item.verdict for item in evidence}


def test_a_file_system_that_is_not_ours_to_see_says_nothing() -> None:
    look = Look(PAUSED, 5, {"vda": 2})
    assert verdict("file_system", look, DEVICES["virtio-disk0"]) == "unavailable"
    assert verdict("block_info", look, DEVICES["virtio-disk0"]) == "unavailable"


@pytest.mark.parametrize(
    ("kind", "format", "space", "expected"),
    [
        ("block", "qcow2", Space(100 << 20, 50 << 20, 50 << 20), "confirms"),
        ("block", "qcow2", Space(100 << 20, 10 << 20, 50 << 20), "inconclusive"),
        ("block", "raw", Space(50 << 20, 50 << 20, 50 << 20), "inconclusive"),
        ("file", "raw", Space(100 << 20, 100 << 20, 100 << 20), "inconclusive"),
        ("file", "qcow2", Space(100 << 20, 10 << 20, 100 << 20), "inconclusive"),
    ],
)
def test_an_images_sizes_say_what_they_can_about_no_space(
    kind: str, format: str, space: Space, expected: str
) -> None:
    device = Device("virtio-disk0", target="vda", source=DeviceSource(type=kind, format=format))
    assert verdict("block_info", Look(PAUSED, 5, {"vda": 2}, None, {"vda": space}), device) == expected


def test_space_is_no_evidence_for_another_reason() -> None:
    evidence = gather(Look(PAUSED, 5, {"vda": 1}), DEVICES["virtio-disk0"], "", lifecycle=False, pause=True)
    assert [item.check for item in evidence] == ["state", "disk_errors"]
