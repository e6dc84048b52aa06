"""grouped_linear in plain torch, any device, differentiable: the truth."""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_linear_reference(
    x_sorted: Tensor, offsets: Tensor, w: Tensor, b: Tensor | None = None, transposed: bool = False
) -> Tensor:
    """y[i] = x_sorted[i] W_e^T + b_e for offsets[e] <= i < offsets[e+1]; rows past offsets[E] are zero."""
    wide = torch.float64 if x_sorted.dtype == torch.float64 else torch.float32
    w = w if transposed else w.transpose(1, 2)
    parts = []
    bounds = offsets.tolist()
    for e, right in enumerate(w.unbind(0)):
        y = x_sorted[bounds[e] : bounds[e + 1]].to(wide) @ right.to(wide)
        parts.append(y if b is None else y + b[e].to(wide))
    parts.append(x_sorted.new_zeros(x_sorted.shape[0] - bounds[-1], w.shape[2], dtype=wide))
    return torch.cat(parts).to(x_sorted.dtype)
