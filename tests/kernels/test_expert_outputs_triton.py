"""The Triton form of expert_outputs and combine_outputs in Triton's interpreter: the bits of the Triton form of
grouped_ffn, by any partition, and the reference's numbers. fp32 and fp16: the interpreter's bf16 products are wrong."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from headgate.bench.gpu.record import Recorder
from headgate.kernels import GPT_OSS, Activation, quantize
from headgate.kernels.chip import A100, H200
from headgate.kernels.expert_outputs import combine_outputs_reference, expert_outputs_reference
from headgate.kernels.tiles import Size, choose

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


def table(part, experts):
    slots = torch.full((experts,), -1, dtype=torch.int32)
    slots[part] = torch.arange(1, len(part) + 1).int()
    return slots


def both(p, act, chip, parts, pick=pick):
    """(y of grouped_ffn's Triton form, y by `parts`, the outputs of pairs)."""
    from headgate.kernels.expert_outputs import on_triton
    from headgate.kernels.grouped_ffn import on_triton as whole

    t, ids, form = p.tensors, p.ids.int(), {n: p.form.get(n, False) for n in ("transposed", "interleaved")}
    weights, rest = [t.get(n) for n in WEIGHTS], (act.kind, act.params, act.gated, *form.values())
    y, _ = whole.forward(t["rows"], ids, t["weights"], *weights, *rest, False, chip=chip)
    out = torch.full((ids.numel(), y.shape[1]), math.nan)
    for part in parts:
        slots = table(part, p.experts)
        on_triton.expert_outputs(t["rows"], ids, *pick(weights, part), slots, out, *rest, chip=chip)
    return y, on_triton.combine_outputs(out, ids, t["weights"], p.experts, y.dtype), out


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
def test_any_partition_is_grouped_ffn_to_the_bit(problem, form, dtype, chip):
    act, how = FORMS[form]
    p = problem(20, 64, 32, 5, 3, dtype=dtype, **how)
    y, got, _ = both(p, act, CHIPS[chip], ([4, 0], [1, 2, 3]))
    assert torch.equal(got, y)


SHAPES = {
    "odd": dict(R=17, D=35, F=21),
    "no rows": dict(R=0),
    "all on one": dict(R=20, ids=torch.full((20, 1), 2)),
    "none at all": dict(R=6, ids=torch.full((6, 2), -1)),
    "sentinels": dict(R=8, ids=torch.tensor([[0, 3], [7, -1], [2, 0], [-1, 1]]).repeat(2, 1)),
    "an expert twice in a row": dict(R=6, ids=torch.tensor([[1, 1], [2, 1]]).repeat(3, 1)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_odd_shapes(problem, shape):
    p = problem(**{"D": 20, "F": 12, "E": 3, **SHAPES[shape]})
    y, got, out = both(p, SILU, CHIPS["pointers"], [[e] for e in range(p.experts)])
    assert torch.equal(got, y)
    dead = ((p.ids < 0) | (p.ids >= p.experts)).reshape(-1)
    assert torch.equal(out.isnan().all(1), dead)


def test_tiles_are_chosen_for_all_experts(problem):
    """66 pairs on 4 experts are 17 rows each, on the one of a call 66: another tile, which may sum in another order."""
    from headgate.kernels.expert_outputs import on_triton
    from headgate.kernels.grouped_ffn import on_triton as whole

    p, rest, chip = problem(33, 32, 16, 4, 2), ("silu", SILU.params, True, False, False), CHIPS["pointers"]
    t, ids, rows, counted, recorders = p.tensors, p.ids.int(), torch.zeros(66, 32), [], [Recorder(), Recorder()]
    weights = (t["w_gate_up"], None, t["w_down"], None, None)
    whole.forward(t["rows"], ids, t["weights"], *weights, *rest, False, chip=chip, launch=recorders[0])
    one = pick(weights, [2])
    on_triton.expert_outputs(t["rows"], ids, *one, table([2], 4), rows, *rest, chip=chip, launch=recorders[1])
    for recorder in recorders:
        counted.append([launched.arguments["BM"] for launched in recorder.launches if "BM" in launched.arguments])
    assert counted == [[32, 32], [32, 32]]
    assert choose(Size(66, 32, 16, 1, 4), chip).up.rows == 128


def test_outputs_and_sum_against_the_reference(problem, assert_close):
    act, how = FORMS["gpt-oss"]
    p, part = problem(17, 35, 21, 5, 2, **how), [3, 0, 4]
    t = {n: v.double() for n, v in p.tensors.items()}
    _, _, out = both(p, act, CHIPS["pointers"], [part])
    want = torch.full_like(out, math.nan, dtype=torch.float64)
    arena = [None if w is None else w.double() for w in pick([t.get(n) for n in WEIGHTS], part)]
    expert_outputs_reference(
        t["rows"], p.ids, arena[0], arena[2], table(part, 5), want, arena[3], arena[4], activation=act,
        transposed=True, interleaved=True,
    )  # fmt: skip
    assert_close(out, want)
    from headgate.kernels.expert_outputs.on_triton import combine_outputs

    filled = out.nan_to_num(0.5)
    y = combine_outputs(filled, p.ids.int(), p.tensors["weights"], 5, torch.float32)
    assert_close(y, combine_outputs_reference(filled.double(), p.ids, t["weights"], 5, torch.float64))


@pytest.mark.parametrize("format", ["fp8", "uint4", "mxfp4", "Q4_0"])
def test_quantized_arenas(problem, format):
    p = problem(9, 64, 96, 4, 2)
    for n in ("w_gate_up", "w_down"):
        p.tensors[n] = quantize(p.tensors[n], format, block=(1, 32) if format == "uint4" else None)

    def pick(weights, part):
        part = [part[0], *part]  # a slot that nobody is in
        return [None if w is None else replace(w, data=w.data[part], scale=w.scale[part]) for w in weights]

    y, got, _ = both(p, SILU, CHIPS["maps"], ([2, 0], [3, 1]), pick)
    assert torch.equal(got, y)


def test_a_slot_that_is_not_there_counts_as_not_here(problem):
    from headgate.kernels.expert_outputs import on_triton

    p = problem(9, 20, 12, 3, 2)
    t, out = p.tensors, torch.full((18, 20), math.nan)
    slots = torch.tensor([0, 2, -7], dtype=torch.int32)
    weights = (t["w_gate_up"][:2], None, t["w_down"][:2], None, None)
    on_triton.expert_outputs(t["rows"], p.ids.int(), *weights, slots, out, "silu", SILU.params, True, False, False,
                             chip=CHIPS["pointers"])  # fmt: skip
    assert torch.equal(out.isnan().all(1), p.ids.reshape(-1) != 0)
