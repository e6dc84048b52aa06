"""Placements on live models, on 2 and 4 gloo ranks: placed.py holds the checks."""

from pathlib import Path

import pytest
from ranks_runner import Rank, checks_of, passed_on_every_rank, run_ranks

PLACED = Path(__file__).with_name("placed.py")


@pytest.fixture(scope="module", params=[2, 4], ids="{}-ranks".format)
def results(request, tmp_path_factory) -> list[Rank]:
    return run_ranks(PLACED, request.param, tmp_path_factory.mktemp("placed"), seconds=400)


@pytest.mark.parametrize("check", checks_of(PLACED))
def test_on_every_rank(results, check):
    passed_on_every_rank(results, check)
