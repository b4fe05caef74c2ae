"""What is believed of an agent: runs by their chain, life by its heartbeats, a name by who lives."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest

from tests.fleet.machine import CEPH, FILER, Machine, epoch_at, uuid_of, view
from virtbus.fleet import Answer, Blame, Fleet
from virtbus.fleet.agent import Agent, Runs
from virtbus.model import DeviceSource, Now, OpenIncidents, to_ns
from virtbus.testing import MOMENT

HOUR = 3600.0


# ------------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize("heard", [True, False], ids=["its gap was heard", "its gap was not heard"])
def test_a_host_whose_clock_went_back_between_two_starts_is_heard(heard):
    fleet = Fleet()
    machine = Machine(fleet, 1)
    machine.epoch = epoch_at(100)
    machine.beat(0)
    machine.restarts(600, epoch_at(2), heard=heard)
    machine.beat(601)
    for guest in range(3):
        machine.fails(610 + guest, guest)
    machine.beat(660)
    (host,) = view(fleet, 661).hosts
    assert (host.incidents, host.paused, host.fresh) == (3, 3, True)


def test_an_error_of_the_new_run_counts_before_anything_else_of_that_run_came():
    fleet = Fleet()
    machine = Machine(fleet, 1)
    machine.epoch = epoch_at(100)
    machine.beat(0)
    machine.restarts(600, epoch_at(2), heard=False)
    machine.fails(601, 1)
    (host,) = view(fleet, 602).hosts
    assert (host.incidents, host.fresh) == (1, False)


def test_a_heartbeat_of_the_last_run_that_is_delivered_again_changes_nothing():
    fleet = Fleet()
    machine = Machine(fleet, 1)
    machine.beat(0)
    old = machine.epoch
    machine.restarts(60, epoch_at(3))
    machine.fails(61, 1)
    machine.beat(62)
    machine.beat(63, epoch=old, committed_sequence=99, incidents=OpenIncidents(0))
    (host,) = view(fleet, 64).hosts
    assert (host.incidents, host.fresh) == (1, True)


def test_a_backlog_of_an_older_run_opens_nothing_that_the_present_run_does_not_list():
    fleet = Fleet()
    machine = Machine(fleet, 1)
    machine.epoch = epoch_at(5)
    machine.beat(0)
    present, machine.epoch = machine.epoch, epoch_at(1)
    machine.fails(10, 1)
    machine.open.clear()
    machine.epoch = present
    machine.beat(60)
    (host,) = view(fleet, 61).hosts
    assert (host.incidents, host.fresh) == (0, True)


def test_runs_are_in_the_order_of_the_chain_whatever_comes_first():
    runs = Runs()
    runs.meets("c")
    runs.follows("c", "b")
    runs.follows("b", "a")
    assert [runs.rank(one) for one in "abcx"] == [0, 1, 2, -1]
    assert runs.newest == "c"


def test_a_run_whose_events_come_behind_the_heartbeat_of_the_next_is_the_older_one():
    runs = Runs()
    runs.meets("a")
    assert runs.beats("c")
    runs.meets("b")
    runs.follows("b", "a")
    runs.follows("c", "b")
    assert [runs.rank(one) for one in "abc"] == [0, 1, 2]
    assert runs.newest == "c"


def test_an_agent_that_goes_on_beating_is_the_newest_run_even_if_another_seemed_later():
    runs = Runs()
    assert runs.beats("live")
    assert runs.beats("stale")  # a first heartbeat is taken for a new run
    assert not runs.beats("live")
    assert runs.beats("live")
    assert runs.newest == "live"


FIVE = [f"0000000{number}-0000-7000-8000-000000000000" for number in range(5)]


def test_heartbeats_that_come_once_more_speak_for_no_run():
    runs = Runs()
    assert runs.beats("a", FIVE[0])
    assert runs.beats("a", FIVE[1])
    assert runs.beats("b", FIVE[2])
    assert [runs.beats("a", FIVE[0]), runs.beats("a", FIVE[1])] == [False, False]
    assert not runs.beats("b", FIVE[2])
    assert runs.newest == "b"
    assert [runs.beats("a", FIVE[3]), runs.beats("a", FIVE[4])] == [False, True]
    assert runs.newest == "a"


def test_the_memory_of_runs_is_bounded():
    runs = Runs()
    for number in range(1000):
        runs.follows(f"e{number}", f"p{number}")
        runs.beats(f"e{number}")
    assert runs.newest == "e999"
    assert len(runs._order) <= 33
    assert len(runs._beating) <= 32


# --------------------------------------------------------------------------------------- signs of life


def test_a_host_of_which_only_a_backlog_was_heard_is_silent():
    fleet = Fleet()
    dead = Machine(fleet, 1)
    for guest in range(2):
        dead.fails(0, guest)
    others = [Machine(fleet, number) for number in range(2, 6)]
    for at in range(0, int(6 * HOUR), 60):
        for other in others:
            other.beat(at)
        host = view(fleet, at + 1).host(dead.host.name)
        assert host is not None
        assert (host.state, host.answer) == ("silent", Answer.CANT_TELL)


def test_heartbeats_that_come_once_more_make_no_dead_agent_live():
    fleet = Fleet()
    dead, other = Machine(fleet, 1), Machine(fleet, 2)
    for at in (0, 60, 120):
        dead.beat(at)
    for at in range(0, 901, 60):
        other.beat(at)
        if at >= 300:
            dead.is_heard_again(at, -1)
    host = view(fleet, 901).host(dead.host.name)
    assert host is not None
    assert host.state == "silent"


def test_an_older_runs_heartbeats_that_come_once_more_open_nothing():
    fleet = Fleet()
    machine = Machine(fleet, 1)
    machine.fails(5, 1)
    machine.beat(10)
    machine.beat(70)
    machine.restarts(80, epoch_at(2))
    machine.recovers(90)
    machine.beat(100)
    machine.is_heard_again(110, 1, 2)
    (host,) = view(fleet, 111).hosts
    assert host.incidents == 0


def test_agents_that_never_saw_their_hypervisor_are_no_silent_hosts():
    fleet = Fleet()
    machines = [Machine(fleet, number) for number in range(12)]
    for machine in machines[3:]:
        machine.host = None
    for at in range(0, 601, 60):
        for machine in machines:
            machine.beat(at)
    shown = view(fleet, 601)
    assert (len(shown.hosts), shown.silent, shown.suspect_ourselves) == (3, 0, False)


def test_many_agents_of_one_silent_host_are_one_silent_host():
    """Whoever speaks for one host can't make us doubt our own connection."""
    fleet = Fleet()
    machines = [Machine(fleet, number) for number in range(1, 6)]
    for at in range(0, 601, 60):
        for machine in machines:
            machine.beat(at)
    for number in range(100, 130):
        Machine(fleet, number, name="compute-0").fails(600, 1)
    shown = view(fleet, 601)
    assert (shown.silent, shown.suspect_ourselves) == (1, False)


