"""Every dispatcher on 2 and on 4 gloo ranks: ranks.py holds the checks, all run by one start of the processes."""

from pathlib import Path

import pytest
from ranks_runner import cases_of, passed_on_every_rank, ranks_fixture

RANKS = Path(__file__).with_name("ranks.py")
results = ranks_fixture(RANKS)


@pytest.mark.parametrize(("size", "check"), cases_of(RANKS, [2, 4]))
def test_on_every_rank(results, size, check):
    passed_on_every_rank(results(size), check)
