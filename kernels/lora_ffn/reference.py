"""lora_ffn in plain torch, any device, differentiable: the truth. It forms the whole change of each weight."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation import Activation
from .task import Delta


def lora_ffn_reference(
    rows: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    up: Delta | None = None,
    down: Delta | None = None,
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    *,
    activation: Activation,
    skill_of_row: Tensor | None = None,
    gates: Tensor | None = None,
    transposed: bool = False,
    interleaved: bool = False,
) -> Tensor:
    """y[t] = sum_k weights[t, k] * FFN(rows[t]) with the weights W_e + gates[t] * scale * B_i A_i of expert e, where
    i = e * S + skill_of_row[t]."""
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    if transposed:
        w_gate_up, w_down = w_gate_up.transpose(1, 2), w_down.transpose(1, 2)
    experts = w_down.shape[0]
    some = up or down
    skills = 1 if some is None else some.a.shape[0] // experts
    y = torch.zeros(rows.shape[0], w_down.shape[1], dtype=wide, device=rows.device)
    for i in range(experts * skills):
        e, skill = divmod(i, skills)
        chosen = expert_ids == e
        if skill_of_row is not None:
            chosen = chosen & (skill_of_row == skill)[:, None]
        t, k = torch.where(chosen)
        gate = torch.ones(len(t), 1, dtype=wide, device=rows.device) if gates is None else gates[t, None].to(wide)

        def product(x: Tensor, w: Tensor, b: Tensor | None, delta: Delta | None, e=e, i=i, gate=gate) -> Tensor:
            y = x @ w[e].to(wide).T
            if delta is not None:
                y = y + gate * (x @ (delta.scale * delta.b[i].to(wide) @ delta.a[i].to(wide)).T)
            return y if b is None else y + b[e].to(wide)

        h = product(rows[t].to(wide), w_gate_up, b_gate_up, up)
        if not activation.gated:
            a = activation(h)
        elif interleaved:
            a = activation(h[:, 0::2], h[:, 1::2])
        else:
            a = activation(*h.chunk(2, dim=1))
        y = y.index_add(0, t, product(a, w_down, b_down, down) * weights[t, k, None].to(wide))
    return y.to(rows.dtype)
