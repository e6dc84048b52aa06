"""What every test shares: one tolerance table, one comparison, fixed seeds, and the rule for GPU tests."""

from __future__ import annotations

import gc
import os
import random
import sys
from pathlib import Path

# A worker of pytest-xdist has one core: it and the processes that it starts use one thread each.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

# Triton asks for this when it is imported: without a GPU its kernels run in the interpreter, on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

sys.path.append(str(Path(__file__).parent / "support"))  # what tests share and import by name
import processor_time

# Largest allowed error, relative to the largest magnitude expected. One table for the whole suite: a test that
# needs more says by how much (`scale=`) and why.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def pytest_addoption(parser):
    processor_time.add_option(parser)


def pytest_configure(config):
    budget_s, worker = config.getoption("--module-budget"), hasattr(config, "workerinput")
    config.pluginmanager.register(processor_time.ProcessorTime(budget_s, worker), "processor_time")
    # The tests' shapes are tiny: more threads only wait for each other.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.hookimpl(trylast=True)  # after `-m` has chosen
def pytest_collection_modifyitems(config, items):
    _longest_first(items)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def _longest_first(items) -> None:
    """Modules that start ranks, then those with slow tests, then the others: a long one that comes last runs alone.

    Ranks wait for each other much of the time, so another worker has the cores meanwhile.
    """
    slow = {item.path for item in items if "slow" in item.keywords}

    def order(item) -> tuple[bool, bool]:
        return not hasattr(getattr(item, "module", None), "cases_of"), item.path not in slow

    items.sort(key=order)  # stable: modules and their tests stay in their order


def pytest_collection_finish():
    """What was imported stays: the collector need not look at it again in every full collection (7 % of the time)."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # or a library says at the end that its objects leaked


@pytest.fixture(autouse=True)
def _seed():
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tolerance():
    """tolerance(dtype) -> largest allowed error, relative to the largest magnitude expected."""
    return TOLERANCE.__getitem__


def _assert_close(actual, expected, dtype=None, scale: float = 1.0, name: str = "tensor") -> None:
    assert tuple(actual.shape) == tuple(expected.shape), (
        f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    dtype = dtype or max((actual.dtype, expected.dtype), key=TOLERANCE.__getitem__)
    a, e = actual.detach().double().cpu(), expected.detach().double().cpu()
    finite, what = e.isfinite(), f"{name} {tuple(a.shape)} {str(dtype)[6:]}"
    broken = int((finite & ~a.isfinite()).sum())
    assert not broken, f"{what}: {broken} of {a.numel()} elements are NaN or Inf where a number is expected"
    odd = int((~finite & (a != e) & ~(a.isnan() & e.isnan())).sum())
    assert not odd, f"{what}: {odd} of {a.numel()} elements should be the NaN or Inf expected and are not"
    if not int(finite.sum()):
        return
    error, size = (a - e)[finite].abs().max().item(), e[finite].abs().max().item()
    allowed = scale * TOLERANCE[dtype] * size
    if error > allowed:
        where = torch.where(finite, (a - e).abs(), 0.0).argmax().item()
        at = tuple(int(i) for i in np.unravel_index(where, a.shape))
        raise AssertionError(
            f"{what}: largest error {error:.3g} at {at} (got {a[at]:.6g}, expected {e[at]:.6g}), "
            f"relative {error / size if size else float('inf'):.3g}, allowed {scale * TOLERANCE[dtype]:.3g}"
        )


@pytest.fixture(scope="session")
def assert_close():
    """assert_close(actual, expected, dtype=None, scale=1.0, name="tensor").

    The largest error must be within `scale` * tolerance(dtype) of the largest finite magnitude of `expected`;
    NaN and Inf are allowed only where expected has them. `dtype` is by default the coarser of the two. An empty tensor
    passes if the shapes agree; where expected is all zero, so must actual be.
    """
    return _assert_close


@pytest.fixture(params=["plain", "native"])
def cpu_form(request, monkeypatch) -> str:
    """Runs the test on each CPU form of the operations: plain torch, and the compiled one where it can be had."""
    if request.param == "plain":
        monkeypatch.setenv("HEADGATE_CPU", "plain")
        return "plain"
    monkeypatch.delenv("HEADGATE_CPU", raising=False)
    from headgate.kernels import native

    if not native.available():
        pytest.skip(f"no compiled CPU form: {native.status().why}")
    return "native"
