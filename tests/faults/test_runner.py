"""make faults runs every scenario, and fails when one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.faults.__main__ import SCENARIOS, Scenario, run


def test_every_scenario_of_this_folder_is_run():
    here = Path(__file__).parent
    scripts = {path.stem for path in here.glob("[a-z]*.py") if "\ndef main() ->" in path.read_text()}
    assert scripts - {"kill_child", "fold_child", "overtaken_child"} == {
        scenario.name for scenario in SCENARIOS
    }


def test_a_scenario_that_ends_badly_fails_the_run_and_the_others_run_all_the_same(capfd: Any):
    bad = Scenario("no_such_scenario", "")
    good = Scenario("spool_damage", "", quick="1 7")
    assert run([bad, good], quick=True) == 1
    told = capfd.readouterr()
    assert "no_such_scenario: BROKEN" in told.out
    assert "spool_damage: ok" in told.out
    assert "broken: no_such_scenario" in told.err
