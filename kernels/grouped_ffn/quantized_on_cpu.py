"""grouped_ffn on frozen weights in few bits on CPU, without a backward pass: the C++ form, which reads each weight once
as it is stored and widens it in registers.

Few rows of an expert meet its weights as they are read; for many a cut of the weights is widened, then multiplied by
all of them. Serves int8, int4 and mxfp4 (not fp8) on rows in fp32, bf16 and fp16; products are summed in fp32, and the
activation between them is kept in fp32 (bf16 for many bf16 rows on CPUs that multiply them).
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .. import native
from ..quantized import PER_BYTE, Quantized
from .on_cpu import Call

_FORMATS = {"int8": 0, "int4": 1, "mxfp4": 2}
_SCALES = {**native.DTYPES, torch.uint8: 3}
_NO_MATRIX = (0,) * 9


def serves(rows: Tensor, pairs: int, weights: tuple[Quantized | None, ...]) -> ctypes.CDLL | None:
    """The library, if it is the form to multiply rows with these weights."""
    there = [w for w in weights if w is not None]
    if rows.device.type != "cpu" or any(w.format not in _FORMATS for w in there):
        return None
    return native.serves(rows.dtype, pairs, there[0].shape[0])


def forward(
    lib: ctypes.CDLL,
    rows: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    packed: tuple[Quantized, Quantized | None, Quantized],
    b1: Tensor | None,
    b2: Tensor | None,
    form: tuple[str, list[float], bool, bool],
) -> Tensor:
    """y [R, O] in the type of rows; `form` is (activation, params, gated, interleaved), `lib` what `serves` gave."""
    y = rows.new_empty(rows.shape[0], packed[2].shape[1])
    _run(lib, _call(rows, expert_ids, weights, packed, b1, b2, form), packed, y=y)
    return y


def _call(rows, expert_ids, weights, packed, b1, b2, form, **more) -> Call:
    """The arguments but for the weights, of which only the shapes are told."""
    kind, params, gated, interleaved = form
    shapes = [None if w is None else torch.empty(()).expand(w.shape) for w in packed]
    return Call(rows, expert_ids, weights, *shapes, b1, b2, kind, params, gated, False, interleaved, **more)


def _run(lib: ctypes.CDLL, call: Call, packed: tuple[Quantized | None, ...], **out: Tensor) -> None:
    matrices, held = [], []
    for w in packed:
        numbers, tensors = _matrix(w)
        matrices += numbers
        held.append(tensors)
    array = (ctypes.c_int64 * len(matrices))(*matrices)
    call.run(lambda args: lib.hg_grouped_ffn_quantized(args, array), **out)


def _matrix(w: Quantized | None) -> tuple[tuple[int, ...], tuple[Tensor, ...]]:
    """FewBits of quantized.h, and the tensors that it points into."""
    if w is None:
        return _NO_MATRIX, ()
    data, scale = (t if t.stride(2) == 1 else t.contiguous() for t in (w.data, w.scale))
    places = (data.data_ptr(), *data.stride()[:2], scale.data_ptr(), *scale.stride()[:2])
    return (*places, _FORMATS[w.format], w.block[1], _SCALES[scale.dtype]), (data, scale)
