"""What is missing is told once, with its numbers; what a gap event names is not, in any order."""

import pytest

from virtbus.consumer import MissingEvents
from virtbus.errors import ConfigError, DedupeUnavailable
from virtbus.marks import Marks
from virtbus.model import PreviousRun, SequenceRange
from virtbus.sequences import SequenceCheck
from virtbus.testing import a_gap, a_heartbeat

SOURCE = "/virtbus/agents/a"
FIRST, SECOND, THIRD = (f"019a05f9-4236-73ae-a6f0-00000000000{n}" for n in (1, 2, 3))


class Check:
    """A check, what it told, and its restart."""

    def __init__(self):
        self.told = []
        self.kept = {}
        self.check = SequenceCheck(60.0, self.told.append)

    def see(self, epoch, *numbers, now=0.0, event=None):
        for number in numbers:
            self.check.saw(self.attributes(epoch, number), event, now)

    def beat(self, epoch, now=0.0):
        attributes = {"source": SOURCE, "id": f"beat {epoch}"}
        self.check.saw(attributes, a_heartbeat(epoch=epoch), now)

    @staticmethod
    def attributes(epoch, number):
        return {"source": SOURCE, "id": f"{epoch}-{number}", "epoch": epoch, "sequence": f"{number:012d}"}

    def hand_out(self, epoch, *numbers):
        for number in numbers:
            self.check.saw(self.attributes(epoch, number), None, 0.0)
            self.check.handed_out(self.attributes(epoch, number))

    def settle(self, epoch, *numbers):
        for number in numbers:
            self.check.settled(SOURCE, f"{epoch}-{number}")

    def restart(self):
        self.kept |= {run[:2]: run for run in self.check.changes() if run[2] is not None}
        self.check = SequenceCheck(60.0, self.told.append)
        self.check.restore(self.kept.values())

    def missing(self, now=1000.0):
        self.check.tick(now)
        return [(hole.epoch, hole.first, hole.last) for hole in self.told]


@pytest.fixture
def check():
    return Check()


def test_a_gap_event_that_comes_before_the_neighbours_of_the_numbers_it_names_is_no_alarm(check):
    check.see(FIRST, 1, 2, 3, 4)
    check.see(SECOND, 1, event=a_gap(missing=(SequenceRange(FIRST, 7, 8),), missing_events=2))
    check.see(FIRST, 5, 6, 9)
    assert check.missing() == []


def test_a_gap_event_that_is_the_first_word_of_a_run_is_no_alarm_either(check):
    check.see(SECOND, 1, event=a_gap(missing=(SequenceRange(FIRST, 6, 8),), missing_events=3))
    check.see(FIRST, 5, 9)
    assert check.missing() == []


def test_the_gap_event_and_the_last_runs_tail_explain_all_but_what_is_lost(check):
    check.see(FIRST, 1, 2, 3, 4)
    gap = a_gap(previous=PreviousRun(FIRST, 9), missing=(SequenceRange(FIRST, 7, 8),), missing_events=2)
    check.see(SECOND, 1, event=gap)
    check.see(FIRST, 5)
    assert check.missing() == [(FIRST, 6, 6), (FIRST, 9, 9)]


def test_a_run_that_begins_while_its_agent_is_known_begins_at_one(check):
    check.beat(FIRST)
    check.see(FIRST, 40)
    check.see(SECOND, 3)
    check.beat(SECOND)
    assert check.missing() == [(SECOND, 1, 2)]


def test_a_run_whose_first_event_comes_after_others_of_it_begins_at_one(check):
    check.see(FIRST, 40)
    check.see(SECOND, 5)
    check.see(SECOND, 3, now=1.0)
    check.see(SECOND, 1, now=2.0, event=a_gap(previous=PreviousRun(FIRST, 40)))
    assert check.missing() == [(SECOND, 2, 2), (SECOND, 4, 4)]


def test_what_a_gap_event_names_of_a_run_that_is_not_yet_known_to_have_begun_is_no_alarm(check):
    check.beat(FIRST)
    check.see(SECOND, 6)
    check.see(SECOND, 7, event=a_gap(missing=(SequenceRange(SECOND, 2, 5),), missing_events=4))
    check.see(SECOND, 8)
    check.beat(SECOND)
    assert check.missing() == [(SECOND, 1, 1)]


def test_a_run_that_beats_before_its_first_event_begins_at_one(check):
    check.beat(FIRST)
    check.beat(SECOND)
    check.see(SECOND, 2)
    assert check.missing() == [(SECOND, 1, 1)]


def test_the_first_run_that_is_heard_of_an_agent_begins_with_what_comes_first(check):
    check.see(FIRST, 40)
    check.beat(FIRST)
    check.beat(FIRST)
    check.see(FIRST, 41)
    assert check.missing() == []


@pytest.mark.parametrize("later", [SECOND, FIRST], ids=["clock right", "clock set back"])
def test_no_clock_tells_which_run_is_the_later_one(check, later):
    """The host's clock went back between two starts: the later run's epoch is the smaller one."""
    earlier = FIRST if later is SECOND else SECOND
    check.beat(earlier)
    check.see(earlier, 1, 2, 3)
    check.beat(later)
    check.see(later, 3)
    check.see(later, 4, event=a_gap(previous=PreviousRun(earlier, 5)))
    assert check.missing() == [(later, 1, 2), (earlier, 4, 5)]


