"""The dispatchers on GPUs: many ranks on one by symmetric memory, and on NCCL where there are several. `pytest -m gpu`.

None of it has run on a GPU yet.
"""

from __future__ import annotations

import pytest
import torch

from headgate.dispatch import DISPATCHERS, ENGINES

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
GPUS = torch.cuda.device_count()
several = pytest.mark.skipif(GPUS < 2, reason=f"needs 2 CUDA devices, torch sees {GPUS}")
MANY = [name for name in DISPATCHERS if name != "local"]
CUDA = ("--device", "cuda", "--timeout", "120")


def named(checks: list[str], name: str) -> list[str]:
    """The checks of one dispatcher, without those that count collectives' bytes or look at the CPU's windows."""
    return [check for check in checks if check.startswith(f"{name}: ")]


@pytest.mark.parametrize("size", [2, 4])
def test_symmetric_with_many_ranks_on_one_gpu(run_ranks, checks_of, all_is_well, size):
    """NCCL refuses two ranks on a GPU: gloo carries the counts, symmetric memory the rows. The ranks take turns on the
    device, so a barrier waits for as many time slices."""
    only = "symmetric: |one_sided_copies"
    found = run_ranks(
        "ranks.py", size, *CUDA, "--only", only, seconds=540, TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES="1"
    )
    checks = checks_of("ranks.py")
    all_is_well(found, [*named(checks, "symmetric"), "one_sided_copies_give_the_bits_of_messages"])


@several
@pytest.mark.parametrize("name", MANY)
def test_on_nccl(run_ranks, checks_of, all_is_well, name):
    size = 4 if GPUS >= 4 else 2
    found = run_ranks("ranks.py", size, *CUDA, "--backend", "nccl", "--only", f"{name}: ", seconds=540)
    all_is_well(found, named(checks_of("ranks.py"), name))


@several
@pytest.mark.parametrize("name", ENGINES)
def test_engines_on_nccl(run_ranks, checks_of, all_is_well, name):
    why = ENGINES[name].why_not()
    if why:
        pytest.skip(f"{ENGINES[name].__name__}: {why}")
    found = run_ranks(f"{name}_ranks.py", 2, *CUDA, "--backend", "nccl", seconds=540)
    all_is_well(found, checks_of(f"{name}_ranks.py"))
