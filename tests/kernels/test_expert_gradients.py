"""expert_gradients and combine_gradients: the backward pass of grouped_ffn bit for bit, however experts are shared out
over calls and slots."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from few_bits_experts import FewBits

from headgate.kernels import GPT_OSS, Routing, combine_gradients, expert_gradients, grouped_ffn
from headgate.kernels.activation import as_activation
from headgate.kernels.expert_gradients import combine_gradients_reference, expert_gradients_reference
from headgate.kernels.quantized import FORMATS

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


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((shape, torch.float32) for shape in SHAPES),
        *((shape, dtype) for dtype in HALF for shape in [*SHAPES][1:6] + [*SHAPES][-1:]),
        *((shape, torch.float64) for shape in [*SHAPES][3:6]),
    ],
    ids=lambda case: case if isinstance(case, str) else name(case),
)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("rows", [40, 400])
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


@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(s, marks=pytest.mark.slow) for s in range(8, 32))])
def test_random_problems_with_any_number_of_threads(problem, cpu_form, seed):
    r, before = random.Random(seed), torch.get_num_threads()
    torch.manual_seed(seed)
    odd, experts = cpu_form == "native", r.choice([1, 2, 5, 20])  # as to SHAPES
    p = problem(
        R=r.choice([1, 2, 5, 16, 33, 65, 129, 300]),
        D=r.choice([2, 7, 31, 33, 96, 130]) if odd else r.choice([16, 32, 96, 128]),
        F=r.choice([1, 3, 8, 17, 33, 100]) if odd else r.choice([16, 48, 96]),
        E=experts,
        K=r.randint(1, min(experts, 8)),
        dtype=r.choice([torch.float32, *HALF]),
        bias=r.random() < 0.4,
        transposed=r.random() < 0.5,
        interleaved=r.random() < 0.3,
    )
    if seed % 2:  # experts twice in a row, and sentinels
        p.ids[:] = torch.randint(-1, experts + 1, p.ids.shape)
    grad = given(p)
    try:
        torch.set_num_threads(r.choice([1, 2, 3]))
        want = replace(p, needs=("rows", "weights")).run(grad)
        if odd:
            torch.set_num_threads(r.choice([1, 2, 3]))
        got = parted(p, grad, cut(p, r.choice([1, 2, 4])))
        assert all(torch.equal(value, want[n]) for n, value in got.items())
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("form", ["gpt-oss", "pair", "ungated"])
def test_against_the_reference(problem, form, assert_close):
    """Each pair's own, at the odd sizes of the problem."""
    p = problem(**FORMS[form])
    t, grad, (arena, slots) = p.tensors, given(p), in_slots(p, torch.tensor([3, 0, 4]))
    outs = {"d_rows": torch.full((p.ids.numel(), 70), math.nan), "d_weights": torch.full((p.ids.numel(),), math.nan)}
    wide = {n: torch.full_like(v, math.nan, dtype=torch.float64) for n, v in outs.items()}
    routing = Routing.from_topk(p.ids, t["weights"], p.experts)
    for weights, rows, g, to in (
        (arena, t["rows"], grad, outs),
        ({n: w.double() for n, w in arena.items()}, t["rows"].double(), grad.double(), wide),
    ):
        w1 = (weights["w_gate_up"], weights["w_up"]) if "w_up" in weights else weights["w_gate_up"]
        biases = {n: weights[n] for n in ("b_gate_up", "b_down") if n in weights}
        if to is outs:
            expert_gradients(g, rows, routing, w1, weights["w_down"], slots, **to, **biases, **p.form)
        else:
            how = {n: p.form[n] for n in ("transposed", "interleaved") if n in p.form}
            act = as_activation(p.form.get("activation", "silu"), p.form.get("gated", True))
            expert_gradients_reference(
                g, rows, p.ids, t["weights"].double(), w1, weights["w_down"], slots, **to, **biases, **how,
                activation=act,
            )  # fmt: skip
    for n, value in outs.items():
        assert_close(value, wide[n], name=n)
    filled = outs["d_rows"].nan_to_num(0.5)
    want = combine_gradients_reference(filled.double(), p.ids, p.experts, torch.float64)
    assert_close(combine_gradients(filled, routing, torch.float32), want)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("pair", [False, True])
