"""Attention and experts on 4 and 8 gloo ranks: block.py holds the checks."""

from pathlib import Path

import pytest
from ranks_runner import cases_of, checks_of, passed_on_every_rank, ranks_fixture

BLOCK = Path(__file__).with_name("block.py")
results = ranks_fixture(BLOCK, seconds=400)


@pytest.mark.parametrize(("size", "check"), cases_of(BLOCK, [4, 8], dict.fromkeys(checks_of(BLOCK), (8,))))
def test_on_every_rank(results, size, check):
    passed_on_every_rank(results(size), check)
