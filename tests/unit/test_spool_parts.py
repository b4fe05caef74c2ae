"""The pure parts of the spool: the ledger of sequences, the index of rows, sizes and checksums."""

from __future__ import annotations

import sqlite3
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtbus.model import PreviousRun, SequenceRange
from virtbus.spool import files
from virtbus.spool.draft import disk_bytes
from virtbus.spool.mirror import Births, Index
from virtbus.spool.missing import (
    CHUNK,
    Account,
    Missing,
    count_events,
    mark,
    merge_ranges,
    subtract_ranges,
)
from virtbus.words import GapReason

SETS = st.sets(st.integers(1, 60))
NOBODY = frozenset()


def ranges(numbers, epoch="e"):
    return merge_ranges(SequenceRange(epoch, number, number) for number in numbers)


def numbers(items):
    return {number for item in items for number in range(item.first, item.last + 1)}


@given(SETS)
def test_merged_ranges_hold_the_same_numbers_and_touch_nowhere(chosen):
    merged = ranges(chosen)
    assert numbers(merged) == chosen
    assert count_events(merged) == len(chosen)
    assert all(left.last + 1 < right.first for left, right in pairwise(merged))


@given(SETS, SETS)
def test_subtracting_ranges_is_subtracting_numbers(chosen, taken):
    assert numbers(subtract_ranges(ranges(chosen), ranges(taken))) == chosen - taken


def test_ranges_of_two_epochs_stay_apart():
    assert len(merge_ranges([SequenceRange("a", 1, 2), SequenceRange("b", 3, 4)])) == 2
    left = subtract_ranges([SequenceRange("a", 1, 2)], [SequenceRange("b", 1, 2)])
    assert left == (SequenceRange("a", 1, 2),)


@given(st.permutations(range(1, 40)), st.integers(0, 39))
def test_an_account_knows_its_front_and_its_holes_in_any_order_of_settling(order, count):
    account = Account(1, "e", 0, 0, last=39)
    for number in order[:count]:
        account.settle(number, number)
    settled = set(order[:count])
    front = next((number for number in range(1, 40) if number not in settled), 40) - 1
    assert account.settled_through == front
    assert numbers(account.holes({})) == set(range(1, 40)) - settled
    assert account.complete == (count == 39)


LAST = 2 * CHUNK + 21
# Near the edges of bytes and of chunks, where a span of bits can go wrong, and anywhere.
NUMBERS = st.integers(1, LAST + 20) | st.sampled_from(
    [at + by for at in (0, CHUNK, LAST) for by in range(1, 20)]
)


@given(st.lists(st.tuples(NUMBERS, NUMBERS).map(sorted), max_size=12))
def test_spans_of_any_size_settle_just_their_numbers(chosen):
    account = Account(1, "e", 0, 0, last=LAST)
    for first, last in chosen:
        account.settle(first, last)
    settled = numbers(SequenceRange("e", first, min(last, LAST)) for first, last in chosen)
    assert numbers(account.holes({})) == set(range(1, LAST + 1)) - settled
    assert account.finished == {n for n in range(2) if n < account.below}


def test_an_account_keeps_no_bitmap_of_what_is_settled_to_the_end():
    account = Account(1, "e", 0, 0, last=10 * CHUNK + 5)
    account.settle(CHUNK + 1, 3 * CHUNK)
    assert account.settled_through == 0
    account.settle(1, CHUNK)
    assert (account.settled_through, account.bitmaps) == (3 * CHUNK, {})
    assert account.finished == {0, 1, 2}
    account.settle(3 * CHUNK + 1, 10 * CHUNK + 5)
    assert account.complete


def test_rows_and_names_are_no_holes():
    account = Account(1, "e", 0, 0, last=10)
    account.settle(1, 3)
    present: dict[int, int] = {}
    assert mark(present, 5, 6)
    assert not mark(present, 6, 7)
    assert account.holes(present) == (SequenceRange("e", 4, 4), SequenceRange("e", 8, 10))


@pytest.mark.parametrize(("rows", "keys"), [(1_000, 1), (1_000, 1_000), (200_000, 1), (200_000, 1_000)])
def test_every_row_is_taken_once_in_the_order_of_its_key(rows, keys):
    index = Index()
    for row in range(1, rows + 1):
        index.add(row, f"key-{row % keys}", row % 4)
    seen: dict[str, int] = {}
    count = 0
    while taken := index.take(256, NOBODY, 0.0):
        assert len({key for _, key in taken}) == len(taken)
        for row, key in taken:
            assert row > seen.get(key, 0)
            seen[key] = row
            index.confirm(row, key)
        count += len(taken)
    assert count == rows
    assert (index.pending, index.taken, index.oldest_row()) == (0, 0, None)


