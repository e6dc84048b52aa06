"""plan in plain torch: a stable sort."""

from __future__ import annotations

import torch
from torch import Tensor


def plan_reference(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(pair_of_row, offsets, row_of_pair) of `expert_ids` [T, K]; see `Plan`."""
    flat = expert_ids.reshape(-1).long()
    flat = torch.where((flat < 0) | (flat >= num_experts), num_experts, flat)
    order = torch.argsort(flat, stable=True)
    inverse = torch.empty_like(order).scatter(0, order, torch.arange(flat.numel(), device=flat.device))
    counts = flat.new_zeros(num_experts + 1).scatter_add(0, flat, torch.ones_like(flat))
    offsets = torch.cat([counts.new_zeros(1), counts[:-1].cumsum(0)])
    return order.int(), offsets.int(), inverse.int()
