"""Attention and experts on 4 and 8 gloo ranks: block.py holds the checks."""

from pathlib import Path

import pytest
from ranks_runner import cases_of, passed_on_every_rank, ranks_fixture

BLOCK = Path(__file__).with_name("block.py")
results = ranks_fixture(BLOCK, seconds=400)


@pytest.mark.parametrize(("results", "check"), cases_of(BLOCK, [4, 8]), indirect=["results"])
def test_on_every_rank(results, check):
    passed_on_every_rank(results, check)
