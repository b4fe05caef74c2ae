"""Holds live where they act: whatever is killed, lost, wiped or renamed, what is held is what is true."""

from __future__ import annotations

import random
import sqlite3
import uuid
from collections import Counter
from contextlib import closing
from functools import partialmethod

import pytest

from tests.integrations.plane import POINTS, RULES, Killed, World, story_of_a_kill
from virtbus.errors import ConfigError
from virtbus.integrations.base import HOLD, RELEASE, REPORT, ActionRefused, Found, Hold, TargetUnavailable
from virtbus.integrations.holds import Finding, HoldState, Row, reconcile
from virtbus.integrations.reactor import Reactor
from virtbus.integrations.store import ActionStore
from virtbus.integrations.telemetry import Audited, ReleaseRefused
from virtbus.retry import no_waiting

HOSTS = ("h1", "h2", "h3")


@pytest.fixture
def world(tmp_path):
    one = World(tmp_path, HOSTS)
    yield one
    if one.reactor is not None:
        one.kill()


def held_h1(world: World) -> World:
    world.bad = {"h1"}
    world.run(60)
    assert world.plane.held == {"h1"}
    return world


# ---- what is held outlives who holds it


def test_a_host_in_trouble_is_held_and_given_back(world):
    held_h1(world)
    world.bad = set()
    world.run(90)
    assert world.plane.held == set()
    assert [one for one in world.plane.done if one[0] != REPORT] == [(HOLD, "h1"), (RELEASE, "h1")]


def test_a_hold_whose_state_was_lost_is_adopted_counted_and_given_back(world):
    held_h1(world)
    world.kill(losing_state=True)
    world.bad = {"h1", "h2"}
    world.run(90)
    assert world.plane.held == {"h1"}, "max_share counts what was adopted"
    assert Finding.ADOPTED in world.findings
    world.bad = set()
    world.run(90)
    assert world.plane.held == set()


def test_a_hold_is_counted_before_anything_more_is_held_after_a_fail_over(world, tmp_path):
    """The other instance stood by and has held nothing itself; the active one dies."""
    world.start()
    standby, store = world.reactor, world.store
    world.reactor._worker.step()  # it looked at its start, when nothing was held
    (tmp_path / "active").mkdir()
    world.folder = tmp_path / "active"
    world.reactor = None
    held_h1(world)
    world.kill()
    world.reactor, world.store, world.folder = standby, store, tmp_path
    world.bad = {"h1", "h2"}
    world.run(120)
    assert world.plane.held == {"h1"}


def test_an_instance_that_hears_nothing_undoes_nothing(world):
    held_h1(world)
    world.kill()
    world.silent = set(HOSTS)
    world.plane.wipe("h1")
    world.run(1000)
    assert world.plane.done.count((HOLD, "h1")) == 1
    assert (RELEASE, "h1") not in world.plane.done


def test_nothing_is_held_before_the_control_plane_was_read(world):
    world.bad = {"h1"}

    def unreadable(verb, target):
        if verb == "look":
            raise TargetUnavailable("away")

    world.plane.fails = unreadable
    with no_waiting():
        world.start()
        world.reactor._worker.looks.failed(world.monotonic, 300.0)
        world.run(200)
    assert (HOLD, "h1") not in world.plane.done
    assert world.reactor.not_ready()


# ---- released means released


@pytest.mark.parametrize("error", [TargetUnavailable, ActionRefused])
def test_a_host_is_held_until_its_release_has_succeeded(world, error):
    held_h1(world)

    def fails(verb, target):
        if verb == RELEASE:
            raise error("no")

    world.plane.fails = fails
    world.bad = {"h2"}
    world.run(400)
    assert world.plane.held == {"h1"}, "the limit of one is used up"
    assert world.store.rows()["h1"].state is HoldState.RELEASING
    if error is ActionRefused:
        assert any(isinstance(one, ReleaseRefused) and one.target == "h1" for one in world.told)
    world.plane.fails = lambda verb, target: None
    world.run(120)
    assert world.plane.held == {"h2"}


