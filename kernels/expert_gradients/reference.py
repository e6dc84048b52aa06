"""expert_gradients and combine_gradients in plain torch, any device: the truth, by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation import Activation
from ..grouped_ffn.reference import grouped_ffn_reference


def expert_gradients_reference(
    grad: Tensor,
    rows: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    w_gate_up: Tensor | tuple[Tensor, Tensor],
    w_down: Tensor,
    slot_of_expert: Tensor,
    d_rows: Tensor,
    d_weights: Tensor,
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    *,
    activation: Activation,
    transposed: bool = False,
    interleaved: bool = False,
) -> None:
    """d_rows[t*K + k] and d_weights[t*K + k] of the pairs whose expert lies in a slot, for grad of grouped_ffn's y."""
    for e, s in enumerate(slot_of_expert.tolist()):
        t, k = torch.where(expert_ids == e)
        if s < 0:
            continue
        one = slice(s, s + 1)
        w1 = (w_gate_up[0][one], w_gate_up[1][one]) if isinstance(w_gate_up, tuple) else w_gate_up[one]
        b1, b2 = (None if b is None else b[one] for b in (b_gate_up, b_down))
        with torch.enable_grad():
            x, weight = rows[t].detach().requires_grad_(), weights[t, k, None].detach().requires_grad_()
            y = grouped_ffn_reference(
                x, torch.zeros(len(t), 1, dtype=torch.int32), weight, w1, w_down[one], b1, b2,
                activation=activation, transposed=transposed, interleaved=interleaved,
            )  # fmt: skip
            dx, dw = torch.autograd.grad(y, (x, weight), grad[t])
        pair = t * expert_ids.shape[1] + k
        d_rows[pair], d_weights[pair] = dx.to(d_rows.dtype), dw[:, 0].to(d_weights.dtype)


def combine_gradients_reference(d_rows: Tensor, expert_ids: Tensor, num_experts: int, dtype: torch.dtype) -> Tensor:
    """dx[t] = the sum over the live pairs (t, k) of d_rows[t*K + k]."""
    live = ((expert_ids >= 0) & (expert_ids < num_experts))[..., None]
    return torch.where(live, d_rows.reshape(*expert_ids.shape, d_rows.shape[1]), 0.0).sum(1).to(dtype)
