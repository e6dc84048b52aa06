"""grouped_ffn on CUDA devices: the Triton form, or the plain one where that cannot serve, which says so once."""

from __future__ import annotations

import torch
from torch import Tensor

from ..chip import chip_of, say_once, why_not
from . import plain

def _why_plain(rows: Tensor, w_down: Tensor) -> str | None:
    if rows.dtype == torch.float64:
        return "fp64 products have no Triton form"
    why = why_not(rows.device.index)
    if why is None:
        from ..plan.on_triton import MOST_EXPERTS

        if w_down.shape[0] > MOST_EXPERTS:
            why = f"num_experts must be at most {MOST_EXPERTS} for the Triton form, got {w_down.shape[0]}"
    return why


def forward(rows, *rest):
    why = _why_plain(rows, rest[4])
    if why is not None:
        say_once("grouped_ffn", why, "a loop of matmuls over experts, which waits for the device")
        return plain.forward(rows, *rest)
    from . import on_triton

    return on_triton.forward(rows, *rest, chip=chip_of(rows.device.index))


def backward(grad, rows, *rest):
    if _why_plain(rows, rest[4]) is not None:
        return plain.backward(grad, rows, *rest)
    from . import on_triton

    return on_triton.backward(grad, rows, *rest, chip=chip_of(rows.device.index))