def test_a_hold_that_is_refused_after_its_effect_counts_for_the_limit(world):
    def refused(verb, target):
        if verb == HOLD and target == "h1":
            raise ActionRefused("a gateway's answer")

    world.run(30)
    world.plane.after = refused
    world.bad = {"h1"}
    world.run(60)
    assert world.plane.held == {"h1"}
    world.bad = {"h1", "h2"}
    world.run(60)
    assert world.plane.held == {"h1"}, "the limit of one is used up"
    world.bad = {"h2"}
    world.run(200)
    assert world.plane.held == {"h2"}, "h1 is well and was released"


def test_a_release_that_has_not_succeeded_is_dropped_when_the_host_is_bad_again(world):
    held_h1(world)
    with world.outage():
        world.bad = set()
        world.run(90)
        assert world.store.rows()["h1"].state is HoldState.RELEASING
        world.bad = {"h1"}
        world.run(60)
    world.run(120)
    assert world.plane.held == {"h1"}
    assert (RELEASE, "h1") not in world.plane.done


def test_releasing_twice_is_released(world):
    held_h1(world)
    world.plane.after = lambda verb, target: (_ for _ in ()).throw(TargetUnavailable("the answer was lost"))
    world.bad = set()
    world.run(70)
    world.plane.after = lambda verb, target: None
    world.run(120)
    assert world.plane.held == set()
    assert world.store.rows()["h1"].state is HoldState.FREE


# ---- what others do


def test_what_another_controller_wiped_is_set_again(world):
    held_h1(world)
    world.plane.wipe("h1")
    world.run(15)
    assert world.plane.held == {"h1"}
    assert world.findings == [Finding.WIPED]


def test_a_node_that_registered_anew_is_held_again_and_shows_its_condition(world):
    held_h1(world)
    world.plane.register_anew("h1")
    world.run(15)
    assert world.plane.held == {"h1"}
    assert world.plane.targets["h1"].condition == {"status": "False", "message": ""}
    assert world.findings == [Finding.REGISTERED_ANEW]


@pytest.mark.parametrize("still", [False, True])
def test_what_another_instance_gave_back_before_its_node_registered_anew_is_not_held_again(world, still):
    held_h1(world)
    world.kill()
    world.plane.take_back("h1")  # by the instance that was active meanwhile
    world.plane.register_anew("h1")
    world.bad = {"h1"} if still else set()
    world.run(60)
    assert world.findings == [Finding.TARGET_GONE]
    assert world.plane.held == world.bad, "the policy decides again"
    assert world.plane.done.count((HOLD, "h1")) == 1 + still


def test_a_well_node_that_registered_anew_shows_its_condition_within_minutes(world):
    world.run(30)
    world.plane.register_anew("h2")
    world.run(310)
    assert world.plane.targets["h2"].condition == {"status": "True", "message": ""}


def test_a_condition_that_another_reactor_showed_is_corrected_within_minutes(world):
    """It blamed the host and was killed; this one showed it well before, and finds nothing new to say."""
    world.run(30)
    world.plane.targets["h2"].condition = {"status": "False", "message": "by the reactor before"}
    world.run(310)
    assert world.plane.targets["h2"].condition == {"status": "True", "message": ""}


@pytest.mark.parametrize("while_down", [False, True])
def test_what_an_operator_took_back_is_left_alone_until_the_host_was_well(world, while_down):
    held_h1(world)
    if while_down:
        world.kill()
    world.plane.take_back("h1")
    world.run(200)
    assert world.plane.held == set()
    assert world.findings == [Finding.REMOVED_BY_HAND]
    world.kill()
    world.run(200)
    assert world.plane.held == set(), "also after a restart"
    world.bad = set()
    world.run(90)
    world.kill()
    world.bad = {"h1"}
    world.run(90)
    assert world.plane.held == {"h1"}, "it was well once"


def test_a_report_that_came_before_its_node_is_sent_when_it_is_there(tmp_path):
    world = World(tmp_path, HOSTS)
    del world.plane.targets["h2"]
    world.run(30)
    world.plane.register_anew("h2")
    world.run(70)
    assert world.plane.targets["h2"].condition == {"status": "True", "message": ""}
    world.kill()


def test_a_hold_of_a_node_that_is_not_there_eats_no_place_and_is_set_when_it_comes(world):
    del world.plane.targets["h1"]
    world.bad = {"h1", "h2"}
    world.run(200)
    assert world.plane.held == {"h2"}
    world.bad = {"h1"}
    world.run(90)
    world.plane.register_anew("h1")
    world.run(90)
    assert world.plane.held == {"h1"}


