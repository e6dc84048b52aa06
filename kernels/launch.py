"""How a Triton kernel is started, and the one place for what differs between Triton's versions: nothing that the
kernels use, from 3.6 to 3.9.

Every host function takes `launch` as an argument: the benchmark's compiler and its roofline hand over one that takes
notes in place of running.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor


class Launch(Protocol):
    """Starts `kernel` on `grid` programs. `warps` and `stages` are per program; the rest are its arguments by name."""

    def __call__(self, kernel: Any, grid: Sequence[int], *, warps: int, stages: int, **arguments: Any) -> None: ...


def launch(kernel: Any, grid: Sequence[int], *, warps: int = 4, stages: int = 2, **arguments: Any) -> None:
    """Runs it on the current stream of its tensors' device; nothing to do for an empty grid."""
    if min(grid) < 1:
        return
    device = next(a.device for a in arguments.values() if isinstance(a, Tensor))
    if device.type != "cuda":  # the interpreter
        kernel[tuple(grid)](**arguments, num_warps=warps, num_stages=stages)
        return
    with torch.cuda.device(device):
        kernel[tuple(grid)](**arguments, num_warps=warps, num_stages=stages)


def with_contiguous_rows(x: Tensor) -> Tensor:
    """x, copied only where neighbours in a row are not neighbours in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def tensor_map(t: Tensor, block: Sequence[int]) -> Any:
    """A descriptor of `t` for loads of `block` by TMA; see `can_map`. Out of bounds it reads zero."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(t, list(t.shape), list(t.stride()), list(block))


def can_map(t: Tensor) -> bool:
    """Whether TMA can address `t`: last axis contiguous, every other stride and the address a multiple of 16 bytes,
    and each stride a multiple of the next."""
    size = t.element_size()
    return (
        t.numel() > 0
        and t.stride(-1) == 1
        and all(s > 0 and s * size % 16 == 0 for s in t.stride()[:-1])
        and all(outer % inner == 0 for outer, inner in pairwise(t.stride()[:-1]))
        and max(t.shape) < 2**31
        and (t.device.type == "meta" or t.data_ptr() % 16 == 0)
    )
