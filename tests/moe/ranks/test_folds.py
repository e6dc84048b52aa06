"""parallelize on 2 and 4 gloo ranks, and every fold of 8: folds.py holds the checks."""

from pathlib import Path

import pytest
from ranks_runner import cases_of, checks_of, passed_on_every_rank, ranks_fixture

FOLDS = Path(__file__).with_name("folds.py")
results = ranks_fixture(FOLDS, seconds=400)
ON_EIGHT = "the_layer_under_every_fold"
# in `make test` each check runs once: on four ranks, and the longest on two
SLOW = dict.fromkeys(checks_of(FOLDS), (2,))
SLOW |= dict.fromkeys(
    ["gradients_that_add_up", "other_forms_of_layers", "sharded_by_fsdp", "tokens_dropped_or_not"], (4,)
)
SLOW[ON_EIGHT] = (2, 8)
CASES = [*cases_of(FOLDS, [2, 4], SLOW), *cases_of(FOLDS, [8], SLOW, only=[ON_EIGHT])]


@pytest.mark.parametrize(("size", "check"), CASES)
def test_on_every_rank(results, size, check):
    passed_on_every_rank(results(size), check)