@pytest.mark.timeout(60)  # it would wait for ever
def test_hosts_that_the_control_plane_does_not_know_keep_no_event_away(world, monkeypatch):
    """Their conditions wait for them, more than a reactor lets wait before it hears no more events."""
    monkeypatch.setattr("virtbus.integrations.worker.MOST_WAITING", 5)
    world.agents |= {f"elsewhere-{number}": str(uuid.uuid4()) for number in range(20)}
    world.run(30)
    held_h1(world)
    world.bad = set()
    world.run(90)
    assert world.plane.held == set()


# ---- hosts that change or go


def test_a_host_that_is_told_with_its_domain_now_keeps_its_hold(world):
    held_h1(world)
    world.kill()
    world.agents["h1.example.org"] = world.agents.pop("h1")
    world.bad = {"h1.example.org"}
    world.run(100)
    assert world.plane.held == {"h1"}
    world.bad = set()
    world.run(400)
    assert world.plane.held == set()
    assert [one for one in world.plane.done if one[0] != REPORT].count((HOLD, "h1")) == 1


def renames_h1(world):
    """The host calls itself by its name with the domain now."""
    world.agents["h1.example.org"] = world.agents.pop("h1")
    world.bad = {"h1.example.org"} if world.bad else set()


def test_what_an_operator_took_back_is_left_alone_also_under_the_hosts_other_name(world):
    held_h1(world)
    world.run(70)
    world.plane.take_back("h1")
    world.run(30)
    renames_h1(world)
    world.run(300)
    assert world.plane.held == set()
    world.kill()
    world.run(100)
    assert world.plane.held == set(), "also after a restart"


@pytest.mark.parametrize("verb", [HOLD, RELEASE])
def test_a_host_that_changes_its_name_while_its_hold_is_on_its_way_comes_to_what_is_true(world, verb):
    if verb is HOLD:
        world.run(30)
        world.bad = {"h1"}
    else:
        held_h1(world)
        world.run(70)
        world.bad = set()
    with world.outage():
        world.run(200)
        renames_h1(world)
        world.run(100)
    world.run(200)
    assert world.plane.held == ({"h1"} if verb is HOLD else set())
    assert {row.state for row in world.store.rows().values() if row.ours} <= {HoldState.HELD}
    world.bad = set()
    world.run(400)
    assert world.plane.held == set()
    assert not [row for row in world.store.rows().values() if row.ours]


def test_a_host_of_another_domain_does_not_take_over_a_hold(tmp_path):
    world = World(tmp_path, ["h1.a.org", "h1.b.org", "h3.a.org"])
    world.bad = {"h1.a.org"}
    world.run(60)
    world.kill()
    world.silent = {"h1.a.org"}
    world.bad = set()
    world.run(300)
    assert world.plane.held == {"h1.a.org"}, "nobody has said that it is well"
    world.kill()


def test_a_renamed_host_is_given_back_by_its_old_name(world):
    held_h1(world)
    world.run(60)
    world.agents["other"] = world.agents.pop("h1")
    world.plane.register_anew("other")
    world.kill()
    world.bad = set()
    world.run(60)
    assert world.plane.held == set()


def test_a_decommissioned_host_is_given_back_after_a_day(tmp_path):
    world = World(tmp_path, HOSTS)
    held_h1(world)
    del world.agents["h1"]
    world.kill(losing_state=True)
    world.bad = set()
    world.run(600)
    assert world.plane.held == {"h1"}, "silence is not wellness"
    world.wall += 86_400.0
    world.run(3700)
    assert world.plane.held == set()
    world.kill()


@pytest.mark.parametrize("heard_again", [False, True])
def test_a_reactor_that_was_deaf_for_a_day_gives_nothing_back_before_it_has_listened(tmp_path, heard_again):
    """Nobody has spoken for the held host, nor for any other: that is rather our own connection."""
    world = World(tmp_path, HOSTS)
    held_h1(world)
    world.run(3700)
    world.silent = set(HOSTS)
    world.run(60)
    world.wall += 86_400.0
    world.monotonic += 86_400.0
    world.run(60)
    if heard_again:
        world.silent = {"h1"}  # its heartbeat comes a little later than those of the others
        world.run(60)
        world.silent = set()
        world.run(60)
    assert world.plane.held == {"h1"}
    assert (RELEASE, "h1") not in world.plane.done
    world.kill()


