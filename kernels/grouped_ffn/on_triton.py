"""grouped_ffn in Triton: which kernels run, on which tiles, in which order. Nothing here waits for the device.

Layout of h: [N, W] in the plan's order, columns as the weights' rows are stored (gate then up for a pair).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..activation import Activation
from ..activation_triton import form_of
from ..chip import Chip, say_once
from ..gemm_triton import Matrix, Operand, by_eight, column_sum, or_other, over_rows, precision_of, rows_gemm
from ..launch import Launch, can_map, launch, with_contiguous_rows
from ..plan.on_triton import Schedule, schedule
from ..tiles import Size, Tile, Tiles, choose
from ..weight_grad_triton import dw_gemm
from . import thin
from .triton_backward import back_kernel, router_grad_kernel
from .triton_forward import combine_kernel, up_kernel


def forward(
    rows, expert_ids, weights, w1, w_up, w2, b1, b2, kind, params, gated, transposed, interleaved, keep,
    *, chip: Chip, launch: Launch = launch, tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    act = Activation.from_params(kind, gated, params)
    if not keep and tiles is None and thin.serves(rows):
        tensors = (rows, expert_ids, weights, w1, w_up, w2, b1, b2)
        y = thin.thin_forward(*tensors, act, transposed, interleaved, chip=chip, launch=launch)
        return y, rows.new_empty(0, _width(w1, w_up, transposed))
    run = Run(rows, expert_ids, weights, w1, w_up, w2, transposed, interleaved, chip, launch, tiles)
    form = {"FORM": form_of(act), "INTERLEAVED": interleaved}
    order = run.schedule(run.tiles.up.rows)
    a, h = run.new(run.pairs, run.f), run.new(run.pairs if keep else 0, run.width)
    run.up(order, a, h, b1, keep, form)
    y_rows, y = run.new(run.pairs, run.out), run.new(run.rows.shape[0], run.out)
    run.rows_gemm(run.tiles.down, order, a, [run.down.forward()], b2, y_rows)
    del a
    run.combine(order, y_rows, run.weights, y)
    return y, h


def backward(
    grad, rows, expert_ids, weights, w1, w_up, w2, b1, b2, h, kind, params, gated, transposed, interleaved, needs,
    *, chip: Chip, launch: Launch = launch, tiles: Tiles | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    run = Run(rows, expert_ids, weights, w1, w_up, w2, transposed, interleaved, chip, launch, tiles)
    form = {"FORM": form_of(Activation.from_params(kind, gated, params)), "INTERLEAVED": interleaved}
    order = run.schedule(run.tiles.back.rows)
    grad = with_contiguous_rows(grad)
    dx, ds, d1, du, d2, db1, db2 = out = tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if t is not None and need else run.new(0)
        for t, need in zip((rows, weights, w1, w_up, w2, b1, b2), needs, strict=True)
    )
    want_x, want_s, want_1, want_up, want_2, want_b1, want_b2 = needs
    want_h = want_x or want_1 or want_up or want_b1
    dh, sa = run.new(run.pairs if want_h else 0, run.width), run.new(run.pairs if want_2 else 0, run.f)
    columns = -(-run.f // run.tiles.back.columns)
    parts = rows.new_empty(columns if want_s else 0, run.pairs, dtype=torch.float32)
    if want_h or want_2 or want_s:
        run.back(order, grad, h, dh, sa, parts, form, want_h, want_2, want_s)
    if want_s:
        run.router_grad(order, parts, grad, b2, ds)
    if want_2:
        run.dw(order, grad, sa, d2, gathered=0, swap=transposed)
    if want_b2:
        run.column_sum(order, grad, db2, run.weights)
    del sa, parts
    if want_b1:
        run.column_sum(order, dh, db1, None)
    pair = w_up is not None
    for wanted, part, dw in ((want_1, dh[:, : run.f] if pair else dh, d1), (want_up, dh[:, run.f :], du)):
        if wanted:
            run.dw(order, part, run.rows, dw, gathered=1, swap=transposed)
    if want_x:
        dx_rows = run.new(run.pairs, run.d)
        ups = [m.backward() for m in run.ups]
        run.rows_gemm(run.tiles.dx, order, dh, ups, None, dx_rows)
        del dh, part
        run.combine(order, dx_rows, None, dx)
    return out


def combine(
    y_rows: Tensor, row_of_pair: Tensor, offsets: Tensor, experts: int, weights: Tensor | None, y: Tensor,
    *, top_k: int, launch: Launch,
) -> None:  # fmt: skip
    """y [R, D]: each row's sum over its pairs, of the rows of y_rows at their places, where those are live."""
    block = columns_of(y)
    launch(
        combine_kernel, grid=(y.shape[0], -(-y.shape[1] // block)), warps=4 if block > 256 else 1, stages=1,
        y_rows=y_rows, row_of_pair=row_of_pair, offsets=offsets, weights=or_other(weights, y_rows), y=y,
        D=y.shape[1], E=experts, TOP_K=top_k, WEIGHTED=weights is not None, BD=block,
    )  # fmt: skip


def columns_of(y: Tensor) -> int:
    """Columns of one program of a kernel that copies or adds rows."""
    return min(1024, max(16, triton.next_power_of_2(y.shape[1])))


def _width(w1: Tensor, w_up: Tensor | None, transposed: bool) -> int:
    return sum(w.shape[2 if transposed else 1] for w in (w1, w_up) if w is not None)


class Run:
    """The tensors, sizes and tiles of one pass, and one method per kernel. `routed`: how many experts the routing has,
    where those of the weights are some of them: the tiles are the ones for all."""

    def __init__(
        self, rows, expert_ids, weights, w1, w_up, w2, transposed, interleaved, chip, launch, tiles,
        routed: int | None = None,
    ) -> None:  # fmt: skip
        self.rows, self.ids = with_contiguous_rows(rows), expert_ids
        self.weights = None if weights is None else weights.contiguous()
        self.ups, self.down = Matrix.pair(w1, w_up, transposed), Matrix.of(w2, transposed)
        self.experts, self.top_k, self.pairs = w2.shape[0], expert_ids.shape[1], expert_ids.numel()
        self.d = rows.shape[1]
        self.f, self.out = (w2.shape[1], w2.shape[2]) if transposed else (w2.shape[2], w2.shape[1])
        self.width = _width(w1, w_up, transposed)
        self.chip, self.launch = chip, launch
        formats = () if self.down.format == "none" else (self.ups[0].format, self.down.format)
        size = Size(
            self.pairs, self.d, self.f, routed or self.experts, rows.element_size(), self.width > self.f, interleaved,
            formats,
        )  # fmt: skip
        self.tiles = tiles or choose(size, chip)
        # where a map's tile begins must be aligned too, and the up projection behind the gate's columns is not always
        self.aligned = self.f * rows.element_size() % 16 == 0
        behind = len(self.ups) == 1 and self.width > self.f and not interleaved and not self.ups[0].input_inner
        self.mapped = chip.tensor_maps and all(m.can_map for m in (*self.ups, self.down))
        self.mapped = self.mapped and (self.aligned or not behind)
        if chip.tensor_maps and not (self.mapped and self.aligned) and self.pairs and not formats:
            say_once(
                "grouped_ffn",
                "expert weights whose matrices do not begin and run on at multiples of 16 bytes cannot be read by TMA",
                "the same kernels with plain loads, which are slower",
            )

    def new(self, *shape: int) -> Tensor:
        return self.rows.new_empty(shape)

    def schedule(self, block_rows: int) -> Schedule:
        return schedule(self.ids, self.experts, block_rows, launch=self.launch)

    def _over_rows(self, tile: Tile, order: Schedule, columns: int) -> dict[str, Any]:
        return {"PRECISION": precision_of(self.rows.dtype), **over_rows(self.chip, tile, order, columns)}

    def up(self, order: Schedule, a: Tensor, h: Tensor, bias: Tensor | None, keep: bool, form: dict[str, Any]) -> None:
        tile, ups = self.tiles.up, [m.forward() for m in self.ups]
        wide = tile.columns * 2 if form["INTERLEAVED"] else tile.columns
        handles = [u.handle(self.mapped, tile.depth, wide) for u in ups]
        self.launch(
            up_kernel,
            x=self.rows, w_gate=handles[0], w_up=handles[-1], s_gate=self.ups[0].scale, s_up=self.ups[-1].scale,
            bias=or_other(bias, a), a=a, h=h if keep else a, pair_of_row=order.pair_of_row, D=self.d, F=self.f,
            up_row=0 if len(ups) == 2 else self.f,
            stride_x=self.rows.stride(0), **ups[0].arguments(), TOP_K=self.top_k, **form, KEEP=keep,
            BIAS=bias is not None, MAP=self.mapped, EVEN_K=self.d % tile.depth == 0,
            BY=by_eight(self.d, self.f, self.rows.stride(0), *ups[0].outer_strides), PIECES=tile.pieces,
            **self._over_rows(tile, order, self.f),
        )  # fmt: skip

    def rows_gemm(
        self, tile: Tile, order: Schedule, a: Tensor, w: list[Operand], bias: Tensor | None, y: Tensor
    ) -> None:
        rows_gemm(
            a, w, bias, y, order, tile, chip=self.chip, launch=self.launch, mapped=self.mapped,
            map_rows=self.chip.tensor_maps and can_map(a) and (self.aligned or len(w) == 1),
        )  # fmt: skip

    def combine(self, order: Schedule, y_rows: Tensor, weights: Tensor | None, y: Tensor) -> None:
        combine(
            y_rows, order.row_of_pair, order.offsets, self.experts, weights, y, top_k=self.top_k, launch=self.launch
        )

    def back(self, order, grad, h, dh, sa, parts, form, want_h, want_2, want_s) -> None:
        tile, w = self.tiles.back, self.down.backward()
        self.launch(
            back_kernel,
            grad=grad, w=w.handle(self.mapped, tile.depth, tile.columns), s=self.down.scale, h=h, weights=self.weights,
            dh=dh if want_h else h, sa=sa if want_2 else h, parts=parts if want_s else h,
            pair_of_row=order.pair_of_row, D=self.out, F=self.f, N=self.pairs, stride_g=grad.stride(0), **w.arguments(),
            TOP_K=self.top_k, **form, DH=want_h, SA=want_2, DS=want_s, MAP=self.mapped,
            BY=by_eight(self.out, self.f, grad.stride(0), *w.outer_strides), EVEN_K=self.out % tile.depth == 0,
            PIECES=tile.pieces, **self._over_rows(tile, order, self.f),
        )  # fmt: skip

    def dw(self, order: Schedule, left: Tensor, right: Tensor, dw: Tensor, gathered: int, swap: bool) -> None:
        """dw = left^T right per expert, or right^T left where `swap`; side `gathered` is read by the pairs' rows."""
        if swap:
            left, right, gathered = right, left, 1 - gathered
        dw_gemm(
            left, right, dw, gathered, order.pair_of_row, order.offsets, self.top_k, self.tiles.dw,
            chip=self.chip, launch=self.launch,
        )  # fmt: skip

    def router_grad(self, order: Schedule, parts: Tensor, grad: Tensor, bias: Tensor | None, ds: Tensor) -> None:
        block = 16 if bias is not None else 256
        self.launch(
            router_grad_kernel, grid=(-(-self.pairs // block),), warps=4, stages=1,
            parts=parts, row_of_pair=order.row_of_pair, expert_ids=self.ids.contiguous(), grad=grad,
            bias=or_other(bias, grad), offsets=order.offsets, ds=ds, N=self.pairs, E=self.experts, D=self.out,
            COLUMNS=parts.shape[0], stride_g=grad.stride(0), TOP_K=self.top_k, BIAS=bias is not None, BP=block, BD=128,
        )  # fmt: skip

    def column_sum(self, order: Schedule, values: Tensor, out: Tensor, weights: Tensor | None) -> None:
        column_sum(values, out, weights, order.pair_of_row, order.offsets, self.top_k, launch=self.launch)
