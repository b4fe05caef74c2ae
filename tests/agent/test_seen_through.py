"""Every gap begins at what was seen through: over drains, losses, standstills, clock steps and restarts."""

from __future__ import annotations

import os
import shutil
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from tests.agent.test_agent import AGENT, House
from tests.faults.spool_kit import open_spool
from tests.sources.simulated import SimulatedHost
from tests.sources.test_observer import OPTIONS
from tests.waiting import wait_until
from virtbus.agent.agent import Agent, AgentOptions
from virtbus.agent.incidents import IncidentLimits, Incidents
from virtbus.agent.publisher import Publisher
from virtbus.errors import RestartNeeded, SpoolFull
from virtbus.model import Clock, Host, Now
from virtbus.observations import (
    CallbackLost,
    DomainState,
    HostKnown,
    SourceGone,
    SourceLost,
    SourceReady,
    SourceSeen,
    StoodStill,
    Surveyed,
)
from virtbus.seen import MARGIN_SECONDS, Moment
from virtbus.sources.link import RESUMED
from virtbus.sources.observer import Observer
from virtbus.spool import Spool, SpoolLimits, faults
from virtbus.testing import FakeBus, FakeSource, a_gap, a_host, a_raw_io_error

T = 1_800_000_000 * 10**9


def moment(text):
    return datetime.fromisoformat(text).timestamp()


def spans(one, kind="gap"):
    return [(moment(e["data"]["started_at"]), moment(e["data"]["ended_at"])) for e in one.delivered(kind)]


