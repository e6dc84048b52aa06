"""transformers models under parallelize on 2 and 4 gloo ranks: models.py holds the checks."""

from pathlib import Path

import pytest
from ranks_runner import Rank, checks_of, passed_on_every_rank, run_ranks

MODELS = Path(__file__).with_name("models.py")


@pytest.fixture(scope="module", params=[2, 4], ids="{}-ranks".format)
def results(request, tmp_path_factory) -> list[Rank]:
    return run_ranks(MODELS, request.param, tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("check", checks_of(MODELS))
def test_on_every_rank(results, check):
    passed_on_every_rank(results, check)
