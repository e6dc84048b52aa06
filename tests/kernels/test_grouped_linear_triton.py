"""The Triton form of grouped_linear in Triton's interpreter, against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headgate.kernels.chip import A100, H200
from headgate.kernels.grouped_linear import grouped_linear_reference

triton = pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="Triton's interpreter is off"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.mark.parametrize("chip", [replace(A100, processors=3), replace(H200, processors=3)], ids=["pointers", "maps"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("counts", "fan_in", "fan_out", "dtype"),
    [
        ([40, 0, 3, 1], 24, 40, torch.float32),
        ([0, 21], 33, 70, torch.float32),
        ([0, 0, 0], 8, 16, torch.float32),
        ([5] * 20, 16, 32, torch.float16),
    ],
)
def test_forward_and_gradients_equal_the_reference(counts, fan_in, fan_out, dtype, transposed, chip, assert_close):
    from headgate.kernels.grouped_linear import on_triton

    x = torch.randn(sum(counts) + 2, fan_in, dtype=dtype)
    shape = (len(counts), fan_in, fan_out) if transposed else (len(counts), fan_out, fan_in)
    w, b = torch.randn(shape, dtype=dtype) / 2, torch.randn(len(counts), fan_out, dtype=dtype)
    x[-1], offsets = torch.nan, torch.tensor([0, *counts]).cumsum(0)  # two rows belong to nobody
    y = on_triton.forward(x, offsets, w, b, transposed, chip=chip)
    grad = torch.randn_like(y)
    got = on_triton.backward(grad, x, offsets, w, b, transposed, [True, True, True], chip=chip)
    leaves = [t.clone().requires_grad_() for t in (x.nan_to_num(), w, b)]
    want = grouped_linear_reference(leaves[0], offsets, *leaves[1:], transposed)
    assert_close(y, want, name="y")
    for name, g, ref in zip("xwb", got, torch.autograd.grad(want, leaves, grad), strict=True):
        assert_close(g, ref, name=name)
    nothing = on_triton.backward(grad, x, offsets, w, b, transposed, [False, False, False], chip=chip)
    assert not any(t.numel() for t in nothing)
