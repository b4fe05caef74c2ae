"""The list of fault scenarios is the scenarios that there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.faults.__main__ import SCENARIOS, Scenario, run


def test_every_scenario_in_this_folder_is_run_by_make_faults():
    here = Path(__file__).parent
    scripts = {
        path.stem for path in here.glob("[a-z]*.py") if 'if __name__ == "__main__"' in path.read_text()
    }
    assert scripts - {"kill_child"} == {scenario.name for scenario in SCENARIOS}


def test_a_scenario_that_ends_badly_fails_the_whole_run_and_the_others_run_all_the_same(capfd: Any):
    bad = Scenario("no_such_scenario", "")
    good = Scenario("spool_damage", "", quick="1 7")
    assert run([bad, good], quick=True) == 1
    told = capfd.readouterr()
    assert "no_such_scenario: BROKEN" in told.out
    assert "spool_damage: ok" in told.out
    assert "broken: no_such_scenario" in told.err
