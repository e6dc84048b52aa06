"""Rows in expert order to the places of their pairs."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def spread_kernel(y_rows, row_of_pair, offsets, out, D, S, BD: tl.constexpr):
    """out[pair] = y_rows[place of the pair], of the pairs that have one among the offsets[S] live ones. One program for
    BD columns of a pair."""
    pair, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BD + tl.arange(0, BD)
    place = tl.load(row_of_pair + pair)
    end = tl.where(place < tl.load(offsets + S), D, 0)
    v = tl.load(y_rows + place.to(tl.int64) * D + d, mask=d < end, other=0.0)
    tl.store(out + pair * D + d, v.to(out.dtype.element_ty), mask=d < end)
