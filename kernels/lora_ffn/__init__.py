"""lora_ffn: grouped_ffn on frozen weights with a low-rank change of each expert's matrices, which is never formed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..activation import Activation, as_activation
from ..autocast import under_autocast
from ..chip import chip_of, say_once, why_no_grouped_gemm
from ..grouped_ffn import quantized
from ..grouped_ffn.checks import check
from ..quantized import Quantized, columns_of
from ..routing import Routing
from ..transforms import backward_of, implement, register_composite, register_second_backward, run
from . import composite, plain
from .checks import check_deltas
from .reference import lora_ffn_reference
from .task import Delta, listed

__all__ = ["Delta", "lora_ffn", "lora_ffn_reference"]

# Each of w_gate_up, w_up (or None) and w_down is one tensor, or (data, scale) with `formats` and `blocks` as in
# headgate::grouped_ffn_quantized. a and b of either projection are both None where it has no change.
_ARGS = (
    "Tensor rows, Tensor expert_ids, Tensor weights, Tensor[] w_gate_up, Tensor[]? w_up, Tensor[] w_down, "
    "Tensor? b_gate_up, Tensor? b_down, Tensor? a_up, Tensor? b_up, Tensor? a_down, Tensor? b_down_, Tensor? gates, "
    "Tensor? skill_of_row, Tensor? seed"
)
_FORM = (
    "float[] scales, float dropout, str[]? formats, int[]? blocks, str activation, float[] params, bool gated, "
    "bool transposed, bool interleaved"
)
torch.library.define("headgate::lora_ffn", f"({_ARGS}, {_FORM}, bool keep) -> (Tensor, Tensor)")
torch.library.define(
    "headgate::lora_ffn_backward",
    f"(Tensor grad, {_ARGS}, Tensor h, {_FORM}, bool[] needs) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_TENSORS = (0, 2, 8, 9, 10, 11, 12)  # those of _ARGS that have a gradient


def _on_cuda(name: str, at: int) -> Any:
    """The Triton form, or the loop of matmuls, which says so once; `at`: where rows stand among the arguments."""

    def chosen(*args: Any) -> Any:
        rows, down, formats = args[at], args[at + 5], args[-9 + 1 if name == "backward" else -8]
        a = next(t for t in (args[at + 8], args[at + 10], down[0]) if t is not None)  # [E*S, ., .], or [E, ., .]
        why = why_no_grouped_gemm(rows, a.shape[0])
        if why is None and formats and not quantized.triton_serves(rows, _packed(args, at), "lora_ffn"):
            return getattr(plain, name)(*args)
        if why is not None:
            say_once("lora_ffn", why, "a loop of matmuls over experts, which waits for the device")
            return getattr(plain, name)(*args)
        from . import on_triton

        return getattr(on_triton, name)(*args, chip=chip_of(rows.device.index))

    return chosen


implement("lora_ffn", "cuda", _on_cuda("forward", 0))
implement("lora_ffn", "CompositeExplicitAutograd", plain.forward)
implement("lora_ffn_backward", "cuda", _on_cuda("backward", 1))
implement("lora_ffn_backward", "CompositeExplicitAutograd", plain.backward)
_composite_backward = backward_of(composite.without_h, _TENSORS)
register_composite("lora_ffn", composite.forward)
register_composite("lora_ffn_backward", _composite_backward)


@torch.library.register_fake("headgate::lora_ffn")
def _(rows, ids, weights, w1, w_up, w2, *rest):
    formats, gated, transposed, keep = rest[11], rest[15], rest[16], rest[18]
    o, f = w2[0].shape[1], w2[0].shape[2]
    if formats:
        f = columns_of(formats[-1], f)
    elif transposed:
        o, f = f, o
    return rows.new_empty(rows.shape[0], o), rows.new_empty(ids.numel() if keep else 0, 2 * f if gated else f)


@torch.library.register_fake("headgate::lora_ffn_backward")
def _(grad, *args):
    needs = args[-1]
    return tuple(
        grad.new_empty(0) if args[i] is None or not need else args[i].new_empty(args[i].shape)
        for i, need in zip(_TENSORS, needs, strict=True)
    )


def _setup_context(ctx, inputs, output):
    tensors, form, keep = inputs[:15], inputs[15:-1], inputs[-1]
    assert keep, "the public function keeps h whenever a gradient will be asked for"
    w1, w_up, w2 = tensors[3:6]
    ctx.save_for_backward(*tensors[:3], *w1, *(w_up or ()), *w2, *tensors[6:], output[1])
    ctx.form, ctx.each, ctx.pair = form, len(w1), w_up is not None
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_y, _grad_h):
    n = ctx.each
    found: list[Any] = [None] * 25
    found[3], found[4], found[5] = [None] * n, [None] * n if ctx.pair else None, [None] * n
    if grad_y is None:
        return tuple(found)
    rows, ids, weights, *rest, h = ctx.saved_tensors
    w1, rest = rest[:n], rest[n:]
    w_up, rest = (rest[:n], rest[n:]) if ctx.pair else (None, rest)
    w2, rest = rest[:n], rest[n:]
    needs = [ctx.needs_input_grad[i] for i in _TENSORS]
    backward, args = torch.ops.headgate.lora_ffn_backward, (rows, ids, weights, w1, w_up, w2, *rest, h)
    out = run(backward, _composite_backward, grad_y, *args, *ctx.form, needs)
    for i, d, need in zip(_TENSORS, out, needs, strict=True):
        found[i] = d if need else None
    return tuple(found)


torch.library.register_autograd("headgate::lora_ffn", _backward, setup_context=_setup_context)
register_second_backward("lora_ffn_backward", _composite_backward, _TENSORS)


def lora_ffn(
    rows: Tensor,
    routing: Routing,
    w_gate_up: Tensor | Quantized | tuple[Tensor, Tensor] | tuple[Quantized, Quantized],
    w_down: Tensor | Quantized,
    up: Delta | None,
    down: Delta | None,
    *,
    skill_of_row: Tensor | None = None,
    gates: Tensor | None = None,
    dropout: float = 0.0,
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str | Activation = "silu",
    gated: bool = True,
    transposed: bool = False,
    interleaved: bool = False,
) -> Tensor:
    """`grouped_ffn` with the weights W_e + scale * B_i A_i, i = e * S + skill_of_row[t], of which no change is formed:

        H = x W1_e^T + b1_e + gates[t] scale (x A1_i^T) B1_i^T,   y[t] = sum_k weights[t, k] (A W2_e^T + b2_e + ...)

    Weights, biases, rows and form are those of `grouped_ffn`; all weights and biases are frozen. The rest:
        up, down       Delta(a [E*S, r, in], b [E*S, out, r], scale), any floating types; None: no change there
        skill_of_row   [R] integers 0 .. S-1: which of S adapters changes the experts for a row; None: S is 1
        gates          [R] floating: what a row's changes are multiplied by, or None
        dropout        of what A takes (x, and the activation), pair by pair; 0 but in training

    For backward only rows, the pre-activation (R*K*2F elements) and the routing are kept. There are gradients of rows,
    router weights, A, B and gates; those of the weights are never computed.

    Cost: 6*N*D*F + 2*N*r*(2D + 3F) FLOPs forward, twice that backward (a third less than grouped_ffn's), N live pairs.
    Raises ValueError / TypeError naming argument, rule and value; IndexError for an expert id below -1 or a skill that
    is not there (CPU; elsewhere its row meets no expert).
    Source: Hu et al., LoRA (2021), eq. 3; several adapters behind a router: Kang et al., Self-MoE (2024).
    """
    act = as_activation(activation, gated)
    w1, w_up = w_gate_up if isinstance(w_gate_up, tuple) else (w_gate_up, None)
    autocast = under_autocast(rows.device)
    stored: list[Any] = [w1, w_up, w_down, b_gate_up, b_down]
    check("lora_ffn", rows, routing, w1, w_up, w_down, b_gate_up, b_down, act, transposed, interleaved, cast=autocast)
    experts = w_down.shape[0]
    if routing.num_experts != experts:
        raise ValueError(
            f"lora_ffn: routing.num_experts must equal w_down's experts, got {routing.num_experts} and {experts}"
        )
    check_deltas(rows, up, down, skill_of_row, gates, dropout, stored, transposed)
    if autocast:
        to = torch.get_autocast_dtype(rows.device.type)
        rows, stored = rows.to(to), [t.to(to) if isinstance(t, Tensor) else t for t in stored]
    *matrices, b1, b2 = stored
    seed = torch.randint(2**40, (1,)) if dropout else None
    factors = [t for d in (up, down) for t in ((None, None) if d is None else (d.a, d.b))]
    scales = [0.0 if d is None else float(d.scale) for d in (up, down)]
    tensors = [rows, routing.expert_ids, routing.weights, *map(listed, matrices), b1, b2, *factors]
    tensors += [gates, skill_of_row, seed]
    learning = (rows, routing.weights, gates, *factors)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in learning)
    formats, blocks = quantized.form_of(*matrices) if isinstance(w_down, Quantized) else (None, None)
    form = (scales, dropout, formats, blocks, act.kind, act.params, act.gated, transposed, interleaved)
    return run(torch.ops.headgate.lora_ffn, composite.forward, *tensors, *form, keep)[0]


def _packed(args: Any, at: int) -> Any:
    w1, w_up, w2 = args[at + 3 : at + 6]
    form = at + 15 + at  # h stands before it in the backward pass
    return quantized.unpacked(w1, w_up, w2, args[form + 2], args[form + 3])
