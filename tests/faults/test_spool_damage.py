"""A short run of random damage; `make faults` runs a thousand (tests/faults/spool_damage.py)."""

from __future__ import annotations

from tests.faults import spool_damage


def test_damaged_files_start_publish_nothing_corrupt_and_name_what_is_missing():
    tally = spool_damage.run(60, seed=20260101)
    assert tally.clean, tally.notes
    assert tally.set_aside > 10
    assert tally.delivered > 1000