def test_an_interval_concerns_its_own_agent_alone():
    """A fleet in which one agent beats once an hour comes to the same verdicts as one in which none does."""
    found = []
    for odd in (60.0, HOUR):
        fleet = Fleet()
        slow = Machine(fleet, 99)
        slow.interval = odd
        slow.beat(0)
        machines = [Machine(fleet, number) for number in range(6)]
        for at in range(60, 900, 60):
            for machine in machines:
                if at == 300 and machine.number < 3:
                    machine.fails(at, 1)
                    machine.fails(at, 2)
                machine.beat(at)
        found.append([(one.name, one.blame) for one in view(fleet, 900).backends])
    assert found[0] == found[1] == [("10.61.0.7", Blame.BACKEND)]


def test_no_agent_gets_more_patience_than_three_hours():
    fleet = Fleet()
    machine = Machine(fleet, 1)
    machine.interval = 86_400.0 * 365
    machine.beat(0)
    assert view(fleet, 3 * HOUR - 1).hosts[0].state == "observing"
    assert view(fleet, 3 * HOUR + 1).hosts[0].state == "silent"


@pytest.mark.parametrize("skew", [0.0, -5 * HOUR, 400 * 24 * HOUR], ids=["right", "behind", "ahead"])
def test_heartbeats_that_waited_while_nobody_listened_are_no_sign_of_life(skew):
    """An agent that died an hour ago is silent; one that lives is heard with its next heartbeat."""
    fleet = Fleet()
    dead, alive = Machine(fleet, 1, skew=skew), Machine(fleet, 2, skew=skew)
    for machine in (dead, alive):
        machine.queued_until = 2 * HOUR
        for at in range(0, int(HOUR), 60):
            machine.beat(at)
    for at in range(int(HOUR), int(2 * HOUR), 60):
        alive.beat(at)
    assert [one.state for one in view(fleet, 2 * HOUR + 1).hosts] == ["silent", "silent"]
    alive.beat(2 * HOUR)
    alive.beat(2 * HOUR + 60)
    assert [one.state for one in view(fleet, 2 * HOUR + 61).hosts] == ["silent", "observing"]


