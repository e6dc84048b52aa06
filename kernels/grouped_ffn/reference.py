"""grouped_ffn in plain torch, any device, differentiable: the truth."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation import Activation


def grouped_ffn_reference(
    rows: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    w_gate_up: Tensor | tuple[Tensor, Tensor],
    w_down: Tensor,
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    *,
    activation: Activation,
    transposed: bool = False,
    interleaved: bool = False,
) -> Tensor:
    """y[t] = sum_k weights[t, k] * (act(rows[t] W1_e^T + b1_e) W2_e^T + b2_e) with e = expert_ids[t, k]."""
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    w1 = torch.cat(w_gate_up, dim=2 if transposed else 1) if isinstance(w_gate_up, tuple) else w_gate_up
    if transposed:
        w1, w_down = w1.transpose(1, 2), w_down.transpose(1, 2)
    y = torch.zeros(rows.shape[0], w_down.shape[1], dtype=wide, device=rows.device)
    for e in range(w_down.shape[0]):
        t, k = torch.where(expert_ids == e)
        h = rows[t].to(wide) @ w1[e].to(wide).T
        if b_gate_up is not None:
            h = h + b_gate_up[e].to(wide)
        if not activation.gated:
            a = activation(h)
        elif interleaved:
            a = activation(h[:, 0::2], h[:, 1::2])
        else:
            a = activation(*h.chunk(2, dim=1))
        out = a @ w_down[e].to(wide).T
        if b_down is not None:
            out = out + b_down[e].to(wide)
        y = y.index_add(0, t, out * weights[t, k, None].to(wide))
    return y.to(rows.dtype)
