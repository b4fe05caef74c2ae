"""Seen through: what counts, what never does, and in which clock it is told. Pure."""

import math

import pytest

from virtbus.model import Now
from virtbus.observations import SourceLost, SourceReady, SourceSeen, Surveyed
from virtbus.seen import (
    ANSWER_OF_MANY_SECONDS,
    ANSWER_SECONDS,
    MARGIN_SECONDS,
    Moment,
    SeenThrough,
    Sight,
    WallClocks,
    earliest,
)
from virtbus.testing import a_host
from virtbus.words import GapReason

DAY = 1_800_000_000 * 10**9


def at(seconds, *, stepped=0.0, slept=0.0):
    """A reading `seconds` after a boot, with a wall clock that was set by `stepped`."""
    return Now(DAY + int((seconds + stepped) * 1e9), seconds - slept, slept)


def ready(now, *, proves=True):
    return SourceReady(a_host(), now.wall_ns, (), proves=proves)


def connected():
    now = at(100)
    seen = SeenThrough(Moment.of(at(0)))
    seen.take(ready(now), now)
    seen.committed()
    return seen


def seconds_of(moment):
    return moment.boot_ns / 1e9


def test_a_question_counts_from_when_it_was_asked_and_only_once_its_batch_is_committed():
    seen = connected()
    seen.take(SourceSeen(at(110)), at(112))
    assert seconds_of(seen.moment) == 100
    assert seconds_of(seen.committed()) == 110 - MARGIN_SECONDS


def test_a_drain_alone_proves_nothing_of_a_source_that_answers_questions():
    seen = connected()
    seen.drained(at(150))
    assert seconds_of(seen.committed()) == 100


def test_of_a_source_that_proves_nothing_a_drain_counts_from_before_it():
    seen = SeenThrough(Moment.of(at(0)))
    seen.take(ready(at(100), proves=False), at(100))
    seen.committed()
    seen.drained(at(150))
    assert seconds_of(seen.committed()) == 150 - MARGIN_SECONDS


def test_nothing_counts_while_the_source_is_lost_and_the_gap_begins_at_the_last_proof():
    seen = connected()
    seen.take(SourceLost(at(120).wall_ns, "gone"), at(120))
    seen.take(SourceSeen(at(130)), at(131))
    seen.drained(at(140))
    assert seconds_of(seen.committed()) == 100
    blind = seen.take(ready(at(150)), at(150))
    assert (seconds_of(blind.since), blind.why) == (100, "gone")
    assert seconds_of(seen.committed()) == 150


def test_a_loss_that_began_before_the_last_proof_begins_the_gap():
    seen = connected()
    seen.take(SourceLost(at(90).wall_ns, "deaf"), at(120))
    assert seconds_of(seen.take(ready(at(150)), at(150)).since) == 90


def test_of_two_losses_the_first_begins_the_gap_and_a_standstill_keeps_its_reason():
    seen = connected()
    seen.take(SourceLost(at(120).wall_ns, "stood still", reason=GapReason.AGENT_STANDSTILL), at(120))
    seen.take(SourceLost(at(130).wall_ns, "gone"), at(130))
    assert seen.take(ready(at(150)), at(150)).reason is GapReason.AGENT_STANDSTILL


def test_a_connection_that_does_not_answer_is_silent_and_one_that_stood_still_at_once():
    seen = connected()
    seen.take(SourceSeen(at(110)), at(110))
    assert seen.silent_for(at(110 + ANSWER_SECONDS), ANSWER_SECONDS) is None
    assert seen.silent_for(at(170), ANSWER_SECONDS) == 60
    assert seen.silent_for(at(170, slept=60), ANSWER_SECONDS) == 60


def test_of_many_connections_one_that_is_silent_is_its_guests_matter_and_all_of_them_are_ours():
    """The agent was stopped, say, and goes on: until it has connected again it sees nobody."""
    sight = Sight(Moment.of(at(0)), at(0))
    for name in ("a", "b"):
        found = SourceReady(a_host(), at(100).wall_ns, (), connection=name, proves=True, whole=False)
        sight.take(found, at(100))
    sight.surveyed(Surveyed(at(100).wall_ns, a_host(), frozenset()))
    sight.take(SourceSeen(at(130), "a"), at(130))
    assert sight.troubles(at(130 + ANSWER_OF_MANY_SECONDS)) == []
    assert sight.troubles(at(190)) == ["source: no answer on any of 2 connections for 60 s"]
    assert sight.troubles(at(190, slept=60)) == ["source: no answer on any of 2 connections for 60 s"]
    sight.take(SourceLost(at(190).wall_ns, "gone", "a"), at(190))
    assert sight.troubles(at(190)) == ["source: no answer on any of 1 connections for 90 s"]
    found = SourceReady(a_host(), at(191).wall_ns, (), connection="a", proves=True, whole=False)
    sight.take(found, at(191))
    assert sight.troubles(at(191)) == []