def test_the_stored_events_of_an_agent_that_died_are_no_sign_of_life():
    fleet = Fleet()
    machine = Machine(fleet, 1)
    machine.beat(0)
    machine.beat(60)
    machine.fails(400, 1)
    assert view(fleet, 401).hosts[0].state == "silent"


def test_one_heartbeat_alone_may_have_waited_for_any_time_and_lets_nobody_act():
    fleet = Fleet()
    machine = Machine(fleet, 1)
    others = [Machine(fleet, number) for number in range(2, 6)]
    for at in range(0, 301, 60):
        for other in others:
            other.beat(at)
    machine.beat(300)
    assert view(fleet, 301).hosts[0].answer is Answer.CANT_TELL
    machine.beat(360)
    assert view(fleet, 361).hosts[0].answer is Answer.WELL


def test_hosts_of_which_one_heartbeat_came_are_nothing_to_compare_with():
    fleet = Fleet()
    sick, *others = (Machine(fleet, number) for number in range(6))
    for at in (0, 60, 120):
        sick.beat(at)
    for guest, source in enumerate((CEPH, FILER)):
        sick.fails(121, guest, source)
    for other in others:
        other.beat(180)
    for at in (180, 240):
        sick.beat(at)
    assert view(fleet, 241).host(sick.host.name).blame is Blame.UNDETERMINED
    for other in others:
        other.beat(240)
    assert view(fleet, 241).host(sick.host.name).blame is Blame.HOST


def test_a_clock_that_is_set_forward_silences_its_host_for_one_interval_at_most():
    fleet = Fleet()
    machine = Machine(fleet, 1)
    for at in (0, 60, 120):
        machine.beat(at)
    machine.skew = HOUR
    machine.beat(180)
    machine.beat(240)
    assert view(fleet, 241).hosts[0].answer is Answer.WELL
    machine.skew = -HOUR
    machine.beat(300)
    assert view(fleet, 301).hosts[0].answer is Answer.WELL


def test_an_agent_whose_clock_stands_still_is_heard_by_its_interval():
    fleet = Fleet()
    machine = Machine(fleet, 1)
    for at in (0, 60, 120):
        machine.beat(at, sent_at=MOMENT)
    assert view(fleet, 121).hosts[0].answer is Answer.WELL


# ------------------------------------------------------------------------- what began before we listened

SHARED = [CEPH, FILER]
OWN = DeviceSource(type="nvme", path="0000:01:00.0/1")


def began_unheard(*, others: int = 5) -> tuple[Fleet, Machine, list[Machine]]:
    """A host whose guests stand still since before the reactor's start, among others that are well."""
    fleet = Fleet()
    sick = Machine(fleet, 1)
    return fleet, sick, [Machine(fleet, number) for number in range(2, 2 + others)]


def goes_on(machines: list[Machine], begin: int, end: int) -> None:
    for at in range(begin, end, 60):
        for machine in machines:
            machine.beat(at)


