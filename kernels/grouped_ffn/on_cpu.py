"""grouped_ffn on CPU: hands the tensors to the C++ form, or to the plain one where that cannot serve.

The C++ form reads the weights where and as they are stored: any strides. Layout of its h: an expert's rows are the
columns of a block [W, rows], in the order of the plan.
"""

from __future__ import annotations

import ctypes

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
    call = _Call(rows, expert_ids, weights, w1, w_up, w2, b1, b2, kind, params, gated, transposed, interleaved)
    call.run(lib.hg_grouped_ffn_forward, [y.data_ptr(), _address(h), *[0] * 18])
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
    call = _Call(rows, expert_ids, weights, w1, w_up, w2, b1, b2, kind, params, gated, transposed, interleaved)
    matrices = [x for w in (d1, du, d2) for x in (_address(w), *_strides(w if w.numel() else None, transposed))]
    tail = [grad.data_ptr(), grad.stride(0), _address(dx), _address(ds32), *matrices, _address(db1), _address(db2)]
    call.run(lib.hg_grouped_ffn_backward, [0, h.data_ptr(), *tail])
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


class _Call:
    """The arguments common to forward and backward, in the order of Args in problem.h; holds what it points to."""

    def __init__(self, rows, ids, weights, w1, w_up, w2, b1, b2, kind, params, gated, transposed, interleaved) -> None:
        if ids.numel() >= 2**31:
            raise ValueError(f"grouped_ffn: R * K must be below 2^31 pairs on CPU, got {ids.numel()}")
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        ids, weights = narrow_ids(ids, w2.shape[0]).contiguous(), weights.to(torch.float32).contiguous()
        b1, b2 = (None if b is None else b.contiguous() for b in (b1, b2))
        if w_up is not None and w_up.stride()[1:] != w1.stride()[1:]:  # a tile reads rows of both
            w1, w_up = w1.contiguous(), w_up.contiguous()
        numbers = (ctypes.c_float * 4)(*params)
        self.held = (rows, ids, weights, w1, w_up, b1, b2, numbers)
        f, o = _sizes(w2, transposed)
        self.args = [
            native.DTYPES[rows.dtype],
            torch.get_num_threads(),
            rows.shape[0],
            ids.shape[1],
            w2.shape[0],
            rows.shape[1],
            f,
            o,
            KINDS.index(kind),
            gated,
            interleaved,
            ctypes.addressof(numbers),
            ids.data_ptr(),
            weights.data_ptr(),
            rows.data_ptr(),
            rows.stride(0),
        ]
        for w in (w1, w_up, w2):
            self.args += (0 if w is None else w.data_ptr(), *_strides(w, transposed))
        self.args += (_address(b1), _address(b2))

    def run(self, function, tail: list[int]) -> None:
        args = self.args + tail
        code = function((ctypes.c_int64 * len(args))(*args))
        if code == 1:
            ids = self.held[1]
            raise IndexError(f"grouped_ffn: expert_ids must be at least -1 (no expert), got {int(ids.min())}")
        if code:
            raise MemoryError("grouped_ffn: no memory for scratch space")