@pytest.mark.parametrize("step", [-3600.0, 3600.0])
def test_a_clock_that_is_set_before_a_word_of_the_source_is_read_moves_no_edge(step):
    def told(seconds, kind, **more):
        told_at = Moment.of(at(seconds))
        return kind(at_ns=told_at.wall_ns, booted_ns=told_at.booted_ns, **more)

    seen = SeenThrough(Moment.of(at(0)))
    seen.take(told(100, SourceReady, host=a_host(), domains=(), proves=True), at(101, stepped=step))
    assert seconds_of(seen.committed()) == 100
    seen.take(told(90, SourceLost, why="deaf"), at(120, stepped=step))
    assert seconds_of(seen.blind.since) == 90


@pytest.mark.parametrize("step", [-3600.0, 3600.0])
def test_a_moment_is_told_in_the_wall_clock_as_it_is_now(step):
    moment, now = Moment.of(at(100)), at(160, stepped=step)
    assert (now.wall_ns - moment.wall(now)) / 1e9 == pytest.approx(60)


def test_what_the_clock_wandered_changes_no_stamp():
    assert Moment.of(at(100)).wall(at(160, stepped=0.05)) == at(100).wall_ns


@pytest.mark.parametrize("step", [-3600.0, 3600.0])
def test_a_stamp_of_either_clock_is_not_older_than_its_moment(step):
    moment, now = Moment.of(at(100)), at(160, stepped=step)
    before_the_step, after_it = at(130), at(130, stepped=step)
    clocks = WallClocks()
    assert clocks.stamps(moment, now)[0] < min(before_the_step.wall_ns, after_it.wall_ns)
    assert clocks.stamps(moment, now)[0] in (at(100).wall_ns, at(100, stepped=step).wall_ns)


@pytest.mark.parametrize("noticed", [90, 110, 149])
def test_a_stamp_of_a_clock_that_was_set_twice_is_not_older_than_its_moment(noticed):
    clocks, moment = WallClocks(), Moment.of(at(100))
    for second in (10, noticed, 150, 160):
        step = 0 if second < noticed else -30 if second < 150 else 7200
        clocks.follow(at(second, stepped=step))
    assert clocks.stamps(moment, at(160, stepped=7200))[0] == at(100, stepped=-30).wall_ns
    later = Moment.of(at(155, stepped=7200))
    assert clocks.stamps(later, at(160, stepped=7200))[0] == later.wall_ns


def test_a_stamp_of_a_clock_that_was_set_back_before_is_later_than_any_since():
    clocks = WallClocks()
    clocks.follow(at(10, stepped=7200))
    clocks.follow(at(50))
    since, now = Moment.of(at(100)), at(160)
    assert now.wall_ns <= clocks.stamps(since, now)[1] < at(40, stepped=7200).wall_ns
    assert clocks.stamps(since, now, ours=False)[1] == math.inf
    ahead = Moment.of(at(40, stepped=7200))
    assert clocks.stamps(ahead, now)[1] >= at(49, stepped=7200).wall_ns, "it was set back since then"


@pytest.mark.parametrize("step", [-30, 7200])
def test_of_a_clock_that_was_set_since_both_stamps_may_be(step):
    clocks, since = WallClocks(), Moment.of(at(100))
    for second in (10, 150):
        clocks.follow(at(second, stepped=0 if second < 150 else step))
    _, latest = clocks.stamps(since, at(160, stepped=step))
    assert latest >= max(at(150).wall_ns, at(160, stepped=step).wall_ns)


def test_of_a_time_before_clocks_were_followed_no_stamp_is_too_late():
    clocks = WallClocks()
    clocks.follow(at(50))
    assert clocks.stamps(Moment.of(at(40)), at(60))[1] == math.inf


def test_the_memory_of_clocks_is_bounded():
    clocks = WallClocks()
    for second in range(1000):
        clocks.follow(at(second, stepped=-second))
    assert len(clocks._each) <= 64
    assert clocks.stamps(Moment.of(at(0)), at(1000))[0] == at(0, stepped=-999).wall_ns


def test_moments_are_ordered_by_the_boots_clock_whatever_the_wall_clock_did():
    first, second = Moment.of(at(100)), Moment.of(at(101, stepped=-3600))
    assert earliest(second, first) == first
