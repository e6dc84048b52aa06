"""parallelize on 2 and 4 gloo ranks, and every fold of 8: folds.py holds the checks."""

from pathlib import Path

import pytest
from ranks_runner import cases_of, passed_on_every_rank, ranks_fixture

FOLDS = Path(__file__).with_name("folds.py")
results = ranks_fixture(FOLDS, seconds=400)
ON_EIGHT = "the_layer_under_every_fold"
SLOW = {
    "gradients_that_add_up": (4,),
    "other_forms_of_layers": (4,),
    "sharded_by_fsdp": (4,),
    "tokens_dropped_or_not": (4,),
    ON_EIGHT: (8,),
}
CASES = [*cases_of(FOLDS, [2, 4], SLOW), *cases_of(FOLDS, [8], SLOW, only=[ON_EIGHT])]


@pytest.mark.parametrize(("size", "check"), CASES)
def test_on_every_rank(results, size, check):
    passed_on_every_rank(results(size), check)
