"""Where a group goes on, and what it is told that it will never get."""

import pytest

from virtbus.bus import Memory
from virtbus.bus.kafka.places import Log, Losses, Place, resume
from virtbus.sequences import Cause, MissingEvents

A, B = "id-a", "id-b"
LOG = Log("t[0]", A, 10, 50)


@pytest.mark.parametrize(
    ("committed", "noted", "start"),
    [
        pytest.param(None, None, 10, id="a new group begins with the oldest"),
        pytest.param(Place(A, 20), None, None, id="a commit stands"),
        pytest.param(Place("", 20), None, None, id="a commit of an older release stands"),
        pytest.param(Place(A, 20), Place(A, 15), None, id="the commit is further: others read on"),
        pytest.param(Place(A, 20), Place(A, 25), None, id="an operator moved the commit back"),
        pytest.param(Place(A, 5), Place(A, 25), 10, id="and back beyond what is left"),
        pytest.param(None, Place(A, 25), 10, id="the commit expired: what was read comes again"),
        pytest.param(Place(A, 10), None, None, id="the oldest that is left is the next"),
        pytest.param(Place(A, 50), None, None, id="at the end"),
        pytest.param(Place(A, 20), Place(B, 90), None, id="an old topic's note beside a new commit"),
    ],
)
def test_nothing_is_lost(committed, noted, start):
    assert resume(committed, noted, LOG) == (start, ())


@pytest.mark.parametrize(
    ("committed", "noted", "lost"),
    [
        pytest.param(Place(A, 4), None, (A, 4, 9, Cause.RETENTION), id="retention overtook the group"),
        pytest.param(None, Place(A, 4), (A, 4, 9, Cause.RETENTION), id="and its commit expired"),
        pytest.param(Place(A, 4), Place(A, 7), (A, 7, 9, Cause.RETENTION), id="the note is further"),
        pytest.param(Place(B, 20), None, (B, 20, None, Cause.REPLACED), id="a recreated topic"),
        pytest.param(None, Place(B, 20), (B, 20, None, Cause.REPLACED), id="and the commits went with it"),
        pytest.param(
            Place(B, 20, 12),
            None,
            (B, 12, None, Cause.REPLACED),
            id="noticed late: 12 on may be the new's",
        ),
        pytest.param(None, Place(B, 20, 12), (B, 12, None, Cause.REPLACED), id="late, by the note alone"),
        pytest.param(Place("", 70), None, ("", 70, None, Cause.REPLACED), id="beyond the end, no ids"),
    ],
)
def test_what_is_lost_is_told_with_its_numbers_and_the_group_goes_on_with_the_oldest(committed, noted, lost):
    start, (told, *more) = resume(committed, noted, LOG)
    assert (start, told) == (10, MissingEvents("t[0]", *lost))
    # Of a topic that took the place of another the group missed what retention took before it came.
    replaced = [MissingEvents("t[0]", A, 0, 9, Cause.RETENTION)]
    assert more == (replaced if told.cause is Cause.REPLACED else [])


@pytest.mark.parametrize("note", [None, "", "x", "[]", '["a", "b", 1]', "{}", "3"])
def test_a_note_that_can_not_be_read_is_none(note):
    assert Place.read(note) is None


def test_a_place_is_what_was_noted():
    assert Place.read(Place(A, 3).note()) == Place(A, 3)
    assert Place.read(Place(A, 3, 2).note()) == Place(A, 3, 2)
    assert Place.committed(3, Place(A, 3, 2).metadata()) == Place(A, 3, 2)
    assert Place.committed(3, "") == Place("", 3)
    assert Place.committed(3, "somebody's own words") == Place("", 3)


@pytest.mark.parametrize("id_", [B, ""], ids=["with ids", "without"])
def test_partitions_that_the_new_topic_lacks_are_told_once(id_):
    told = []
    notes = {f"t[{number}]": Place(A if id_ else "", 20 + number).note() for number in range(3)}
    notes |= {"other[7]": Place(A, 5).note(), "no partition": "x"}
    for _ in range(2):  # two starts
        memory = Memory(notes, told.append)
        losses = Losses("t", memory)
        losses.topic_id = id_
        losses.without({0})
        notes |= memory.fresh
    old = A if id_ else ""
    assert told == [MissingEvents(f"t[{n}]", old, 20 + n, None, Cause.REPLACED) for n in (1, 2)]
