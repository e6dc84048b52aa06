"""Losses and capacity of a whole batch on 2 and on 4 gloo ranks: ranks_losses.py holds the checks."""

from pathlib import Path

import pytest
from ranks_runner import Rank, checks_of, passed_on_every_rank, run_ranks

RANKS = Path(__file__).with_name("ranks_losses.py")


@pytest.fixture(scope="module", params=[2, 4], ids="{}-ranks".format)
def results(request, tmp_path_factory) -> list[Rank]:
    return run_ranks(RANKS, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", checks_of(RANKS))
def test_on_every_rank(results, check):
    passed_on_every_rank(results, check)
