"""Everything that computes the case, each from the same stored weights: a builder takes the problem and returns a
function (x [T, D], ids [T, K], weights [T, K]) -> y [T, D], differentiable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from itertools import pairwise

import torch
from torch import Tensor

from ..kernels import grouped_ffn
from ..kernels.grouped_ffn import plain as plain_form
from .shapes import Problem, as_routing

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
Builder = Callable[[Problem], Forward]
TRANSFORMERS = ("eager", "batched_mm", "grouped_mm")


def headgate(problem: Problem) -> Forward:
    s, p = problem.shape, problem.parameters

    def forward(x, ids, weights):
        return grouped_ffn(
            x,
            as_routing(s, ids, weights),
            p["gate_up_proj"],
            p["down_proj"],
            b_gate_up=p.get("gate_up_proj_bias"),
            b_down=p.get("down_proj_bias"),
            activation=s.form,
            transposed=s.transposed,
            interleaved=s.interleaved,
        )

    return forward


class _Plain(torch.autograd.Function):
    """Headgate's plain torch form, whatever form the operation would choose here."""

    @staticmethod
    def forward(ctx, form, keep, *tensors):
        y, h = plain_form.forward(*tensors, *form, keep)  # type: ignore[call-arg]
        ctx.save_for_backward(*tensors, h)
        ctx.form = form
        return y

    @staticmethod
    def backward(ctx, *grads):
        *tensors, h = ctx.saved_tensors
        needs = [True, True, True, False, True, tensors[6] is not None, tensors[7] is not None]
        out = plain_form.backward(grads[0], *tensors, h, *ctx.form, needs)  # type: ignore[call-arg]
        dx, ds, d1, _, d2, db1, db2 = (o if need else None for o, need in zip(out, needs, strict=True))
        return None, None, dx, None, ds, d1, None, d2, db1, db2


def plain(problem: Problem) -> Forward:
    s, p = problem.shape, problem.parameters
    form = (s.form.kind, s.form.params, True, s.transposed, s.interleaved)
    w = (p["gate_up_proj"], None, p["down_proj"], p.get("gate_up_proj_bias"), p.get("down_proj_bias"))

    def forward(x, ids, weights):
        return _Plain.apply(form, torch.is_grad_enabled(), x, ids.to(torch.int32), weights, *w)

    return forward


def experts_module(problem: Problem) -> torch.nn.Module:
    """The experts module of transformers for this family, around the problem's own parameters."""
    s = problem.shape
    folder, cls, config_cls = s.experts_class.split(":")
    config = getattr(import_module(f"transformers.models.{folder}.configuration_{folder}"), config_cls)(
        hidden_size=s.hidden,
        intermediate_size=s.intermediate,
        num_experts_per_tok=s.top_k,
        hidden_act="silu",
        **({"n_routed_experts": s.experts} if folder == "deepseek_v3" else {}),
        **({"num_experts": s.experts} if folder in ("qwen3_moe", "olmoe") else {}),
        **({"num_local_experts": s.experts} if folder in ("mixtral", "gpt_oss") else {}),
        **({"moe_intermediate_size": s.intermediate} if folder in ("qwen3_moe", "deepseek_v3") else {}),
    )
    config._experts_implementation = "eager"
    with torch.device("meta"):
        module = getattr(import_module(f"transformers.models.{folder}.modeling_{folder}"), cls)(config)
    for name, parameter in problem.parameters.items():
        if getattr(module, name).shape != parameter.shape:
            raise RuntimeError(f"{cls}.{name} is {tuple(getattr(module, name).shape)}, not {tuple(parameter.shape)}")
        setattr(module, name, parameter)
    return module


def eager(problem: Problem) -> Forward:
    return experts_module(problem)


def _through_interface(name: str) -> Builder:
    def build(problem: Problem) -> Forward:
        module = experts_module(problem)
        function = getattr(import_module("transformers.integrations.moe"), f"{name}_experts_forward")
        return lambda x, ids, weights: function(module, x, ids, weights)

    return build


class _GroupedLinear(torch.autograd.Function):
    """rows [N, in] sorted by expert, w [E, out, in] (or [E, in, out] transposed) -> [N, out], one matmul per expert."""

    @staticmethod
    def forward(ctx, rows, w, offsets, transposed):
        right = w if transposed else w.transpose(1, 2)
        out = rows.new_empty(rows.shape[0], right.shape[2])
        for e, (lo, hi) in enumerate(pairwise(offsets)):
            if lo < hi:
                torch.mm(rows[lo:hi], right[e], out=out[lo:hi])
        ctx.save_for_backward(rows, w)
        ctx.offsets, ctx.transposed = offsets, transposed
        return out

    @staticmethod
    def backward(ctx, *grads):
        rows, w = ctx.saved_tensors
        grad, left = grads[0], w.transpose(1, 2) if ctx.transposed else w
        d_rows, d_w = torch.empty_like(rows), torch.empty_like(w)
        for e, (lo, hi) in enumerate(pairwise(ctx.offsets)):
            if lo == hi:
                d_w[e].zero_()
                continue
            x, g = rows[lo:hi], grad[lo:hi]
            torch.mm(g, left[e], out=d_rows[lo:hi])
            torch.mm(*((x.T, g) if ctx.transposed else (g.T, x)), out=d_w[e])
        return d_rows, d_w, None, None


def sorted_loop(problem: Problem) -> Forward:
    """What a careful user writes by hand: sort once, gather once, one matmul per expert written in place, the routing
    weight applied to the narrow activation (F) and not to the wide output (D), a token's K rows summed at once."""
    s, p = problem.shape, problem.parameters

    def gate(h: Tensor) -> Tensor:
        return s.form(*((h[:, 0::2], h[:, 1::2]) if s.interleaved else h.chunk(2, dim=1)))

    def forward(x, ids, weights):
        flat = ids.reshape(-1)
        experts, order = torch.sort(flat, stable=True)
        offsets = [0, *torch.bincount(flat, minlength=s.experts).cumsum(0).tolist()]
        h = _GroupedLinear.apply(x[order // s.top_k], p["gate_up_proj"], offsets, s.transposed)
        if s.bias:
            h = h + p["gate_up_proj_bias"][experts]
        scale = weights.reshape(-1)[order, None]
        out = _GroupedLinear.apply(gate(h) * scale, p["down_proj"], offsets, s.transposed)
        if s.bias:
            out = out + p["down_proj_bias"][experts] * scale
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        return out[back].view(x.shape[0], s.top_k, -1).sum(1)

    return forward


IMPLEMENTATIONS: Mapping[str, Builder] = {
    "headgate": headgate,
    "plain": plain,
    "eager": eager,
    "batched_mm": _through_interface("batched_mm"),
    "grouped_mm": _through_interface("grouped_mm"),
    "sorted": sorted_loop,
}
ABOUT = {
    "headgate": "headgate.kernels.grouped_ffn on the stored weights",
    "plain": "headgate's plain torch form",
    "eager": "transformers: the experts module's own loop",
    "batched_mm": "transformers: one gathered weight copy per (token, expert) pair",
    "grouped_mm": "transformers: sorted rows, torch's grouped matmul (its default)",
    "sorted": "hand-written sort and loop in torch",
    "matmuls": "bound: the bare per-expert matmuls of the same split",
    "dense": "bound: one dense matmul per projection, the same FLOPs",
    "read": "bound: reading the weights of the experts hit, at the measured bandwidth",
}
