"""Placements on live models, on 2 and 4 gloo ranks: placed.py holds the checks."""

from pathlib import Path

import pytest
from ranks_runner import cases_of, checks_of, passed_on_every_rank, ranks_fixture

PLACED = Path(__file__).with_name("placed.py")
results = ranks_fixture(PLACED, seconds=400)
# in `make test` each check runs once: on four ranks, and the longest on two
SLOW = dict.fromkeys(checks_of(PLACED), (2,)) | {"weights_and_optimizer_state_move_in_mid_training": (4,)}


@pytest.mark.parametrize(("size", "check"), cases_of(PLACED, [2, 4], SLOW))
def test_on_every_rank(results, size, check):
    passed_on_every_rank(results(size), check)
