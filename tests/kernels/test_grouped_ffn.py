"""grouped_ffn's numbers: the output and every gradient against the reference, on uninitialised memory full of NaN."""

from __future__ import annotations

import math
import random
from itertools import product

import pytest
import torch

from headgate.kernels import GPT_OSS, Activation

pytestmark = pytest.mark.usefixtures("cpu_form", "nan_filled_memory")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture
def nan_filled_memory():
    """torch.empty hands out NaN: whatever is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def name(value):
    return str(value)[6:] if isinstance(value, torch.dtype) else None


SHAPES = {
    "no rows": dict(R=0),
    "one row": dict(R=1),
    "one row, many experts": dict(R=1, D=96, F=64, E=32, K=8),
    "odd": {},
    "the smallest sizes": dict(R=3, D=1, F=1, E=2, K=1),
    "more than 64 rows per expert": dict(R=300, D=128, F=96, E=3, K=2),
    "one expert with every row": dict(R=70, E=1, K=1, dead=0),
    "all rows to one of four experts": dict(ids=torch.full((33, 1), 2), E=4),
    "empty experts": dict(ids=torch.tensor([[0, 6], [6, 3], [3, 0]]), R=3, E=8),
    "K = E": dict(E=4, K=4, dead=0),
    "K = 1": dict(K=1),
    "the same expert twice in a row": dict(ids=torch.tensor([[1, 1], [2, 0], [0, 0]]), R=3),
    "no expert at all": dict(ids=torch.full((33, 2), -1)),
    "sentinel ids": dict(ids=torch.tensor([[5, 0], [1, 7], [2**31 - 1, 5], [-1, 4]]), R=4),
    "no choices": dict(ids=torch.empty(33, 0, dtype=torch.long)),
    "another width out than in": dict(D_out=21),
    "a pair of weights": dict(pair=True),
    "biases": dict(bias=True),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(problem, check, shape, dtype):
    p = problem(dtype=dtype, **SHAPES[shape])
    got = check(p, grad=torch.randn(p.tensors["rows"].shape[0], SHAPES[shape].get("D_out", p.tensors["rows"].shape[1])))
    dead = ((p.ids < 0) | (p.ids >= p.experts)).all(1)
    assert not got["y"][dead].any(), "a row without experts is exactly zero"
    assert not got["rows"][dead].any(), "and so is its gradient"


ACTIVATIONS = {
    **{kind: kind for kind in ("silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu")},
    "identity": Activation("identity"),
    "silu of slope 0.7": Activation("silu", alpha=0.7),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(problem, check, activation, gated, dtype):
    act = ACTIVATIONS[activation]
    if isinstance(act, Activation):
        act = Activation(act.kind, gated, act.alpha)
    check(problem(R=17, D=40, F=19, dtype=dtype, activation=act, gated=gated, bias=True))


CLAMPED = {
    "gpt-oss": GPT_OSS,
    "DeepSeek-V4, clamped before": Activation("silu", limit=0.5),
    "Step-3, clamped after": Activation("silu", limit=0.5, clamp_after=True),
    "shifted only": Activation("gelu", up_shift=1.0),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("activation", CLAMPED)
def test_clamped_activations(problem, check, activation, dtype):
    """Values lie on both sides of the limit, and none so near that rounding to `dtype` would move it across."""
    act = CLAMPED[activation]
    for seed in range(1000):
        torch.manual_seed(seed)
        p = problem(R=9, D=24, F=7, E=3, bias=True, dtype=dtype, activation=act, interleaved=act is GPT_OSS)
        t = {n: v.double() for n, v in p.tensors.items()}
        t["rows"] = t["rows"] * min(act.limit, 3.0)
        p = type(p)({**p.tensors, "rows": t["rows"].to(dtype)}, p.ids, p.experts, p.form)
        h = torch.einsum("td,ewd->tew", p.tensors["rows"].double(), t["w_gate_up"]) + t["b_gate_up"]
        gate = h[..., 0::2] if act is GPT_OSS else h[..., :7]
        near = torch.cat([h.abs(), act.phi(gate)], -1) - act.limit
        if act.limit == math.inf or near.abs().min() > 0.006 * act.limit:
            break
    else:
        pytest.fail("no seed keeps clear of the limit")
    assert act.limit == math.inf or (near > 0).any()
    check(p, grad=torch.randn(9, 24))


LAYOUTS = list(product([False, True], [False, True], [False, True]))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=name)
@pytest.mark.parametrize(("transposed", "interleaved", "bias"), LAYOUTS)
def test_layouts(problem, check, transposed, interleaved, bias, dtype):
    check(problem(dtype=dtype, transposed=transposed, interleaved=interleaved, bias=bias))


@pytest.mark.parametrize("form", [dict(pair=True), dict(gated=False), dict(gated=False, bias=True)])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=name)
def test_transposed_pair_and_ungated(problem, check, form, dtype):
    check(problem(R=100, D=64, F=48, E=2, dtype=dtype, transposed=True, **form))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("router", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=name)
def test_router_weights_of_any_type(problem, check, router, dtype):
    p = problem(dtype=dtype)
    p.tensors["weights"] = p.tensors["weights"].to(router)
    check(p)


def strided(t: torch.Tensor, how: str) -> torch.Tensor:
    """The same numbers, laid out otherwise."""
    if how == "every other element":
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), math.nan, dtype=t.dtype)
        wide[..., 1::2] = t
        return wide[..., 1::2]
    if how == "transposed view":
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    outer = torch.full([s + 3 for s in t.shape], math.nan, dtype=t.dtype)  # sliced from a larger one, at an odd offset
    inner = outer[tuple(slice(1, 1 + s) for s in t.shape)]
    return inner.copy_(t)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=name)
@pytest.mark.parametrize("how", ["every other element", "transposed view", "slice of a larger tensor"])
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("which", ["rows", "weights", "w_gate_up", "w_up", "w_down", "biases", "all"])
def test_any_strides(problem, check, which, transposed, how, dtype):
    few = dict(R=9, D=20, F=11, E=3, dtype=dtype, transposed=transposed)
    p = problem(**few, pair=which == "w_up", bias=which in ("biases", "all"))
    for n, t in p.tensors.items():
        if which in (n, "all") or (which == "biases" and n.startswith("b_")):
            p.tensors[n] = strided(t, how)
            assert not p.tensors[n].is_contiguous()
    check(p, grad=torch.randn(9, 20))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=name)
def test_rows_and_ids_that_share_memory(problem, check, dtype):
    p = problem(dtype=dtype, ids=torch.tensor([[3, 1]]).expand(33, 2))
    p.tensors["rows"] = p.tensors["rows"][:1].expand(33, 70)
    check(p)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=name)
@pytest.mark.parametrize("how", ["every other element", "transposed view", "slice of a larger tensor"])
def test_gradient_of_any_strides(problem, check, how, dtype):
    grad = strided(torch.randn(33, 70, dtype=dtype), how)
    p = problem(dtype=dtype)
    check(p, grad=grad)
    leaves = p.leaves()
    p.call(leaves).sum().backward()  # hands over one element, expanded
    expected = p.run(torch.ones(33, 70))
    for n, leaf in leaves.items():
        assert torch.equal(leaf.grad, expected[n]), n


ALL = ("rows", "weights", "w_gate_up", "w_up", "w_down", "b_gate_up", "b_down")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("pair", [False, True], ids=["one", "pair"])
@pytest.mark.parametrize("needs", [(n,) for n in ALL] + [ALL[:2], ("rows", "w_down"), ("w_gate_up", "b_down"), ()])
def test_a_gradient_does_not_depend_on_which_others_are_asked_for(problem, needs, pair, dtype):
    p = problem(dtype=dtype, bias=True, pair=pair, R=80, E=2)
    needs = tuple(n for n in needs if n in p.tensors)
    grad = torch.randn(80, 70)
    every, some = p.run(grad), type(p)(p.tensors, p.ids, p.experts, p.form, needs).run(grad)
    assert set(some) == {"y", *needs}
    for n, value in some.items():
        assert torch.equal(value, every[n]), n


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=name)
def test_a_bad_row_stays_alone(problem, check, assert_close, value, dtype):
    """Row 4 goes to expert 2 alone: nothing else sees its NaN, but its own output and expert 2's gradients."""
    p = problem(R=70, dtype=dtype, dead=0)
    p.ids[:] = torch.where(p.ids == 2, 3, p.ids)
    p.ids[4], p.ids[5:8, 0] = torch.tensor([2, -1]), 2
    clean, grad = p.run(torch.ones(70, 70)), torch.ones(70, 70)
    rows = p.tensors["rows"].clone()
    rows[4, 3] = value
    p.tensors["rows"] = rows
    got = p.run(grad)
    others = torch.arange(70) != 4
    for n in ("y", "rows", "weights"):
        assert torch.equal(got[n][others], clean[n][others]), n
    assert not got["y"][4].isfinite().all()
    for n in ("w_gate_up", "w_down"):
        for e in (0, 1, 3, 4):
            assert torch.equal(got[n][e], clean[n][e]), (n, e)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=name)
