"""The forward kernels of grouped_ffn: up (gather, GEMM, bias, activation) and combine (gather-sum). Between them runs
rows_kernel of gemm_triton.py, the down projection.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..activation_triton import GATED, activate
from ..gemm_triton import row_tile, weight_tile, whole, whole_strides
from .triton_common import halves, left_right


@triton.jit
def _finish_up(
    g, u, bias, a, h, e, place, valid, f, F, FORM: tl.constexpr, INTERLEAVED: tl.constexpr, KEEP: tl.constexpr,
    BIAS: tl.constexpr, PIECES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Bias, H and A of columns f .. f + BN, in PIECES one after the other. `u` is unused unless gate and up are two
    tiles."""
    TWO: tl.constexpr = FORM[GATED] and not INTERLEAVED
    WIDE: tl.constexpr = 2 * BN if INTERLEAVED else BN
    if PIECES > 1:
        FEWER: tl.constexpr = PIECES // 2
        HALF: tl.constexpr = BN // 2
        g, g_right = left_right(g, BM, WIDE)
        u_right = u
        if TWO:
            u, u_right = left_right(u, BM, WIDE)
        _finish_up(g, u, bias, a, h, e, place, valid, f, F, FORM, INTERLEAVED, KEEP, BIAS, FEWER, BM, HALF)
        f += HALF
        _finish_up(g_right, u_right, bias, a, h, e, place, valid, f, F, FORM, INTERLEAVED, KEEP, BIAS, FEWER, BM, HALF)
    else:
        width = 2 * F if FORM[GATED] else F
        wide, end = f + tl.arange(0, WIDE), F
        if INTERLEAVED:
            wide, end = wide + f, 2 * F
        if BIAS:
            b_row = bias + e.to(tl.int64) * width
            g += tl.load(b_row + wide, mask=wide < end, other=0.0).to(tl.float32)[None, :]
            if TWO:
                u += tl.load(b_row + F + wide, mask=wide < F, other=0.0).to(tl.float32)[None, :]
        at = place.to(tl.int64)[:, None]
        inside = valid[:, None] & (wide < end)[None, :]
        if KEEP:
            tl.store(h + at * width + wide[None, :], g.to(h.dtype.element_ty), mask=inside)
            if TWO:
                tl.store(h + at * width + (F + wide)[None, :], u.to(h.dtype.element_ty), mask=inside)
        if INTERLEAVED:
            g, u = halves(g, BM, BN)
        columns = f + tl.arange(0, BN)
        act = activate(g, u, FORM).to(a.dtype.element_ty)
        tl.store(a + at * F + columns[None, :], act, mask=valid[:, None] & (columns < F)[None, :])


@triton.jit
def up_kernel(
    x, w_gate, w_up, s_gate, s_up, bias, a, h, pair_of_row, offsets, tile_expert, tile_row, tiles,
    D, F, up_row, stride_x, stride_e, stride_k, stride_n, stride_se, stride_so,
    TOP_K: tl.constexpr, FORM: tl.constexpr, INTERLEAVED: tl.constexpr, KEEP: tl.constexpr, BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PIECES: tl.constexpr, MAP: tl.constexpr,
    K_INNER: tl.constexpr, EVEN_K: tl.constexpr, FORMAT: tl.constexpr, SCALED: tl.constexpr,
    BY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A[i, f] = act(x[row of place i] W1_e^T + b1_e) and, if KEEP, H (the pre-activation), BM x BN at a time.

    The rows are gathered by the loads of the loop. Gate and up of a tile are two accumulators of one program, or one of
    twice the width whose neighbouring columns are split in registers (INTERLEAVED). `up_row`: where the up projection
    begins in w_up; H has the weights' own order of columns. The epilogue
    takes its columns in PIECES, for fewer registers.
    """
    if BY > 1:
        D, F, up_row, stride_x = whole(D, BY), whole(F, BY), whole(up_row, BY), whole(stride_x, BY)
        stride_e, stride_k, stride_n = whole_strides(stride_e, stride_k, stride_n, K_INNER, BY, FORMAT)
    live, columns = tl.load(tiles), tl.cdiv(F, BN)
    WIDE: tl.constexpr = 2 * BN if INTERLEAVED else BN
    TWO: tl.constexpr = FORM[GATED] and not INTERLEAVED
    f_end = 2 * F if INTERLEAVED else F
    ks = tl.arange(0, BK)
    for index in tl.range(tl.program_id(0), live * columns, tl.num_programs(0)):
        e, _, place, valid, column = row_tile(index, live, columns, tile_expert, tile_row, offsets, BM, GROUP)
        row = tl.load(pair_of_row + place, mask=valid, other=0) // TOP_K  # rows past the end compute row 0, unstored
        x_rows = x + row.to(tl.int64)[:, None] * stride_x
        n = column * WIDE
        g = tl.zeros((BM, WIDE), tl.float32)
        u = tl.zeros((BM, WIDE), tl.float32)
        for k in range(0, D, BK):
            if EVEN_K:
                xs = tl.load(x_rows + (k + ks)[None, :])
            else:
                xs = tl.load(x_rows + (k + ks)[None, :], mask=(k + ks < D)[None, :], other=0.0)
            ws = weight_tile(
                w_gate, s_gate, e, k, n, D, f_end, stride_e, stride_k, stride_n, stride_se, stride_so,
                BK, WIDE, MAP, K_INNER, EVEN_K, FORMAT, SCALED, a.dtype.element_ty,
            )  # fmt: skip
            g = tl.dot(xs, ws, g, input_precision=PRECISION)
            if TWO:
                vs = weight_tile(
                    w_up, s_up, e, k, up_row + n, D, up_row + F, stride_e, stride_k, stride_n, stride_se, stride_so,
                    BK, WIDE, MAP, K_INNER, EVEN_K, FORMAT, SCALED, a.dtype.element_ty,
                )  # fmt: skip
                u = tl.dot(xs, vs, u, input_precision=PRECISION)
        _finish_up(g, u, bias, a, h, e, place, valid, column * BN, F, FORM, INTERLEAVED, KEEP, BIAS, PIECES, BM, BN)


@triton.jit
def combine_kernel(
    y_rows, row_of_pair, offsets, weights, y, D, E,
    TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y[t] = sum_k weights[t, k] * y_rows[place of (t, k)] in fp32, k rising; the weights are 1 unless WEIGHTED. One
    program for BD columns of a token; a pair without an expert adds nothing."""
    t, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BD + tl.arange(0, BD)
    live = tl.load(offsets + E)
    acc = tl.zeros((BD,), tl.float32)
    for k in tl.static_range(TOP_K):
        place = tl.load(row_of_pair + t * TOP_K + k)
        end = tl.where(place < live, D, 0)
        v = tl.load(y_rows + place.to(tl.int64) * D + d, mask=d < end, other=0.0).to(tl.float32)
        if WEIGHTED:
            v *= tl.where(place < live, tl.load(weights + t * TOP_K + k).to(tl.float32), 0.0)
        acc += v
    tl.store(y + t * D + d, acc.to(y.dtype.element_ty), mask=d < D)