def test_a_fault_that_began_while_the_reactor_was_away_is_its_hosts_once_the_queue_told_it():
    fleet, sick, others = began_unheard()
    everybody = [sick, *others]
    for machine in everybody:
        machine.queued_until = HOUR
    goes_on(everybody, 0, 600)
    for guest, source in enumerate(SHARED):
        sick.fails(600, guest, source)
    goes_on(everybody, 600, int(HOUR))
    goes_on(everybody, int(HOUR), int(HOUR) + 300)
    host = view(fleet, HOUR + 300).host(sick.host.name)
    assert host is not None
    assert (host.answer, host.since) == (Answer.BAD, pytest.approx(600 + to_ns(MOMENT) / 1e9, abs=61))


def test_who_was_resumed_last_after_an_outage_that_the_queue_tells_of_is_not_at_fault():
    """Forty minutes ago five hosts lost two storage systems; four were resumed before the reactor's start."""
    fleet, sick, others = began_unheard()
    everybody = [sick, *others]
    for machine in everybody:
        machine.queued_until = HOUR
    goes_on(everybody, 0, 600)
    for machine in everybody[:5]:
        for guest, source in enumerate(SHARED):
            machine.fails(600, guest, source)
    goes_on(everybody, 600, 1200)
    for machine in everybody[1:5]:
        machine.recovers(1200)
    goes_on(everybody, 1200, int(HOUR))
    for at in range(int(HOUR), int(HOUR) + 3600, 60):
        goes_on(everybody, at, at + 1)
        host = view(fleet, at + 1).host(sick.host.name)
        assert host is not None
        assert host.answer is Answer.CANT_TELL


@pytest.mark.parametrize("goes", [True, False], ids=["it goes on", "its guests stand still"])
def test_open_incidents_of_before_hold_their_host_only_when_something_tells_that_the_fault_is_its_own(goes):
    fleet, sick, others = began_unheard()
    unheard, sick.fleet = sick.fleet, Fleet()
    for guest, source in enumerate(SHARED):
        sick.fails(0, guest, source)
    sick.fleet = unheard
    goes_on([sick, *others], 3600, 3900)
    if goes:
        sick.open = {id_: replace(one, total=one.total + 1) for id_, one in sick.open.items()}
    goes_on([sick, *others], 3900, 4200)
    host = view(fleet, 4200).host(sick.host.name)
    assert host is not None
    assert host.answer is (Answer.BAD if goes else Answer.CANT_TELL)


def test_open_incidents_of_before_on_the_hosts_own_storage_hold_it():
    fleet, sick, others = began_unheard()
    unheard, sick.fleet = sick.fleet, Fleet()
    for guest in range(2):
        sick.fails(0, guest, OWN)
    sick.fleet = unheard
    goes_on([sick, *others], 3600, 3900)
    host = view(fleet, 3900).host(sick.host.name)
    assert host is not None
    assert host.answer is Answer.BAD


def test_a_fault_that_was_seen_to_begin_before_a_restart_is_still_the_hosts_own_after_it():
    fleet, sick, others = began_unheard()
    everybody = [sick, *others]
    goes_on(everybody, 0, 600)
    for guest, source in enumerate(SHARED):
        sick.fails(600, guest, source)
    goes_on(everybody, 601, 640)
    stored = view(fleet, 630).own
    assert stored == set(sick.open), "too early to blame it, and nobody else has it"
    for restart in (700, 720):
        again = Fleet()
        again.witnessed = stored
        for machine in everybody:
            machine.fleet = again
        for at in (restart, restart + 10):
            for machine in others[:2]:
                machine.beat(at)
        stored = view(again, restart + 11).own
        assert stored == set(sick.open), "also when the next restart comes before its agent was heard"
    goes_on(everybody, 740, 1100)
    host = view(again, 1100).host(sick.host.name)
    assert host is not None
    assert host.answer is Answer.BAD
    sick.recovers(1110)
    goes_on(everybody, 1120, 1200)
    assert view(again, 1200).own == set()


def test_a_trouble_that_others_had_too_is_not_remembered_as_a_hosts_own():
    fleet, sick, others = began_unheard()
    everybody = [sick, *others]
    goes_on(everybody, 0, 600)
    for machine in everybody[:4]:
        for guest, source in enumerate(SHARED):
            machine.fails(600, guest, source)
    goes_on(everybody, 601, 1200)
    for machine in everybody[1:4]:
        machine.recovers(1200)
    goes_on(everybody, 1201, 3600)
    assert view(fleet, 3600).own == set()


