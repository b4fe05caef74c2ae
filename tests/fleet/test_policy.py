"""The policy of holds: each of its guarantees has a test that fails without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from virtbus.fleet import Answer, Blame, FleetView, HostHealth
from virtbus.integrations.policy import Decision, HoldPolicy, HoldRules

WELL = HostHealth("c", "agent", "observing", 1.0, Blame.NONE, "", False, None, 0, 0, 0, 0, 0.0, (), True)
BAD = replace(
    WELL, blame=Blame.HOST, why="two arrays", since=0.0, incidents=2, guests=2, paused=2, backends=("a", "b")
)
UNDETERMINED = replace(BAD, blame=Blame.UNDETERMINED, why="one system")
BACKEND = replace(BAD, blame=Blame.BACKEND, why="that of a")


def view(*hosts: HostHealth, others: int = 30, suspect: bool = False) -> FleetView:
    rest = tuple(replace(WELL, name=f"other-{number}", agent_id=str(number)) for number in range(others))
    return FleetView((*hosts, *rest), (), 0, 0, 0.0, suspect)


def play(
    policy: HoldPolicy,
    shown: FleetView,
    seconds: float,
    held: dict[str, int] | None = None,
    start: float = 0.0,
) -> list[tuple[float, Decision]]:
    """What is decided over a time of one view, each second; what is decided is done at once."""
    held = {} if held is None else held
    out = []
    now = start
    while now <= start + seconds:
        for decision in policy.decide(shown, held, now):
            out.append((now - start, decision))
            if decision.hold:
                held[decision.host] = 1
            else:
                del held[decision.host]
        now += 1.0
    return out


def told(decisions: Sequence[tuple[float, Decision]]) -> list[tuple[float, str, bool]]:
    return [(at, decision.host, decision.hold) for at, decision in decisions]


def test_a_host_at_fault_is_held_after_raise_seconds_and_no_sooner():
    assert told(play(HoldPolicy(HoldRules(raise_seconds=30.0)), view(BAD), 100)) == [(30.0, "c", True)]


def test_trouble_that_comes_and_goes_is_counted_anew():
    policy = HoldPolicy(HoldRules(raise_seconds=30.0))
    assert play(policy, view(BAD), 20) == []
    assert play(policy, view(WELL), 0, start=21) == []
    assert told(play(policy, view(BAD), 100, start=22)) == [(30.0, "c", True)]


@pytest.mark.parametrize(
    "host",
    [
        replace(BAD, state="silent"),
        replace(BAD, state="blind"),
        replace(BAD, early=True),
        UNDETERMINED,
        BACKEND,
        WELL,
    ],
    ids=["silent", "blind", "early", "undetermined", "backend", "well"],
)
def test_only_a_host_that_is_bad_is_held(host):
    assert play(HoldPolicy(HoldRules()), view(host), 3600) == []


@pytest.mark.parametrize(
    ("when", "host", "holds"),
    [
        ("undetermined", UNDETERMINED, True),
        ("undetermined", replace(UNDETERMINED, early=True), False),
        ("undetermined", replace(UNDETERMINED, full=True), False),
        ("undetermined", replace(UNDETERMINED, guests=1), False),
        ("undetermined", replace(UNDETERMINED, state="blind"), False),
        ("undetermined", replace(UNDETERMINED, state="silent"), False),
        ("undetermined", BACKEND, False),
        ("any", BACKEND, True),
        ("any", replace(BACKEND, guests=1), False),
        ("any", replace(BACKEND, state="silent"), False),
        ("any", WELL, False),
        ("host", UNDETERMINED, False),
    ],
)
def test_an_operator_may_have_more_held_than_what_is_at_fault(when, host, holds):
    decisions = told(play(HoldPolicy(HoldRules(when=when)), view(host), 100))
    assert decisions == ([(30.0, "c", True)] if holds else [])


def test_nothing_is_held_while_most_agents_are_silent_at_once():
    policy = HoldPolicy(HoldRules())
    assert play(policy, view(BAD, suspect=True), 3600) == []
    assert policy.withheld == ()


def test_two_agents_that_claim_one_name_get_nothing_done():
    other = replace(WELL, agent_id="another")
    assert play(HoldPolicy(HoldRules()), view(BAD, other), 3600) == []
    assert play(HoldPolicy(HoldRules()), view(WELL, other), 3600, {"c": 1}) == []


def test_of_two_agents_of_one_name_the_one_that_is_heard_speaks():
    past = replace(BAD, agent_id="another", state="silent")
    for claims in ((past, WELL), (WELL, past)):
        decisions = play(HoldPolicy(HoldRules(clear_seconds=300.0)), view(*claims), 400, {"c": 1})
        assert told(decisions) == [(300.0, "c", False)]


def test_a_held_host_is_released_when_it_was_well_for_clear_seconds():
    policy = HoldPolicy(HoldRules(clear_seconds=300.0))
    decisions = play(policy, view(WELL), 400, {"c": 1})
    assert told(decisions) == [(300.0, "c", False)]


@pytest.mark.parametrize(
    "host",
    [
        replace(WELL, fresh=False),
        replace(WELL, state="silent"),
        replace(WELL, state="blind"),
        BACKEND,
        UNDETERMINED,
        replace(BACKEND, incidents=1, guests=1, paused=1),
    ],
    ids=["not fresh", "silent", "blind", "a backend's", "undetermined", "one guest stands still"],
)
def test_only_a_host_that_is_well_is_released(host):
    assert play(HoldPolicy(HoldRules()), view(host), 86_400 // 24, {"c": 1}) == []


def test_well_is_counted_anew_after_a_doubt():
    policy, held = HoldPolicy(HoldRules(clear_seconds=300.0)), {"c": 1}
    assert play(policy, view(WELL), 299, held) == []
    assert play(policy, view(replace(WELL, state="silent")), 0, held, start=300) == []
    assert told(play(policy, view(WELL), 400, held, start=301)) == [(300.0, "c", False)]


@pytest.mark.parametrize(("times", "seconds"), [(1, 300), (2, 600), (3, 1200), (5, 4800), (9, 4800)])
def test_each_time_that_it_comes_back_it_must_be_well_for_twice_as_long(times, seconds):
    policy = HoldPolicy(HoldRules(clear_seconds=300.0))
    assert told(play(policy, view(WELL), seconds + 10, {"c": times})) == [(seconds, "c", False)]


def test_how_often_in_a_row_a_host_was_held():
    policy = HoldPolicy(HoldRules())
    assert policy.times(0, None, 0.0) == 1
    assert policy.times(2, 1000.0, 1000.0 + 3600) == 3
    assert policy.times(2, 1000.0, 1000.0 + 3601) == 1


def test_never_more_than_the_share_is_held_and_what_is_withheld_is_told():
    bad = [replace(BAD, name=f"bad-{number}", agent_id=f"b{number}") for number in range(8)]
    policy, held = HoldPolicy(HoldRules(max_share=0.1)), {}
    assert len(play(policy, view(*bad, others=32), 3600, held)) == 4
    assert len(held) == 4
    assert sorted({*held, *policy.withheld}) == [host.name for host in bad]


def test_one_host_may_always_be_held():
    assert len(play(HoldPolicy(HoldRules(max_share=0.1)), view(BAD, others=2), 100)) == 1


def test_a_release_is_told_until_the_host_is_no_longer_held_and_frees_no_place_before():
    policy, held = HoldPolicy(HoldRules(clear_seconds=10.0, max_share=0.01)), {"c": 1}
    shown = view(WELL, replace(BAD, name="d", agent_id="d"))
    for now in range(100):
        decisions = policy.decide(shown, held, float(now))
        assert [one.host for one in decisions] == (["c"] if now >= 10 else [])
    assert [one.host for one in policy.decide(shown, {}, 100.0)] == ["d"]


def test_a_held_host_that_left_the_fleet_counts_for_an_hour():
    policy, held = HoldPolicy(HoldRules()), {"gone": 1}
    decisions = told(play(policy, view(BAD, others=14), 2 * 3600, held))
    assert decisions == [(3600.0, "c", True)]


def test_what_somebody_else_holds_is_left_alone_until_it_was_well():
    policy = HoldPolicy(HoldRules(raise_seconds=30.0, clear_seconds=300.0))
    policy.leave_alone("c")
    assert play(policy, view(BAD), 3600) == []
    assert play(policy, view(WELL), 300, start=4000) == []
    assert told(play(policy, view(BAD), 100, start=5000)) == [(30.0, "c", True)]


def test_a_host_at_fault_goes_before_one_of_which_nothing_is_known():
    first = replace(UNDETERMINED, name="a", agent_id="a")
    policy = HoldPolicy(HoldRules(when="undetermined", max_share=0.01))
    assert [one.host for _, one in play(policy, view(first, BAD), 100)] == ["c"]


@pytest.mark.parametrize(
    ("host", "answer"),
    [
        (BAD, Answer.BAD),
        (WELL, Answer.WELL),
        (replace(BAD, early=True), Answer.CANT_TELL),
        (replace(BAD, state="blind"), Answer.CANT_TELL),
        (replace(WELL, state="silent"), Answer.CANT_TELL),
        (replace(WELL, fresh=False), Answer.CANT_TELL),
        (BACKEND, Answer.CANT_TELL),
        (UNDETERMINED, Answer.CANT_TELL),
    ],
)
def test_there_are_three_answers(host, answer):
    assert host.answer is answer
