"""parallelize on 2 and 4 gloo ranks, and every fold of 8: folds.py holds the checks."""

from pathlib import Path

import pytest
from ranks_runner import Rank, checks_of, passed_on_every_rank, run_ranks

FOLDS = Path(__file__).with_name("folds.py")
ON_EIGHT = "the_layer_under_every_fold"


@pytest.fixture(scope="module", params=[2, 4], ids="{}-ranks".format)
def results(request, tmp_path_factory) -> list[Rank]:
    return run_ranks(FOLDS, request.param, tmp_path_factory.mktemp("folds"), seconds=400)


@pytest.mark.parametrize("check", checks_of(FOLDS))
def test_on_every_rank(results, check):
    passed_on_every_rank(results, check)


@pytest.mark.slow
def test_every_fold_of_eight_ranks(tmp_path):
    passed_on_every_rank(run_ranks(FOLDS, 8, tmp_path, seconds=400, only=ON_EIGHT), ON_EIGHT)
