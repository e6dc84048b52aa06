"""grouped_ffn: every expert's feed-forward network on the rows routed to it, and their weighted sum."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation import Activation, as_activation
from ..autocast import under_autocast
from ..chip import say_once
from ..quantized import Quantized
from ..routing import Routing
from ..transforms import backward_of, implement, register_composite, register_second_backward, run
from . import composite, on_cpu, on_gpu, plain, quantized
from .checks import check
from .reference import grouped_ffn_reference

__all__ = ["grouped_ffn", "grouped_ffn_reference"]

_ARGS = (
    "Tensor rows, Tensor expert_ids, Tensor weights, Tensor w_gate_up, Tensor? w_up, Tensor w_down, "
    "Tensor? b_gate_up, Tensor? b_down"
)
_FORM = "str activation, float[] params, bool gated, bool transposed, bool interleaved"

# (y [R, D], h): h is the pre-activation of every pair in the backend's own order and layout, T*K*W elements (W = 2F, or
# F ungated), and has no element unless `keep`. Nothing else of the forward pass is kept for the backward pass.
torch.library.define("headgate::grouped_ffn", f"({_ARGS}, {_FORM}, bool keep) -> (Tensor, Tensor)")
torch.library.define(
    "headgate::grouped_ffn_backward",
    f"(Tensor grad, {_ARGS}, Tensor h, {_FORM}, bool[] needs) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _anywhere(rows, *rest):
    say_once("grouped_ffn", f"{rows.device.type} has no kernel of its own yet", "a loop of matmuls over experts")
    return plain.forward(rows, *rest)


implement("grouped_ffn", "cpu", on_cpu.forward)
implement("grouped_ffn", "cuda", on_gpu.forward)
implement("grouped_ffn", "CompositeExplicitAutograd", _anywhere)
implement("grouped_ffn_backward", "cpu", on_cpu.backward)
implement("grouped_ffn_backward", "cuda", on_gpu.backward)
implement("grouped_ffn_backward", "CompositeExplicitAutograd", plain.backward)

_TENSORS = (0, 2, 3, 4, 5, 6, 7)  # those of _ARGS that have a gradient
_composite_backward = backward_of(composite.without_h, _TENSORS)
register_composite("grouped_ffn", composite.forward)
register_composite("grouped_ffn_backward", _composite_backward)


@torch.library.register_fake("headgate::grouped_ffn")
def _(rows, expert_ids, weights, w_gate_up, w_up, w_down, b1, b2, act, params, gated, transposed, interleaved, keep):
    d_out = w_down.shape[2] if transposed else w_down.shape[1]
    f = w_down.shape[1] if transposed else w_down.shape[2]
    pairs = expert_ids.shape[0] * expert_ids.shape[1] if keep else 0
    return rows.new_empty(rows.shape[0], d_out), rows.new_empty(pairs, 2 * f if gated else f)


@torch.library.register_fake("headgate::grouped_ffn_backward")
def _(grad, rows, expert_ids, weights, w_gate_up, w_up, w_down, b1, b2, h, act, params, gated, tr, il, needs):
    inputs = (rows, weights, w_gate_up, w_up, w_down, b1, b2)
    return tuple(
        rows.new_empty(0) if t is None or not need else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, need in zip(inputs, needs, strict=True)
    )


def _setup_context(ctx, inputs, output):
    rows, expert_ids, weights, w_gate_up, w_up, w_down, b1, b2, *form, keep = inputs
    assert keep, "the public function keeps h whenever a gradient will be asked for"
    ctx.save_for_backward(rows, expert_ids, weights, w_gate_up, w_up, w_down, b1, b2, output[1])
    ctx.form = form
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_y, _grad_h):
    if grad_y is None:
        return (None,) * 14
    *tensors, h = ctx.saved_tensors
    g = ctx.needs_input_grad
    needs = [g[0], g[2], g[3], g[4], g[5], g[6], g[7]]
    backward = torch.ops.headgate.grouped_ffn_backward
    out = run(backward, _composite_backward, grad_y, *tensors, h, *ctx.form, needs)
    d = [o if need else None for o, need in zip(out, needs, strict=True)]
    return d[0], None, d[1], d[2], d[3], d[4], d[5], d[6], *(None,) * 6


torch.library.register_autograd("headgate::grouped_ffn", _backward, setup_context=_setup_context)
register_second_backward("grouped_ffn_backward", _composite_backward, _TENSORS)


def grouped_ffn(
    rows: Tensor,
    routing: Routing,
    w_gate_up: Tensor | Quantized | tuple[Tensor, Tensor] | tuple[Quantized, Quantized],
    w_down: Tensor | Quantized,
    *,
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str | Activation = "silu",
    gated: bool = True,
    transposed: bool = False,
    interleaved: bool = False,
) -> Tensor:
    """y[t] = sum_k weights[t, k] * (act(rows[t] W1_e^T + b1_e) W2_e^T + b2_e),  e = expert_ids[t, k].

    Shapes (weights as stored, not copied; but a pair of two different layouts is brought into one first):
        rows        [R, D]      fp32, bf16, fp16 (fp64: plain form), any strides
        routing     expert_ids [R, K] (-1: no expert), weights [R, K] any floating dtype
        w_gate_up   [E, 2F, D]  gate rows first; `interleaved`: gate, up, gate, up, ...; or a pair (w_gate, w_up) of
                                [E, F, D]; [E, F, D] when not gated; last two axes swapped when `transposed`
        w_down      [E, D, F]   last two axes swapped when `transposed`
        b_gate_up   [E, 2F] or [E, F]; b_down [E, D]; both optional
        returns     [R, D], dtype of rows; products of half types are summed in fp32

    Weights may all be `Quantized` [E, out, in]: frozen, with gradients for everything else.

    For backward only rows, the pre-activation (R*K*2F elements) and the routing are kept; the activation is recomputed
    and the router-weight gradient is <dA', A>, so the experts' outputs need not be (Guo et al., SonicMoE, 2025).
    Under autocast the inputs are cast to autocast's dtype first. Second derivatives, and the transforms of torch.func,
    are taken in plain torch.

    Cost: 6*N*D*F FLOPs forward, 12*N*D*F backward, N = live pairs.
    Raises ValueError / TypeError naming argument, rule and value; IndexError for an expert id below -1 (CPU).

    >>> x, ids, w = torch.randn(5, 8), torch.tensor([[0, 1]] * 5), torch.full((5, 2), 0.5)
    >>> grouped_ffn(x, Routing.from_topk(ids, w, 2), torch.randn(2, 32, 8), torch.randn(2, 8, 16)).shape
    torch.Size([5, 8])
    """
    act = as_activation(activation, gated)
    w1, w_up = w_gate_up if isinstance(w_gate_up, tuple) else (w_gate_up, None)
    autocast = under_autocast(rows.device)
    weights = (w1, w_up, w_down, b_gate_up, b_down)
    check("grouped_ffn", rows, routing, *weights, act, transposed, interleaved, cast=autocast)
    if routing.num_experts != w_down.shape[0]:
        raise ValueError(
            "grouped_ffn: routing.num_experts must equal w_down's experts, got "
            f"{routing.num_experts} and {w_down.shape[0]}"
        )
    tensors = [rows, routing.expert_ids, routing.weights, *weights]
    if autocast:
        to = torch.get_autocast_dtype(rows.device.type)
        tensors = [t.to(to) if i not in (1, 2) and isinstance(t, Tensor) else t for i, t in enumerate(tensors)]
    if isinstance(w_down, Quantized):
        return quantized.call(tensors, act, interleaved)
    keep = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)
    form = (act.kind, act.params, act.gated, transposed, interleaved)
    return run(torch.ops.headgate.grouped_ffn, composite.forward, *tensors, *form, keep)[0]
