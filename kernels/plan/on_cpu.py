"""plan on CPU: a counting sort in C++, or the reference where that was not built."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .. import native
from ..routing import narrow_ids
from .reference import plan_reference


def plan_on_cpu(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(pair_of_row, offsets, row_of_pair) of `expert_ids` [T, K]; see `Plan`."""
    lib = native.library()
    if lib is None:
        return plan_reference(expert_ids, num_experts)
    if expert_ids.numel() >= 2**31:
        raise ValueError(f"plan: T * K must be below 2^31 pairs on CPU, got {expert_ids.numel()}")
    ids = narrow_ids(expert_ids, num_experts).contiguous()
    out = [torch.empty(n, dtype=torch.int32) for n in (ids.numel(), num_experts + 1, ids.numel())]
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (ids, *out)]
    sizes = ctypes.c_int64(ids.numel()), ctypes.c_int64(num_experts)
    if lib.hg_plan(pointers[0], *sizes, *pointers[1:]):
        raise MemoryError("plan: no memory for the order of pairs")
    return out[0], out[1], out[2]