def in_a_child(work):
    """Run `work` in a forked process that ends as it likes, even killed."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def test_an_error_that_was_queued_after_the_drain_lies_in_the_gap_when_its_commit_was_the_last(
    tmp_path, house
):
    stamp = tmp_path / "stamp"

    def killed_after_the_commit():
        one = House(tmp_path / "state")
        queued = threading.Event()

        def describe(uuid):
            if not queued.is_set():
                queued.set()
                raw = a_raw_io_error(alias="late", observed_at=time.time_ns())
                stamp.write_text(str(raw.observed_at))
                one.agent.queue.put(raw)
                time.sleep(0.2)

        one.source.describe = describe
        one.start().wait("gap")
        faults.hook = lambda point: (
            os.kill(os.getpid(), 9) if point == "after_commit" and queued.is_set() else None
        )
        one.source.play(a_raw_io_error(observed_at=time.time_ns()))
        time.sleep(30)

    in_a_child(killed_after_the_commit)
    one = house()
    one.wait("gap")
    (started, ended), *_ = spans(one)
    assert started <= int(stamp.read_text()) / 1e9 <= ended


@pytest.mark.parametrize("end", ["stopped", "killed"])
def test_the_time_for_which_libvirt_was_away_lies_in_a_gap_also_when_the_agent_ends_meanwhile(
    tmp_path, house, monkeypatch, end
):
    monkeypatch.setattr("virtbus.agent.intake.ALIVE_SECONDS", 0.05)
    monkeypatch.setattr("virtbus.spool.committing.ALIVE_SECONDS", 0.05)

    def away():
        one = House(tmp_path / "state").start()
        one.wait("gap")
        lost = time.time_ns()
        (tmp_path / "lost").write_text(str(lost))
        one.source.play(SourceLost(lost, "the daemon went away"))
        wait_until(lambda: one.agent.not_ready() == ["source is disconnected"])
        time.sleep(0.5)  # signs of life go on
        if end == "killed":
            os.kill(os.getpid(), 9)
        one.end()

    in_a_child(away)
    one = house()
    one.wait("gap")
    assert spans(one)[0][0] <= int((tmp_path / "lost").read_text()) / 1e9


def test_a_start_that_finds_no_libvirt_claims_to_have_seen_nothing(tmp_path, house, monkeypatch):
    first = house()
    first.wait("gap")
    first.end()
    monkeypatch.setattr("virtbus.agent.intake.SOURCE_GRACE_SECONDS", 0.1)
    run = FakeSource.run
    monkeypatch.setattr(FakeSource, "run", lambda self, sink, stop: stop.wait())
    ended = time.time()
    blind = house()
    blind.wait("gap")
    blind.end()
    monkeypatch.setattr(FakeSource, "run", run)
    third = house()
    third.wait("gap")
    assert spans(third)[0][0] <= ended


class Observed:
    """An agent on a simulated hypervisor, with a clock that can stand still."""

    def __init__(self, folder, **options):
        self.host = SimulatedHost(1)
        self.slept = 0.0
        self.bus = FakeBus()
        self.agent = Agent(
            source=Observer(self.host, options=replace(OPTIONS, **options), clock=self.clock),
            bus=self.bus,
            spool=Spool.open(folder, limits=SpoolLimits(), agent_id=AGENT),
            incidents=Incidents(IncidentLimits(), new_id=lambda: "00000000-0000-7000-8000-000000000001"),
            agent_id=AGENT,
            options=AgentOptions(heartbeat_seconds=0, drain_seconds=1.0),
            clock=self.clock,
        )

    def clock(self):
        return Now(time.time_ns(), time.monotonic(), self.slept)

    delivered, wait = House.delivered, House.wait


@pytest.fixture
def observed(tmp_path, monkeypatch, request):
    monkeypatch.setattr("virtbus.sources.crew.PROVE_SECONDS", 0.05)
    monkeypatch.setattr("virtbus.sources.crew.QUIET_SECONDS", 0.05)
    one = Observed(tmp_path / "state", **getattr(request, "param", {}))
    one.agent.start()
    one.wait("gap")
    yield one
    one.host.answers.set()
    one.agent.abort()
    one.agent.join()


def test_a_process_that_stood_still_says_so_from_the_last_moment_it_saw_and_reconnects(observed):
    before = time.time()
    observed.slept += 60.0
    gap = observed.wait("gap", 2)[1]["data"]
    assert gap["reason"] == "agent_standstill"
    assert "stood still for 60 s" in gap["detail"] or "stood still for 59 s" in gap["detail"]
    # The wall clock did not move in this test, so a minute that was slept begins a minute before.
    assert moment(gap["started_at"]) <= before - 55
    wait_until(lambda: observed.agent.not_ready() == [])
    assert len([link for link in observed.host.links if link.handler]) == 2


@pytest.mark.parametrize("observed", [{"grace_seconds": 3600.0}], indirect=True)
def test_a_pause_that_waits_for_its_event_is_not_seen_through_before_it_is_told(observed):
    """libvirt may lose the event; killed before the wait is over, the agent would never tell the pause."""
    guest = next(iter(observed.host.guests.values()))
    wait_until(lambda: observed.agent.not_ready() == [])
    paused = time.time_ns()
    observed.host.suspend(guest)
    observed.host.lifecycle(guest, RESUMED)
    sight = observed.agent.intake.sight
    seen = sight.connections["simulated:///"]
    answered = seen._answered
    time.sleep(1.5)  # more than the margin that every proof leaves
    wait_until(lambda: seen._answered > answered + 1.0)
    assert sight.through.wall_ns <= paused
    assert observed.agent.not_ready() == []


def test_readiness_ends_when_the_connection_of_the_events_answers_no_longer(observed):
    wait_until(lambda: observed.agent.not_ready() == [])
    observed.host.answers.clear()
    time.sleep(0.1)
    for seen in observed.agent.intake.sight.connections.values():
        seen._answered -= 30  # as if it had been silent for so long
    (reason,) = observed.agent.not_ready()
    assert "no answer on the connection of the events" in reason
    observed.host.answers.set()
    wait_until(lambda: observed.agent.not_ready() == [])


def test_a_loss_begins_at_the_last_answer_and_not_when_it_was_noticed(observed):
    wait_until(
        lambda: (
            observed.agent.intake.sight.connections["simulated:///"].moment.wall_ns
            > time.time_ns() - 2 * 10**9
        )
    )
    observed.host.answers.clear()
    time.sleep(0.2)
    silent_from = time.time()
    time.sleep(0.5)
    observed.host.cut()
    observed.host.answers.set()
    gap = observed.wait("gap", 2)[1]["data"]
    assert gap["reason"] == "source_lost"
    assert moment(gap["started_at"]) < silent_from


def test_a_source_that_proves_nothing_and_a_process_that_stood_still_is_a_gap_too(tmp_path, monkeypatch):
    slept = [0.0]
    one = House(tmp_path / "state")
    one.agent._clock = one.agent.intake._clock = lambda: Now(time.time_ns(), time.monotonic(), slept[0])
    one.start()
    one.wait("gap")
    one.agent.beat(1.0)
    writing, go_on = threading.Event(), threading.Event()

    def hang(point):
        writing.set()
        go_on.wait()

    monkeypatch.setattr(faults, "hook", hang)  # the intake's thread is in a write all the time
    try:
        one.source.play(a_raw_io_error())
        assert writing.wait(10)
        slept[0] = 300.0
        one.agent.beat(1.0)  # of the main thread
    finally:
        go_on.set()
    stood = one.wait("gap", 2)[1]["data"]
    assert stood["reason"] == "agent_standstill"
    assert moment(stood["ended_at"]) - moment(stood["started_at"]) >= MARGIN_SECONDS
    one.end()


def test_a_callback_that_nobody_can_read_is_a_gap_and_a_storm_of_them_few(house):
    one = house()
    one.wait("gap")
    one.source.play(*(CallbackLost(time.time_ns(), "text that is not UTF-8") for _ in range(1000)))
    gap = one.wait("gap", 2)[1]["data"]
    assert (gap["reason"], "not UTF-8" in gap["detail"]) == ("observations_dropped", True)
    assert gap["started_at"] <= gap["ended_at"]
    one.end()
    gaps = [e["data"] for e in one.delivered("gap") if e["data"]["reason"] == "observations_dropped"]
    assert sum(each["missing_occurrences"] for each in gaps) == 1000
    assert len(gaps) < 10


def test_the_observer_tells_of_a_callback_that_could_not_be_read(observed):
    for handler in observed.host.handlers():
        handler.undecodable()
    assert observed.wait("gap", 2)[1]["data"]["reason"] == "observations_dropped"


class Readings:
    """A clock that says what it was given."""

    def __init__(self, *now):
        self.now = Now(*now)

    def __call__(self):
        return self.now


def restarted(folder, clock, *now):
    clock.now = Now(*now)
    again = open_spool(folder, clock=clock)
    again.close()
    return datetime.fromtimestamp(again.opening.last_alive_ns / 1e9, UTC)


def test_a_wall_clock_that_stepped_back_leaves_the_gaps_beginning_where_it_was(tmp_path):
    """An hour ahead at the boot, set right by NTP, killed half an hour later."""
    clock = Readings(T + 3600 * 10**9, 0.0)
    spool = open_spool(tmp_path / "s", clock=clock)
    spool.commit([a_gap()])
    for second in range(10, 1800, 10):
        clock.now = Now(T + second * 10**9, float(second))
        spool.alive(Moment.of(clock.now))
    spool.close()
    last_seen = datetime.fromtimestamp(T / 1e9, UTC) + timedelta(seconds=1790)
    assert restarted(tmp_path / "s", clock, T + 2100 * 10**9, 2100.0) == last_seen
    assert restarted(tmp_path / "s", clock, T + 2200 * 10**9, 5.0) == last_seen  # after a boot


def test_a_clock_set_back_while_nothing_new_is_seen_is_the_clock_of_the_sign_of_life(tmp_path):
    """The source is lost, the clock is set back two hours, the power is cut: the gap begins at the loss."""
    clock = Readings(T, 1000.0)
    spool = open_spool(tmp_path / "s", clock=clock)
    spool.commit([a_gap()])
    seen = Moment.of(clock.now)
    spool.alive(seen)
    back = T - 7200 * 10**9
    clock.now = Now(back + 3 * 10**9, 1003.0)
    spool.alive(seen)
    shutil.copytree(tmp_path / "s", tmp_path / "cut")  # what a power cut finds
    spool.close()
    after = restarted(tmp_path / "cut", clock, back + 90 * 10**9, 5.0)
    assert after == datetime.fromtimestamp(back / 1e9, UTC)


@pytest.mark.parametrize("hours", [-2, 2])
def test_a_sign_of_life_is_in_the_clock_of_its_moment(tmp_path, hours):
    """The clock is set while the batch that was seen through waits for the disk."""
    clock = Readings(T, 1000.0)
    spool = open_spool(tmp_path / "s", clock=clock)
    spool.commit([a_gap()])
    seen = Moment.of(clock.now)
    after = T + hours * 3600 * 10**9
    clock.now = Now(after + 30 * 10**9, 1030.0)
    spool.alive(seen)
    spool.close()
    assert restarted(tmp_path / "s", clock, after + 90 * 10**9, 1090.0) == datetime.fromtimestamp(
        after / 1e9, UTC
    )


def test_a_clock_set_back_a_year_between_two_runs_of_one_boot_leaves_the_time_that_passed(tmp_path):
    clock = Readings(T, 100.0)
    spool = open_spool(tmp_path / "s", clock=clock)
    spool.commit([a_gap()])
    spool.alive(Moment.of(clock.now))
    spool.close()
    now = T - 365 * 86400 * 10**9
    assert restarted(tmp_path / "s", clock, now, 160.0) == datetime.fromtimestamp(now / 1e9 - 60, UTC)


def test_a_clock_set_back_over_a_boot_turns_no_gap_around(tmp_path):
    clock = Readings(T, 5000.0)
    spool = open_spool(tmp_path / "s", clock=clock)
    spool.commit([a_gap()])
    spool.alive(Moment.of(clock.now))
    spool.close()
    now = T - 365 * 86400 * 10**9
    assert restarted(tmp_path / "s", clock, now, 30.0) <= datetime.fromtimestamp(now / 1e9, UTC)


def test_a_gap_never_ends_before_it_began(house):
    one = house()
    one.wait("gap")
    one.source.play(SourceLost(time.time_ns() + 10**12, "a clock ahead"))
    one.source.play(SourceReady(a_host(), time.time_ns(), ()))
    gap = one.wait("gap", 2)[1]["data"]
    assert gap["started_at"] <= gap["ended_at"]


def test_a_thread_that_dies_ends_the_agent_with_its_reason(tmp_path, monkeypatch):
    one = House(tmp_path / "state")

    def breaks(*_):
        raise ImportError("too many open files")

    monkeypatch.setattr(one.agent.incidents, "tick", breaks)
    one.start()
    wait_until(lambda: one.agent.wait(0))
    with pytest.raises(Exception, match="intake thread ended: ImportError: too many open files") as caught:
        one.agent.join()
    assert caught.value.exit_code == 70


# ------------------------------------------------------------------------------------------ identity


def copied(tmp_path, *hosts: Host):
    """The ids that agents on one state folder's copies get, one a host, and what they tell."""
    from virtbus.agent.identity import load_agent_id, tie_to_host

    machine = tmp_path / "machine-id"
    machine.write_text("0123456789abcdef0123456789abcdef\n")
    ids = []
    for host in hosts:
        agent_id, _ = load_agent_id(tmp_path, machine)
        ids.append(tie_to_host(tmp_path, host, tmp_path) or agent_id)
        assert load_agent_id(tmp_path, machine) == (ids[-1], None)
    return ids


