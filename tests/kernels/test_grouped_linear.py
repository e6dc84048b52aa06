"""grouped_linear against its reference: forward, every gradient, odd shapes, as an operator, bad input."""

from __future__ import annotations

import pytest
import torch

from headgate.kernels import grouped_linear
from headgate.kernels.grouped_linear import grouped_linear_reference

CASES = {
    "even": [4, 4, 4],
    "an empty expert": [5, 0, 3],
    "first and last empty": [0, 6, 0],
    "one row": [0, 1, 0],
    "no row": [0, 0, 0],
}


def make(counts, dtype=torch.float32, tail=2, transposed=False, bias=True, grad=True):
    x = torch.randn(sum(counts) + tail, 6, dtype=dtype).requires_grad_(grad)
    shape = (len(counts), 6, 5) if transposed else (len(counts), 5, 6)
    w = (torch.randn(shape, dtype=dtype) / 2).requires_grad_(grad)
    b = torch.randn(len(counts), 5, dtype=dtype).requires_grad_(grad) if bias else None
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    return x, offsets, w, b


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("counts", CASES.values(), ids=CASES.keys())
def test_forward_and_gradients_equal_the_reference(counts, transposed, dtype, assert_close):
    x, offsets, w, b = make(counts, dtype, transposed=transposed)
    y, want = (
        grouped_linear(x, offsets, w, b, transposed=transposed),
        grouped_linear_reference(x, offsets, w, b, transposed),
    )
    assert y.dtype == dtype
    assert_close(y, want)
    assert y[offsets[-1] :].eq(0).all()  # rows of nobody
    g = torch.randn_like(y)
    for got, ref, name in zip(
        torch.autograd.grad(y, (x, w, b), g), torch.autograd.grad(want, (x, w, b), g), "xwb", strict=True
    ):
        assert_close(got, ref, name=name)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck(transposed):
    x, offsets, w, b = make([2, 0, 3], torch.float64, transposed=transposed)
    assert torch.autograd.gradcheck(lambda *t: grouped_linear(t[0], offsets, *t[1:], transposed=transposed), (x, w, b))


def test_only_the_gradients_asked_for():
    x, offsets, w, b = make([2, 1])
    x.requires_grad_(False)
    b.requires_grad_(False)
    grouped_linear(x, offsets, w, b).sum().backward()  # an expanded gradient too
    assert x.grad is None
    assert b.grad is None
    assert w.grad is not None
    frozen = w.detach()
    x.requires_grad_()
    grouped_linear(x, offsets, frozen).sum().backward()
    assert x.grad is not None


def test_strided_weights_are_taken_as_they_lie(assert_close):
    x, offsets, _, _ = make([3, 2])
    wide = torch.randn(2, 6, 10)
    w = wide[:, :, ::2]
    assert not w.is_contiguous()
    assert_close(grouped_linear(x, offsets, w, transposed=True), grouped_linear_reference(x, offsets, w, None, True))


@pytest.mark.parametrize("bias", [False, True])
def test_operator_is_well_formed(bias):
    x, offsets, w, b = make([2, 0, 1], bias=bias)
    torch.library.opcheck(torch.ops.headgate.grouped_linear.default, (x, offsets, w, b, False))


def test_compiles_whole(assert_close):
    x, offsets, w, b = make([2, 0, 1])
    f = torch.compile(lambda *t: grouped_linear(*t).relu(), fullgraph=True, backend="aot_eager")
    y = f(x, offsets, w, b)
    assert_close(y, grouped_linear_reference(x, offsets, w, b).relu())
    y.square().sum().backward()
    got = w.grad.clone()
    w.grad = None
    grouped_linear_reference(x, offsets, w, b).relu().square().sum().backward()
    assert_close(got, w.grad)


def test_autocast_casts_like_a_linear_layer():
    x, offsets, w, b = make([2, 2])
    with torch.autocast("cpu", torch.bfloat16):
        assert grouped_linear(x, offsets, w, b).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"x_sorted": torch.zeros(2)}, ValueError, r"x_sorted must be \[N, in\], got \(2,\)"),
        ({"w": torch.zeros(5, 6)}, ValueError, r"w must be \[E, out, in\], got \(5, 6\)"),
        ({"w": torch.zeros(2, 5, 7)}, ValueError, "w must take x_sorted's 6 columns"),
        ({"offsets": torch.zeros(3)}, TypeError, "offsets must be integers, got torch.float32"),
        ({"offsets": torch.zeros(4, dtype=torch.int32)}, ValueError, r"offsets must be \[E\+1\] = \[3\], got \(4,\)"),
        (
            {"offsets": torch.zeros(3, dtype=torch.int32, device="meta")},
            ValueError,
            "offsets must be on x_sorted's device",
        ),
        ({"b": torch.zeros(2, 6)}, ValueError, r"b must be \(2, 5\), got \(2, 6\)"),
        ({"w": torch.zeros(2, 5, 6).double()}, TypeError, "w must have the dtype of x_sorted"),
        ({"x_sorted": torch.zeros(4, 6, dtype=torch.int32)}, TypeError, "x_sorted must be fp64, fp32, bf16 or fp16"),
    ],
)
def test_bad_input_names_argument_rule_and_value(change, error, says):
    x, offsets, w, b = make([2, 0], grad=False)
    with pytest.raises(error, match=says):
        grouped_linear(**{"x_sorted": x, "offsets": offsets, "w": w, "b": b, **change})
