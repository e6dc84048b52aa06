"""States of linear attention, row by row: the truth."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_memory_reference(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None, offsets: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """S <- a S;   S <- S + k (beta (v - S^T k))^T, or S + k v^T without beta;   o = S^T q, row by row.

    Shapes as `linear_memory`.
    """
    out, states = torch.zeros_like(v), []
    for group, s in enumerate(state):
        for i in range(int(offsets[group]), int(offsets[group + 1])):
            s = log_decay[i, :, None, None].exp() * s
            new = v[i] if beta is None else beta[i, :, None] * (v[i] - torch.einsum("hkv,hk->hv", s, k[i]))
            s = s + k[i, :, :, None] * new[:, None, :]
            out = out.index_put((torch.tensor(i, device=out.device),), torch.einsum("hkv,hk->hv", s, q[i]))
        states.append(s)
    return out, torch.stack(states) if states else state