def test_a_copy_with_the_same_machine_id_on_another_host_gets_an_id_of_its_own(tmp_path):
    here, there = a_host(uuid="a", boot_id="boot-1"), a_host(uuid="b", boot_id="boot-2")
    one, again, other = copied(tmp_path, here, here, there)
    assert one == again != other


def test_a_hosts_uuid_that_changes_while_the_kernel_runs_is_libvirts_own_and_not_believed(tmp_path):
    ids = copied(
        tmp_path, *(a_host(uuid=each, boot_id="boot-1") for each in "abc"), a_host(uuid="d", boot_id="x")
    )
    assert len(set(ids)) == 1


def test_an_agent_on_a_copied_folder_says_so_before_anything_else_under_its_new_id(tmp_path):
    new = "99999999-2222-4333-8444-555555555555"
    one = House(tmp_path / "state")
    one.agent.speaker.identify = lambda host: new if one.agent.agent_id == AGENT else None
    one.start()
    opening, changed = one.wait("gap", 2)
    assert changed["data"]["reason"] == "identity_changed"
    assert AGENT in changed["data"]["detail"]
    assert {opening["data"]["agent_id"], changed["data"]["agent_id"]} == {new}
    one.end()


def test_libvirt_that_comes_late_and_names_another_host_ends_the_agent_for_a_new_start(tmp_path, monkeypatch):
    monkeypatch.setattr("virtbus.agent.intake.SOURCE_GRACE_SECONDS", 0.1)
    monkeypatch.setattr(FakeSource, "run", lambda self, sink, stop: stop.wait())
    new = "99999999-2222-4333-8444-555555555555"
    one = House(tmp_path / "state")
    one.agent.speaker.identify = lambda host: new
    one.start()
    one.wait("gap")
    one.agent.queue.put(SourceReady(a_host(), time.time_ns(), ()))
    told = [event["data"] for event in one.wait("gap", 3)]
    assert [each["reason"] for each in told if each["agent_id"] == AGENT] == [
        "agent_down", "source_lost", "identity_changed",
    ]  # fmt: skip
    with pytest.raises(Exception, match="starts again as") as caught:
        one.agent.join()
    assert caught.value.exit_code == 75