def test_an_agent_whose_clock_lies_does_not_make_others_troubles_witnessed():
    """One host's clock is set forward while its heartbeats wait: what it says of the past is its own."""
    fleet, sick, others = began_unheard()
    unheard, sick.fleet = sick.fleet, Fleet()
    for guest, source in enumerate(SHARED):
        sick.fails(0, guest, source)
    sick.fleet = unheard
    liar = others[0]
    liar.queued_until = 3600
    liar.skew = -40 * HOUR
    liar.beat(3500)
    liar.skew = 0.0
    liar.beat(3560)
    liar.queued_until = None
    goes_on([sick, *others], 3600, 4200)
    host = view(fleet, 4200).host(sick.host.name)
    assert host is not None
    assert host.answer is Answer.CANT_TELL


# --------------------------------------------------------------------------------------- who has a name


def test_a_machine_that_was_replaced_is_the_past_once_it_is_silent():
    """Same name, new hardware, new agent: two claims until the old one has been silent."""
    fleet = Fleet()
    old, new = Machine(fleet, 1, name="compute-1"), Machine(fleet, 2, name="compute-1")
    old.fails(0, 1)
    old.beat(0)
    new.beat(100)
    assert len(view(fleet, 101).hosts) == 2
    new.beat(160)
    (host,) = view(fleet, 200).hosts
    assert (host.agent_id, host.incidents, host.answer) == (new.agent, 0, Answer.WELL)


def test_what_the_replaced_machine_still_had_in_its_spool_is_not_held_against_the_new_one():
    fleet = Fleet()
    old, new = Machine(fleet, 1, name="compute-1"), Machine(fleet, 2, name="compute-1")
    old.beat(0)
    new.beat(100)
    new.beat(200)
    view(fleet, 201)
    old.fails(210, 1)
    (host,) = view(fleet, 211).hosts
    assert (host.agent_id, host.incidents) == (new.agent, 0)


def test_a_heartbeat_that_comes_once_more_brings_no_replaced_machine_back():
    fleet = Fleet()
    old, new = Machine(fleet, 1, name="compute-1"), Machine(fleet, 2, name="compute-1")
    old.beat(0)
    old.beat(60)
    for at in range(100, 500, 60):
        new.beat(at)
        view(fleet, at)
    old.is_heard_again(500, 1)
    assert [one.agent_id for one in view(fleet, 501).hosts] == [new.agent]


def test_a_machine_that_comes_back_under_a_name_that_is_taken_makes_two_claims():
    fleet = Fleet()
    old, new = Machine(fleet, 1, name="compute-1"), Machine(fleet, 2, name="compute-1")
    old.beat(0)
    for at in range(100, 500, 60):
        new.beat(at)
        view(fleet, at)
    old.beat(500)
    assert {one.agent_id for one in view(fleet, 501).hosts} == {old.agent, new.agent}
    for at in range(520, 900, 60):
        new.beat(at)
    assert [one.agent_id for one in view(fleet, 900).hosts] == [new.agent]


def test_a_host_installed_anew_with_a_slower_clock_is_heard():
    fleet = Fleet()
    old = Machine(fleet, 1)
    old.epoch = epoch_at(100)
    old.fails(0, 1)
    old.beat(0)
    new = Machine(fleet, 1)
    new.agent, new.epoch = uuid_of(77), epoch_at(1)
    new.beat(30)
    new.fails(31, 5)
    (host,) = view(fleet, 40).hosts
    assert (host.agent_id, host.incidents) == (new.agent, 1)


def test_a_renamed_host_is_known_by_its_new_name_alone():
    fleet = Fleet()
    machine = Machine(fleet, 1, name="before")
    machine.beat(0)
    machine.host = dataclasses.replace(machine.host, name="after")
    machine.restarts(30, epoch_at(3))
    assert [(one.name, one.state) for one in view(fleet, 31).hosts] == [("after", "silent")]
    machine.beat(40)
    assert [(one.name, one.state) for one in view(fleet, 41).hosts] == [("after", "observing")]


