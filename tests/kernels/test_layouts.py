"""Every operation takes its inputs and gradients however they lie in memory: the numbers of contiguous ones."""

from __future__ import annotations

import itertools

import pytest
import torch

from headgate.kernels import (
    Quantized,
    Routing,
    combine_gradients,
    combine_outputs,
    expert_gradients,
    expert_outputs,
    grouped_ffn,
    grouped_linear,
    plan,
    quantize,
    router_logits,
    topk,
)  # fmt: skip
from headgate.kernels.activation import as_activation
from headgate.kernels.topk import SCORES

E = 5


def turned(t):
    """Column-major."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t.flip(0).contiguous().flip(0)


def stepped(t):
    """Every second element of a larger tensor, from the second on."""
    wide = torch.zeros([2 * n + 1 for n in t.shape], dtype=t.dtype)
    part = wide[tuple(slice(1, None, 2) for _ in t.shape)]
    return part.copy_(t)


def repeated(t):
    """The first row, in every row."""
    return t[:1].expand(t.shape)


def narrow(t):
    """One column, in every column."""
    return t[..., :1].expand(t.shape)


LAYOUTS = {"turned": turned, "stepped": stepped, "repeated": repeated, "narrow": narrow}


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def ids(tokens, k=2):
    return torch.rand(tokens, E).argsort(1)[:, :k].int()


def ffn(rows, weights, w1, w2, b1, b2, **form):
    routing = Routing.from_topk(ids_of[rows.shape[0]], weights, E)
    return grouped_ffn(rows, routing, w1, w2, b_gate_up=b1, b_down=b2, **form)


def pair(rows, weights, w_gate, w_up, w2):
    return grouped_ffn(rows, Routing.from_topk(ids_of[rows.shape[0]], weights, E), (w_gate, w_up), w2)


ids_of = {n: ids(n) for n in (1, 7, 40)}


def ffn_inputs(tokens, dtype=torch.float32):
    shapes = [(tokens, 6), (tokens, 2), (E, 16, 6), (E, 6, 8), (E, 16), (E, 6)]
    return [randn(*s, dtype=dtype) for s in shapes]


OPERATIONS = {
    "grouped_ffn": (ffn, lambda: ffn_inputs(7)),
    "grouped_ffn, one row": (ffn, lambda: ffn_inputs(1)),
    "grouped_ffn, many rows": (ffn, lambda: ffn_inputs(40)),
    "grouped_ffn, bf16": (ffn, lambda: ffn_inputs(7, torch.bfloat16)),
    "grouped_ffn, fp64": (ffn, lambda: ffn_inputs(7, torch.float64)),
    "grouped_ffn, pair": (pair, lambda: [randn(7, 6), randn(7, 2), randn(E, 8, 6), randn(E, 8, 6), randn(E, 6, 8)]),
    "grouped_linear": (
        lambda x, w, b: grouped_linear(x, torch.tensor([0, 2, 2, 5, 6, 7]), w, b),
        lambda: [randn(7, 6), randn(E, 4, 6), randn(E, 4)],
    ),
    "router_logits": (router_logits, lambda: [randn(7, 6), randn(E, 6), randn(E)]),
    "router_logits, bf16": (router_logits, lambda: [randn(7, 6, dtype=torch.bfloat16), randn(E, 6), randn(E)]),
} | {
    f"topk {score}, {k} of {E}, {tokens} tokens": (
        lambda x, bias, score=score, k=k: (lambda r: (r.weights, r.scores))(
            topk(x, k, score=score, bias=bias.detach(), renormalize=True)
        ),
        lambda tokens=tokens: [randn(tokens, E), randn(E)],
    )
    for score in SCORES
    for k, tokens in ((E, 7), (2, 7), (E, 300), (2, 300))
}  # fmt: skip


def run(operation, tensors, layout):
    """The results, and the gradients of all inputs for gradients that lie so, too."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    torch.manual_seed(1)
    found = operation(*leaves)
    found = found if isinstance(found, tuple) else (found,)
    grads = torch.autograd.grad(
        found,
        leaves,
        [layout(torch.randn_like(y, memory_format=torch.contiguous_format)) for y in found],
        allow_unused=True,
    )
    return [*found, *grads]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_forward_and_backward_in_any_layout(name, layout, cpu_form, assert_close):
    operation, inputs = OPERATIONS[name]
    tensors = [LAYOUTS[layout](t) for t in inputs()]
    assert any(not t.is_contiguous() for t in tensors)
    got = run(operation, tensors, LAYOUTS[layout])
    want = run(operation, [t.contiguous() for t in tensors], lambda g: LAYOUTS[layout](g).contiguous())
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, dtype=a.dtype, name=f"{i}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format", [None, "int8", "int4", "mxfp4", "fp8"])
def test_outputs_of_experts_in_any_layout(format, layout, cpu_form, assert_close):
    as_is, lay = (lambda t: t.contiguous()), LAYOUTS[layout]
    rows, weights, w1, w2 = lay(randn(7, 64)), lay(randn(7, 2)), lay(randn(E, 64, 64)), lay(randn(E, 64, 32))
    found = []
    for change in (lay, as_is):
        if format is None:
            a, b = change(w1), change(w2)
        else:
            a, b = (quantize(w, format) for w in (w1, w2))
            a, b = (Quantized(change(lay(q.data)), change(lay(q.scale)), format, q.block) for q in (a, b))
        x, s = (t if change is lay else t.contiguous() for t in (rows, weights))
        routing = Routing(lay(ids_of[7]) if change is lay else lay(ids_of[7]).contiguous(), s, E)
        out = torch.empty(14, 64)
        slots, d_rows, d_weights = torch.arange(E, dtype=torch.int32), torch.empty(14, 64), torch.empty(14)
        expert_outputs(x, routing, a, b, slots, out)
        expert_gradients(x, x, routing, a, b, slots, d_rows=d_rows, d_weights=d_weights)
        found.append([out, combine_outputs(out, routing, x.dtype), grouped_ffn(x, routing, a, b)])
        found[-1] += d_rows, d_weights, combine_gradients(d_rows, routing, x.dtype)
    for got, want in zip(*found, strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plans_and_quantized_weights_in_any_layout(layout, cpu_form):
    lay = LAYOUTS[layout]
    got, want = plan(lay(ids_of[7]), E), plan(lay(ids_of[7]).contiguous(), E)
    assert torch.equal(got.pair_of_row, want.pair_of_row)
    assert torch.equal(got.offsets, want.offsets)
    for format in ("fp8", "int8", "int4", "mxfp4"):
        w = lay(randn(2, 6, 64))
        a, b = quantize(w, format), quantize(w.contiguous(), format)
        assert torch.equal(a.data.view(torch.uint8), b.data.view(torch.uint8))
        assert torch.equal(a.scale, b.scale)
        spread = Quantized(lay(a.data), lay(a.scale), format, a.block)
        assert torch.equal(spread.dequantize(), spread.copy().dequantize())


@pytest.mark.parametrize(("score", "k"), itertools.product(SCORES, (2, E)))
def test_topk_compiles_on_any_layout(score, k):
    """What it answers lies in memory as its fake says."""
    for tokens in (7, 300):
        for lay in LAYOUTS.values():
            torch.library.opcheck(
                torch.ops.headgate.topk.default, (lay(randn(tokens, E)), k, None, score, 1, 1, 2, True, 1.5),
                test_utils=["test_faketensor"],
            )  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_compile_on_any_layout(layout, cpu_form):
    lay, ops, only = LAYOUTS[layout], torch.ops.headgate, {"test_utils": ["test_faketensor"]}
    offsets = torch.tensor([0, 2, 2, 5, 6, 7])
    x, w, b = lay(randn(7, 6)), lay(randn(E, 4, 6)), lay(randn(E, 4))
    torch.library.opcheck(ops.router_logits.default, (x, lay(randn(E, 6)), lay(randn(E))), **only)
    torch.library.opcheck(ops.grouped_linear.default, (x, offsets, w, b, False), **only)
    torch.library.opcheck(
        ops.grouped_linear_backward.default, (lay(randn(7, 4)), x, offsets, w, b, False, [True] * 3), **only
    )
    torch.library.opcheck(ops.plan.default, (lay(ids_of[7]), E), **only)
    rows, weights, w1, w2, b1, b2 = (lay(t) for t in ffn_inputs(7))
    inputs = (rows, lay(ids_of[7]), weights, w1, None, w2, b1, b2)
    form = ("silu", as_activation("silu", True).params, True, False, False)
    torch.library.opcheck(ops.grouped_ffn.default, (*inputs, *form, False), **only)
