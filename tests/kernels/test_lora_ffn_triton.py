"""The Triton form of lora_ffn in Triton's interpreter, against the reference, and its launches built ahead of time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lora_cases import Case

from headgate.kernels.chip import A100, H200
from headgate.kernels.quantized import quantize

triton = pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="Triton's interpreter is off"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
CASES = {
    "plain": {},
    "odd, biases": dict(rows=19, hidden=33, inner=35, bias=True, rank=5),
    "transposed, interleaved, gpt-oss": dict(transposed=True, interleaved=True, bias=True, activation="gpt_oss"),
    "skills and gates": dict(skills=3, rank=2),
    "down only, a pair": dict(targets=("down",), pair=True),
    "up only, fp16": dict(targets=("up",), dtype=torch.float16, factors=torch.float32, hidden=16, inner=16),
    "no row": dict(rows=0),
}


def both(case: Case, chip):
    from headgate.kernels.lora_ffn import on_triton

    args = case.arguments(True)
    y, h = on_triton.forward(*args, chip=chip)
    grad = torch.randn_like(y)
    needs = [True, True, *(d is not None for d in (case.deltas["up"], case.deltas["down"]) for _ in "ab")]
    got = on_triton.backward(grad, *args[:15], h, *args[15:-1], [*needs, case.gates is not None], chip=chip)
    return y, grad, [t for t, need in zip(got, [*needs, case.gates is not None], strict=True) if need]


FAST = [("transposed, interleaved, gpt-oss", "pointers"), ("skills and gates", "maps")]  # seconds each, interpreted
CHIPS = {"pointers": replace(A100, processors=3), "maps": replace(H200, processors=3)}


@pytest.mark.parametrize(
    ("sizes", "chip"),
    [
        pytest.param(s, c, id=f"{name}-{kind}", marks=[] if (name, kind) in FAST else pytest.mark.slow)
        for name, s in CASES.items()
        for kind, c in CHIPS.items()
    ],
)
def test_forward_and_gradients_equal_the_reference(sizes, chip, assert_close):
    case = Case(**sizes)
    y, grad, got = both(case, chip)
    want = case.reference()
    assert_close(y, want, name="y")
    leaves = case.leaves
    for (name, _), g, ref in zip(leaves.items(), got, torch.autograd.grad(want, [*leaves.values()], grad), strict=True):
        assert_close(g, ref, name=name, dtype=case.x.dtype)


@pytest.mark.slow
def test_weights_in_few_bits(assert_close):
    from headgate.kernels.lora_ffn import on_triton

    case = Case(hidden=64, inner=32)
    packed = [quantize(w, "int8", block=(1, 32)) for w in (case.w1, case.w2)]
    case.w1, case.w2 = (q.dequantize(torch.float32) for q in packed)
    args = case.arguments(True)
    args[3], args[5] = ([q.data, q.scale] for q in packed)
    args[17], args[18] = ["int8", "int8"], [1, 32, 1, 32]
    chip = replace(H200, processors=3)
    y, h = on_triton.forward(*args, chip=chip)
    want, grad = case.reference(), torch.randn_like(y)
    assert_close(y, want)
    got = on_triton.backward(grad, *args[:15], h, *args[15:-1], [True] * 6 + [False], chip=chip)
    leaves = case.leaves
    for (name, _), g, ref in zip(
        leaves.items(), got, torch.autograd.grad(want, [*leaves.values()], grad), strict=False
    ):
        assert_close(g, ref, name=name)
