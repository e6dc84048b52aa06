"""grouped_linear in Triton: the grouped products of gemm_triton.py on rows that are in expert order already."""

from __future__ import annotations

from torch import Tensor

from ..chip import Chip
from ..gemm_triton import Matrix, column_sum, rows_gemm
from ..launch import Launch, can_map, launch, with_contiguous_rows
from ..plan.on_triton import tiles_of
from ..tiles import Size, Tiles, choose
from ..weight_grad_triton import dw_gemm


def forward(
    x: Tensor, offsets: Tensor, w: Tensor, b: Tensor | None, transposed: bool, *, chip: Chip, launch: Launch = launch
) -> Tensor:
    m, out = Matrix.of(w, transposed), w.shape[2 if transposed else 1]
    y = x.new_zeros(x.shape[0], out)  # rows that belong to nobody stay zero
    tile = _tiles(x, out, x.shape[1], w.shape[0], chip).down
    order = tiles_of(offsets, x.shape[0], tile.rows, launch=launch)
    mapped = chip.tensor_maps and m.can_map
    x = with_contiguous_rows(x)
    rows_gemm(
        x, [m.forward()], b, y, order, tile, chip=chip, launch=launch, mapped=mapped, map_rows=mapped and can_map(x)
    )
    return y


def backward(
    grad: Tensor, x: Tensor, offsets: Tensor, w: Tensor, b: Tensor | None, transposed: bool, needs: list[bool],
    *, chip: Chip, launch: Launch = launch,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad, x, m = with_contiguous_rows(grad), with_contiguous_rows(x), Matrix.of(w, transposed)
    tiles = _tiles(x, x.shape[1], grad.shape[1], w.shape[0], chip)
    order = tiles_of(offsets, x.shape[0], tiles.down.rows, launch=launch)
    dx = x.new_zeros(x.shape) if needs[0] else x.new_empty(0)
    dw = w.new_empty(w.shape) if needs[1] else x.new_empty(0)
    db = b.new_empty(b.shape) if b is not None and needs[2] else x.new_empty(0)
    mapped = chip.tensor_maps and m.can_map
    if needs[0]:
        rows_gemm(
            grad, [m.backward()], None, dx, order, tiles.down,
            chip=chip, launch=launch, mapped=mapped, map_rows=mapped and can_map(grad),
        )  # fmt: skip
    if needs[1]:
        left, right = (x, grad) if transposed else (grad, x)
        dw_gemm(left, right, dw, None, order.offsets, order.offsets, 1, tiles.dw, chip=chip, launch=launch)
    if b is not None and needs[2]:
        column_sum(grad, db, None, order.offsets, order.offsets, 1, launch=launch)
    return dx, dw, db


def _tiles(x: Tensor, columns: int, depth: int, experts: int, chip: Chip) -> Tiles:
    """`down` is the tile of rows [N, depth] times [depth, columns]."""
    return choose(Size(x.shape[0], columns, depth, experts, x.element_size(), gated=False), chip)
