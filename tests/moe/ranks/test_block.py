"""Attention and experts on 4 and 8 gloo ranks: block.py holds the checks."""

from pathlib import Path

import pytest
from ranks_runner import cases_of, checks_of, passed_on_every_rank, ranks_fixture

BLOCK = Path(__file__).with_name("block.py")
results = ranks_fixture(BLOCK, seconds=400)
SOME, EVERY = "the_model_under_some_folds", "the_model_under_every_fold"
ON_EIGHT = [check for check in checks_of(BLOCK) if check != SOME]
SLOW = dict.fromkeys(ON_EIGHT, (8,)) | {EVERY: (4, 8)}
CASES = [*cases_of(BLOCK, [4], SLOW), *cases_of(BLOCK, [8], SLOW, only=ON_EIGHT)]


@pytest.mark.parametrize(("size", "check"), CASES)
def test_on_every_rank(results, size, check):
    passed_on_every_rank(results(size), check)
