"""Sizes at which the C++ form takes an expert's intermediate columns in parts, and its experts in several waves."""

import pytest
import torch

from headgate.kernels import Routing, grouped_ffn, native


def _step(rows, ids, weights, w_gate_up, w_down, biases, cotangent, **form):
    leaves = [t.clone().requires_grad_() for t in (rows, weights, w_gate_up, w_down, *biases)]
    b1, b2 = leaves[4:] if biases else (None, None)
    routing = Routing.from_topk(ids, leaves[1], w_down.shape[0])
    y = grouped_ffn(leaves[0], routing, leaves[2], leaves[3], b_gate_up=b1, b_down=b2, **form)
    y.backward(cotangent)
    return [y.detach(), *(t.grad for t in leaves)]


@pytest.mark.skipif(not native.available(), reason="the C++ form is not built on this machine")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("transposed", "interleaved", "gated"),
    [(False, False, True), (True, False, True), (False, True, True), (True, True, True), (False, False, False)],
)
def test_parts_and_waves_equal_the_plain_form(assert_close, monkeypatch, dtype, transposed, interleaved, gated):
    rows, d, f, experts, k = 700, 24, 1571, 3, 2
    ids = torch.stack([torch.randperm(experts)[:k] for _ in range(rows)])
    ids[::7, 1] = -1
    w_gate_up = torch.randn(experts, 2 * f if gated else f, d) * d**-0.5
    w_down = torch.randn(experts, d, f) * f**-0.5
    biases = [torch.randn(experts, w_gate_up.shape[1]) * 0.1, torch.randn(experts, d) * 0.1]
    if transposed:
        w_gate_up, w_down = w_gate_up.mT.contiguous(), w_down.mT.contiguous()
    tensors = [t.to(dtype) for t in (torch.randn(rows, d), w_gate_up, w_down, *biases, torch.randn(rows, d))]
    x, w_gate_up, w_down, b1, b2, cotangent = tensors
    arguments = (x, ids, torch.rand(rows, k), w_gate_up, w_down, [b1, b2], cotangent)
    form = {"transposed": transposed, "interleaved": interleaved, "gated": gated}
    native_results = _step(*arguments, **form)
    monkeypatch.setenv("HEADGATE_CPU", "plain")
    for actual, expected in zip(native_results, _step(*arguments, **form), strict=True):
        assert_close(actual, expected, dtype)
