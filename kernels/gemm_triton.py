"""Grouped products in Triton: rows in expert order times their expert's matrix, and sums over an expert's rows.
Kernels first, then the functions that start them. The matrix's gradient is in weight_grad_triton.py.

A grid has as many programs as the chip holds; each walks over tiles. How many tiles there are stands in device memory
(`tiles`), so nobody waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chip import Chip
from .gguf_triton import at_words, in_blocks
from .launch import Launch, can_map, tensor_map
from .plan.on_triton import Schedule
from .quantized import BLOCKS, Quantized
from .quantized_triton import quantized_tile
from .tiles import Tile


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
def row_tile(index, live, columns, tile_expert, tile_row, offsets, BM: tl.constexpr, GROUP: tl.constexpr):
    """Work item `index` over rows in expert order: (expert, first place, places [BM], which of them are the expert's,
    column tile)."""
    tile, column = find_tile(index, live, columns, GROUP)
    e, first = tl.load(tile_expert + tile), tl.load(tile_row + tile)
    place = first + tl.arange(0, BM)
    return e, first, place, place < tl.load(offsets + e + 1), column


@triton.jit
def whole_strides(stride_e, stride_k, stride_n, K_INNER: tl.constexpr, BY: tl.constexpr, FORMAT: tl.constexpr):
    """The two strides that are not 1 as multiples of BY; see `whole`. Those of GGUF's blocks need not be."""
    if in_blocks(FORMAT):
        return stride_e, stride_k, stride_n
    elif K_INNER:
        return whole(stride_e, BY), stride_k, whole(stride_n, BY)
    else:
        return whole(stride_e, BY), whole(stride_k, BY), stride_n


@triton.jit
def whole(x, BY: tl.constexpr):
    """x, which the host has seen to be a multiple of BY, as something the compiler knows to be one: it learns of
    multiples of 16 by itself, and 8 elements of 2 bytes are enough for the widest loads and stores."""
    return x // BY * BY


