"""headgate.Muon on 4 gloo ranks; muon.py holds the checks."""

from pathlib import Path

import pytest
from ranks_runner import cases_of, passed_on_every_rank, ranks_fixture

RANKS = Path(__file__).with_name("muon.py")
results = ranks_fixture(RANKS, seconds=300)


@pytest.mark.parametrize(("size", "check"), cases_of(RANKS, [4]))
def test_on_every_rank(results, size, check):
    passed_on_every_rank(results(size), check)
