"""The backward kernels of grouped_ffn: back (dA' and the activation's backward) and the router weights' gradient. dW,
the biases' gradients and dX are products of gemm_triton.py. No result depends on an order of arrival.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..activation_triton import GATED, activate, activate_backward
from ..gemm_triton import row_tile, weight_tile, whole, whole_strides
from .triton_common import halves, interleave_columns, left_right


@triton.jit
def _finish_back(
    da, s, h, dh, sa, place, valid, n, F, FORM: tl.constexpr, INTERLEAVED: tl.constexpr, DH: tl.constexpr,
    SA: tl.constexpr, DS: tl.constexpr, PIECES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dh and sa of columns n .. n + BN, in PIECES one after the other; returns <dA', A> over them [BM]."""
    share = tl.zeros((BM,), tl.float32)
    if PIECES > 1:
        FEWER: tl.constexpr = PIECES // 2
        HALF: tl.constexpr = BN // 2
        left, right = left_right(da, BM, BN)
        share += _finish_back(left, s, h, dh, sa, place, valid, n, F, FORM, INTERLEAVED, DH, SA, DS, FEWER, BM, HALF)
        n += HALF
        share += _finish_back(right, s, h, dh, sa, place, valid, n, F, FORM, INTERLEAVED, DH, SA, DS, FEWER, BM, HALF)
    else:
        width = 2 * F if FORM[GATED] else F
        f = n + tl.arange(0, BN)
        at = place.to(tl.int64)[:, None]
        inside = valid[:, None] & (f < F)[None, :]
        if INTERLEAVED:
            wide = 2 * n + tl.arange(0, 2 * BN)
            both = valid[:, None] & (wide < 2 * F)[None, :]
            hs = tl.load(h + at * width + wide[None, :], mask=both, other=0.0)
            g, u = halves(hs, BM, BN)
            g, u = g.to(tl.float32), u.to(tl.float32)
        else:
            g = tl.load(h + at * width + f[None, :], mask=inside, other=0.0).to(tl.float32)
            u = g
            if FORM[GATED]:
                u = tl.load(h + at * width + (F + f)[None, :], mask=inside, other=0.0).to(tl.float32)
        if SA or DS:
            act = activate(g, u, FORM)
            if DS:
                share = tl.sum(tl.where(inside, da * act, 0.0), axis=1)
            if SA:
                tl.store(sa + at * F + f[None, :], (s * act).to(sa.dtype.element_ty), mask=inside)
        if DH:
            dg, du = activate_backward(s * da, g, u, FORM)
            if INTERLEAVED:
                dgu = interleave_columns(dg.to(dh.dtype.element_ty), du.to(dh.dtype.element_ty), BM, BN)
                tl.store(dh + at * width + wide[None, :], dgu, mask=both)
            else:
                tl.store(dh + at * width + f[None, :], dg.to(dh.dtype.element_ty), mask=inside)
                if FORM[GATED]:
                    tl.store(dh + at * width + (F + f)[None, :], du.to(dh.dtype.element_ty), mask=inside)
    return share


@triton.jit
def back_kernel(
    grad, w, s, h, weights, dh, sa, parts, pair_of_row, offsets, tile_expert, tile_row, tiles,
    D, F, N, stride_g, stride_e, stride_k, stride_n, stride_se, stride_so,
    TOP_K: tl.constexpr, FORM: tl.constexpr, INTERLEAVED: tl.constexpr, DH: tl.constexpr, SA: tl.constexpr,
    DS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PIECES: tl.constexpr,
    MAP: tl.constexpr, K_INNER: tl.constexpr, EVEN_K: tl.constexpr, FORMAT: tl.constexpr, SCALED: tl.constexpr,
    BY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dA'[i, f] = grad[row of place i] W2_e, and from it and H, BM x BN at a time:

        dh     s * dA' through the activation, columns as H's          (DH)
        sa     s * A, the activation recomputed: what dW2 contracts    (SA)
        parts  [column tiles, N]: this tile's share of <dA', A>        (DS)

    with s the router weight of the place's pair. The contraction is swapped, so the experts' outputs are not needed
    (Guo et al., SonicMoE, 2025). The epilogue takes its columns in PIECES.
    """
    if BY > 1:
        D, F, stride_g = whole(D, BY), whole(F, BY), whole(stride_g, BY)
        stride_e, stride_k, stride_n = whole_strides(stride_e, stride_k, stride_n, K_INNER, BY, FORMAT)
    live, columns = tl.load(tiles), tl.cdiv(F, BN)
    ks = tl.arange(0, BK)
    for index in tl.range(tl.program_id(0), live * columns, tl.num_programs(0)):
        e, _, place, valid, column = row_tile(index, live, columns, tile_expert, tile_row, offsets, BM, GROUP)
        pair = tl.load(pair_of_row + place, mask=valid, other=0)
        g_rows = grad + (pair // TOP_K).to(tl.int64)[:, None] * stride_g
        n = column * BN
        da = tl.zeros((BM, BN), tl.float32)
        for k in range(0, D, BK):
            if EVEN_K:
                gs = tl.load(g_rows + (k + ks)[None, :])
            else:
                gs = tl.load(g_rows + (k + ks)[None, :], mask=(k + ks < D)[None, :], other=0.0)
            ws = weight_tile(
                w, s, e, k, n, D, F, stride_e, stride_k, stride_n, stride_se, stride_so,
                BK, BN, MAP, K_INNER, EVEN_K, FORMAT, SCALED, dh.dtype.element_ty,
            )  # fmt: skip
            da = tl.dot(gs, ws, da, input_precision=PRECISION)
        part = tl.load(weights + pair, mask=valid, other=0.0).to(tl.float32)[:, None]
        share = _finish_back(da, part, h, dh, sa, place, valid, n, F, FORM, INTERLEAVED, DH, SA, DS, PIECES, BM, BN)
        if DS:
            tl.store(parts + column.to(tl.int64) * N + place, share, mask=valid)


@triton.jit
def router_grad_kernel(
    parts, row_of_pair, expert_ids, grad, bias, offsets, ds, N, E, D, COLUMNS, stride_g,
    TOP_K: tl.constexpr, BIAS: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """ds[pair] = the sum of its shares in `parts` [COLUMNS, N], columns rising, plus <grad, b2_e> where BIAS; BP pairs
    a program. Zero for a pair without an expert."""
    pair = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    place = tl.load(row_of_pair + pair, mask=pair < N, other=0).to(tl.int64)
    live = (pair < N) & (place < tl.load(offsets + E))
    acc = tl.zeros((BP,), tl.float32)
    share = parts + place
    for _ in range(COLUMNS):
        acc += tl.load(share, mask=live, other=0.0)
        share += N
    if BIAS:
        e = tl.load(expert_ids + pair, mask=live, other=0).to(tl.int64)
        part = tl.zeros((BP, BD), tl.float32)
        for d0 in range(0, D, BD):
            d = d0 + tl.arange(0, BD)
            inside = live[:, None] & (d < D)[None, :]
            gs = tl.load(grad + (pair // TOP_K)[:, None] * stride_g + d[None, :], mask=inside, other=0.0)
            bs = tl.load(bias + e[:, None] * D + d[None, :], mask=inside, other=0.0)
            part += gs.to(tl.float32) * bs.to(tl.float32)
        acc += tl.sum(part, axis=1)
    tl.store(ds + pair, acc.to(ds.dtype.element_ty), mask=pair < N)
