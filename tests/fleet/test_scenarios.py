"""What operators live through: the verdict is right or undetermined, never wrong."""

from __future__ import annotations

import pytest

from tests.fleet.world import SCENARIOS, World, play
from virtbus.fleet import Blame, FleetView
from virtbus.integrations.policy import HoldPolicy, HoldRules

PATHS = sorted(SCENARIOS.glob("*.toml"))
EACH = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def wrong_verdicts(world: World, view: FleetView) -> list[str]:
    """Every blame in `view` that is not the scenario's truth."""
    wrong = [
        f"host {one.name} is blamed: {one.why}"
        for one in view.hosts
        if one.blame is Blame.HOST and one.name not in world.truth_hosts
    ]
    wrong += [
        f"backend {one.name} is blamed: {one.why}"
        for one in view.backends
        if one.blame is Blame.BACKEND and world.storage_of(one.name) not in world.truth_systems
    ]
    wrong += [
        f"host {one.name} is called healthy with {one.incidents} open incidents"
        for one in view.hosts
        if one.blame is Blame.NONE and one.incidents
    ]
    wrong += [
        f"the fault of host {one.name} is put down to a backend: {one.why}"
        for one in view.hosts
        if one.blame is Blame.BACKEND and one.name in world.truth_hosts and not world.truth_systems
    ]
    return wrong


def test_there_are_sixty_scenarios_each_with_its_story():
    stories = [World(path).story.strip() for path in PATHS]
    assert len(PATHS) >= 60
    assert all(len(story) > 80 for story in stories)
    assert len(set(stories)) == len(PATHS)


@EACH
def test_no_verdict_is_wrong_at_any_moment(path):
    world = World(path)
    for moment, view in play(world):
        assert not wrong_verdicts(world, view), f"after {moment:g} s"


@EACH
def test_the_last_verdict_is_the_one_that_the_story_allows(path):
    world = World(path)
    *_, (_, view) = play(world)
    found = {one.name: one.blame.value for one in view.hosts if one.blame is not Blame.NONE}
    assert found == {name: blame for name, blame in world.expected.items() if blame != "none"}, {
        one.name: one.why for one in view.hosts if one.why
    }
    backends = {world.storage_of(one.name): one.blame.value for one in view.backends}
    assert backends == world.expected_backends, {one.name: one.why for one in view.backends}


@EACH
def test_a_fleet_that_starts_late_is_not_wrong_either(path):
    """A restart in the middle: what was told before is known only from the heartbeats."""
    late = World(path)
    for moment, view in play(late, from_=late.seconds / 2):
        assert not wrong_verdicts(late, view), f"after {moment:g} s"


@EACH
@pytest.mark.parametrize("part", [0.0, 0.25, 0.5, 0.75], ids=lambda part: f"from {part:.0%}")
def test_no_host_is_held_that_is_not_at_fault_whenever_the_reactor_starts(path, part):
    world = World(path)
    policy, held = HoldPolicy(HoldRules()), {}
    for moment, view in play(world, from_=part * world.seconds):
        for decision in policy.decide(view, held, moment):
            assert not decision.hold or decision.host in world.truth_hosts, decision.why
            held[decision.host] = 1


def test_hosts_at_fault_are_held():
    """Holding none would never be wrong."""
    found = 0
    for path in PATHS:
        policy, held = HoldPolicy(HoldRules()), {}
        for moment, view in play(World(path)):
            decisions = policy.decide(view, held, moment)
            held |= {one.host: 1 for one in decisions if one.hold}
        found += len(held)
    assert found >= 8, found


def test_a_fleet_that_starts_late_agrees_after_one_round_of_heartbeats():
    """Where all is still open, the heartbeats alone give the same verdict."""
    agreed = 0
    for path in PATHS:
        *_, (_, whole) = play(World(path))
        *_, (_, late) = play(World(path), from_=World(path).seconds - 65)
        blamed = {one.name: one.blame for one in late.hosts if one.blame in (Blame.HOST, Blame.BACKEND)}
        agreed += all(whole.host(name).blame in (blame, Blame.UNDETERMINED) for name, blame in blamed.items())
        assert {one.name: one.incidents for one in late.hosts if one.incidents} == {
            one.name: one.incidents for one in whole.hosts if one.incidents and one.state != "silent"
        }, path.stem
    assert agreed == len(PATHS)


def test_enough_is_determined_to_be_of_use():
    """Doubting everything would never be wrong: a third of the stories must end with somebody blamed."""
    determined = 0
    for path in PATHS:
        *_, (_, view) = play(World(path))
        blames = {one.blame for one in view.hosts} | {one.blame for one in view.backends}
        determined += bool(blames & {Blame.HOST, Blame.BACKEND})
    assert determined >= 24, determined