@triton.jit
def weight_tile(
    w, s, e, k, n, k_end, n_end, stride_e, stride_k, stride_n, stride_se, stride_so,
    BK: tl.constexpr, BN: tl.constexpr, MAP: tl.constexpr, K_INNER: tl.constexpr, EVEN_K: tl.constexpr,
    FORMAT: tl.constexpr, SCALED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """[BK, BN] of expert e's matrix from (k, n), zero from k_end on. MAP: `w` is a tensor map of the three stored axes,
    of which the last is k where K_INNER; else a pointer. EVEN_K: no tile reaches past k_end. With a FORMAT the numbers
    are few bits, one scale for SCALED (rows, columns) of the stored axes, widened to DTYPE in registers."""
    if FORMAT != "none":
        if K_INNER:
            tile = quantized_tile(
                w, s, e, n, k, n_end, k_end, stride_e, stride_n, stride_se, stride_so, BN, BK, SCALED[0], SCALED[1],
                FORMAT,
            ).T  # fmt: skip
        else:
            tile = quantized_tile(
                w, s, e, k, n, k_end, n_end, stride_e, stride_k, stride_se, stride_so, BK, BN, SCALED[0], SCALED[1],
                FORMAT,
            )  # fmt: skip
        tile = tile.to(DTYPE)
    elif MAP:
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
def rows_kernel(
    a, w, w_second, s, s_second, bias, y, offsets, tile_expert, tile_row, tiles,
    DEPTH, WIDTH, stride_a, stride_e, stride_k, stride_n, stride_se, stride_so,
    SEGMENTS: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, MAP: tl.constexpr, MAP_A: tl.constexpr, K_INNER: tl.constexpr, EVEN_K: tl.constexpr,
    FORMAT: tl.constexpr, SCALED: tl.constexpr, BY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y[i, n] = A[i, :DEPTH] W_e + b_e for rows in expert order: the down projection, and dX = dH W1 of the backward
    pass. SEGMENTS 2: A has DEPTH more columns, for w_second (a pair of gate and up). MAP_A: `a` is a tensor map."""
    if BY > 1:
        DEPTH, WIDTH, stride_a = whole(DEPTH, BY), whole(WIDTH, BY), whole(stride_a, BY)
        stride_e, stride_k, stride_n = whole_strides(stride_e, stride_k, stride_n, K_INNER, BY, FORMAT)
    live, columns = tl.load(tiles), tl.cdiv(WIDTH, BN)
    ks = tl.arange(0, BK)
    for index in tl.range(tl.program_id(0), live * columns, tl.num_programs(0)):
        e, first, place, valid, column = row_tile(index, live, columns, tile_expert, tile_row, offsets, BM, GROUP)
        n = column * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for segment in tl.static_range(SEGMENTS):
            for k in range(0, DEPTH, BK):
                if MAP_A:  # rows past the expert's end are somebody else's, and are not stored
                    at = a.load([first, segment * DEPTH + k])
                else:
                    a_rows = a + place.to(tl.int64)[:, None] * stride_a + segment * DEPTH
                    inside = valid[:, None]
                    if not EVEN_K:
                        inside = inside & (k + ks < DEPTH)[None, :]
                    at = tl.load(a_rows + (k + ks)[None, :], mask=inside, other=0.0)
                w_here, s_here = w if segment == 0 else w_second, s if segment == 0 else s_second
                ws = weight_tile(
                    w_here, s_here, e, k, n, DEPTH, WIDTH, stride_e, stride_k, stride_n, stride_se, stride_so,
                    BK, BN, MAP, K_INNER, EVEN_K, FORMAT, SCALED, y.dtype.element_ty,
                )  # fmt: skip
                acc = tl.dot(at, ws, acc, input_precision=PRECISION)
        wide = n + tl.arange(0, BN)
        if BIAS:
            acc += tl.load(bias + e.to(tl.int64) * WIDTH + wide, mask=wide < WIDTH, other=0.0).to(tl.float32)[None, :]
        tl.store(
            y + place.to(tl.int64)[:, None] * WIDTH + wide[None, :],
            acc.to(y.dtype.element_ty),
            mask=valid[:, None] & (wide < WIDTH)[None, :],
        )


@triton.jit
def column_sum_kernel(
    values, weights, pair_of_row, offsets, out, WIDTH, stride,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out_e[n] = sum over the places i of expert e of values[i, n]; where GATHER, of s_i * values[row of place i, n]
    with s the router weight. One program for BN columns of an expert, rows rising."""
    e, n = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    first, end = tl.load(offsets + e), tl.load(offsets + e + 1)
    acc = tl.zeros((BR, BN), tl.float32)
    for i in tl.range(first, end, BR, num_stages=3):
        place = i + tl.arange(0, BR)
        valid = place < end
        row, inside = place, valid[:, None] & (n < WIDTH)[None, :]
        if GATHER:
            pair = tl.load(pair_of_row + place, mask=valid, other=0)
            row = pair // TOP_K
        v = tl.load(values + row.to(tl.int64)[:, None] * stride + n[None, :], mask=inside, other=0.0).to(tl.float32)
        if GATHER:
            v *= tl.load(weights + pair, mask=valid, other=0.0).to(tl.float32)[:, None]
        acc += v
    tl.store(out + e.to(tl.int64) * WIDTH + n, tl.sum(acc, axis=0).to(out.dtype.element_ty), mask=n < WIDTH)


@dataclass(frozen=True)
class Operand:
    """Expert weights as the right side [k, n] of a product: which stored axis is which, and by how far apart."""

    weights: Matrix
    k_inner: bool

    def arguments(self) -> dict[str, Any]:
        """What weight_tile asks besides pointers, tile and sizes."""
        m = self.weights
        e, outer, inner = m.stored.stride()
        k, n = (inner, outer) if self.k_inner else (outer, inner)
        return {
            "stride_e": e, "stride_k": k, "stride_n": n, "stride_se": m.scale.stride(0), "stride_so": m.scale.stride(1),
            "K_INNER": self.k_inner, "FORMAT": m.format, "SCALED": m.scaled,
        }  # fmt: skip

    @property
    def outer_strides(self) -> tuple[int, int]:
        """Between experts, and between an expert's rows as they are stored, where BY of `whole` asks for them."""
        if self.weights.format in BLOCKS:
            return 0, 0
        return self.weights.stored.stride(0), self.weights.stored.stride(1)

    def handle(self, mapped: bool, bk: int, bn: int) -> Any:
        """What a kernel gets: a tensor map for tiles of bk x bn, or the tensor."""
        stored = self.weights.stored
        return tensor_map(stored, [1, bn, bk] if self.k_inner else [1, bk, bn]) if mapped else stored


@dataclass(frozen=True)
class Matrix:
    """An expert projection: `stored` [E, ., .] with a contiguous last axis, which is the input where `input_inner`;
    of Quantized weights the bytes, their `scale`, `format` and what one scale spans. `scale` is `stored` where the
    weights have none beside them."""

    stored: Tensor
    input_inner: bool
    scale: Tensor
    format: str = "none"
    scaled: tuple[int, int] = (1, 1)

    @classmethod
    def of(cls, w: Tensor | Quantized, transposed: bool) -> Matrix:
        """Of weights of any strides; copied only where neither of an expert's axes is contiguous."""
        if isinstance(w, Quantized) and w.format in BLOCKS:
            data = at_words(w.data, w.format)
            return cls(data, True, data, w.format, w.block)
        if isinstance(w, Quantized):
            data, scale = (t if t.stride(2) == 1 else t.contiguous() for t in (w.data, w.scale))
            return cls(data.view(torch.uint8), True, scale, w.format, w.block)
        if w.stride(2) != 1 and w.stride(1) == 1:
            return cls(w.transpose(1, 2), transposed, w)
        stored = w if w.stride(2) == 1 else w.contiguous()
        return cls(stored, not transposed, stored)

    @classmethod
    def pair(cls, w: Tensor | Quantized, second: Tensor | Quantized | None, transposed: bool) -> list[Matrix]:
        """One or two, of one layout: a program reads both by one set of strides."""
        given = [w] if second is None else [w, second]
        both = [cls.of(t, transposed) for t in given]
        if len({(m.input_inner, m.stored.stride(), m.scale.stride()) for m in both}) > 1:
            both = [cls.of(t.copy() if isinstance(t, Quantized) else t.contiguous(), transposed) for t in given]
        return both

    @property
    def can_map(self) -> bool:
        """Whether TMA can read it."""
        return self.format == "none" and can_map(self.stored)

    def forward(self) -> Operand:
        return Operand(self, self.input_inner)

    def backward(self) -> Operand:
        return Operand(self, not self.input_inner)


def blocks(tile: Tile) -> dict[str, int]:
    """The tile, as kernels and `launch` take it."""
    return {
        "BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "GROUP": tile.group,
        "warps": tile.warps, "stages": tile.stages,
    }  # fmt: skip


def over_rows(chip: Chip, tile: Tile, order: Schedule, columns: int) -> dict[str, Any]:
    """What every product over rows in expert order is started with: the grid, the list of tiles, the tile."""
    items = order.tile_expert.numel() * -(-columns // tile.columns)
    return {
        "grid": (min(items, chip.processors * tile.resident),),
        "offsets": order.offsets,
        "tile_expert": order.tile_expert,
        "tile_row": order.tile_row,
        "tiles": order.tiles,
        **blocks(tile),
    }


def precision_of(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: fp32 by torch's own rule for fp32 products, the rest as it is."""
    if dtype != torch.float32:
        return "ieee"
    # both of torch's switches show here; get_float32_matmul_precision raises where this one was used to set it
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def by_eight(*numbers: int) -> int:
    """BY of `whole`: 8 where all of these are multiples of it, else 1."""
    return 8 if all(n % 8 == 0 for n in numbers) else 1


def or_other(t: Tensor | None, other: Tensor) -> Tensor:
    """A kernel's pointer argument cannot be None; the one given instead is not read."""
    return other if t is None else t.contiguous()


def rows_gemm(
    a: Tensor, w: Sequence[Operand], bias: Tensor | None, y: Tensor, order: Schedule, tile: Tile,
    *, chip: Chip, launch: Launch, mapped: bool, map_rows: bool,
) -> None:  # fmt: skip
    """y = a w for rows in expert order. Of two `w` each takes half of a's columns, and the products are added.
    `mapped`: w by tensor maps; `map_rows`: a too. Rows of y that no expert owns are not written."""
    depth = a.shape[1] // len(w)
    handles = [m.handle(mapped, tile.depth, tile.columns) for m in w]
    launch(
        rows_kernel,
        a=tensor_map(a, [tile.rows, tile.depth]) if map_rows else a, w=handles[0], w_second=handles[-1],
        s=w[0].weights.scale, s_second=w[-1].weights.scale, bias=or_other(bias, y), y=y, DEPTH=depth,
        WIDTH=y.shape[1], stride_a=a.stride(0), **w[0].arguments(), SEGMENTS=len(w), BIAS=bias is not None, MAP=mapped,
        MAP_A=map_rows, BY=by_eight(depth, y.shape[1], a.stride(0), *w[0].outer_strides),
        EVEN_K=depth % tile.depth == 0, PRECISION=precision_of(y.dtype),
        **over_rows(chip, tile, order, y.shape[1]),
    )  # fmt: skip


def column_sum(
    values: Tensor, out: Tensor, weights: Tensor | None, pair_of_row: Tensor, offsets: Tensor, top_k: int,
    *, launch: Launch,
) -> None:  # fmt: skip
    """out [E, columns] = the sum of each expert's rows of `values`; with `weights`, of the rows of its places' pairs,
    each times its router weight."""
    launch(
        column_sum_kernel, grid=(out.shape[0], -(-out.shape[1] // 64)), warps=4, stages=2,
        values=values, weights=or_other(weights, values), pair_of_row=pair_of_row, offsets=offsets, out=out,
        WIDTH=out.shape[1], stride=values.stride(0), TOP_K=top_k, GATHER=weights is not None, BR=32, BN=64,
    )  # fmt: skip
