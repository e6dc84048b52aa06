"""What only a GPU can show of the kernels: bf16, the compiled code, graphs, no waiting, tensors past 2^31 elements.

Each new combination of constants compiles for about a second, so that the cases are few and telling; the interpreter's
tests are the many. `pytest -m gpu`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from headgate.kernels import (
    GPT_OSS,
    Activation,
    Routing,
    combine_gradients,
    combine_outputs,
    expert_gradients,
    expert_outputs,
    grouped_ffn,
    plan,
    topk,
)  # fmt: skip
from headgate.kernels.grouped_ffn import grouped_ffn_reference
from headgate.kernels.plan import plan_reference
from headgate.kernels.quantized import BLOCKS, quantize
from headgate.kernels.topk import topk_reference

pytestmark = pytest.mark.gpu
_SILU = Activation("silu")

FORMS = {
    "gate first": {},
    "transposed": {"transposed": True},
    "gpt-oss": {"transposed": True, "interleaved": True, "bias": True, "activation": GPT_OSS},
    "pair": {"pair": True},
    "ungated": {"gated": False, "activation": "relu2", "bias": True},
}
FEW, MANY = dict(R=24, D=128, F=96, E=8, K=2), dict(R=700, D=256, F=192, E=4, K=2)  # tiles of 16 rows, and of 128


@pytest.fixture
def problem(problem):
    """The problems of the other tests, on the GPU."""

    def make(**how):
        p = problem(**how)
        return replace(p, tensors={n: t.cuda() for n, t in p.tensors.items()}, ids=p.ids.cuda())

    return make


@pytest.fixture
def poisoned():
    """Uninitialised memory holds NaN (and the largest integer) while the test runs."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("size", [FEW, MANY], ids=["few rows", "many rows"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_in_bf16(problem, check, form, size):
    check(problem(dtype=torch.bfloat16, **size, **FORMS[form]))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [FEW, MANY], ids=["few rows", "many rows"])
def test_other_types(problem, check, dtype, size):
    check(problem(dtype=dtype, bias=True, **size))


_BITS = ("fp8", "int8", "int4", "uint4", "mxfp4", *BLOCKS)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rows", [2, 24, 700], ids=["thin", "few rows", "many rows"])
@pytest.mark.parametrize(
    ("format", "form"),
    [*((format, "gate first") for format in _BITS), ("uint4", "pair"), ("Q4_K", "pair"), ("gguf_mxfp4", "gpt-oss")],
)
def test_weights_in_few_bits(problem, assert_close, format, form, rows):
    """Against the reference on what they mean, and the gradients of rows and router weights of more than a few."""
    few = dict(R=rows, D=256, F=256, E=4, K=2, dtype=torch.bfloat16, **FORMS[form])
    p = problem(**few | {"transposed": False})
    names = [n for n in ("w_gate_up", "w_up", "w_down") if n in p.tensors]
    packed = {n: quantize(p.tensors[n], format) for n in names}
    meant = replace(p, tensors=p.tensors | {n: q.dequantize(torch.bfloat16) for n, q in packed.items()})
    asked = ("rows", "weights")
    want = replace(meant.to(torch.float64), needs=asked).run(truth=True)
    if rows <= 4:
        with torch.no_grad():
            assert_close(p.call(p.tensors | packed), want["y"], dtype=torch.bfloat16, name="y")
        return
    leaves = {n: t.detach().requires_grad_(n in asked) for n, t in p.tensors.items()}
    y = p.call(leaves | packed)
    got = torch.autograd.grad(y, [leaves[n] for n in asked], torch.ones_like(y))
    assert_close(y, want["y"], dtype=torch.bfloat16, name="y")
    for n, g in zip(asked, got, strict=True):
        assert_close(g, want[n], dtype=torch.bfloat16, name=n)


@pytest.mark.parametrize("format", ["uint4", "Q8_0", "Q4_K"])
def test_experts_in_few_bits_in_two_calls_are_those_of_one(problem, format):
    p = problem(R=24, D=256, F=256, E=4, K=2, dtype=torch.bfloat16)
    t, routing = p.tensors, Routing.from_topk(p.ids, p.tensors["weights"], p.experts)
    w1, w2 = (quantize(t[n], format) for n in ("w_gate_up", "w_down"))
    out = torch.full((p.ids.numel(), 256), math.nan, device="cuda")
    for part in ([0, 2], [3, 1]):
        slots = torch.full((4,), -1, dtype=torch.int32, device="cuda")
        slots[part] = torch.arange(2, dtype=torch.int32, device="cuda")
        there = (replace(w, data=w.data[part], scale=w.scale[part]) for w in (w1, w2))
        expert_outputs(t["rows"], routing, *there, slots, out)
    assert torch.equal(combine_outputs(out, routing, torch.bfloat16), grouped_ffn(t["rows"], routing, w1, w2))


