"""Checkpoints between folds, and experts on disk, on 2 and 4 gloo ranks: folds_kept.py holds the checks."""

from pathlib import Path

import pytest
from ranks_runner import cases_of, passed_on_every_rank, ranks_fixture

KEPT = Path(__file__).with_name("folds_kept.py")
results = ranks_fixture(KEPT, seconds=400)
SLOW = {
    "a_checkpoint_moves_between_folds_and_to_one_process": (4,),
    "a_checkpoint_of_one_process_goes_to_any_fold": (4,),
    "a_ranks_experts_can_be_on_disk": (4,),
}


@pytest.mark.parametrize(("size", "check"), cases_of(KEPT, [2, 4], SLOW))
def test_on_every_rank(results, size, check):
    passed_on_every_rank(results(size), check)