def test_a_dry_run_says_once_what_it_would_show(tmp_path, monkeypatch):
    world = World(tmp_path, HOSTS)
    monkeypatch.setattr(Reactor, "__init__", partialmethod(Reactor.__init__, dry_run=True))
    world.bad = {"h1"}
    world.run(900)
    would = Counter((one.verb, one.target) for one in world.told if isinstance(one, Audited))
    assert would[HOLD, "h1"] == 1
    assert would[REPORT, "h1"] <= 2, "well, then in trouble"
    assert world.plane.done == []
    world.kill()


@pytest.mark.parametrize("losing_state", [False, True])
def test_a_long_held_host_whose_agent_is_silent_for_hours_keeps_its_hold_over_a_restart(
    tmp_path, losing_state
):
    """A broken disk ends the agent, too: without a store nobody knows how long ago it spoke."""
    world = World(tmp_path, HOSTS)
    held_h1(world)
    world.wall += 2 * 86_400.0
    world.run(130)
    world.silent = {"h1"}
    world.run(30)
    world.kill(losing_state=losing_state)
    world.run(3700)
    assert world.plane.held == {"h1"}
    world.wall += 86_400.0
    world.run(130)
    assert world.plane.held == set(), "not for ever"
    world.kill()


def test_a_decommissioned_host_is_given_back_although_our_clock_once_was_years_ahead(tmp_path):
    world = World(tmp_path, HOSTS)
    world.wall += 3 * 365 * 86_400.0
    held_h1(world)
    world.run(60)
    world.wall -= 3 * 365 * 86_400.0
    del world.agents["h1"]
    world.kill()
    world.bad = set()
    world.run(600)
    assert world.plane.held == {"h1"}
    world.wall += 86_400.0
    world.run(3700)
    assert world.plane.held == set()
    world.kill()


# ---- kills


@pytest.mark.parametrize("losing_state", [False, True], ids=["state kept", "state lost"])
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("ends", ["bad", "well"])
def test_a_kill_at_any_point_leaves_what_is_true(world, monkeypatch, point, losing_state, ends):
    story_of_a_kill(
        world, point, monkeypatch, "h1", ends=ends, losing_state=losing_state, held=lambda: world.plane.held
    )


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_no_well_host_is_held_and_none_for_ever(tmp_path, seed):
    """Half an hour of kills, wipes, lost state, outages and operators; then a quiet one."""
    chance = random.Random(seed)
    hosts = [f"h{number}" for number in range(9)]
    world = World(tmp_path, hosts)
    prone = {"h0", "h1", "h2", "h3", "h4"}
    most = 0

    def disturb(verb, target):
        if chance.random() < 0.02:
            raise chance.choice([Killed(), TargetUnavailable("away"), ActionRefused("no")])

    world.plane.fails = world.plane.after = disturb
    with no_waiting():
        for _ in range(30):
            # In order: a seed is the same story in every process.
            world.bad = {
                host for host in sorted(prone) if chance.random() < (0.7 if host in world.bad else 0.25)
            }
            world.run(chance.choice([5, 20, 70, 130]))
            most = max(most, len(world.plane.held))
            assert world.plane.held <= prone
            name = chance.choice(sorted(prone))
            event = chance.random()
            if event < 0.1:
                world.plane.wipe(name)
            elif event < 0.2:
                world.plane.register_anew(name)
            elif event < 0.3 and name in world.plane.held:
                world.plane.take_back(name)
            elif event < 0.5 and world.reactor is not None:
                world.kill(losing_state=chance.random() < 0.5)
        world.plane.fails = world.plane.after = lambda verb, target: None
        world.bad = set()
        world.run(600)
    assert world.plane.held == set()
    assert not any(one.mark for one in world.plane.targets.values()), "no mark is left behind"
    assert most <= 3, "a third of nine"
    if world.reactor is not None:
        world.kill()


def test_a_state_that_a_newer_release_wrote_is_refused_and_never_read_as_something_else(tmp_path):
    """An action of a kind that we don't know would be done as a release."""
    file = tmp_path / "plane.db"
    ActionStore(file).close()
    with closing(sqlite3.connect(file)) as db, db:
        db.execute(
            "INSERT INTO actions (key, target, topic, verb, why, body, stored_at)"
            " VALUES ('k', 'h1', 'hold', 'evict', '', '{}', 0)"
        )
    with pytest.raises(ConfigError, match=r"evict.*move it away"):
        ActionStore(file)


