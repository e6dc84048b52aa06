"""parallelize on 2 and 4 gloo ranks, and every fold of 8: folds.py holds the checks."""

from pathlib import Path

import pytest
from ranks_runner import cases_of, passed_on_every_rank, ranks_fixture

FOLDS = Path(__file__).with_name("folds.py")
results = ranks_fixture(FOLDS, seconds=400)
ON_EIGHT = "the_layer_under_every_fold"
CASES = [*cases_of(FOLDS, [2, 4]), *cases_of(FOLDS, [8], {ON_EIGHT: (8,)}, only=[ON_EIGHT])]


@pytest.mark.parametrize(("results", "check"), CASES, indirect=["results"])
def test_on_every_rank(results, check):
    passed_on_every_rank(results, check)
