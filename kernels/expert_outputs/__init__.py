"""expert_outputs and combine_outputs: grouped_ffn in two steps, for experts that are not all here at once.

The first step writes what each (row, k) pair's expert answers, for the experts whose weights lie in a slot now, and may
be called several times; the second takes the weighted sum. So hits are computed while misses are on the way, experts
take turns in few slots, and some may be computed elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation import Activation, as_activation
from ..chip import say_once
from ..grouped_ffn.checks import check
from ..quantized import Quantized
from ..routing import Routing, narrow_ids
from ..transforms import implement, refuse_transforms, register_composite, run
from . import on_cpu, on_gpu, plain
from .checks import check_out, check_slots, coding, listed, refuse_gradients
from .reference import combine_outputs_reference, expert_outputs_reference

__all__ = ["combine_outputs", "combine_outputs_reference", "expert_outputs", "expert_outputs_reference"]

# Each of w_gate_up, w_up (or nothing) and w_down is [tensor], or [data, scale] of Quantized weights; those have
# `formats` and `blocks` as in headgate::grouped_ffn_quantized.
torch.library.define(
    "headgate::expert_outputs",
    "(Tensor rows, Tensor expert_ids, Tensor[] w_gate_up, Tensor[] w_up, Tensor[] w_down, Tensor? b_gate_up, "
    "Tensor? b_down, Tensor slot_of_expert, Tensor(a!) out, str[] formats, int[] blocks, str activation, "
    "float[] params, bool gated, bool transposed, bool interleaved) -> ()",
)
torch.library.define(
    "headgate::combine_outputs",
    "(Tensor out, Tensor expert_ids, Tensor weights, int num_experts, ScalarType dtype) -> Tensor",
)


def _anywhere(rows, *rest):
    say_once("expert_outputs", f"{rows.device.type} has no kernel of its own yet", "a loop of matmuls over experts")
    plain.expert_outputs(rows, *rest)


def _refuse(*_args):
    refuse_transforms("expert_outputs", "it is forward only and writes into `out`: call grouped_ffn")


implement("expert_outputs", "cpu", on_cpu.expert_outputs)
implement("expert_outputs", "cuda", on_gpu.expert_outputs)
implement("expert_outputs", "CompositeExplicitAutograd", _anywhere)
implement("combine_outputs", "cpu", on_cpu.combine_outputs)
implement("combine_outputs", "cuda", on_gpu.combine_outputs)
implement("combine_outputs", "CompositeExplicitAutograd", plain.combine_outputs)
register_composite("expert_outputs", _refuse)
register_composite("combine_outputs", combine_outputs_reference)


@torch.library.register_fake("headgate::expert_outputs")
def _(rows, *rest) -> None:
    return None


@torch.library.register_fake("headgate::combine_outputs")
def _(out, expert_ids, weights, num_experts, dtype):
    return out.new_empty(expert_ids.shape[0], out.shape[1], dtype=dtype)


def expert_outputs(
    rows: Tensor,
    routing: Routing,
    w_gate_up: Tensor | Quantized | tuple[Tensor, Tensor] | tuple[Quantized, Quantized],
    w_down: Tensor | Quantized,
    slot_of_expert: Tensor,
    out: Tensor,
    *,
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str | Activation = "silu",
    gated: bool = True,
    transposed: bool = False,
    interleaved: bool = False,
) -> None:
    """out[t*K + k] = act(rows[t] W1_s^T + b1_s) W2_s^T + b2_s for each pair whose expert lies in a slot s,
    s = slot_of_expert[expert_ids[t, k]]. The other rows of `out` stay as they are.

    Shapes, with S slots; weights, biases and form as in `grouped_ffn`, in any strides:
        rows            [R, D]      fp32, bf16, fp16 (fp64: plain form)
        routing         expert_ids [R, K] of 0 .. E-1 (-1: no expert); every call gets those of the whole batch
        w_gate_up, w_down           [S, 2F, D] and [S, D, F], or as their forms have it; they may be Quantized
        slot_of_expert  int32 [E]   -1: not here. On CPU also [2, E] (or [3, E] for a pair): a row for each weight, in
                                    the order of arguments, where an expert's matrices lie apart from each other;
                                    without biases, of weights that are tensors. As strides are any, slots may overlap
        out             [R*K, D]    contiguous; fp64 for fp64 rows, else fp32: the type that sums are taken in

    Calls that together have each expert once, and then `combine_outputs`, give `grouped_ffn` of all experts' weights to
    the bit, whichever experts are called together, in whichever slots and order, if an expert lies in its slot as among
    all (inner strides). It holds on CPU for weights that are tensors or, where the C++ form serves, in
    few bits but fp8; and on CUDA for tensors from 5 rows on, for fewer grouped_ffn takes kernels that sum in another
    order. Elsewhere the two agree to rounding.

    Forward only: ValueError where a gradient would be asked for. Autocast is not looked at: rows come in the weights'
    dtype. Calls of several threads may write to one `out` at once, if they have no expert in common. Cost: of the
    experts that are here, 6*N*D*F FLOPs. Raises ValueError / TypeError naming argument, rule and value; IndexError for
    an expert id below -1 (CPU). On CUDA, where nothing waits for the device, an expert whose slot is not below S counts
    as not here.

    >>> x, ids, w = torch.randn(5, 8), torch.tensor([[0, 3]] * 5), torch.full((5, 2), 0.5)
    >>> routing, out = Routing.from_topk(ids, w, 4), torch.empty(5 * 2, 8)
    >>> slots = torch.tensor([1, -1, -1, 0], dtype=torch.int32)
    >>> expert_outputs(x, routing, torch.randn(2, 32, 8), torch.randn(2, 8, 16), slots, out)
    >>> combine_outputs(out, routing, x.dtype).shape
    torch.Size([5, 8])
    """
    act = as_activation(activation, gated)
    w1, w_up = w_gate_up if isinstance(w_gate_up, tuple) else (w_gate_up, None)
    tensors = {"rows": rows, "w_gate_up": w1, "w_up": w_up, "w_down": w_down, "b_gate_up": b_gate_up, "b_down": b_down}
    check("expert_outputs", rows, routing, w1, w_up, w_down, b_gate_up, b_down, act, transposed, interleaved, count="S")
    check_slots("expert_outputs", slot_of_expert, routing, rows, w1, w_up, w_down, b_gate_up, b_down)
    check_out("expert_outputs", out, routing, rows.dtype, w_down.shape[2 if transposed else 1], rows.device)
    refuse_gradients("expert_outputs", out=out, **tensors)
    torch.ops.headgate.expert_outputs(
        rows, routing.expert_ids, *map(listed, (w1, w_up, w_down)), b_gate_up, b_down, slot_of_expert, out,
        *coding(w1, w_up, w_down), act.kind, act.params, act.gated, transposed, interleaved,
    )  # fmt: skip


def combine_outputs(out: Tensor, routing: Routing, dtype: torch.dtype) -> Tensor:
    """y[t] = sum_k weights[t, k] * out[t*K + k] as `grouped_ffn` takes it for rows of `dtype`: in its order, with its
    roundings. A pair without an expert adds nothing, whatever stands in its row of `out`.

    `out` [R*K, D] as `expert_outputs` wrote it; returns [R, D] of `dtype`. Forward only. Cost: R*K*D multiplications.
    Raises ValueError / TypeError naming argument, rule and value.
    """
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"combine_outputs: dtype must be fp64, fp32, bf16 or fp16, got {dtype}")
    if routing.expert_ids.dim() != 2 or routing.expert_ids.shape != routing.weights.shape:
        raise ValueError(
            "combine_outputs: routing's expert_ids and weights must both be [R, K], got "
            f"{tuple(routing.expert_ids.shape)} and {tuple(routing.weights.shape)}"
        )
    check_out("combine_outputs", out, routing, dtype, None, routing.expert_ids.device)
    refuse_gradients("combine_outputs", out=out, weights=routing.weights)
    ids = narrow_ids(routing.expert_ids, routing.num_experts)
    args = (out, ids, routing.weights, routing.num_experts, dtype)
    return run(torch.ops.headgate.combine_outputs, combine_outputs_reference, *args)
