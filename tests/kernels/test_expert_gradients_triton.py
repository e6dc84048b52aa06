"""The Triton form of expert_gradients and combine_gradients in Triton's interpreter: the bits of grouped_ffn's backward
pass there, by any partition, and the reference's numbers. fp32 and fp16: the interpreter's bf16 products are wrong."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from headgate.kernels import GPT_OSS, Activation, quantize
from headgate.kernels.chip import A100, H200
from headgate.kernels.expert_gradients import combine_gradients_reference, expert_gradients_reference

triton = pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="Triton's interpreter is off"),
    pytest.mark.filterwarnings("ignore:headgate. grouped_ffn. expert weights whose", "ignore::RuntimeWarning"),
]

# Few processors, so that a program walks over many tiles. A100: pointers; H200: tensor maps.
CHIPS = {"pointers": replace(A100, processors=3), "maps": replace(H200, processors=3)}
SILU = Activation("silu")
FORMS = {
    "gate first": (SILU, {}),
    "gpt-oss": (GPT_OSS, dict(transposed=True, interleaved=True, bias=True, activation=GPT_OSS)),
    "pair": (SILU, dict(pair=True)),
    "ungated": (Activation("relu2", False), dict(gated=False, activation="relu2", bias=True)),
}
WEIGHTS = ("w_gate_up", "w_up", "w_down", "b_gate_up", "b_down")


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """torch.empty hands out NaN: whatever is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pick(weights, part):
    """An arena of these experts, with a slot of NaN before them."""
    return [None if w is None else torch.cat([torch.full_like(w[:1], math.nan), w[part]]) for w in weights]


def pick_quantized(weights, part):
    part = [part[0], *part]  # a slot that nobody is in
    return [None if w is None else replace(w, data=w.data[part], scale=w.scale[part]) for w in weights]


def table(part, experts):
    slots = torch.full((experts,), -1, dtype=torch.int32)
    slots[part] = torch.arange(1, len(part) + 1).int()
    return slots


def both(p, act, chip, parts, pick=pick):
    """((dx, ds) of grouped_ffn's Triton form, those by `parts`, the pairs' own)."""
    from headgate.kernels.expert_gradients import on_triton
    from headgate.kernels.expert_outputs.on_triton import combine_outputs
    from headgate.kernels.grouped_ffn import on_triton as whole

    t, ids, form = p.tensors, p.ids.int(), {n: p.form.get(n, False) for n in ("transposed", "interleaved")}
    batch = (t["rows"], ids, t["weights"])
    weights, rest = [t.get(n) for n in WEIGHTS], (act.kind, act.params, act.gated, *form.values())
    y, h = whole.forward(*batch, *weights, *rest, True, chip=chip)
    grad, needs = torch.randn(y.shape).to(y.dtype), [True, True, *[False] * 5]
    want = whole.backward(grad, *batch, *weights, h, *rest, needs, chip=chip)[:2]
    d_rows, d_weights = torch.full((ids.numel(), t["rows"].shape[1]), math.nan), torch.full((ids.numel(),), math.nan)
    for part in parts:
        outs = (d_rows, d_weights)
        on_triton.expert_gradients(grad, *batch, *pick(weights, part), table(part, p.experts), *outs, *rest, chip=chip)
    dx = combine_outputs(d_rows, ids, None, p.experts, y.dtype)
    live = (ids >= 0) & (ids < p.experts)
    ds = torch.where(live, d_weights.view(ids.shape), 0.0).to(t["weights"].dtype)
    return want, (dx, ds), (grad, d_rows, d_weights)