def test_few_bits(format, pair, cpu_form, assert_close):
    """Any partition has the same bits; grouped_ffn's backward pass on the same weights the same numbers."""
    experts, (d, f) = 5, (256, 256) if format.endswith("_K") else (96, 64)
    few = FewBits(experts, d, f, pair, format, (1, 32) if format in ("int8", "int4") else None)
    x, ids = torch.randn(70, d, requires_grad=True), torch.rand(70, experts).argsort(1)[:, :3]
    weights, grad = torch.rand(70, 3, requires_grad=True), torch.randn(70, d)
    routing = Routing.from_topk(ids, weights, experts)

    def run(parts):
        d_rows, d_weights = torch.full((210, d), math.nan), torch.full((210,), math.nan)
        for part in parts:
            slots = torch.full((experts,), -1, dtype=torch.int32)
            slots[part] = torch.arange(len(part)).int()
            expert_gradients(grad, x, routing, *few.of(part), slots, d_rows=d_rows, d_weights=d_weights)
        return combine_gradients(d_rows, routing, x.dtype), d_weights.view(70, 3)

    whole = run([torch.arange(experts)])
    for one, other in zip(run([torch.tensor([4, 1]), torch.tensor([0]), torch.tensor([3, 2])]), whole, strict=True):
        assert torch.equal(one, other)
    y = grouped_ffn(x, routing, *few.of(torch.arange(experts)))
    for got, want in zip(whole, torch.autograd.grad(y, (x, weights), grad), strict=True):
        assert_close(got, want.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_opcheck(problem, dtype):
    p = problem(R=5, D=16, F=16, dtype=dtype, bias=True)
    arena, slots = in_slots(p, torch.tensor([2, 0]))
    act, ids, d_rows, d_weights = as_activation("silu"), p.ids.int(), torch.zeros(10, 16), torch.zeros(10)
    t, lists = p.tensors, ([arena["w_gate_up"]], [], [arena["w_down"]])
    biases, form = (arena["b_gate_up"], arena["b_down"]), ([], [], act.kind, act.params, True, False, False)
    args = (given(p), t["rows"], ids, t["weights"], *lists, *biases, slots, d_rows, d_weights, *form)
    torch.library.opcheck(torch.ops.headgate.expert_gradients.default, args)
    torch.library.opcheck(torch.ops.headgate.combine_gradients.default, (d_rows, ids, p.experts, dtype))


def call(**changes):
    """expert_gradients with R=5, D=8, F=16, E=4, K=2, S=3 and one thing changed."""
    given = dict(
        grad=torch.randn(5, 8), rows=torch.randn(5, 8), ids=torch.zeros(5, 2, dtype=torch.long), experts=4,
        w_gate_up=torch.randn(3, 32, 8), w_down=torch.randn(3, 8, 16),
        slots=torch.tensor([2, -1, 0, 1], dtype=torch.int32), d_rows=torch.zeros(10, 8), d_weights=torch.zeros(10),
    ) | changes  # fmt: skip
    routing = Routing.from_topk(given.pop("ids"), torch.rand(5, 2), given.pop("experts"))
    outs = [t for t in (given["d_rows"], given["d_weights"]) if t is not None]
    before = [t.clone() for t in outs]
    positional = [given.pop(n) for n in ("grad", "rows")], [given.pop(n) for n in ("w_gate_up", "w_down", "slots")]
    try:
        expert_gradients(*positional[0], routing, *positional[1], **given)
    except Exception:
        assert all(map(torch.equal, outs, before)), "an error comes before anything is changed"
        raise


BAD = {
    "rows of another width": (dict(rows=torch.randn(5, 9)), ValueError, r"w_gate_up must be \(3, 32, 9\)"),
    "a gradient of another width": (
        dict(grad=torch.randn(5, 9)),
        ValueError,
        r"grad must be \[R, D\] .*D=8, got \(5, 9\)",
    ),
    "a gradient of another type": (
        dict(grad=torch.randn(5, 8).half()),
        TypeError,
        r"grad must have the dtype and device",
    ),
    "a slot too far": (dict(slots=torch.tensor([0, 3, 2, -1], dtype=torch.int32)), ValueError, r"to S - 1 = 2, got 3"),
    "d_rows for rows": (dict(d_rows=torch.zeros(5, 8)), ValueError, r"d_rows must be \[R\*K, D\] with R\*K=10, D=8"),
    "d_rows of another type": (dict(d_rows=torch.zeros(10, 8).half()), TypeError, r"d_rows must be torch.float32 for"),
    "d_weights of pairs": (dict(d_weights=torch.zeros(5, 2)), ValueError, r"d_weights must be \[R\*K\], got \(5, 2\)"),
    "d_weights with gaps": (dict(d_weights=torch.zeros(20)[::2]), ValueError, r"d_weights must be contiguous"),
    "an id below -1": (
        dict(ids=torch.full((5, 2), -2)),
        IndexError,
        r"expert_gradients: expert_ids must be at least -1",
    ),
    "what is learned": (
        dict(d_rows=torch.zeros(10, 8, requires_grad=True)),
        ValueError,
        r"d_rows must not ask for a grad",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    changes, error, words = BAD[case]
    with pytest.raises(error, match=words):
        call(**changes)


def test_nothing_asked_for_is_nothing_done(problem):
    call(d_rows=None, d_weights=None, ids=torch.full((5, 2), -2))
    p = problem(R=40, D=64, F=32)
    grad, parts = given(p), cut(p, 3)
    both = parted(p, grad, parts)
    for one in ("rows", "weights"):
        assert torch.equal(parted(p, grad, parts, wanted=(one,))[one], both[one])
