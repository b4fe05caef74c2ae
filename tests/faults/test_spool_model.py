"""A short run of the spool's model; `make faults` runs a thousand (tests/faults/spool_model.py)."""

from __future__ import annotations

import os

from hypothesis.stateful import run_state_machine_as_test

from tests.faults.spool_model import SpoolMachine, model_settings


def test_the_spool_behaves_as_its_model_over_crashes_wishes_and_clock_jumps():
    examples = 1000 if os.environ.get("VIRTBUS_FAULTS") else 50
    run_state_machine_as_test(SpoolMachine, settings=model_settings(examples))