# ---- the table of holds.py


def a_row(state=HoldState.HELD, **more):
    return Row("h1", state, 1.0, uid="u1", target="n1", **more)


def a_mark(**more):
    return Hold("h1", "n1", "why", **{"uid": "u1", **more})


@pytest.mark.parametrize(
    ("found", "finding", "state"),
    [
        (Found([a_mark()], {"h1": "u1"}), None, HoldState.HELD),
        (Found([a_mark(intact=False)], {"h1": "u1"}), Finding.WIPED, HoldState.HOLDING),
        (Found([], {"h1": "u2"}), Finding.REGISTERED_ANEW, HoldState.HOLDING),
        (Found([], {"h1": "u1"}, {"h1": None}), Finding.REGISTERED_ANEW, HoldState.HOLDING),
        (Found([], {"h1": "u1"}), Finding.REMOVED_BY_HAND, HoldState.LEFT),
        (Found([], {}), Finding.TARGET_GONE, HoldState.FREE),
    ],
)
def test_what_a_look_means(found, finding, state):
    changes = reconcile(
        {"h1": a_row()}, found, asked=None, reported={"h1"}, acting=True, known=True, wall=9.0
    )
    assert [(one.finding, one.row.state) for one in changes] == ([(finding, state)] if finding else [])


@pytest.mark.parametrize("found", [Found([], {"h1": "u2"}), Found([], {"h1": "u1"}, {"h1": None})])
def test_what_was_replaced_while_another_instance_may_have_acted_is_forgotten(found):
    changes = reconcile(
        {"h1": a_row()}, found, asked=None, reported={"h1"}, acting=True, known=False, wall=9.0
    )
    assert [(one.finding, one.row.state, one.again) for one in changes] == [
        (Finding.TARGET_GONE, HoldState.FREE, False)
    ]


def test_two_marks_that_name_one_host_are_both_adopted():
    marks = [a_mark(uid="u1"), Hold("h1", "n2", "why", uid="u2")]
    changes = reconcile({}, Found(marks, {}), asked=None, reported=(), acting=True, known=True, wall=9.0)
    assert [(one.row.host, one.row.target) for one in changes] == [("h1", "n1"), ("n2", "n2")]


@pytest.mark.parametrize("since", [float("nan"), float("inf"), -1e300, 1e12])
@pytest.mark.parametrize("times", [10**400, -5])
def test_whatever_a_mark_says_can_be_stored_and_lies_in_the_past(tmp_path, since, times):
    mark = Hold("h1", "h1", "\ud800", since=since, times=times, uid="u")
    store = ActionStore(tmp_path / "store.db")
    store.reconcile(Found([mark], {"h1": "u"}), asked=None, acting=True, known=True, wall=1000.0)
    row = store.rows()["h1"]
    assert (row.state, row.since, row.times, row.why) == (HoldState.HELD, 1000.0, 1, "?")
    store.close()


def test_a_look_at_some_says_nothing_of_the_others():
    rows = {"h1": a_row()}
    assert reconcile(rows, Found([], {}), asked=["h2"], reported=(), acting=True, known=True, wall=9.0) == []


def test_what_is_under_way_is_not_corrected():
    for state in (HoldState.HOLDING, HoldState.RELEASING):
        rows = {"h1": a_row(state)}
        assert (
            reconcile(rows, Found([], {}), asked=None, reported=(), acting=True, known=True, wall=9.0) == []
        )
        marked = Found([a_mark()], {"h1": "u1"})
        assert reconcile(rows, marked, asked=None, reported=(), acting=True, known=True, wall=9.0) == []


def test_a_mark_is_known_by_the_object_it_stands_on_whatever_name_it_tells():
    changes = reconcile(
        {"h1.example.org": Row("h1.example.org", HoldState.HELD, 1.0, uid="u1", target="n1")},
        Found([a_mark()], {}), asked=None, reported=(), acting=True, known=True, wall=9.0,
    )  # fmt: skip
    assert changes == []


def test_the_rules_of_these_tests_leave_room_for_one_of_three():
    assert int(RULES.max_share * 3) == 1