def test_taking_costs_the_same_with_many_rows_as_with_few():
    def lines_run(rows):
        index, count = Index(), 0

        def note(_frame, event, _argument):
            nonlocal count
            count += event == "line"
            return note

        for row in range(1, rows + 1):
            index.add(row, f"key-{row % 1000}", 2)
        sys.settrace(note)
        try:
            for _ in range(3):
                for row, key in index.take(256, NOBODY, 0.0):
                    index.confirm(row, key)
        finally:
            sys.settrace(None)
        return count

    few, many = lines_run(10_000), lines_run(500_000)
    assert 0 < many < 1.5 * few


def test_a_held_row_is_not_taken_and_its_key_goes_on_when_it_is_released():
    index = Index()
    index.add(1, "a", 0)
    index.add(2, "a", 0)
    assert index.reserve(1)
    assert not index.reserve(1)
    assert index.take(10, NOBODY, 0.0) == []
    index.release(1, "a")
    assert index.take(10, NOBODY, 0.0) == [(1, "a")]


def test_a_held_row_that_goes_lets_the_next_of_its_key_go_on():
    index = Index()
    index.add(1, "a", 0)
    index.add(2, "a", 0)
    index.reserve(1)
    assert index.take(10, NOBODY, 0.0) == []
    index.remove(1, "a")
    assert index.take(10, NOBODY, 0.0) == [(2, "a")]


def test_a_row_behind_the_first_can_go_and_is_passed_over():
    index = Index()
    for row in (1, 2, 3):
        index.add(row, "a", 0)
    index.remove(2, "a")
    assert index.take(10, NOBODY, 0.0) == [(1, "a")]
    index.confirm(1, "a")
    assert index.take(10, NOBODY, 0.0) == [(3, "a")]


def test_the_heap_does_not_grow_while_rows_only_come_and_give_way():
    index = Index()
    for row in range(1, 60_000):
        index.add(row, f"key-{row % 3}", 0)
        index.remove(row, f"key-{row % 3}")
    assert len(index._ready) < 10_000
    assert index._codes == {}


def test_births_are_bounded_and_never_make_a_row_older():
    births = Births()
    for position in range(1, 50_000):
        births.add(position, position * 1.5)
    assert len(births._last) <= 4096
    assert all(births.of(position) >= position * 1.5 for position in range(1, 50_000, 97))


@given(
    st.builds(
        Missing,
        st.lists(st.builds(SequenceRange, st.text(max_size=5), st.integers(1, 9), st.integers(1, 9))).map(
            tuple
        ),
        st.just(GapReason.SPOOL_FULL),
        st.integers(0, 9),
        st.none() | st.integers(0, 9),
        found=st.integers(0, 9),
        previous=st.none() | st.builds(PreviousRun, st.text(max_size=5), st.integers(0, 9)),
    )
)
def test_what_a_gap_event_names_is_read_as_it_was_written(facts):
    assert Missing.parse(facts.dump()) == facts


VALUES = st.none() | st.integers(-(2**62), 2**62) | st.text(max_size=8) | st.binary(max_size=8)


@given(st.lists(VALUES, min_size=2, max_size=4), st.lists(VALUES, min_size=2, max_size=4))
def test_different_values_have_different_checksums(left, right):
    same = [(type(item), item) for item in left] == [(type(item), item) for item in right]
    assert (files.seal(left) == files.seal(right)) == same


@pytest.mark.parametrize("payload", [300, 900, 1300, 1900, 2100, 4000, 4300, 9000, 50_000])
def test_disk_bytes_are_about_what_sqlite_uses(tmp_path, payload):
    db = sqlite3.connect(tmp_path / "db", isolation_level=None)
    db.execute("CREATE TABLE t (a INTEGER PRIMARY KEY, b BLOB)")
    db.execute("BEGIN")
    for number in range(400):
        db.execute("INSERT INTO t VALUES (?, ?)", (number, bytes(payload)))
    db.execute("COMMIT")
    used = (tmp_path / "db").stat().st_size
    db.close()
    assert 0.75 * used <= 400 * disk_bytes(payload) <= 1.35 * used
