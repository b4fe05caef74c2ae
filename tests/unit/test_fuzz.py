"""A moment of fuzzing for everything that reads what others wrote; `make soak` does ten minutes."""

import pytest

from tests.soak.fuzz import TARGETS, run


@pytest.mark.parametrize("target", TARGETS)
def test_random_and_damaged_input_is_refused_and_breaks_nothing(target):
    assert run(TARGETS[target], 2.0) >= 100