def test_a_hosts_uuid_that_libvirt_tells_late_ends_an_agent_on_a_copied_folder_too(tmp_path):
    new = "99999999-2222-4333-8444-555555555555"
    one = House(tmp_path / "state")
    one.agent.speaker.identify = lambda host: new if host.uuid == "another" else None
    one.start().wait("gap")
    one.source.play(HostKnown(a_host(uuid="another"), time.time_ns()))
    opening, changed = (event["data"] for event in one.wait("gap", 2))
    assert (opening["agent_id"], changed["agent_id"], changed["reason"]) == (AGENT, AGENT, "identity_changed")
    with pytest.raises(RestartNeeded):
        one.agent.join()


def test_whose_id_it_is_is_asked_again_until_the_disk_lets_the_answer_be_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("virtbus.agent.intake.ALIVE_SECONDS", 0.05)
    answers = [SpoolFull("no space"), SpoolFull("no space"), "99999999-2222-4333-8444-555555555555"]

    def identify(host):
        answer = answers.pop(0)
        if isinstance(answer, SpoolFull):
            raise answer
        return answer

    one = House(tmp_path / "state")
    one.agent.speaker.identify = identify
    one.start()
    assert one.wait("gap", 2)[1]["data"]["reason"] == "identity_changed"
    with pytest.raises(RestartNeeded):
        one.agent.join()


