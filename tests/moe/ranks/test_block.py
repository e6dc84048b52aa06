"""Attention and experts on 4 and 8 gloo ranks: block.py holds the checks."""

from pathlib import Path

import pytest
from ranks_runner import Rank, checks_of, passed_on_every_rank, run_ranks

BLOCK = Path(__file__).with_name("block.py")


@pytest.fixture(scope="module", params=[4, 8], ids="{}-ranks".format)
def results(request, tmp_path_factory) -> list[Rank]:
    return run_ranks(BLOCK, request.param, tmp_path_factory.mktemp("block"), seconds=400)


@pytest.mark.parametrize("check", checks_of(BLOCK))
def test_on_every_rank(results, check):
    passed_on_every_rank(results, check)
