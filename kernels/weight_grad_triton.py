"""The gradient of expert weights in Triton: for each expert, a contraction over its rows. The kernel first, then the
function that starts it.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from .chip import Chip
from .gemm_triton import blocks, by_eight, find_tile, precision_of, whole
from .launch import Launch, can_map, tensor_map
from .tiles import Tile


@triton.jit
def rows_at(pair_of_row, place, valid, TOP_K: tl.constexpr, GATHER: tl.constexpr, MASKED: tl.constexpr):
    """Where the gathered side has the rows of these places: at their pairs' rows, or at the places themselves."""
    row = place
    if GATHER:
        if MASKED:
            row = tl.load(pair_of_row + place, mask=valid, other=0)
        else:
            row = tl.load(pair_of_row + place)
        row = row.to(tl.uint32) // TOP_K  # of unsigned numbers: a shift, or few instructions
    return row


@triton.jit
def gathered_block(a, row, valid, m, M, stride, BM: tl.constexpr, EVEN: tl.constexpr):
    """[BM, BK]: columns m and on of a, at the rows `row` [BK]; zero where not `valid`. EVEN: all of them before M. (Not
    loaded as [BK, BM] and turned: before sm_90 such a block would go through registers.)"""
    columns = m + tl.arange(0, BM)
    at = (a + columns)[:, None] + (row.to(tl.int64) * stride)[None, :]
    inside = valid[None, :]
    if not EVEN:
        inside = inside & (columns < M)[:, None]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def straight_block(
    b, first, valid, n, WIDTH, stride,
    BK: tl.constexpr, BN: tl.constexpr, MAP: tl.constexpr, EVEN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """[BK, BN] of b from row `first` and column n on; where MASKED, zero where not `valid`. MAP: `b` is a tensor map.
    EVEN: it ends before WIDTH."""
    if MAP:
        block = b.load([first, n])
        if MASKED:
            block = tl.where(valid[:, None], block, 0.0)
    else:
        columns = n + tl.arange(0, BN)
        at = (b + columns)[None, :] + ((first + tl.arange(0, BK)).to(tl.int64) * stride)[:, None]
        if MASKED:
            block = tl.load(at, mask=valid[:, None] & (columns < WIDTH)[None, :], other=0.0)
        elif EVEN:
            block = tl.load(at)
        else:
            block = tl.load(at, mask=(columns < WIDTH)[None, :], other=0.0)
    return block


@triton.jit
def store_block(dw, acc, e, m, n, M, WIDTH, BM: tl.constexpr, BN: tl.constexpr, TURNED: tl.constexpr):
    """acc [BM, BN] at (m, n) of expert e's matrix [M, WIDTH], or at (n, m) of [WIDTH, M] where TURNED."""
    ms, ns = m + tl.arange(0, BM), n + tl.arange(0, BN)
    at = ms.to(tl.int64)[:, None] * WIDTH + ns[None, :]
    if TURNED:
        at = ms[:, None] + ns.to(tl.int64)[None, :] * M
    inside = (ms < M)[:, None] & (ns < WIDTH)[None, :]
    tl.store(dw + e.to(tl.int64) * M * WIDTH + at, acc.to(dw.dtype.element_ty), mask=inside)


@triton.jit
def store_block_by_map(
    dw, acc, e, m, n, BM: tl.constexpr, BN: tl.constexpr, PIECES: tl.constexpr, TURNED: tl.constexpr
):
    """The same by a tensor map, in 1 or 2 PIECES of its columns: each waits in shared memory while the next tile's
    loads begin, and the accumulators go there directly (a `reshape`: the compiler puts a detour under `[None]`)."""
    if PIECES == 2:
        acc, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        store_block_by_map(dw, acc, e, m, n, BM, BN // 2, 1, TURNED)
        store_block_by_map(dw, right, e, m, n + BN // 2, BM, BN // 2, 1, TURNED)
    elif TURNED:
        dw.store([e, n, m], acc.to(dw.dtype).T.reshape(1, BN, BM))
    else:
        dw.store([e, m, n], acc.to(dw.dtype).reshape(1, BM, BN))


@triton.jit
def dw_kernel(
    a, b, dw, pair_of_row, offsets, E, M, WIDTH, stride_a, stride_b,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, TURNED: tl.constexpr, MAP: tl.constexpr, MAP_DW: tl.constexpr,
    PIECES: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, GROUP: tl.constexpr, BY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dW_e[m, n] (TURNED: dW_e[n, m]) = sum over the places i of expert e of a[i, m] * b[i, n], BM x BN at a time, BK
    places a step. GATHER: a is read at the row of the place's pair. MAP, MAP_DW: `b`, `dw` are tensor maps. EVEN_M,
    EVEN_N: no tile reaches past M, WIDTH. An expert without places gets zeros.

    The last step takes the expert's last BK places: a is zero at those that were counted already, and b, all the
    expert's own, needs no mask (an infinite element of a row that is met twice makes NaN). Where an expert has fewer
    than BK places, its one block reaches into other experts' rows, and both sides are masked.
    """
    if BY > 1:
        M, WIDTH, stride_a, stride_b = whole(M, BY), whole(WIDTH, BY), whole(stride_a, BY), whole(stride_b, BY)
    tall, columns = tl.cdiv(M, BM), tl.cdiv(WIDTH, BN)
    steps = tl.arange(0, BK)
    for index in tl.range(tl.program_id(0), E * tall * columns, tl.num_programs(0)):
        e = index // (tall * columns)
        tile, column = find_tile(index % (tall * columns), tall, columns, GROUP)
        m, n = tile * BM, column * BN
        first, end = tl.load(offsets + e), tl.load(offsets + e + 1)
        last = end - BK
        acc = tl.zeros((BM, BN), tl.float32)
        for i in range(first, tl.where(first <= last, end, first), BK):
            at = tl.minimum(i, last)
            new = at + steps >= i
            row = rows_at(pair_of_row, at + steps, new, TOP_K, GATHER, False)
            left = gathered_block(a, row, new, m, M, stride_a, BM, EVEN_M)
            right = straight_block(b, at, new, n, WIDTH, stride_b, BK, BN, MAP, EVEN_N, False)
            acc = tl.dot(left, right, acc, input_precision=PRECISION)
        if last < first:
            own = first + steps < end
            row = rows_at(pair_of_row, first + steps, own, TOP_K, GATHER, True)
            left = gathered_block(a, row, own, m, M, stride_a, BM, EVEN_M)
            right = straight_block(b, first, own, n, WIDTH, stride_b, BK, BN, MAP, EVEN_N, True)
            acc = tl.dot(left, right, acc, input_precision=PRECISION)
        if MAP_DW:
            store_block_by_map(dw, acc, e, m, n, BM, BN, PIECES, TURNED)
        else:
            store_block(dw, acc, e, m, n, M, WIDTH, BM, BN, TURNED)


def dw_gemm(
    left: Tensor, right: Tensor, dw: Tensor, gathered: int | None, pair_of_row: Tensor, offsets: Tensor, top_k: int,
    tile: Tile, *, chip: Chip, launch: Launch,
) -> None:  # fmt: skip
    """dw [E, left's columns, right's columns] = left^T right over each expert's rows; side `gathered`, 0 or 1, is read
    at the row of the place's pair, a side that is not at the place itself. A tile's rows are columns of the gathered
    side (of the left one, if None), its columns those of the other, which comes by a tensor map where it can."""
    turned = gathered == 1
    a, b = (right, left) if turned else (left, right)
    m, n = a.shape[1], b.shape[1]
    mapped, map_dw, pieces = chip.tensor_maps and can_map(b), chip.tensor_maps and can_map(dw), tile.parts
    part = [tile.rows, tile.columns // pieces]
    if gathered is None:  # no loads of indices to wait for: as many steps under way with half the stages
        tile = replace(tile, stages=(tile.stages + 1) // 2)
    items = dw.shape[0] * -(-m // tile.rows) * -(-n // tile.columns)
    launch(
        dw_kernel, grid=(min(items, chip.processors * tile.resident),),
        a=a, b=tensor_map(b, [tile.depth, tile.columns]) if mapped else b,
        dw=tensor_map(dw, [1, *(part[::-1] if turned else part)]) if map_dw else dw,
        pair_of_row=pair_of_row, offsets=offsets, E=dw.shape[0], M=m, WIDTH=n, stride_a=a.stride(0),
        stride_b=b.stride(0), TOP_K=top_k, GATHER=gathered is not None, TURNED=turned, MAP=mapped, MAP_DW=map_dw,
        PIECES=pieces, EVEN_M=m % tile.rows == 0, EVEN_N=n % tile.columns == 0,
        BY=by_eight(m, n, a.stride(0), b.stride(0)), PRECISION=precision_of(dw.dtype), **blocks(tile),
    )  # fmt: skip