def test_what_was_not_committed_is_not_seen_through_though_the_agent_ends(tmp_path, monkeypatch):
    one = House(tmp_path / "state").start()
    one.wait("gap")
    commit, at = one.spool.commit, time.time_ns()
    broken = threading.Event()

    def refused(*words):
        broken.set()
        raise SpoolFull("no space")

    monkeypatch.setattr(one.spool, "commit", refused)
    one.source.play(a_raw_io_error(observed_at=at), SourceReady(a_host(), at + 10**9, ()))
    assert broken.wait(10)
    one.agent.abort()
    one.agent._threads["intake"].join(10)
    monkeypatch.setattr(one.spool, "commit", commit)
    assert one.agent.intake.seen_through().wall_ns <= at
    one.agent.join()


def test_a_lost_callback_that_waits_to_be_told_is_not_seen_through_and_told_at_the_end(house, monkeypatch):
    one = house([SourceReady(a_host(), time.time_ns(), (), proves=True)])
    one.wait("gap")
    one.agent.intake._unread_at = time.monotonic() + 3600.0
    lost, later = time.time_ns(), Now(time.time_ns() + 10**10, time.monotonic() + 10)
    one.source.play(CallbackLost(lost, "not UTF-8"), SourceSeen(later), a_raw_io_error(observed_at=lost))
    one.wait("io_error.v1")
    assert one.agent.intake.seen_through().wall_ns <= lost
    sign = one.agent.intake.writer.sign_of_life

    def then_stops(*moments):  # the stop comes after the batch's gaps were made, with nothing queued
        sign(*moments)
        one.agent.stop()

    monkeypatch.setattr(one.agent.intake.writer, "sign_of_life", then_stops)
    one.agent.queue.wake()
    one.agent.join()
    assert [each["data"]["missing_occurrences"] for each in one.delivered("gap")] == [0, 1]


def test_a_connection_that_comes_up_after_the_first_one_has_a_gap_of_its_own(house):
    one = house()
    first = one.wait("gap")[0]["data"]
    one.source.play(SourceReady(a_host(), time.time_ns(), (), connection="another"))
    later = one.wait("gap", 2)[1]["data"]
    assert (later["reason"], later["started_at"]) == ("source_lost", first["ended_at"])


