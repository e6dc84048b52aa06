"""expert_gradients and combine_gradients: the backward pass of grouped_ffn bit for bit, however experts are shared out
over calls and slots."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from headgate.kernels import GPT_OSS, Routing, combine_gradients, expert_gradients

pytestmark = pytest.mark.usefixtures("cpu_form")
HALF = [torch.bfloat16, torch.float16]
WEIGHTS = ("w_gate_up", "w_up", "w_down", "b_gate_up", "b_down")


def name(dtype):
    return str(dtype)[6:]


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_slots(p, experts, spare=1):
    """(weights by name, slot_of_expert) with `experts` in a random order, and NaN in the slots between."""
    where = torch.randperm(len(experts) + spare)[: len(experts)]
    slots = torch.full((p.experts,), -1, dtype=torch.int32)
    slots[experts] = where.int()
    arena = {}
    for n in WEIGHTS:
        if n in p.tensors:
            t = p.tensors[n]
            arena[n] = torch.full((len(experts) + spare, *t.shape[1:]), math.nan, dtype=t.dtype)
            arena[n][where] = t[experts]
    return arena, slots


def cut(p, calls):
    """The experts in random order, in about equal parts."""
    order = torch.randperm(p.experts)
    return [part for part in (order[i::calls] for i in range(calls)) if len(part)]


def parted(p, grad, parts, wanted=("rows", "weights")):
    """The gradients of `wanted` by calls on `parts` of the experts; NaN where nothing is written."""
    t, kind = p.tensors, wide(p.tensors["rows"].dtype)
    routing, pairs = Routing.from_topk(p.ids, t["weights"], p.experts), p.ids.numel()
    d_rows = torch.full((pairs, t["rows"].shape[1]), math.nan, dtype=kind) if "rows" in wanted else None
    d_weights = torch.full((pairs,), math.nan, dtype=kind) if "weights" in wanted else None
    for experts in parts:
        arena, slots = in_slots(p, experts)
        w1 = (arena["w_gate_up"], arena["w_up"]) if "w_up" in arena else arena["w_gate_up"]
        biases = {n: arena[n] for n in ("b_gate_up", "b_down") if n in arena}
        expert_gradients(
            grad, t["rows"], routing, w1, arena["w_down"], slots, d_rows=d_rows, d_weights=d_weights, **biases, **p.form
        )
    found = {}
    if d_rows is not None:
        found["rows"] = combine_gradients(d_rows, routing, t["rows"].dtype)
    if d_weights is not None:
        live = (p.ids >= 0) & (p.ids < p.experts)
        assert torch.equal(d_weights.isnan().view(p.ids.shape), ~live), "written where nothing is"
        found["weights"] = torch.where(live, d_weights.view(p.ids.shape), 0.0).to(t["weights"].dtype)
    return found


def given(p):
    """A gradient of y, without the strides of a fresh tensor."""
    t = p.tensors
    d_out = t["w_down"].shape[2 if p.form.get("transposed") else 1]
    return torch.randn(len(p.ids), d_out + 3, dtype=torch.float64).to(t["rows"].dtype)[:, 1 : d_out + 1]


def same(p, calls, grad=None):
    grad = given(p) if grad is None else grad
    want = replace(p, needs=("rows", "weights")).run(grad)
    got = parted(p, grad, cut(p, calls))
    for n, value in got.items():
        assert value.dtype == want[n].dtype
        assert torch.equal(value, want[n]), n


# Sizes of whole 64 bytes: torch's matmul, in the plain form, may sum otherwise where an expert begins elsewhere.
SHAPES = {
    "no rows": dict(R=0),
    "one row, many experts": dict(R=1, E=32, K=8),
    "few rows of each": dict(R=9, E=5),
    "panels in slices": dict(R=70, E=3),
    "slices of many pairs": dict(R=150, E=40, K=4, dead=0),
    "blocks": dict(R=400, E=4, dead=0.05),
    "one expert": dict(R=70, E=1, K=1, dead=0),
    "all rows on one of many": dict(R=70, E=5, ids=torch.full((70, 1), 2)),
    "empty experts": dict(ids=torch.tensor([[0, 6], [6, 3], [3, 0]]), R=3, E=8),
    "the same expert twice in a row": dict(ids=torch.tensor([[1, 1], [2, 0], [0, 0]]).repeat(9, 1), R=27),
    "no expert at all": dict(ids=torch.full((33, 2), -1)),
    "sentinel ids": dict(ids=torch.tensor([[5, 0], [1, 7], [2**31 - 1, 5], [-1, 4]]), R=4),
    "no choices": dict(ids=torch.empty(33, 0, dtype=torch.long)),
    "another width out than in": dict(D_out=48),
    "parts of the columns": dict(R=40, D=32, F=1056, E=3, dead=0),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=name)
@pytest.mark.parametrize("shape", SHAPES)
def test_any_partition_is_the_backward_pass_of_grouped_ffn_to_the_bit(problem, shape, dtype):
    p = problem(**{"D": 64, "F": 32, "bias": True, "dtype": dtype, **SHAPES[shape]})
    for calls in (1, 3, p.experts):
        same(p, calls)


FORMS = {
    "transposed": dict(transposed=True),
    "interleaved": dict(interleaved=True, bias=True),
    "gpt-oss": dict(transposed=True, interleaved=True, bias=True, activation=GPT_OSS),
    "pair": dict(pair=True),
    "pair, transposed": dict(pair=True, transposed=True),
    "ungated": dict(gated=False, activation="relu2", bias=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=name)
@pytest.mark.parametrize("rows", [1, 40, 400])
@pytest.mark.parametrize("form", FORMS)
def test_every_form(problem, cpu_form, form, rows, dtype, assert_close):
    p = problem(R=rows, D=64, F=32, E=4, dtype=dtype, **FORMS[form])
    if cpu_form == "native" or not form.startswith("pair"):
        same(p, 3)
        return
    grad = given(p)  # the plain form adds gate's and up's parts to a row's sum one after the other
    want, got = replace(p, needs=("rows", "weights")).run(grad), parted(p, grad, cut(p, 3))
    for n, value in got.items():
        assert_close(value, want[n].double(), dtype=dtype, name=n)
