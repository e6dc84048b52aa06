"""A layer's forward pass through an engine's slots, and its backward pass: gradients of rows and router weights through
experts that are frozen.

The backward pass asks the engine for the same experts once more. Kept from one to the other are the rows, the choices
and their weights; the pre-activation is computed anew. Outputs and gradients are taken pair by pair and summed at the
end, so no result depends on what was there, or on what came first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.expert_gradients import combine_gradients
from ...kernels.expert_outputs import combine_outputs
from ...kernels.routing import Routing
from .groups import FEW_ROWS, distinct, whole_step, write_gradients, write_outputs
from .hybrid import put_pairs, work_of

if TYPE_CHECKING:
    from .engine import Engine

Then = Callable[[NDArray[np.int32]], None] | None


@dataclass(frozen=True)
class Call:
    """One call of a layer: `form` is grouped_ffn's, by name; `then` and `back` are Engine.step's, for either pass."""

    engine: Engine
    layer: int
    experts: int
    form: Mapping[str, Any]
    then: Then = None
    back: Then = None


def compute(call: Call, rows: Tensor, routing: Routing) -> Tensor:
    """y [R, D], with a way back where rows or router weights ask for a gradient."""
    if torch.is_grad_enabled() and (rows.requires_grad or routing.weights.requires_grad):
        return _Frozen.apply(rows, routing.weights, routing.expert_ids, call)  # type: ignore[no-any-return]
    return _outputs(call, rows, routing)


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, expert_ids: Tensor, call: Call) -> Tensor:
        ctx.save_for_backward(rows, weights, expert_ids)
        ctx.set_materialize_grads(False)
        ctx.call = Call(call.engine, call.layer, call.experts, call.form, back=call.back)  # `then` may hold tensors
        return _outputs(call, rows, Routing(expert_ids, weights, call.experts))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        rows, weights, expert_ids = ctx.saved_tensors
        routing = Routing(expert_ids, weights, ctx.call.experts)
        return *_gradients(ctx.call, grad, rows, routing, *ctx.needs_input_grad[:2]), None, None


def _outputs(call: Call, rows: Tensor, routing: Routing) -> Tensor:
    engine, layer, form = call.engine, call.layer, call.form
    chosen, ids, counts = distinct(routing.expert_ids, routing.num_experts)
    wide = torch.promote_types(rows.dtype, torch.float32)
    width = engine.layers[layer].outputs(form["transposed"])
    out = rows.new_empty(routing.expert_ids.numel(), width, dtype=wide)
    y, job, few = None, None, rows.is_cuda and len(rows) <= FEW_ROWS
    with closing(engine.step(layer, ids, call.then, counts, together=few)) as groups:
        for group in groups:
            if group.host:
                there = Routing(chosen, torch.empty(chosen.shape), routing.num_experts)  # nobody asks for weights here
                write = partial(write_outputs, group, rows.cpu(), there, form=form)
                job = engine.order_host(work_of(group, chosen, {"out": out}, write))
            elif few and len(group.experts) == len(ids):
                y = whole_step(group, rows, routing, chosen, form)
            else:
                write_outputs(group, rows, routing, out, form)
    if y is not None:
        return y
    if job is not None:
        put_pairs({"out": out}, engine.wait_host(job))
    return combine_outputs(out, routing, rows.dtype)


def _gradients(
    call: Call, grad: Tensor, rows: Tensor, routing: Routing, want_rows: bool, want_weights: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of rows [R, D] and router weights [R, K], those that are wanted."""
    engine, form = call.engine, call.form
    chosen, ids, counts = distinct(routing.expert_ids, routing.num_experts)
    wide, pairs = torch.promote_types(rows.dtype, torch.float32), routing.expert_ids.numel()
    outs, job = {}, None
    if want_rows:
        outs["d_rows"] = rows.new_empty(pairs, rows.shape[1], dtype=wide)
    if want_weights:
        outs["d_weights"] = rows.new_zeros(pairs, dtype=wide)  # zero where a pair has no expert
    with closing(engine.step(call.layer, ids, call.back, counts)) as groups:
        for group in groups:
            if group.host:
                there = Routing(chosen, routing.weights.cpu(), routing.num_experts)
                write = partial(write_gradients, group, grad.cpu(), rows.cpu(), there, form)
                job = engine.order_host(work_of(group, chosen, outs, write))
            else:
                write_gradients(group, grad, rows, routing, form, **outs)
    if job is not None:
        put_pairs(outs, engine.wait_host(job))
    d_rows = combine_gradients(outs["d_rows"], routing, rows.dtype) if want_rows else None
    weights = routing.weights
    return d_rows, outs["d_weights"].view(weights.shape).to(weights.dtype) if want_weights else None
