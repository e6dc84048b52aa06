"""parallelize on 2, 4 and 8 gloo ranks: folds.py holds the checks."""

from pathlib import Path

import pytest
from ranks_runner import Rank, checks_of, passed_on_every_rank, run_ranks

FOLDS = Path(__file__).with_name("folds.py")


@pytest.fixture(scope="module", params=[2, 4, 8], ids="{}-ranks".format)
def results(request, tmp_path_factory) -> list[Rank]:
    return run_ranks(FOLDS, request.param, tmp_path_factory.mktemp("folds"), seconds=400)


@pytest.mark.parametrize("check", checks_of(FOLDS))
def test_on_every_rank(results, check):
    passed_on_every_rank(results, check)
