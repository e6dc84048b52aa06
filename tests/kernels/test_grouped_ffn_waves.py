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


@pytest.mark.skipif(not native.available(), reason="the C++ form is not built on this machine")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_do_not_depend_on_the_number_of_threads(dtype):
    rows, d, f, experts, k = 1300, 8, 1601, 5, 2
    ids = torch.stack([torch.randperm(experts)[:k] for _ in range(rows)])
    shapes = [(rows, d), (experts, 2 * f, d), (experts, d, f), (rows, d)]
    x, w_gate_up, w_down, cotangent = [torch.randn(s).to(dtype) for s in shapes]
    arguments = (x, ids, torch.rand(rows, k), w_gate_up * d**-0.5, w_down * f**-0.5, [], cotangent)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 8):
            torch.set_num_threads(n)
            results.append(_step(*arguments))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.skipif(not native.available(), reason="the C++ form is not built on this machine")
def test_weights_expanded_along_the_contraction(assert_close):
    """Neighbouring rows whose elements along the contraction are one and the same: strides (., 1, 0)."""
    ids, weights = torch.zeros(80, 1, dtype=torch.int32), torch.ones(80, 1)
    x, w_down = torch.randn(80, 6).bfloat16(), torch.randn(1, 6, 8).bfloat16()
    w_gate_up = torch.randn(1, 16, 1).bfloat16().expand(1, 16, 6)
    routing = Routing(ids, weights, 1)
    y = grouped_ffn(x, routing, w_gate_up, w_down)
    assert_close(y, grouped_ffn(x, routing, w_gate_up.contiguous(), w_down), torch.bfloat16)


def test_an_infinite_pre_activation_is_not_softened():
    """silu of a hugely negative number is 0, however far exp has to go."""
    x, ids = torch.tensor([[-1e38]]), torch.zeros(1, 1, dtype=torch.int32)
    w_up, w_down = torch.ones(1, 1, 1), torch.ones(1, 1, 1)
    y = grouped_ffn(x, Routing(ids, torch.ones(1, 1), 1), w_up, w_down, gated=False)
    assert y.item() == 0
