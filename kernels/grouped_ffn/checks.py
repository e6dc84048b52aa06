"""What grouped_ffn and expert_outputs ask of their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantized import Quantized
from . import quantized


def check(
    op, rows, routing, w1, w_up, w_down, b1, b2, act, transposed, interleaved, *, count: str = "E", cast: bool = False
) -> None:
    """Raises ValueError or TypeError, naming the operation `op`, where weights, biases, rows and routing do not go
    together. `count`: the letter of how many experts the weights hold; `cast`: types may differ, autocast makes them
    one."""
    if rows.dim() != 2:
        raise ValueError(f"{op}: rows must be [R, D], got {tuple(rows.shape)}")
    if routing.expert_ids.dim() != 2 or routing.expert_ids.shape != routing.weights.shape:
        raise ValueError(
            f"{op}: routing's expert_ids and weights must both be [R, K], got "
            f"{tuple(routing.expert_ids.shape)} and {tuple(routing.weights.shape)}"
        )
    if routing.expert_ids.shape[0] != rows.shape[0]:
        raise ValueError(
            f"{op}: routing must have one row of experts per row, got {routing.expert_ids.shape[0]} "
            f"for R={rows.shape[0]}"
        )
    if any(isinstance(w, Quantized) for w in (w1, w_up, w_down)):
        quantized.check(w1, w_up, w_down, transposed, op)
    if len(w1.shape) != 3 or len(w_down.shape) != 3:
        raise ValueError(
            f"{op}: weights must be 3-D [{count}, out, in], got {tuple(w1.shape)} and {tuple(w_down.shape)}"
        )
    if w_up is not None and (not act.gated or interleaved or b1 is not None):
        raise ValueError(f"{op}: a pair (w_gate, w_up) must be gated, not interleaved and without b_gate_up")
    experts, d = w_down.shape[0], rows.shape[1]
    f = w_down.shape[1] if transposed else w_down.shape[2]
    width = 2 * f if act.gated and w_up is None else f
    want = (experts, d, width) if transposed else (experts, width, d)
    if min(experts, d, f) < 1:
        raise ValueError(f"{op}: {count}, D and F must be at least 1, got {count}={experts}, D={d}, F={f}")
    for name, w in (("w_gate_up", w1), ("w_up", w_up)):
        if w is not None and tuple(w.shape) != want:
            raise ValueError(
                f"{op}: {name} must be {want} for D={d}, F={f}, {count}={experts}, gated={act.gated}, "
                f"transposed={transposed}, got {tuple(w.shape)}"
            )
    d_out = w_down.shape[2] if transposed else w_down.shape[1]
    for name, b, size in (("b_gate_up", b1, width), ("b_down", b2, d_out)):
        if b is not None and tuple(b.shape) != (experts, size):
            raise ValueError(f"{op}: {name} must be {(experts, size)}, got {tuple(b.shape)}")
    for name, w in (("w_gate_up", w1), ("w_up", w_up), ("w_down", w_down), ("b_gate_up", b1), ("b_down", b2)):
        if w is not None and w.device != rows.device:
            raise ValueError(f"{op}: {name} must be on the device of rows, got {w.device} and {rows.device}")
        if isinstance(w, Tensor) and w.dtype != rows.dtype and not cast:
            raise TypeError(f"{op}: {name} must have the dtype of rows, got {w.dtype} and {rows.dtype}")
    if rows.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{op}: rows must be fp64, fp32, bf16 or fp16, got {rows.dtype}")
