"""grouped_ffn on frozen weights in few bits on CPU, without a backward pass: the C++ form, which reads each weight once
as it is stored and widens it in registers.

Few rows of an expert meet its weights as they are read; for many a cut of the weights is widened, then multiplied by
all of them. Serves int8, int4, uint4, mxfp4 and GGUF's blocks (not fp8) on rows in fp32, bf16 and fp16; products are
summed in fp32, and the activation between them is kept in fp32 (bf16 for many bf16 rows on CPUs that multiply them).
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .. import native
from ..quantized import Quantized
from .on_cpu import Call

_FORMATS = {  # as Format in quantized.h
    name: i
    for i, name in enumerate(("int8", "int4", "mxfp4", "uint4", "Q8_0", "Q4_0", "gguf_mxfp4", "Q4_K", "Q5_K", "Q6_K"))
}
_SCALES = {**native.DTYPES, torch.uint8: 3}
_NO_MATRIX = (0,) * 9


Packed = tuple[Quantized, Quantized | None, Quantized]
Form = tuple[str, list[float], bool, bool]  # activation, params, gated, interleaved


def serves(dtype: torch.dtype, pairs: int, experts: int, packed: Packed) -> ctypes.CDLL | None:
    """The library, if it is the form to multiply rows of `dtype` with these weights; sizes are the whole batch's."""
    there = [w for w in packed if w is not None]
    if any(w.format not in _FORMATS or w.device.type != "cpu" for w in there):
        return None
    return native.serves(dtype, pairs, experts)


def forward(
    lib: ctypes.CDLL, rows: Tensor, expert_ids: Tensor, weights: Tensor, packed: Packed,
    b1: Tensor | None, b2: Tensor | None, form: Form,
) -> Tensor:  # fmt: skip
    """grouped_ffn's y [R, O], in the type of rows; `lib` is what `serves` gave."""
    y = rows.new_empty(rows.shape[0], packed[2].shape[1])
    _run(lib, _call(rows, expert_ids, weights, packed, b1, b2, form), packed, y=y)
    return y


def outputs(
    lib: ctypes.CDLL, rows: Tensor, expert_ids: Tensor, packed: Packed, b1: Tensor | None, b2: Tensor | None,
    slots: Tensor, out: Tensor, form: Form,
) -> None:  # fmt: skip
    """What expert_outputs writes to `out` [R*K, O]."""
    call = _call(rows, expert_ids, None, packed, b1, b2, form, slots=slots, op="expert_outputs")
    _run(lib, call, packed, pairs=out)


def _call(rows, expert_ids, weights, packed, b1, b2, form, **more) -> Call:
    """The arguments but for the weights, of which only the shapes are told."""
    kind, params, gated, interleaved = form
    w1, w_up, w2 = (None if w is None else torch.empty(()).expand(w.shape) for w in packed)
    return Call(rows, expert_ids, weights, w1, w_up, w2, b1, b2, kind, params, gated, False, interleaved, **more)


def _run(lib: ctypes.CDLL, call: Call, packed: Packed, *, y: Tensor | None = None, pairs: Tensor | None = None) -> None:
    stored = [None if w is None else _stored(w) for w in packed]  # held until the call is over
    numbers = [n for w in stored for n in (_NO_MATRIX if w is None else _matrix(w))]
    matrices = (ctypes.c_int64 * len(numbers))(*numbers)
    call.run(lambda args: lib.hg_grouped_ffn_quantized(args, matrices), y=y, pairs=pairs)


def _stored(w: Quantized) -> Quantized:
    """With rows whose bytes, and whose scales, lie side by side."""
    return w if w.data.stride(2) == 1 and w.scale.stride(2) == 1 else w.copy()


def _matrix(w: Quantized) -> tuple[int, ...]:
    """As FewBits in quantized.h."""
    places = (w.data.data_ptr(), *w.data.stride()[:2], w.scale.data_ptr(), *w.scale.stride()[:2])
    return (*places, _FORMATS[w.format], w.block[1], _SCALES[w.scale.dtype])
