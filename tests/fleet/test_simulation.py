"""Random fleets over simulated days; `make faults` plays a thousand of them (holds)."""

from __future__ import annotations

from tests.fleet.simulation import play


def test_no_host_is_held_that_is_not_at_fault_and_none_for_ever():
    found = play(range(12), days=1.0)
    assert (found.wrong, found.kept, found.beyond) == ([], [], [])
    assert found.holds >= 5, found.line()
    assert found.faults >= found.holds / 2, found.line()
