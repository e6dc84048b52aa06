"""Migrations, checkpoints and models under placements, on 2 and 4 gloo ranks: placed_kept.py holds the checks."""

from pathlib import Path

import pytest
from ranks_runner import cases_of, checks_of, passed_on_every_rank, ranks_fixture

KEPT = Path(__file__).with_name("placed_kept.py")
results = ranks_fixture(KEPT, seconds=400)
# in `make test` each check runs once: on four ranks, and the longest on two
SLOW = dict.fromkeys(checks_of(KEPT), (2,)) | {"a_checkpoint_moves_between_placements_and_folds": (4,)}


@pytest.mark.parametrize(("size", "check"), cases_of(KEPT, [2, 4], SLOW))
def test_on_every_rank(results, size, check):
    passed_on_every_rank(results(size), check)
