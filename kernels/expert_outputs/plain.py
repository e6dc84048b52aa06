"""expert_outputs as a loop over experts of plain torch matmuls, and the sum that goes with it: as grouped_ffn/plain.py.

Quantized weights are widened an expert at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..activation import Activation
from ..grouped_ffn.plain import live_pairs, one_expert, views
from ..grouped_ffn.quantized import unpacked, widened


def stored(
    w1: list[Tensor], w_up: list[Tensor], w2: list[Tensor], formats: list[str], blocks: list[int]
) -> tuple[Any, Any, Any]:
    """The weights out of the operator's lists: tensors, or Quantized; the second may be None."""
    return unpacked(w1, w_up, w2, formats, blocks) if formats else (w1[0], w_up[0] if w_up else None, w2[0])


def expert_outputs(
    rows, expert_ids, w1, w_up, w2, b1, b2, slots, out, formats, blocks, kind, params, gated, transposed, interleaved
) -> None:
    act, weights = Activation.from_params(kind, gated, params), stored(w1, w_up, w2, formats, blocks)
    first, second, last = widened(rows.dtype, weights) if formats else weights
    ups, down = views(first, second, last, transposed)
    pair, offsets = live_pairs(expert_ids, slots.shape[-1], "expert_outputs")
    for e, (slot, firsts, last_one) in enumerate(located(slots, ups, down)):
        p = pair[offsets[e] : offsets[e + 1]]
        if slot >= 0 and p.numel():
            x = rows[p // expert_ids.shape[1]]
            out[p] = one_expert(x, slot, firsts, last_one, b1, b2, act, interleaved)[1].to(out.dtype)


def located(slots: Tensor, ups: list[Tensor], down: Tensor) -> Iterator[tuple[int, list[Tensor], Tensor]]:
    """(slot, projections, last projection) of each expert, of which it is the slot-th; -1: it is not here."""
    if slots.dim() == 1:
        yield from ((slot, ups, down) for slot in slots.tolist())
        return
    for *first, last in slots.T.tolist():
        if last < 0:
            yield -1, ups, down
        else:
            yield 0, [w[s : s + 1] for w, s in zip(ups, first, strict=True)], down[last : last + 1]


def combine_outputs(out: Tensor, expert_ids: Tensor, weights: Tensor, num_experts: int, dtype: torch.dtype) -> Tensor:
    """A row's pairs are added up in the order of their experts, as the loop over experts does it."""
    live = (expert_ids >= 0) & (expert_ids < num_experts)
    order = torch.where(live, expert_ids, num_experts).argsort(dim=1, stable=True)
    each = out.view(*expert_ids.shape, out.shape[1]) * weights[..., None].to(out.dtype)
    each = torch.where(live[..., None], each, 0.0)
    y, row = out.new_zeros(expert_ids.shape[0], out.shape[1]), torch.arange(expert_ids.shape[0], device=out.device)
    for k in order.unbind(1):
        y += each[row, k]
    return y.to(dtype)
