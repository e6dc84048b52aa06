"""What the GEMM kernels of grouped_ffn share: which tile a program works on, and how a tile of weights is loaded."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_tile(index, tiles, columns, GROUP: tl.constexpr):
    """(row tile, column tile) of work item `index` out of tiles x columns: GROUP row tiles take one column tile after
    another together, so that the weights of a column tile are read from memory once for all of them."""
    width = GROUP * columns
    first = (index // width) * GROUP
    size = tl.minimum(tiles - first, GROUP)
    inside = index % width
    return first + inside % size, inside // size


@triton.jit
def weight_tile(
    w, e, k, n, k_end, n_end, stride_e, stride_k, stride_n,
    BK: tl.constexpr, BN: tl.constexpr, MAP: tl.constexpr, K_INNER: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """[BK, BN] of expert e's matrix from (k, n), zero from k_end on. MAP: `w` is a tensor map of the three stored axes,
    of which the last is k where K_INNER; else a pointer. EVEN_K: no tile reaches past k_end."""
    if MAP:
        if K_INNER:
            tile = w.load([e, n, k]).reshape(BN, BK).T
        else:
            tile = w.load([e, k, n]).reshape(BK, BN)
    else:
        ks, ns = k + tl.arange(0, BK), n + tl.arange(0, BN)
        columns = w + e.to(tl.int64) * stride_e + ns.to(tl.int64)[None, :] * stride_n
        inside = (ns < n_end)[None, :]
        if not EVEN_K:
            inside = inside & (ks < k_end)[:, None]
        tile = tl.load(columns + ks.to(tl.int64)[:, None] * stride_k, mask=inside, other=0.0)
    return tile


@triton.jit
def halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, 2 COLUMNS] with columns gate, up, gate, up, ... as ([ROWS, COLUMNS], [ROWS, COLUMNS])."""
    return tl.split(tl.reshape(x, (ROWS, COLUMNS, 2)))


@triton.jit
def interleave_columns(g, u, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse of `halves`."""
    return tl.reshape(tl.join(g, u), (ROWS, 2 * COLUMNS))


@triton.jit
def left_right(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The two halves of x's columns. In the layouts of matrix products this moves no register, and an epilogue that
    takes one half after the other needs half of them."""
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