@pytest.mark.parametrize("epochs", [(FIRST, SECOND, THIRD), (THIRD, SECOND, FIRST)], ids=["right", "back"])
def test_a_whole_run_that_was_lost_is_told_whatever_the_clocks_say(check, epochs):
    one, lost, last = epochs
    check.beat(one)
    check.see(one, 1)
    check.see(last, 1, event=a_gap(previous=PreviousRun(lost, 5)))
    assert check.missing() == [(lost, 1, 5)]


def test_a_first_event_that_is_sent_again_by_hand_days_later_is_no_alarm(check):
    check.see(FIRST, 40)
    check.see(FIRST, 1, now=90_000.0)
    assert check.missing(now=100_000.0) == []


def test_a_run_that_was_heard_before_a_restart_counts_for_the_next_one(check):
    check.beat(FIRST)
    check.restart()
    check.see(SECOND, 4)
    check.restart()
    check.beat(SECOND)
    assert check.missing() == [(SECOND, 1, 3)]


def test_a_late_event_of_a_run_before_all_that_is_known_is_no_alarm(check):
    check.see(SECOND, 1)
    check.see(FIRST, 40)
    assert check.missing() == []


def test_a_hole_that_opened_while_no_consumer_ran_is_told(check):
    check.hand_out(FIRST, 1, 2, 3)
    check.settle(FIRST, 1, 2, 3)
    check.restart()
    check.see(FIRST, 7)
    assert check.missing() == [(FIRST, 4, 6)]


def test_a_whole_run_that_was_lost_while_no_consumer_ran_is_told(check):
    check.see(FIRST, 1)
    check.restart()
    check.see(THIRD, 1, event=a_gap(previous=PreviousRun(SECOND, 5)))
    assert check.missing() == [(SECOND, 1, 5)]


def test_what_had_no_verdict_at_the_restart_is_told_when_it_does_not_come_again(check):
    check.hand_out(FIRST, 1, 2, 3)
    check.settle(FIRST, 1, 3)
    check.restart()
    assert check.missing(now=500.0) == [], "the agent was not heard yet: the broker may be away"
    check.see(FIRST, 4, now=500.0)
    assert check.missing(now=559.0) == []
    assert check.missing(now=561.0) == [(FIRST, 2, 2)]


def test_what_had_no_verdict_at_the_restart_and_comes_again_is_no_alarm(check):
    check.hand_out(FIRST, 1, 2)
    check.settle(FIRST, 2)
    check.restart()
    check.see(FIRST, 1, 3)
    assert check.missing() == []


@pytest.mark.parametrize(
    ("came", "missing"), [((3, 2), [(1, 1)]), ((3, 1), [(2, 2)]), ((3, 1, 2), []), ((4, 2), [(1, 1), (3, 3)])]
)
def test_what_came_out_of_order_as_a_run_began_is_known_after_restarts(check, came, missing):
    """Until something shows that we heard it begin, what came first is the baseline."""
    check.see(FIRST, 1)
    check.beat(FIRST)
    for number in came:
        check.see(SECOND, number)
        check.restart()
    check.beat(SECOND)
    assert check.missing() == [(SECOND, *hole) for hole in missing]


def test_a_hole_that_was_told_is_not_told_again_after_a_restart(check):
    check.see(FIRST, 1, 4)
    assert check.missing() == [(FIRST, 2, 3)]
    check.restart()
    check.see(FIRST, 5)
    assert check.missing(now=2000.0) == [(FIRST, 2, 3)]


# ---- the file


def opened(path, scope="bus group g", rows=100):
    return Marks(path, scope, rows)


def test_a_second_group_in_one_file_does_not_see_the_first_ones_marks(tmp_path):
    one = opened(tmp_path / "seen.db")
    one.write([("s", "1")], [("s", "e", "{}")], {"place": "7"})
    one.close()
    other = opened(tmp_path / "seen.db", "bus group h")
    assert (other.has(("s", "1")), other.runs(), other.notes()) == (False, [], {})
    other.close()
    again = opened(tmp_path / "seen.db")
    assert (again.has(("s", "1")), again.runs(), again.notes()) == (True, [("s", "e", "{}")], {"place": "7"})
    again.close()


def test_a_second_consumer_at_the_same_time_gets_one_clear_line(tmp_path):
    one = opened(tmp_path / "seen.db")
    with pytest.raises(ConfigError, match=r"seen\.db is in use by process \d+: give each consumer"):
        opened(tmp_path / "seen.db")
    one.write([("s", "1")])
    one.close()
    again = opened(tmp_path / "seen.db")
    assert again.has(("s", "1"))
    again.close()


def test_what_can_not_be_written_is_written_whole_the_next_time(tmp_path):
    import sqlite3

    marks = opened(tmp_path / "seen.db")
    marks._database.execute("PRAGMA busy_timeout = 20")
    other = sqlite3.connect(tmp_path / "seen.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(DedupeUnavailable):
        marks.write([("s", "1")], [("s", "e", "{}")], {"a": "1"})
    other.close()
    marks.write([("s", "1")], [("s", "e", "{}")], {"a": "1"})
    marks.write([], [("s", "e", None)], {"a": "2"})
    assert (marks.runs(), marks.notes()) == ([], {"a": "2"})
    marks.close()


def test_missing_events_is_what_the_sdk_hands_out():
    assert MissingEvents(SOURCE, FIRST, 1, 2).cause == "unexplained"
