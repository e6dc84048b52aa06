"""LoRA and parallelize on 2 and 4 gloo ranks: adapters.py holds the checks."""

from pathlib import Path

import pytest
from ranks_runner import cases_of, checks_of, passed_on_every_rank, ranks_fixture

pytest.importorskip("peft")
ADAPTERS = Path(__file__).with_name("adapters.py")
results = ranks_fixture(ADAPTERS, seconds=400)
# in `make test` each check runs once: those that depend on the fold on four ranks, the others on two
ON_FOUR = ["lora_before", "lora_on_experts_at_every_degree", "lora_after", "lora_on_experts_after"]
SLOW = {check: (2,) if check in ON_FOUR else (4,) for check in checks_of(ADAPTERS)}


@pytest.mark.parametrize(("size", "check"), cases_of(ADAPTERS, [2, 4], SLOW))
def test_on_every_rank(results, size, check):
    passed_on_every_rank(results(size), check)