def test_fp32_follows_torchs_precision(problem, check):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        check(problem(dtype=torch.float32, **MANY), scale=300.0)  # 10 bits of 23, the others cut off, not rounded
    finally:
        torch.set_float32_matmul_precision(before)


def test_fp64_takes_the_plain_form(problem, check):
    check(problem(dtype=torch.float64, R=20, D=24, F=16, E=3))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "shape",
    [
        dict(R=33, D=70, F=33, E=5),  # nothing divides anything: no tensor maps
        dict(R=1, D=64, F=64, E=4, K=1, dead=0),
        dict(R=0, D=64, F=64, E=4),
        dict(R=6, D=64, F=64, E=3, ids=torch.full((6, 2), -1)),
        dict(R=300, D=64, F=64, E=9, ids=torch.full((300, 1), 5)),
        dict(R=90, D=72, F=40, E=3, ids=torch.tensor([[0, 3, 7], [2, -1, 0], [-1, -1, 9]]).repeat(30, 1)),
    ],
    ids=["odd", "one row", "no rows", "no expert", "one expert", "sentinels"],
)
def test_odd_shapes(problem, check, shape):
    check(problem(dtype=torch.bfloat16, **shape))


def test_any_strides(problem, check):
    p = problem(dtype=torch.bfloat16, **MANY)
    t = dict(p.tensors)
    t["rows"] = t["rows"].repeat_interleave(2, dim=1)[:, ::2]
    t["w_gate_up"] = t["w_gate_up"].transpose(1, 2).contiguous().transpose(1, 2)
    t["w_down"] = t["w_down"].repeat_interleave(2, dim=2)[:, :, ::2]
    check(replace(p, tensors=t), grad=torch.randn(256, 700, device="cuda").T)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_bad_stays_where_it_is(problem, assert_close, value):
    ids = torch.tensor([[0, 2], [-1, 2], [2, 0], [-1, -1], [0, 5]]).repeat(40, 1)
    p = problem(R=200, D=64, F=64, E=4, ids=ids, bias=True, dtype=torch.bfloat16)
    clean, t = p.run(), {n: v.clone() for n, v in p.tensors.items()}
    for n in ("w_gate_up", "w_down", "b_gate_up", "b_down"):
        t[n][1] = t[n][3] = value
    t["weights"][1, 0] = t["weights"][4, 1] = value
    got = replace(p, tensors=t).run()
    for n in clean:
        assert_close(got[n], clean[n], name=n)
    t["rows"][2] = value
    got, others = replace(p, tensors=t).run(), torch.arange(200, device="cuda") != 2
    for n in ("y", "rows", "weights"):
        assert_close(got[n][others], clean[n][others], name=n)


@pytest.mark.parametrize("size", [FEW, dict(R=4096, D=512, F=256, E=16, K=4)], ids=["few rows", "many rows"])
def test_two_runs_agree_to_the_bit(problem, size):
    p = problem(dtype=torch.bfloat16, bias=True, **size)
    runs = [p.run() for _ in range(4)]
    assert all(torch.equal(runs[0][n], other[n]) for other in runs[1:] for n in other)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("size", [FEW, MANY], ids=["few rows", "many rows"])