def test_a_decommissioned_host_leaves_the_fleet_after_a_day():
    fleet = Fleet()
    Machine(fleet, 1).beat(0)
    assert [one.state for one in view(fleet, 23 * HOUR).hosts] == ["silent"]
    assert view(fleet, 25 * HOUR).hosts == ()


# ---------------------------------------------------------------------------------------------- clocks


@pytest.mark.parametrize("skew", [0.0, -HOUR, HOUR, 400 * 86_400.0])
def test_what_began_together_is_told_whatever_the_clocks_of_the_hosts_say(skew):
    fleet = Fleet()
    machines = [Machine(fleet, number, skew=skew if number == 1 else 0.0) for number in range(6)]
    for at in range(0, 900, 60):
        for machine in machines:
            if at == 300 and machine.number < 2:
                machine.fails(at, 1)
                machine.fails(at, 2)
            machine.beat(at + 1)
    blames = {one.name: one.blame for one in view(fleet, 900).hosts if one.incidents}
    assert blames == dict.fromkeys(["compute-0", "compute-1"], Blame.BACKEND)


def test_a_host_with_a_slow_clock_is_not_blamed_before_its_trouble_has_lasted():
    fleet = Fleet()
    machines = [Machine(fleet, number, skew=-HOUR if number == 1 else 0.0) for number in range(6)]
    for at in range(0, 300, 60):
        for machine in machines:
            machine.beat(at)
    machines[1].fails(300, 1, CEPH)
    machines[1].fails(301, 2, FILER)
    assert view(fleet, 310).host("compute-1").early
    for at in range(310, 430, 60):
        for machine in machines:
            machine.beat(at)
    assert view(fleet, 400).host("compute-1").answer is Answer.BAD


def test_a_time_is_never_later_than_now():
    agent = Agent("a")
    now = Now(to_ns(MOMENT), 0.0)
    assert agent.ours(now.wall_ns / 1e9 + 1e6, now) == now.wall_ns / 1e9


# ---- what began together


def an_outage(fleet: Fleet, *, recovered: float) -> list[Machine]:
    """Three of six hosts lose two storage systems at 600; the first one never recovers."""
    machines = [Machine(fleet, number) for number in range(6)]
    for at in range(0, 5000, 60):
        if at == 600:
            for one in machines[:3]:
                one.fails(at, 0, CEPH)
                one.fails(at, 1, FILER)
        for one in machines:
            if at == recovered:
                machines[1].recovers(at)
                machines[2].recovers(at)
            one.beat(at)
    return machines


def test_the_last_host_to_recover_from_an_outage_is_not_at_fault_however_long_it_takes():
    fleet = Fleet()
    an_outage(fleet, recovered=900)
    (host, *others) = view(fleet, 4990).hosts
    assert (host.incidents, host.blame, host.answer) == (2, Blame.UNDETERMINED, Answer.CANT_TELL)
    assert {one.answer for one in others} == {Answer.WELL}


def test_who_began_to_listen_later_cant_tell_whose_fault_it_is():
    machines = an_outage(Fleet(), recovered=900)
    fleet = Fleet()
    for at in range(5000, 5400, 60):
        for one in machines:
            one.fleet = fleet
            one.beat(at)
    host = view(fleet, 5390).hosts[0]
    assert (host.blame, host.witnessed, host.answer) == (Blame.HOST, False, Answer.CANT_TELL)


def test_what_began_while_we_listened_is_told():
    fleet = Fleet()
    machines = [Machine(fleet, number, skew=-7200.0) for number in range(6)]
    for at in range(0, 400, 60):
        for one in machines:
            one.beat(at)
        if at == 180:
            machines[0].fails(at, 0, CEPH)
            machines[0].fails(at, 1, FILER)
    assert view(fleet, 399).hosts[0].answer is Answer.BAD


def test_heartbeats_whose_ids_do_not_grow_are_each_counted() -> None:
    """An id of any other shape says nothing about order; only the same one twice is one heartbeat."""
    runs = Runs()
    ids = ["ffffffff-0000-4000-8000-000000000000", "00000000-0000-4000-8000-000000000000", "b", "a", "a"]
    assert [runs.beats("one", id_) for id_ in ids] == [True, True, True, True, False]
