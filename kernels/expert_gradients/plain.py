"""expert_gradients as a loop over experts of plain torch matmuls, as grouped_ffn/plain.py, and the sum in its order.

Quantized weights are widened an expert at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation import Activation
from ..expert_outputs.plain import located, stored
from ..grouped_ffn.plain import hidden, hidden_gradients, live_pairs, views, wide_of
from ..grouped_ffn.quantized import widened


def expert_gradients(
    grad, rows, expert_ids, weights, w1, w_up, w2, b1, b2, slots, d_rows, d_weights,
    formats, blocks, kind, params, gated, transposed, interleaved,
) -> None:  # fmt: skip
    act, held = Activation.from_params(kind, gated, params), stored(w1, w_up, w2, formats, blocks)
    first, second, last = widened(rows.dtype, held) if formats else held
    ups, down = views(first, second, last, transposed)
    pair, offsets = live_pairs(expert_ids, slots.shape[-1], "expert_gradients")
    wide, k = wide_of(rows.dtype), expert_ids.shape[1]
    scale = weights.reshape(-1).to(wide)
    for e, (slot, firsts, last_one) in enumerate(located(slots, ups, down)):
        p = pair[offsets[e] : offsets[e + 1]]
        if slot < 0 or not p.numel():
            continue
        t, s = p // k, scale[p, None]
        h, g = hidden(rows[t], slot, firsts, b1).to(wide), grad[t]
        dh, da, a = hidden_gradients(g, s, h, last_one[slot], act, interleaved)
        if d_weights is not None:
            d_weights[p] = (da * a).sum(1)
            if b2 is not None:
                d_weights[p] += (g.to(wide) * b2[slot].to(wide)).sum(1)
        if d_rows is not None:
            parts = [dh] if len(ups) == 1 else dh.chunk(2, dim=1)
            d_rows[p] = sum((d.to(rows.dtype) @ u[slot].T).to(wide) for d, u in zip(parts, firsts, strict=True))


def combine_gradients(d_rows: Tensor, expert_ids: Tensor, num_experts: int, dtype: torch.dtype) -> Tensor:
    """A row's pairs are added up in the order of their experts, as the backward pass of grouped_ffn does it on CPU."""
    live = (expert_ids >= 0) & (expert_ids < num_experts)
    order = torch.where(live, expert_ids, num_experts).argsort(dim=1, stable=True)
    first = torch.arange(len(order), device=d_rows.device) * order.shape[1]
    dx = d_rows.new_zeros(expert_ids.shape[0], d_rows.shape[1])
    for k, alive in zip(order.unbind(1), live.gather(1, order).unbind(1), strict=True):
        dx += torch.where(alive[:, None], d_rows[first + k], 0.0)
    return dx.to(dtype)
