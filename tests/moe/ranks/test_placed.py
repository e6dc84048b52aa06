"""Placements on live models, on 2 and 4 gloo ranks: placed.py holds the checks."""

from pathlib import Path

import pytest
from ranks_runner import cases_of, passed_on_every_rank, ranks_fixture

PLACED = Path(__file__).with_name("placed.py")
results = ranks_fixture(PLACED, seconds=400)


@pytest.mark.parametrize(("size", "check"), cases_of(PLACED, [2, 4]))
def test_on_every_rank(results, size, check):
    passed_on_every_rank(results(size), check)
