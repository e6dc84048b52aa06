"""Weights of few bits in the grouped GEMMs, widened in registers: forward and every gradient that there is, in
Triton's interpreter, against the reference on the widened weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headgate.kernels import GPT_OSS, Activation
from headgate.kernels.chip import A100, H200
from headgate.kernels.grouped_ffn import grouped_ffn_reference
from headgate.kernels.quantized import quantize

triton = pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="Triton's interpreter is off"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

FORMATS = {
    "fp8": ("fp8", None),
    "fp8, small blocks": ("fp8", (24, 32)),
    "fp8, a scale per row": ("fp8", (1, 1 << 20)),
    "int8": ("int8", (1, 64)),
    "int4": ("int4", (1, 32)),
    "int4, wide groups": ("int4", (1, 128)),
    "mxfp4": ("mxfp4", None),
    "uint4": ("uint4", (1, 32)),
}
# Several tiles each way, the last of 64 cut, and several scales along each contraction: those of 128 need more columns.
WIDE = {"fp8": 160, "int4, wide groups": 160}
AGAIN = ("fp8, a scale per row", "mxfp4", "uint4")  # `make test` has them in another form below
SILU = Activation("silu")
FORMS = {"halves": (SILU, False, False), "gpt-oss": (GPT_OSS, True, False), "pair": (SILU, False, True)}


def case(form, format, dtype, rows=21, d=64, f=None, experts=3, k=2):
    act, interleaved, pair = FORMS[form]
    f = WIDE.get(format, 96) if f is None else f
    kind, block = FORMATS[format]

    def weight(outputs, inputs):
        return quantize(torch.randn(experts, outputs, inputs) / inputs**0.5, kind, block=block)

    w1, w_up, w2 = weight(f if pair else 2 * f, d), weight(f, d) if pair else None, weight(d, f)
    b1 = None if pair else torch.randn(experts, 2 * f, dtype=dtype)
    ids = torch.where(torch.rand(rows, k) < 0.2, -1, torch.rand(rows, experts).argsort(1)[:, :k]).int()
    tensors = [torch.randn(rows, d, dtype=dtype), ids, torch.rand(rows, k), w1, w_up, w2, b1, torch.randn(experts, d)]
    tensors[7] = tensors[7].to(dtype)
    return tensors, act, interleaved


def truth(tensors, act, interleaved, dtype, grad):
    rows, ids, weights, w1, w_up, w2, b1, b2 = tensors
    leaves = [t if t is None else t.double().requires_grad_() for t in (rows, weights, b1, b2)]
    first, second = w1.dequantize(dtype).double(), w2.dequantize(dtype).double()
    if w_up is not None:
        first = (first, w_up.dequantize(dtype).double())
    y = grouped_ffn_reference(
        leaves[0], ids, leaves[1], first, second, leaves[2], leaves[3], activation=act, interleaved=interleaved
    )
    asked = [t for t in leaves if t is not None]
    return y, dict(zip((n for n, t in zip("xsbc", leaves, strict=True) if t is not None),
                       torch.autograd.grad(y, asked, grad.double()), strict=True))  # fmt: skip


@pytest.mark.parametrize(
    ("format", "form", "dtype", "chip"),
    [
        *(
            pytest.param(f, "halves", torch.float32, A100, marks=pytest.mark.slow if f in AGAIN else ())
            for f in FORMATS
        ),
        *((f, "gpt-oss", torch.float32, H200) for f in ("mxfp4", "fp8")),
        *((f, "pair", torch.float32, H200) for f in ("uint4", "fp8, a scale per row")),
        ("mxfp4", "gpt-oss", torch.float16, A100),
    ],
    ids=lambda v: v.name if hasattr(v, "name") else str(v),
)
def test_forward_and_gradients(format, form, dtype, chip, assert_close):
    from headgate.kernels.grouped_ffn import on_triton

    tensors, act, interleaved = case(form, format, dtype)
    chip, rest = replace(chip, processors=3), (act.kind, act.params, True, False, interleaved)
    y, h = on_triton.forward(*tensors, *rest, True, chip=chip)
    grad, biased = torch.randn_like(y), tensors[6] is not None
    needs = [True, True, False, False, False, biased, True]
    out = on_triton.backward(grad, *tensors, h, *rest, needs, chip=chip)
    want, grads = truth(tensors, act, interleaved, dtype, grad)
    assert_close(y, want, dtype=dtype, name="y")
    for name, place in (("x", 0), ("s", 1), ("b", 5), ("c", 6)):
        if name in grads:
            assert_close(out[place], grads[name], dtype=dtype, name=name, scale=2.0 if dtype == torch.float16 else 1.0)


def test_more_rows_than_the_thin_form_and_no_backward(assert_close):
    from headgate.kernels.grouped_ffn import on_triton, thin

    tensors, act, interleaved = case("halves", "int4", torch.float32, rows=thin.MAX_ROWS + 3, d=70, f=34)
    form = (act.kind, act.params, True, False, interleaved, False)
    y, h = on_triton.forward(*tensors, *form, chip=replace(A100, processors=2))
    assert h.shape == (0, 68)
    want, _ = truth(tensors, act, interleaved, torch.float32, torch.zeros_like(y))
    assert_close(y, want, dtype=torch.float32)


def test_rows_shorter_than_a_tile_with_one_scale(assert_close):
    from headgate.kernels.grouped_ffn import on_triton

    tensors, act, interleaved = case("halves", "fp8", torch.float32, rows=9, d=5, f=3)
    for place, columns in ((3, 5), (5, 3)):  # neither divides a tile's 16 columns
        tensors[place] = quantize(torch.randn(tensors[place].shape), "fp8", block=(1, columns))
    rest = (act.kind, act.params, True, False, interleaved)
    y, h = on_triton.forward(*tensors, *rest, True, chip=replace(A100, processors=3))
    grad = torch.randn_like(y)
    out = on_triton.backward(grad, *tensors, h, *rest, [True, *[False] * 6], chip=replace(A100, processors=3))
    want, grads = truth(tensors, act, interleaved, torch.float32, grad)
    assert_close(y, want, dtype=torch.float32)
    assert_close(out[0], grads["x"], dtype=torch.float32)
