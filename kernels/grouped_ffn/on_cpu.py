"""grouped_ffn on CPU: hands the tensors to the C++ form, or to the plain one where that cannot serve.

The C++ form reads the weights where and as they are stored: any strides. Layout of its h: an expert's rows are the
columns of a block [W, rows], in the order of the plan.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..activation import KINDS
from ..routing import narrow_ids
from . import plain


def forward(rows, expert_ids, weights, w1, w_up, w2, b1, b2, kind, params, gated, transposed, interleaved, keep):
    lib = native.serves(rows.dtype, expert_ids.numel(), w2.shape[0])
    if lib is None:
        return plain.forward(
            rows, expert_ids, weights, w1, w_up, w2, b1, b2, kind, params, gated, transposed, interleaved, keep
        )
    f, o = _sizes(w2, transposed)
    y = rows.new_empty(rows.shape[0], o)
    h = rows.new_empty(expert_ids.numel() if keep else 0, 2 * f if gated else f)
    call = Call(rows, expert_ids, weights, w1, w_up, w2, b1, b2, kind, params, gated, transposed, interleaved)
    call.run(lib.hg_grouped_ffn_forward, y=y, h=h)
    return y, h


def backward(
    grad, rows, expert_ids, weights, w1, w_up, w2, b1, b2, h, kind, params, gated, transposed, interleaved, needs
):
    lib = native.serves(rows.dtype, expert_ids.numel(), w2.shape[0])
    if lib is None:
        return plain.backward(
            grad, rows, expert_ids, weights, w1, w_up, w2, b1, b2, h,
            kind, params, gated, transposed, interleaved, needs,
        )  # fmt: skip
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    out = [
        torch.empty_like(t, memory_format=torch.contiguous_format) if t is not None and need else rows.new_empty(0)
        for t, need in zip((rows, weights, w1, w_up, w2, b1, b2), needs, strict=True)
    ]
    dx, ds, d1, du, d2, db1, db2 = out
    ds32 = ds if ds.dtype == torch.float32 else torch.empty_like(ds, dtype=torch.float32)
    call = Call(rows, expert_ids, weights, w1, w_up, w2, b1, b2, kind, params, gated, transposed, interleaved)
    matrices = [x for w in (d1, du, d2) for x in (_address(w), *_strides(w if w.numel() else None, transposed))]
    tail = [grad.data_ptr(), grad.stride(0), _address(dx), _address(ds32), *matrices, _address(db1), _address(db2)]
    call.run(lib.hg_grouped_ffn_backward, h=h, gradients=tail)
    if ds32 is not ds:
        out[1] = ds32.to(ds.dtype)
    return tuple(out)


def _sizes(w2: Tensor, transposed: bool) -> tuple[int, int]:
    """(F, output size)."""
    return (w2.shape[1], w2.shape[2]) if transposed else (w2.shape[2], w2.shape[1])


def _address(t: Tensor | None) -> int:
    return t.data_ptr() if t is not None and t.numel() else 0


def _strides(w: Tensor | None, transposed: bool) -> tuple[int, ...]:
    """Distances (expert, output row, input column) of a weight tensor, in elements."""
    if w is None:
        return 0, 0, 0
    return (w.stride(0), w.stride(2), w.stride(1)) if transposed else w.stride()


class Call:
    """A call of the library: the arguments common to its functions, in the order of Args in problem.h; holds what it
    points to. `slots` int32 [E], [weights, E] or None: where each expert lies in the weights, for the operation `op`
    that says so; `weights` may be None there."""

    def __init__(
        self, rows, ids, weights, w1, w_up, w2, b1, b2, kind, params, gated, transposed, interleaved,
        *, slots: Tensor | None = None, op: str = "grouped_ffn",
    ) -> None:  # fmt: skip
        if ids.numel() >= 2**31:
            raise ValueError(f"{op}: R * K must be below 2^31 pairs on CPU, got {ids.numel()}")
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        experts = w2.shape[0] if slots is None else slots.shape[-1]
        ids, slots = narrow_ids(ids, experts).contiguous(), None if slots is None else slots.contiguous()
        weights = None if weights is None else weights.to(torch.float32).contiguous()
        b1, b2 = (None if b is None else b.contiguous() for b in (b1, b2))
        if w_up is not None and w_up.stride()[1:] != w1.stride()[1:]:  # a tile reads rows of both
            w1, w_up = w1.contiguous(), w_up.contiguous()
        numbers = (ctypes.c_float * 5)(*params)
        self.held = (rows, ids, weights, w1, w_up, b1, b2, numbers)
        self.op, self.slots = op, slots
        f, o = _sizes(w2, transposed)
        self.args = [
            native.DTYPES[rows.dtype],
            torch.get_num_threads(),
            rows.shape[0],
            ids.shape[1],
            experts,
            rows.shape[1],
            f,
            o,
            KINDS.index(kind),
            gated,
            interleaved,
            ctypes.addressof(numbers),
            ids.data_ptr(),
            _address(weights),
            rows.data_ptr(),
            rows.stride(0),
        ]
        for w in (w1, w_up, w2):
            self.args += (0 if w is None else w.data_ptr(), *_strides(w, transposed))
        self.args += (_address(b1), _address(b2))

    def run(
        self,
        function: Callable[[Any], int],
        *,
        y: Tensor | None = None,
        h: Tensor | None = None,
        gradients: Sequence[int] = (0,) * 18,
        pairs: Tensor | None = None,
    ) -> None:
        tables = [None] * 3 if self.slots is None else [self.slots] * 3
        if self.slots is not None and self.slots.dim() == 2:
            tables = [self.slots[0], self.slots[1], self.slots[-1]]
        args = [*self.args, _address(y), _address(h), *gradients, *map(_address, tables), _address(pairs)]
        code = function((ctypes.c_int64 * len(args))(*args))
        if code == 1:
            ids = self.held[1]
            raise IndexError(f"{self.op}: expert_ids must be at least -1 (no expert), got {int(ids.min())}")
        if code:
            raise MemoryError(f"{self.op}: no memory for scratch space")
