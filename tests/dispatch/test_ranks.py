"""Every dispatcher on 2 and on 4 gloo ranks: ranks.py holds the checks, all run by one start of the processes."""

from pathlib import Path

import pytest
from dispatch_cases import MANY, WIRED
from ranks_runner import cases_of, checks_of, passed_on_every_rank, ranks_fixture

RANKS = Path(__file__).with_name("ranks.py")
results = ranks_fixture(RANKS)
# in `make test` each check runs once: on four ranks, and on two what these prove as well
ON_TWO = ("recomputed_in_the_backward_pass", "second_derivative", "same_bits")
SLOW = dict.fromkeys(checks_of(RANKS), (2,))
SLOW |= {f"{name}: {check}": (4,) for name in MANY for check in ON_TWO}
SLOW |= {f"{name}: wires_of_the_backward_pass": (4,) for name in WIRED}


@pytest.mark.parametrize(("size", "check"), cases_of(RANKS, [2, 4], SLOW))
def test_on_every_rank(results, size, check):
    passed_on_every_rank(results(size), check)