def test_what_no_expert_takes_touches_nothing(problem, check, dtype):
    """NaN in a row that goes nowhere, in its gradient, in the router weight of a dead pair, and in an idle expert."""
    p = problem(R=70, dtype=dtype, bias=True)
    p.ids[:] = torch.where(p.ids == 1, -1, p.ids)
    p.ids[4] = -1
    grad = torch.randn(70, 70)
    clean = p.run(grad)
    for n, t in p.tensors.items():
        t = p.tensors[n] = t.clone()
        if n == "rows":
            t[4] = math.nan
        elif n == "weights":
            t[(p.ids < 0) | (p.ids >= p.experts)] = math.nan
        else:
            t[1] = math.nan
    grad = grad.clone()
    grad[4] = math.nan
    for n, value in p.run(grad).items():
        assert torch.equal(value, clean[n]), n


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=name)
def test_large_numbers_are_summed_in_fp32(problem, check, dtype):
    """256 equal products: in half precision a running sum would stop growing long before the end."""
    p = problem(R=5, D=512, F=8, E=2, dtype=dtype)
    p.tensors["rows"] = torch.full((5, 512), 0.25, dtype=dtype)
    p.tensors["w_gate_up"] = torch.full((2, 16, 512), 1 / 64, dtype=dtype)
    check(p, grad=torch.ones(5, 512), scale=0.5)


