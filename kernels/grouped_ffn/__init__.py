"""grouped_ffn: every expert's feed-forward network on the rows routed to it, and their weighted sum."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation import Activation, as_activation
from ..chip import say_once
from ..quantized import Quantized
from ..routing import Routing
from . import on_cpu, on_gpu, plain, quantized
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
torch.library.impl("headgate::grouped_ffn", "cpu", on_cpu.forward)
torch.library.impl("headgate::grouped_ffn_backward", "cpu", on_cpu.backward)
torch.library.impl("headgate::grouped_ffn", "cuda", on_gpu.forward)
torch.library.impl("headgate::grouped_ffn_backward", "cuda", on_gpu.backward)


@torch.library.impl("headgate::grouped_ffn", "CompositeExplicitAutograd")
def _(rows, *rest):
    say_once("grouped_ffn", f"{rows.device.type} has no kernel of its own yet", "a loop of matmuls over experts")
    return plain.forward(rows, *rest)


torch.library.impl("headgate::grouped_ffn_backward", "CompositeExplicitAutograd", plain.backward)


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
    out = torch.ops.headgate.grouped_ffn_backward(grad_y, *tensors, h, *ctx.form, needs)
    d = [o if need else None for o, need in zip(out, needs, strict=True)]
    return d[0], None, d[1], d[2], d[3], d[4], d[5], d[6], *(None,) * 6


def _second_backward(ctx, *_grads):
    raise NotImplementedError("grouped_ffn: second derivatives are not offered")


torch.library.register_autograd("headgate::grouped_ffn", _backward, setup_context=_setup_context)
torch.library.register_autograd("headgate::grouped_ffn_backward", _second_backward)


def _under_autocast(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


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
    Under autocast the inputs are cast to autocast's dtype first. Second derivatives raise NotImplementedError.

    Cost: 6*N*D*F FLOPs forward, 12*N*D*F backward, N = live pairs.
    Raises ValueError / TypeError naming argument, rule and value; IndexError for an expert id below -1 (CPU).

    >>> x, ids, w = torch.randn(5, 8), torch.tensor([[0, 1]] * 5), torch.full((5, 2), 0.5)
    >>> grouped_ffn(x, Routing.from_topk(ids, w, 2), torch.randn(2, 32, 8), torch.randn(2, 8, 16)).shape
    torch.Size([5, 8])
    """
    act = as_activation(activation, gated)
    w1, w_up = w_gate_up if isinstance(w_gate_up, tuple) else (w_gate_up, None)
    _check(rows, routing, w1, w_up, w_down, b_gate_up, b_down, act, transposed, interleaved)
    tensors = [rows, routing.expert_ids, routing.weights, w1, w_up, w_down, b_gate_up, b_down]
    if _under_autocast(rows.device):
        to = torch.get_autocast_dtype(rows.device.type)
        tensors = [t.to(to) if i not in (1, 2) and isinstance(t, Tensor) else t for i, t in enumerate(tensors)]
    if isinstance(w_down, Quantized):
        return quantized.call(tensors, act, interleaved)
    keep = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)
    form = (act.kind, act.params, act.gated, transposed, interleaved)
    return torch.ops.headgate.grouped_ffn(*tensors, *form, keep)[0]


def _check(rows, routing, w1, w_up, w_down, b1, b2, act, transposed, interleaved) -> None:
    if rows.dim() != 2:
        raise ValueError(f"grouped_ffn: rows must be [R, D], got {tuple(rows.shape)}")
    if routing.expert_ids.dim() != 2 or routing.expert_ids.shape != routing.weights.shape:
        raise ValueError(
            "grouped_ffn: routing's expert_ids and weights must both be [R, K], got "
            f"{tuple(routing.expert_ids.shape)} and {tuple(routing.weights.shape)}"
        )
    if routing.expert_ids.shape[0] != rows.shape[0]:
        raise ValueError(
            f"grouped_ffn: routing must have one row of experts per row, got {routing.expert_ids.shape[0]} "
            f"for R={rows.shape[0]}"
        )
    if any(isinstance(w, Quantized) for w in (w1, w_up, w_down)):
        quantized.check(w1, w_up, w_down, transposed)
    if len(w1.shape) != 3 or len(w_down.shape) != 3:
        raise ValueError(
            f"grouped_ffn: weights must be 3-D [E, out, in], got {tuple(w1.shape)} and {tuple(w_down.shape)}"
        )
    if w_up is not None and (not act.gated or interleaved or b1 is not None):
        raise ValueError("grouped_ffn: a pair (w_gate, w_up) must be gated, not interleaved and without b_gate_up")
    experts, d = w_down.shape[0], rows.shape[1]
    f = w_down.shape[1] if transposed else w_down.shape[2]
    width = 2 * f if act.gated and w_up is None else f
    want = (experts, d, width) if transposed else (experts, width, d)
    if min(experts, d, f) < 1:
        raise ValueError(f"grouped_ffn: E, D and F must be at least 1, got E={experts}, D={d}, F={f}")
    for name, w in (("w_gate_up", w1), ("w_up", w_up)):
        if w is not None and tuple(w.shape) != want:
            raise ValueError(
                f"grouped_ffn: {name} must be {want} for D={d}, F={f}, E={experts}, gated={act.gated}, "
                f"transposed={transposed}, got {tuple(w.shape)}"
            )
    if routing.num_experts != experts:
        raise ValueError(
            f"grouped_ffn: routing.num_experts must equal w_down's experts, got {routing.num_experts} and {experts}"
        )
    d_out = w_down.shape[2] if transposed else w_down.shape[1]
    for name, b, size in (("b_gate_up", b1, width), ("b_down", b2, d_out)):
        if b is not None and tuple(b.shape) != (experts, size):
            raise ValueError(f"grouped_ffn: {name} must be {(experts, size)}, got {tuple(b.shape)}")
    autocast = _under_autocast(rows.device)
    for name, w in (("w_gate_up", w1), ("w_up", w_up), ("w_down", w_down), ("b_gate_up", b1), ("b_down", b2)):
        if w is not None and w.device != rows.device:
            raise ValueError(f"grouped_ffn: {name} must be on the device of rows, got {w.device} and {rows.device}")
        if isinstance(w, Tensor) and w.dtype != rows.dtype and not autocast:
            raise TypeError(f"grouped_ffn: {name} must have the dtype of rows, got {w.dtype} and {rows.dtype}")
    if rows.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"grouped_ffn: rows must be fp64, fp32, bf16 or fp16, got {rows.dtype}")
