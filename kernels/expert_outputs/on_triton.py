"""expert_outputs in Triton: the kernels of grouped_ffn on the pairs whose expert is here. Nothing waits for the device.

The tiles are those of all experts, and an expert's rows are cut into them from its first row on, whoever is called with
it: its outputs have the bits of grouped_ffn's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation import Activation
from ..activation_triton import form_of
from ..chip import Chip
from ..grouped_ffn.on_triton import Run, columns_of, combine
from ..launch import Launch, launch
from ..plan.on_triton import Schedule
from ..tiles import Tiles
from .triton_spread import spread_kernel


def expert_outputs(
    rows, expert_ids, w1, w_up, w2, b1, b2, slots, out, kind, params, gated, transposed, interleaved,
    *, chip: Chip, launch: Launch = launch, tiles: Tiles | None = None,
) -> None:  # fmt: skip
    here = slots_of_pairs(expert_ids, slots)
    run = Run(rows, here, None, w1, w_up, w2, transposed, interleaved, chip, launch, tiles, routed=slots.numel())
    form = {"FORM": form_of(Activation.from_params(kind, gated, params)), "INTERLEAVED": interleaved}
    order = run.schedule(run.tiles.up.rows)
    a, y_rows = run.new(run.pairs, run.f), run.new(run.pairs, run.out)
    run.up(order, a, a, b1, False, form)
    run.rows_gemm(run.tiles.down, order, a, [run.down.forward()], b2, y_rows)
    del a
    spread(y_rows, order, out, run.experts, launch=launch)


def slots_of_pairs(expert_ids: Tensor, slots: Tensor) -> Tensor:
    """The slot [R, K] of each pair's expert; -1: not here."""
    experts, ids = slots.numel(), expert_ids.long()
    return torch.where((ids >= 0) & (ids < experts), slots[ids.clamp(0, experts - 1)], -1)


def spread(y_rows: Tensor, order: Schedule, out: Tensor, slots: int, *, launch: Launch) -> None:
    """out[pair] = y_rows[its place in the order] for the pairs whose expert is in one of so many `slots`."""
    block = columns_of(out)
    launch(
        spread_kernel, grid=(out.shape[0], -(-out.shape[1] // block)), warps=4 if block > 256 else 1, stages=1,
        y_rows=y_rows, row_of_pair=order.row_of_pair, offsets=order.offsets, out=out, D=out.shape[1], S=slots, BD=block,
    )  # fmt: skip


def combine_outputs(
    out: Tensor, expert_ids: Tensor, weights: Tensor | None, num_experts: int, dtype: torch.dtype,
    *, launch: Launch = launch,
) -> Tensor:  # fmt: skip
    """Without weights: the plain sum."""
    ids, pairs = expert_ids.reshape(-1), expert_ids.numel()
    pair = torch.arange(pairs, dtype=torch.int32, device=out.device)
    place = torch.where((ids >= 0) & (ids < num_experts), pair, pairs)  # combine leaves out what is not below `live`
    live = torch.full((1,), pairs, dtype=torch.int32, device=out.device)
    y = out.new_empty(expert_ids.shape[0], out.shape[1], dtype=dtype)
    combine(out, place, live, 0, weights, y, top_k=expert_ids.shape[1], launch=launch)
    return y
