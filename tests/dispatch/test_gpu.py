"""The dispatchers on GPUs: many ranks on one by symmetric memory, and on NCCL where there are several. `pytest -m gpu`.

None of it has run on a GPU yet.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks_runner import checks_of, passed_on_every_rank, run_ranks

from headgate.dispatch import DISPATCHERS, ENGINES

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
GPUS = torch.cuda.device_count()
several = pytest.mark.skipif(GPUS < 2, reason=f"needs 2 CUDA devices, torch sees {GPUS}")
RANKS = Path(__file__).with_name("ranks.py")


def run(folder: Path, script: Path, size: int, backend: str, only: str, **environment: str) -> None:
    """The checks of a script whose names begin with `only`, all in one test."""
    checks = [check for check in checks_of(script) if check.startswith(only)]
    assert checks
    results = run_ranks(script, size, folder, checks, 540, backend, **environment)
    for check in checks:
        passed_on_every_rank(results, check)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("only", ["symmetric: ", "one_sided_copies_give_the_bits_of_messages"])
def test_symmetric_with_many_ranks_on_one_gpu(size, only, tmp_path):
    """NCCL refuses two ranks on one GPU: gloo carries the counts, symmetric memory the rows. The ranks take turns on
    the device, so that each barrier lasts some time slices."""
    run(tmp_path, RANKS, size, "cuda:gloo", only, TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES="1")


@several
@pytest.mark.parametrize("name", [name for name in DISPATCHERS if name != "local"])
def test_on_nccl(name, tmp_path):
    run(tmp_path, RANKS, 4 if GPUS >= 4 else 2, "nccl", f"{name}: ")


@several
@pytest.mark.parametrize("name", ENGINES)
def test_engines_on_nccl(name, tmp_path):
    why = ENGINES[name].why_not()
    if why:
        pytest.skip(f"{ENGINES[name].__name__}: {why}")
    run(tmp_path, Path(__file__).with_name(f"{name}_ranks.py"), 2, "nccl", "")