def assert_same(got, want):
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize(
    ("form", "dtype", "chip"),
    [
        ("gate first", torch.float32, "maps"),
        ("gate first", torch.float16, "pointers"),
        ("gpt-oss", torch.float16, "maps"),
        ("pair", torch.float32, "pointers"),
        ("ungated", torch.float32, "maps"),
    ],
)
def test_any_partition_is_the_backward_pass_of_grouped_ffn_to_the_bit(problem, form, dtype, chip):
    act, how = FORMS[form]
    p = problem(20, 64, 32, 5, 3, dtype=dtype, **how)
    want, got, _ = both(p, act, CHIPS[chip], ([4, 0], [1, 2, 3]))
    assert_same(got, want)


SHAPES = {
    "odd": dict(R=17, D=35, F=21),
    "no rows": dict(R=0),
    "all on one": dict(R=20, ids=torch.full((20, 1), 2)),
    "sentinels, an expert twice": dict(R=8, ids=torch.tensor([[0, 3], [7, -1], [2, 2], [-1, 1]]).repeat(2, 1)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_odd_shapes(problem, shape):
    p = problem(**{"D": 20, "F": 12, "E": 3, **SHAPES[shape]})
    want, got, (_, d_rows, d_weights) = both(p, SILU, CHIPS["pointers"], [[e] for e in range(p.experts)])
    assert_same(got, want)
    dead = ((p.ids < 0) | (p.ids >= p.experts)).reshape(-1)
    assert torch.equal(d_rows.isnan().all(1), dead)
    assert torch.equal(d_weights.isnan(), dead)


def test_against_the_reference(problem, assert_close):
    act, how = FORMS["gpt-oss"]
    p, part = problem(17, 35, 21, 5, 2, **how), [3, 0, 4]
    t = {n: v.double() for n, v in p.tensors.items()}
    _, _, (grad, d_rows, d_weights) = both(p, act, CHIPS["pointers"], [part])
    wanted = torch.full_like(d_rows, math.nan, dtype=torch.float64), torch.full_like(d_weights, math.nan).double()
    arena = [None if w is None else w.double() for w in pick([t.get(n) for n in WEIGHTS], part)]
    expert_gradients_reference(
        grad.double(), t["rows"], p.ids, t["weights"], arena[0], arena[2], table(part, 5), *wanted, arena[3], arena[4],
        activation=act, transposed=True, interleaved=True,
    )  # fmt: skip
    assert_close(d_rows, wanted[0])
    assert_close(d_weights, wanted[1])
    from headgate.kernels.expert_outputs.on_triton import combine_outputs

    filled = d_rows.nan_to_num(0.5)
    dx = combine_outputs(filled, p.ids.int(), None, 5, torch.float32)
    assert_close(dx, combine_gradients_reference(filled.double(), p.ids, 5, torch.float64))


@pytest.mark.parametrize("format", ["fp8", "int4", "mxfp4"])
def test_quantized_arenas(problem, format):
    p = problem(9, 64, 96, 4, 2)
    for n in ("w_gate_up", "w_down"):
        p.tensors[n] = quantize(p.tensors[n], format, block=(1, 32) if format == "int4" else None)
    want, got, _ = both(p, SILU, CHIPS["maps"], ([2, 0], [3, 1]), pick_quantized)
    assert_same(got, want)


@pytest.mark.parametrize("asked", ["rows", "weights"])
def test_one_of_both(problem, asked):
    from headgate.kernels.expert_gradients import on_triton

    p, chip, part = problem(17, 20, 12, 3, 2), CHIPS["pointers"], [2, 0]
    _, _, (grad, d_rows, d_weights) = both(p, SILU, chip, [part])
    t, alone = p.tensors, torch.full_like(d_rows if asked == "rows" else d_weights, math.nan)
    outs = (alone, None) if asked == "rows" else (None, alone)
    on_triton.expert_gradients(
        grad, t["rows"], p.ids.int(), t["weights"], *pick([t.get(n) for n in WEIGHTS], part), table(part, 3), *outs,
        "silu", SILU.params, True, False, False, chip=chip,
    )  # fmt: skip
    assert torch.equal(alone.nan_to_num(0.5), (d_rows if asked == "rows" else d_weights).nan_to_num(0.5))
