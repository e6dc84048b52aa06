"""expert_outputs and combine_outputs in plain torch, any device: the truth."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation import Activation
from ..grouped_ffn.reference import grouped_ffn_reference


def expert_outputs_reference(
    rows: Tensor,
    expert_ids: Tensor,
    w_gate_up: Tensor | tuple[Tensor, Tensor],
    w_down: Tensor,
    slot_of_expert: Tensor,
    out: Tensor,
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    *,
    activation: Activation,
    transposed: bool = False,
    interleaved: bool = False,
) -> None:
    """out[t*K + k] = the output of expert_ids[t, k] for rows[t], where that expert lies in a slot."""
    for e, s in enumerate(slot_of_expert.tolist()):
        t, k = torch.where(expert_ids == e)
        if s < 0:
            continue
        one = slice(s, s + 1)
        w1 = (w_gate_up[0][one], w_gate_up[1][one]) if isinstance(w_gate_up, tuple) else w_gate_up[one]
        b1, b2 = (None if b is None else b[one] for b in (b_gate_up, b_down))
        only, unweighted = torch.zeros(len(t), 1, dtype=torch.int32), torch.ones(len(t), 1)
        y = grouped_ffn_reference(
            rows[t], only, unweighted, w1, w_down[one], b1, b2,
            activation=activation, transposed=transposed, interleaved=interleaved,
        )  # fmt: skip
        out[t * expert_ids.shape[1] + k] = y.to(out.dtype)


def combine_outputs_reference(
    out: Tensor, expert_ids: Tensor, weights: Tensor, num_experts: int, dtype: torch.dtype
) -> Tensor:
    """y[t] = the sum over the live pairs (t, k) of weights[t, k] * out[t*K + k]."""
    live = ((expert_ids >= 0) & (expert_ids < num_experts))[..., None]
    each = out.reshape(*expert_ids.shape, out.shape[1]) * weights[..., None].to(out.dtype)
    return torch.where(live, each, 0.0).sum(1).to(dtype)
