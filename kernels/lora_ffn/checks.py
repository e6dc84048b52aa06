"""What lora_ffn asks of the low-rank changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .task import Delta


def check_deltas(
    rows: Tensor,
    up: Delta | None,
    down: Delta | None,
    skill_of_row: Tensor | None,
    gates: Tensor | None,
    dropout: float,
    stored: Any,
    transposed: bool,
) -> None:
    """Raises ValueError or TypeError where changes, skills and gates do not go with the weights, or these learn."""
    w1, w_up, w2, b1, b2 = stored
    for name, t in (("w_gate_up", w1), ("w_up", w_up), ("w_down", w2), ("b_gate_up", b1), ("b_down", b2)):
        if isinstance(t, Tensor) and t.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"lora_ffn: {name} must be frozen, whose gradient is never computed, got one that learns")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"lora_ffn: dropout must be in [0, 1), got {dropout!r}")
    experts, (i, o) = w2.shape[0], (2, 1) if not transposed else (1, 2)
    width = sum(w.shape[o] for w in (w1, w_up) if w is not None)
    skills = None
    for name, delta, fan_in, fan_out in (("up", up, rows.shape[1], width), ("down", down, w2.shape[i], w2.shape[o])):
        if delta is None:
            continue
        a, b = delta.a, delta.b
        if a.dim() != 3 or b.dim() != 3 or a.shape[0] % experts or not a.shape[0] or a.shape[1] < 1:
            raise ValueError(
                f"lora_ffn: {name} must be a [E*S, r, in] and b [E*S, out, r] with E={experts} and r at least 1, got "
                f"{tuple(a.shape)} and {tuple(b.shape)}"
            )
        want = (a.shape[0], a.shape[1], fan_in), (a.shape[0], fan_out, a.shape[1])
        if (tuple(a.shape), tuple(b.shape)) != want:
            raise ValueError(
                f"lora_ffn: {name} must be a {want[0]} and b {want[1]}, got {tuple(a.shape)} and {tuple(b.shape)}"
            )
        if not (a.dtype.is_floating_point and b.dtype.is_floating_point):
            raise TypeError(f"lora_ffn: {name} must be floating point, got {a.dtype} and {b.dtype}")
        if a.device != rows.device or b.device != rows.device:
            raise ValueError(f"lora_ffn: {name} must be on the device of rows, got {a.device} and {rows.device}")
        if skills not in (None, a.shape[0] // experts):
            raise ValueError(f"lora_ffn: up and down must have as many skills, got {skills} and {len(a) // experts}")
        skills = a.shape[0] // experts
    if skill_of_row is None and skills not in (None, 1):
        raise ValueError(f"lora_ffn: skill_of_row must be given for {skills} skills, got None")
    for name, t in (("skill_of_row", skill_of_row), ("gates", gates)):
        if t is not None and tuple(t.shape) != (rows.shape[0],):
            raise ValueError(f"lora_ffn: {name} must be [R] with R={rows.shape[0]}, got {tuple(t.shape)}")
    if skill_of_row is not None and (skill_of_row.dtype.is_floating_point or skill_of_row.dtype == torch.bool):
        raise TypeError(f"lora_ffn: skill_of_row must be integers, got {skill_of_row.dtype}")
    if gates is not None and not gates.dtype.is_floating_point:
        raise TypeError(f"lora_ffn: gates must be floating point, got {gates.dtype}")
