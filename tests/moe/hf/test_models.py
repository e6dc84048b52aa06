"""transformers models under parallelize on 2 and 4 gloo ranks: models.py holds the checks."""

from pathlib import Path

import pytest
from ranks_runner import cases_of, passed_on_every_rank, ranks_fixture

MODELS = Path(__file__).with_name("models.py")
results = ranks_fixture(MODELS)


@pytest.mark.parametrize(("size", "check"), cases_of(MODELS, [2, 4]))
def test_on_every_rank(results, size, check):
    passed_on_every_rank(results(size), check)
