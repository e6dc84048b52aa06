"""expert_gradients and combine_gradients: the backward pass of grouped_ffn in two steps, through experts that are
frozen and not all here at once.

The first step computes what the pairs of the experts in slots give: their parts of the rows' gradient, and the
gradients of their router weights. It may be called several times. The second sums a row's parts, in an order that does
not depend on the calls. The pre-activation is computed anew, so that a forward pass need keep no more than the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation import Activation, as_activation
from ..chip import say_once
from ..expert_outputs.checks import check_out, check_slots, coding, listed, refuse_gradients
from ..grouped_ffn.checks import check
from ..quantized import Quantized
from ..routing import Routing, narrow_ids
from ..transforms import implement, refuse_transforms, register_composite, run
from . import on_cpu, on_gpu, plain
from .reference import combine_gradients_reference, expert_gradients_reference

__all__ = ["combine_gradients", "combine_gradients_reference", "expert_gradients", "expert_gradients_reference"]

# Weights as in headgate::expert_outputs. d_rows or d_weights is None where it is not asked for.
torch.library.define(
    "headgate::expert_gradients",
    "(Tensor grad, Tensor rows, Tensor expert_ids, Tensor weights, Tensor[] w_gate_up, Tensor[] w_up, Tensor[] w_down, "
    "Tensor? b_gate_up, Tensor? b_down, Tensor slot_of_expert, Tensor(a!)? d_rows, Tensor(b!)? d_weights, "
    "str[] formats, int[] blocks, str activation, float[] params, bool gated, bool transposed, bool interleaved) -> ()",
)
torch.library.define(
    "headgate::combine_gradients", "(Tensor d_rows, Tensor expert_ids, int num_experts, ScalarType dtype) -> Tensor"
)


def _anywhere(grad, *rest):
    say_once("expert_gradients", f"{grad.device.type} has no kernel of its own yet", "a loop of matmuls over experts")
    plain.expert_gradients(grad, *rest)


def _refuse(*_args):
    refuse_transforms("expert_gradients", "it writes into its arguments: call grouped_ffn")


implement("expert_gradients", "cpu", on_cpu.expert_gradients)
implement("expert_gradients", "cuda", on_gpu.expert_gradients)
implement("expert_gradients", "CompositeExplicitAutograd", _anywhere)
implement("combine_gradients", "cuda", on_gpu.combine_gradients)
implement("combine_gradients", "CompositeExplicitAutograd", plain.combine_gradients)
register_composite("expert_gradients", _refuse)
register_composite("combine_gradients", combine_gradients_reference)


@torch.library.register_fake("headgate::expert_gradients")
def _(grad, *rest) -> None:
    return None


@torch.library.register_fake("headgate::combine_gradients")
def _(d_rows, expert_ids, num_experts, dtype):
    return d_rows.new_empty(expert_ids.shape[0], d_rows.shape[1], dtype=dtype)


def expert_gradients(
    grad: Tensor,
    rows: Tensor,
    routing: Routing,
    w_gate_up: Tensor | Quantized | tuple[Tensor, Tensor] | tuple[Quantized, Quantized],
    w_down: Tensor | Quantized,
    slot_of_expert: Tensor,
    *,
    d_rows: Tensor | None = None,
    d_weights: Tensor | None = None,
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str | Activation = "silu",
    gated: bool = True,
    transposed: bool = False,
    interleaved: bool = False,
) -> None:
    """For each pair p = t*K + k whose expert lies in a slot s, s = slot_of_expert[expert_ids[t, k]], and grad [R, D],
    the gradient of grouped_ffn's y:

        d_rows[p]    = weights[t, k] * (grad[t] W2_s * act'(H)) W1_s,      H = rows[t] W1_s^T + b1_s
        d_weights[p] = <grad[t], act(H) W2_s^T + b2_s>

    The other rows and numbers stay as they are. Weights, biases, slots and form as in `expert_outputs`; the rest:
        grad        [R, D]      dtype of rows
        d_rows      [R*K, D]    contiguous; fp64 for fp64 rows, else fp32; None: not asked for
        d_weights   [R*K]       of the same type; None: not asked for

    Calls that together have each expert once, and then `combine_gradients`, give the gradients of grouped_ffn with all
    experts' weights to the bit, whichever experts are called together, if an expert lies in its slot as among all. It
    holds on CPU and on CUDA for weights that are tensors, unless the C++ form has no part in it and weights are a pair.
    On CPU Quantized weights are widened an expert at a time, and agree to rounding.

    Memory: the pre-activation of the pairs that are here (2F numbers each), while it runs. Not differentiable. Cost: of
    the experts that are here, 10*N*D*F FLOPs. Raises ValueError / TypeError naming argument, rule and value; IndexError
    for an expert id below -1 (CPU).

    >>> x, ids, w = torch.randn(5, 8), torch.tensor([[0, 3]] * 5), torch.full((5, 2), 0.5)
    >>> routing, d_rows, d_weights = Routing.from_topk(ids, w, 4), torch.empty(5 * 2, 8), torch.empty(5 * 2)
    >>> slots, weights = torch.tensor([1, -1, -1, 0], dtype=torch.int32), (torch.randn(2, 32, 8), torch.randn(2, 8, 16))
    >>> expert_gradients(torch.ones(5, 8), x, routing, *weights, slots, d_rows=d_rows, d_weights=d_weights)
    >>> combine_gradients(d_rows, routing, x.dtype).shape
    torch.Size([5, 8])
    """
    act = as_activation(activation, gated)
    w1, w_up = w_gate_up if isinstance(w_gate_up, tuple) else (w_gate_up, None)
    op, biases = "expert_gradients", (b_gate_up, b_down)
    check(op, rows, routing, w1, w_up, w_down, *biases, act, transposed, interleaved, count="S")
    check_slots(op, slot_of_expert, routing, rows, w1, w_up, w_down, *biases)
    width, shape = w_down.shape[2 if transposed else 1], tuple(grad.shape)
    if shape != (rows.shape[0], width):
        raise ValueError(f"{op}: grad must be [R, D] with R={rows.shape[0]}, D={width}, got {shape}")
    if grad.dtype != rows.dtype or grad.device != rows.device:
        raise TypeError(
            f"{op}: grad must have the dtype and device of rows, got {grad.dtype} on {grad.device} and {rows.dtype} on "
            f"{rows.device}"
        )
    if d_rows is not None:
        check_out(op, d_rows, routing, rows.dtype, rows.shape[1], rows.device, name="d_rows")
    if d_weights is not None:
        if d_weights.dim() != 1:
            raise ValueError(f"{op}: d_weights must be [R*K], got {tuple(d_weights.shape)}")
        check_out(op, d_weights[:, None], routing, rows.dtype, 1, rows.device, name="d_weights")
    refuse_gradients(op, d_rows=d_rows, d_weights=d_weights, grad=grad)
    if d_rows is None and d_weights is None:
        return
    with torch.no_grad():
        torch.ops.headgate.expert_gradients(
            grad, rows, routing.expert_ids, routing.weights, *map(listed, (w1, w_up, w_down)), *biases, slot_of_expert,
            d_rows, d_weights, *coding(w1, w_up, w_down), act.kind, act.params, act.gated, transposed, interleaved,
        )  # fmt: skip


def combine_gradients(d_rows: Tensor, routing: Routing, dtype: torch.dtype) -> Tensor:
    """The gradient [R, D] of rows of `dtype`: the sum of each row's pairs in `d_rows` [R*K, D], as `expert_gradients`
    wrote it, in grouped_ffn's order. A pair without an expert adds nothing, whatever stands in its row.

    Not differentiable. Cost: R*K*D additions. Raises ValueError / TypeError naming argument, rule and value.
    """
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"combine_gradients: dtype must be fp64, fp32, bf16 or fp16, got {dtype}")
    if routing.expert_ids.dim() != 2:
        raise ValueError(f"combine_gradients: expert_ids must be [R, K], got {tuple(routing.expert_ids.shape)}")
    check_out("combine_gradients", d_rows, routing, dtype, None, routing.expert_ids.device, name="d_rows")
    refuse_gradients("combine_gradients", d_rows=d_rows)
    ids = narrow_ids(routing.expert_ids, routing.num_experts)
    args = (d_rows, ids, routing.num_experts, dtype)
    return run(torch.ops.headgate.combine_gradients, combine_gradients_reference, *args)
