"""A hundred examples for everything that reads what others wrote; `make soak` fuzzes for ten minutes."""

import pytest

from tests.soak.fuzz import TARGETS, run


@pytest.mark.parametrize("target", TARGETS)
def test_random_and_damaged_input_is_refused_and_breaks_nothing(target):
    assert run(TARGETS[target], 0.0) == 100
