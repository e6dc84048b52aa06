"""A layer's forward and backward pass through an engine's slots where its experts carry LoRA: the experts are frozen
and come and go, A and B stay on the device and learn.

As passes.py: the backward pass asks for the same experts once more, and the pre-activation is computed anew. Products
are those of lora_ffn's loop over experts, on the CPU to the bit what resident experts give.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...kernels.activation import as_activation
from ...kernels.autocast import no_autocast
from ...kernels.chip import say_once
from ...kernels.expert_gradients import combine_gradients
from ...kernels.expert_outputs import combine_outputs
from ...kernels.lora_ffn import Delta
from ...kernels.lora_ffn.plain import Gradients, Loop
from ...kernels.lora_ffn.task import Task
from ...kernels.routing import Routing
from .groups import Group, distinct

if TYPE_CHECKING:
    from .passes import Call


@dataclass(frozen=True)
class Carried:
    """What the experts of a layer carry: the changes of both projections, and dropout where the layer trains."""

    up: Delta | None
    down: Delta | None
    dropout: float = 0.0

    def tensors(self) -> list[Tensor | None]:
        return [t for d in (self.up, self.down) for t in ((None, None) if d is None else (d.a, d.b))]


def compute_adapted(call: Call, rows: Tensor, routing: Routing, carried: Carried) -> Tensor:
    """y [R, D], with a way back to rows, router weights, A and B."""
    if call.engine.hybrid:
        name = call.engine.layers[call.layer].name
        raise ValueError(f"offload: hybrid must be False where experts carry LoRA, got it with {name}")
    if rows.is_cuda:
        say_once("offload", "experts carry LoRA", "a loop of matmuls over experts, which waits for the device")
    seed = torch.randint(2**40, (1,)) if carried.dropout else None
    return _Adapted.apply(rows, routing.weights, *carried.tensors(), routing.expert_ids, seed, carried, call)  # type: ignore[no-any-return]


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weights, a_up, b_up, a_down, b_down, expert_ids, seed, carried, call):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(rows, weights, a_up, b_up, a_down, b_down, expert_ids, seed)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.dropout = replace(call, then=None), carried.dropout
        ctx.scales = [0.0 if d is None else d.scale for d in (carried.up, carried.down)]
        made = _Maker(call, rows, weights, expert_ids, seed, carried)
        wide = torch.promote_types(rows.dtype, torch.float32)
        out = rows.new_empty(
            expert_ids.numel(), call.engine.layers[call.layer].outputs(call.form["transposed"]), dtype=wide
        )

        def write(loop: Loop) -> None:
            for own in loop:
                out[own.pairs] = loop.output(own, loop.hidden(own))

        made.each(call.then, write)
        return combine_outputs(out, Routing(expert_ids, weights, call.experts), rows.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        if grad is None:
            return (None,) * 10
        rows, weights, *factors, expert_ids, seed = ctx.saved_tensors
        up, down = (
            None if a is None else Delta(a, b, scale)
            for a, b, scale in zip(factors[::2], factors[1::2], ctx.scales, strict=True)
        )
        made = _Maker(ctx.call, rows, weights, expert_ids, seed, Carried(up, down, ctx.dropout))
        wide = torch.promote_types(rows.dtype, torch.float32)
        want_rows, want_weights, *wanted = ctx.needs_input_grad[:6]
        of = [torch.zeros_like(t) if want else None for t, want in zip(factors, wanted, strict=True)]
        d_rows = rows.new_empty(expert_ids.numel(), rows.shape[1], dtype=wide) if want_rows else None
        d_weights = rows.new_zeros(expert_ids.numel(), dtype=wide) if want_weights else None
        found = Gradients(((of[0], of[1]), (of[2], of[3])), None, want_rows, want_weights)

        def write(loop: Loop) -> None:
            for own in loop:
                dx, ds = loop.back(own, loop.hidden(own), grad[own.tokens], found)
                if d_rows is not None:
                    d_rows[own.pairs] = dx
                if d_weights is not None:
                    d_weights[own.pairs] = ds

        made.each(ctx.call.back, write)
        routing = Routing(expert_ids, weights, ctx.call.experts)
        dx = None if d_rows is None else combine_gradients(d_rows, routing, rows.dtype)
        ds = None if d_weights is None else d_weights.view(weights.shape).to(weights.dtype)
        return dx, ds, *of, None, None, None, None


@dataclass(frozen=True)
class _Maker:
    """The loops over a step's experts, a group at a time."""

    call: Call
    rows: Tensor
    weights: Tensor
    expert_ids: Tensor
    seed: Tensor | None
    carried: Carried

    def each(self, then: Any, work: Callable[[Loop], None]) -> None:
        call = self.call
        _, ids, counts = distinct(self.expert_ids, call.experts)
        step = call.engine.step(call.layer, ids, then, counts)
        with closing(step) as groups, no_autocast(self.rows.device):
            for group in groups:
                work(Loop(self._task(group), self._slots(group), call.experts))

    def _slots(self, group: Group) -> Tensor:
        """[E], or [weights, E] where each weight has places of its own."""
        there = torch.as_tensor(group.slots)
        slots = torch.full((*there.shape[:-1], self.call.experts), -1)
        slots[..., group.experts] = there.to(slots.dtype)
        return slots

    def _task(self, group: Group) -> Task:
        w, form, c = group.weights, self.call.form, self.carried
        first, second = (w["w_gate_up"], None) if "w_gate_up" in w else (w["w_gate"], w["w_up"])
        act = as_activation(form["activation"], form["gated"])
        return Task(
            self.rows, self.expert_ids, self.weights, first, second, w["w_down"], w.get("b_gate_up"), w.get("b_down"),
            c.up, c.down, None, None, self.seed, c.dropout, act, form["transposed"], form["interleaved"],
        )  # fmt: skip