def test_a_clock_set_back_while_libvirt_was_away_hides_no_message_that_it_kept():
    offset = [0]
    host = SimulatedHost(1, keeps_messages=True)
    guest = next(iter(host.guests.values()))

    def clock():
        return Now(time.time_ns() - offset[0], time.monotonic(), time.monotonic())

    observer = Observer(host, options=OPTIONS, clock=clock)
    seen: list[object] = []
    stop = threading.Event()
    thread = threading.Thread(target=observer.run, args=(seen.append, stop))
    thread.start()
    try:
        wait_until(lambda: any(isinstance(each, SourceReady) for each in seen))
        host.down = True
        host.cut()
        wait_until(lambda: any(isinstance(each, SourceLost) for each in seen))
        offset[0] = 3600 * 10**9
        at = datetime.fromtimestamp(time.time() - 3600, UTC)
        guest.messages = [
            f"I/O error: disk='vda', index='1', path='/img/a', timestamp='{at:%Y-%m-%d %H:%M:%S.%f}+0000', "
            "message='Input/output error'"
        ]
        host.down = False
        wait_until(lambda: sum(isinstance(each, SourceReady) for each in seen) == 2)
        ready = [each for each in seen if isinstance(each, SourceReady)][-1]
        assert [finding.message for finding in ready.findings] == ["Input/output error"]
    finally:
        stop.set()
        thread.join()


def test_a_proof_of_another_connection_speaks_for_that_one_alone(tmp_path):
    one = House(tmp_path / "state")
    at = time.time_ns()
    for name in ("a", "b"):
        one.source._script.append(SourceReady(a_host(), at, (), connection=name, proves=True))
    one.start()
    one.wait("gap")
    one.source.play(SourceSeen(Now(at + 10**10, time.monotonic() + 10), "a"))
    wait_until(lambda: one.agent.intake.sight.connections["a"].moment.wall_ns > at)
    assert one.agent.intake.sight.through.wall_ns <= at
    one.end()


def test_a_reload_of_the_heartbeats_interval_counts_from_now():
    interval = [3600.0]
    publisher = Publisher(
        spool=None, bus=None, taps=None, heartbeat=None, heartbeat_seconds=lambda: interval[0],
        drain_seconds=None, abort=None, bus_name="bus",
    )  # fmt: skip
    publisher.heartbeat_in()
    interval[0] = 60.0
    assert publisher.heartbeat_in() <= 60.0


def test_guests_that_came_and_went_while_the_agent_stood_still_lie_in_a_gap_of_the_host(house):
    one = house()
    one.source.play(Surveyed(time.time_ns(), a_host(), frozenset()))
    one.wait("gap")
    now = Clock()()
    since = now._replace(wall_ns=now.wall_ns - 60 * 10**9, monotonic=now.monotonic - 60)
    one.source.play(StoodStill(now.wall_ns, "stood still", since))
    stood = one.wait("gap", 2)[1]["data"]
    assert (stood["reason"], stood["detail"]) == ("agent_standstill", "stood still")
    lasted = moment(stood["ended_at"]) - moment(stood["started_at"])
    assert lasted == pytest.approx(60 + MARGIN_SECONDS, abs=0.01)


def test_an_old_proof_does_not_bring_back_a_connection_that_has_ended(house):
    guest = DomainState("11111111-2222-4333-8444-555555555555", "guest", "running", False)
    at = time.time_ns()
    one = house()
    one.source.play(Surveyed(at, a_host(), frozenset({guest.uuid})))
    first = one.wait("gap")[0]["data"]
    one.source.play(SourceReady(a_host(), at + 10**9, (guest,), connection="b", proves=True, whole=False))
    late = one.wait("gap", 2)[1]["data"]
    assert (late["detail"], late["started_at"]) == ("b was not reached before", first["ended_at"])
    one.source.play(SourceGone(at + 2 * 10**9, "b", frozenset({guest.uuid})), SourceSeen(Now(at, 0.0), "b"))
    ended = one.wait("gap", 3)[2]["data"]
    assert ended["detail"] == "b ended: its socket is gone"
    wait_until(lambda: len(one.agent.queue) == 0)
    assert one.agent.status()["source"]["connections"] == {"": True}
    assert one.agent.not_ready() == []