@pytest.mark.parametrize("form", FORMS)
def test_experts_in_two_calls_are_those_of_one(problem, form, size):
    """To the bit, and without waiting for the device."""
    p = problem(dtype=torch.bfloat16, **size, **FORMS[form])
    t, routing = p.tensors, Routing.from_topk(p.ids, p.tensors["weights"], p.experts)
    out = torch.full((p.ids.numel(), t["rows"].shape[1]), math.nan, device="cuda")
    calls = []
    for part in (torch.arange(0, p.experts, 2), torch.arange(1, p.experts, 2)):
        slots = torch.full((p.experts,), -1, dtype=torch.int32)
        slots[part] = torch.arange(len(part)).int()
        calls.append(({n: w[part.cuda()] for n, w in t.items() if n not in ("rows", "weights")}, slots.cuda()))

    def step():
        for w, slots in calls:
            w1 = (w["w_gate_up"], w["w_up"]) if "w_up" in w else w["w_gate_up"]
            biases = {n: b for n, b in w.items() if n.startswith("b_")}
            expert_outputs(t["rows"], routing, w1, w["w_down"], slots, out, **biases, **p.form)
        return combine_outputs(out, routing, torch.bfloat16)

    step()  # compiles
    out.fill_(math.nan)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, p.call(t))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_experts_in_two_calls_are_those_of_one(problem, form):
    """To the bit, and without waiting for the device."""
    p = problem(dtype=torch.bfloat16, **MANY, **FORMS[form])
    t, routing = p.tensors, Routing.from_topk(p.ids, p.tensors["weights"], p.experts)
    grad, pairs = torch.randn_like(p.call(t)), p.ids.numel()
    d_rows, d_weights = torch.empty(pairs, t["rows"].shape[1], device="cuda"), torch.zeros(pairs, device="cuda")
    calls = []
    for part in (torch.arange(0, p.experts, 2), torch.arange(1, p.experts, 2)):
        slots = torch.full((p.experts,), -1, dtype=torch.int32)
        slots[part] = torch.arange(len(part)).int()
        calls.append(({n: w[part.cuda()] for n, w in t.items() if n not in ("rows", "weights")}, slots.cuda()))

    def step():
        for w, slots in calls:
            w1 = (w["w_gate_up"], w["w_up"]) if "w_up" in w else w["w_gate_up"]
            how = {n: b for n, b in w.items() if n.startswith("b_")} | p.form
            outs = {"d_rows": d_rows, "d_weights": d_weights}
            expert_gradients(grad, t["rows"], routing, w1, w["w_down"], slots, **outs, **how)
        return combine_gradients(d_rows, routing, torch.bfloat16)

    step()  # compiles
    d_rows.fill_(math.nan)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = replace(p, needs=("rows", "weights")).run(grad)
    assert torch.equal(got, want["rows"])
    assert torch.equal(d_weights.view(p.ids.shape).to(t["weights"].dtype), want["weights"])


def test_nothing_waits_for_the_device(problem):
    p = problem(dtype=torch.bfloat16, bias=True, **MANY)
    logits = torch.randn(700, 4, device="cuda", requires_grad=True)

    def step():
        y = p.run()["y"]
        r = topk(logits, 2, renormalize=True)
        r.weights.sum().backward()
        return y, plan(r.expert_ids, 4)

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph_of_a_training_step(problem, assert_close):
    """Captured with one routing, replayed with another: no shape and no launch depends on what is routed where."""
    p, other = (problem(dtype=torch.bfloat16, bias=True, **MANY) for _ in range(2))
    p.run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        p.run()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        captured = p.run()
    p.ids.copy_(other.ids)
    for n, t in p.tensors.items():
        t.copy_(other.tensors[n])
    graph.replay()
    for n, value in other.run().items():
        assert torch.equal(captured[n], value), n


def test_compiles_as_one_graph(problem, assert_close):
    torch._dynamo.reset()
    p = problem(dtype=torch.bfloat16, **MANY)

    def loss(*tensors):
        return p.call(dict(zip(p.tensors, tensors, strict=True))).float().square().sum()

    def run(function):
        leaves = p.leaves()
        value = function(*leaves.values())
        return [value.detach(), *torch.autograd.grad(value, list(leaves.values()))]

    for got, want in zip(run(torch.compile(loss, fullgraph=True)), run(loss), strict=True):
        assert_close(got, want)


def test_keeps_rows_h_and_routing_to_the_byte(problem):
    p = problem(dtype=torch.bfloat16, **MANY)
    kept: dict[int, int] = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    leaves = p.leaves()
    given = {t.untyped_storage().data_ptr() for n, t in leaves.items() if n not in ("rows", "weights")}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        p.call(leaves)
    h = 700 * 2 * 2 * 192 * 2
    routing = leaves["weights"].untyped_storage().nbytes() + 700 * 2 * 4
    assert sum(v for k, v in kept.items() if k not in given) == leaves["rows"].untyped_storage().nbytes() + h + routing


def _free(gib: float) -> None:
    if torch.cuda.mem_get_info()[0] < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of device memory")


