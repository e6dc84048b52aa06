"""Every dispatcher on 2 and on 4 gloo ranks: ranks.py holds the checks, all run by one start of the processes."""

from pathlib import Path

import pytest
from dispatch_cases import MANY, WIRED
from ranks_runner import cases_of, passed_on_every_rank, ranks_fixture

RANKS = Path(__file__).with_name("ranks.py")
results = ranks_fixture(RANKS)
# what two ranks prove as well as four, and what four prove as well as two
ON_FOUR = ("recomputed_in_the_backward_pass", "second_derivative", "a_nan_stays_with_its_token", "same_bits")
SLOW = {f"{name}: {check}": (2,) for name in MANY for check in ON_FOUR}
SLOW |= {f"{name}: wires_of_the_backward_pass": (4,) for name in WIRED}


@pytest.mark.parametrize(("size", "check"), cases_of(RANKS, [2, 4], SLOW))
def test_on_every_rank(results, size, check):
    passed_on_every_rank(results(size), check)