@pytest.mark.parametrize("seed", [*range(20), *(pytest.param(s, marks=pytest.mark.slow) for s in range(20, 60))])
def test_random_problems(problem, check, seed):
    """Sizes around those of tiles and vectors, in every combination of form, layout and gradients asked for."""
    r, before = random.Random(seed), torch.get_num_threads()
    experts, gated = r.choice([1, 2, 3, 5, 8, 20]), r.random() < 0.8
    pair = gated and r.random() < 0.2
    p = problem(
        R=r.choice([1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 65, 129, 200]),
        D=r.choice([2, 7, 16, 31, 32, 33, 64, 96, 128, 130, 256, 300]),
        F=r.choice([1, 3, 8, 16, 17, 32, 33, 48, 64, 100, 160]),
        E=experts,
        K=r.randint(1, min(experts, 8)),
        dtype=r.choice([torch.float32, *HALF]),
        dead=r.choice([0, 0.2, 0.8]),
        pair=pair,
        bias=r.random() < 0.4,
        gated=gated,
        transposed=r.random() < 0.5,
        interleaved=gated and not pair and r.random() < 0.3,
        activation=r.choice(["silu", "gelu", "gelu_tanh"]),
    )
    for n, t in p.tensors.items():
        if r.random() < 0.2:
            p.tensors[n] = strided(t, r.choice(["every other element", "transposed view", "slice of a larger tensor"]))
    needs = tuple(n for n in p.tensors if r.random() < 0.8)
    p = type(p)(p.tensors, p.ids, p.experts, p.form, needs)
    try:
        torch.set_num_threads(r.choice([1, 2, 3]))
        check(p, grad=torch.randn_like(p.tensors["rows"]))
    finally:
        torch.set_num_threads(before)