def test_activations_past_2_to_the_31_elements(assert_close):
    """The last rows and the gradient of the last rows, where every index into H, A and Y is beyond 32 bits."""
    _free(48)
    rows_, k, d, f, e = 300_000, 8, 64, 512, 16
    x = torch.randn(rows_, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids = torch.rand(rows_, e, device="cuda").topk(k, dim=1).indices
    w = torch.rand(rows_, k, device="cuda")
    w1, w2 = (torch.randn(*s, device="cuda", dtype=torch.bfloat16) / 16 for s in ((e, 2 * f, d), (e, d, f)))
    assert rows_ * k * 2 * f > 2**31
    y = grouped_ffn(x, Routing.from_topk(ids, w, e), w1, w2)
    grad = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, grad)
    for part in (slice(0, 64), slice(-64, None)):
        small = x.detach()[part].float().requires_grad_()
        act = Routing.from_topk(ids[part], w[part], e)
        want = grouped_ffn_reference(small, act.expert_ids, act.weights, w1.float(), w2.float(), activation=_SILU)
        assert_close(y[part], want, dtype=torch.bfloat16, name="y")
        (want_dx,) = torch.autograd.grad(want, small, grad[part].float())
        assert_close(dx[part], want_dx, dtype=torch.bfloat16, name="dx")


def test_weights_past_2_to_the_31_elements(assert_close):
    _free(40)
    rows_, d, f, e = 256, 4096, 2048, 160
    assert e * 2 * f * d > 2**31
    x = torch.randn(rows_, d, device="cuda", dtype=torch.bfloat16)
    w1 = torch.randn(e, 2 * f, d, device="cuda", dtype=torch.bfloat16).div_(64).requires_grad_()
    w2 = torch.randn(e, d, f, device="cuda", dtype=torch.bfloat16).div_(45)
    ids = torch.tensor([[0, e - 1]], device="cuda").expand(rows_, 2)
    w = torch.rand(rows_, 2, device="cuda")
    y = grouped_ffn(x, Routing.from_topk(ids, w, e), w1, w2)
    grad = torch.randn_like(y)
    (dw1,) = torch.autograd.grad(y, w1, grad)
    two = torch.tensor([0, e - 1], device="cuda")
    small = w1.detach()[two].float().requires_grad_()
    act = Routing.from_topk(ids.clamp(max=1), w, 2)
    want = grouped_ffn_reference(x.float(), act.expert_ids, act.weights, small, w2[two].float(), activation=_SILU)
    assert_close(y, want, dtype=torch.bfloat16, name="y")
    (want_dw,) = torch.autograd.grad(want, small, grad.float())
    assert_close(dw1[two], want_dw, dtype=torch.bfloat16, name="dW1")
    assert not dw1[1:-1].any()


@pytest.mark.parametrize(
    ("tokens", "experts", "k"), [(0, 8, 2), (1, 8, 2), (7, 60, 4), (512, 128, 8), (70_000, 256, 8)]
)
def test_plan(tokens, experts, k):
    ids = torch.randint(-1, experts + 1, (tokens, k), device="cuda")
    got, want = plan(ids, experts), plan_reference(ids, experts)
    for a, b in zip((got.pair_of_row, got.offsets, got.row_of_pair), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("score", ["softmax", "topk_softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize(
    ("tokens", "experts", "k", "groups", "group_score"),
    [(1, 128, 8, 1, "top2"), (33, 60, 4, 1, "top2"), (5000, 256, 8, 8, "top2"), (5000, 256, 8, 8, 4)],
)
def test_topk(assert_close, score, tokens, experts, k, groups, group_score):
    logits = torch.randn(tokens, experts, device="cuda").to(torch.bfloat16)
    bias = torch.randn(experts, device="cuda") / 10
    how = dict(bias=bias, score=score, groups=groups, topk_groups=max(1, groups // 2), renormalize=True, scale=2.5)
    how["group_score"] = group_score
    got = topk(logits, k, **how)
    weights, scores, ids, counts = topk_reference(logits, k, **how)
    # two scores may differ in the last bit between exp and exp, and then change places: the rest must be equal
    same = (got.expert_ids == ids).all(1)
    assert same.float().mean() >= 0.96
    assert_close(got.scores, scores, name="scores")
    assert_close(got.weights[same], weights[same], name="weights")
    assert int(got.counts.sum()) == tokens * k
    assert torch.equal(got.counts.long(), torch.bincount(got.expert_ids.flatten().long(), minlength=experts))
    assert (counts - got.counts).abs().sum() <= 2 * k * (~same).sum()


def test_topk_takes_the_lowest_id_among_equals():
    r = topk(torch.zeros(300, 64, device="cuda"), 6)
    assert torch.equal(r.expert_ids, torch.arange(6, device="cuda", dtype=torch.int32).expand(300, 6))
