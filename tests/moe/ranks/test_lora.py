"""headgate.lora and parallelize on 2 and 4 gloo ranks: lora.py holds the checks."""

from pathlib import Path

import pytest
from ranks_runner import cases_of, checks_of, passed_on_every_rank, ranks_fixture

LORA = Path(__file__).with_name("lora.py")
results = ranks_fixture(LORA, seconds=200)
# in `make test` each check runs once: those that depend on the fold on four ranks, the others on two
ON_FOUR = ["put_on_before", "at_every_degree", "put_on_after", "rows_that_travel_while_experts_compute"]
SLOW = {check: (2,) if check in ON_FOUR else (4,) for check in checks_of(LORA)}


@pytest.mark.parametrize(("size", "check"), cases_of(LORA, [2, 4], SLOW))
def test_on_every_rank(results, size, check):
    passed_on_every_rank(results(size), check)
