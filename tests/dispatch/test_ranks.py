"""Every dispatcher on 2 and on 4 gloo ranks: ranks.py holds the checks, all run by one start of the processes."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

RANKS = Path(__file__).with_name("ranks.py")

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)


def _checks() -> list[str]:
    spec = importlib.util.spec_from_file_location("headgate_test_ranks", RANKS)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.CHECKS)


@pytest.fixture(scope="module", params=[2, 4], ids="{}-ranks".format)
def results(request, run_ranks) -> list[tuple[dict[str, str], str]]:
    """For each rank: check -> what went wrong ("" for nothing), and what the process printed."""
    return run_ranks("ranks.py", request.param)


@pytest.mark.parametrize("check", _checks())
def test_on_every_rank(results, check):
    for rank, (done, log) in enumerate(results):
        assert check in done, f"rank {rank} did not come to it; its last check: {list(done)[-1:]}\n{log[-2000:]}"
        assert not done[check], f"rank {rank}:\n{done[check]}"
