"""How epilogues take a product apart by columns, in registers."""

from __future__ import annotations

import triton
import triton.language as tl


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
