"""expert_gradients in Triton: the kernels of grouped_ffn, forward to the pre-activation and back, on the pairs whose
expert is here. Nothing waits for the device.

The tiles are those of all experts, as in expert_outputs: the bits are grouped_ffn's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation import Activation
from ..activation_triton import form_of
from ..chip import Chip
from ..expert_outputs.on_triton import slots_of_pairs, spread
from ..grouped_ffn.on_triton import Run
from ..launch import Launch, launch, with_contiguous_rows
from ..tiles import Tiles


def expert_gradients(
    grad, rows, expert_ids, weights, w1, w_up, w2, b1, b2, slots, d_rows: Tensor | None, d_weights: Tensor | None,
    kind, params, gated, transposed, interleaved,
    *, chip: Chip, launch: Launch = launch, tiles: Tiles | None = None,
) -> None:  # fmt: skip
    here = slots_of_pairs(expert_ids, slots)
    run = Run(rows, here, weights, w1, w_up, w2, transposed, interleaved, chip, launch, tiles, routed=slots.numel())
    form = {"FORM": form_of(Activation.from_params(kind, gated, params)), "INTERLEAVED": interleaved}
    want_x, want_s, grad = d_rows is not None, d_weights is not None, with_contiguous_rows(grad)
    a, h = run.new(run.pairs, run.f), run.new(run.pairs, run.width)
    run.up(run.schedule(run.tiles.up.rows), a, h, b1, True, form)
    del a
    order = run.schedule(run.tiles.back.rows)
    dh = run.new(run.pairs if want_x else 0, run.width)
    columns = -(-run.f // run.tiles.back.columns)
    parts = rows.new_empty(columns if want_s else 0, run.pairs, dtype=torch.float32)
    run.back(order, grad, h, dh, run.new(0), parts, form, want_x, False, want_s)
    del h
    if d_weights is not None:
        ds = d_weights.new_empty(run.pairs)
        run.router_grad(order, parts, grad, b2, ds)
        there = ((here >= 0) & (here < run.experts)).reshape(-1)
        d_weights.copy_(torch.where(there, ds, d_weights))
    del parts
    if d_rows is not None:
        dx_rows = run.new(run.pairs, run.d)
        run.rows_gemm(run.tiles.dx, order, dh, [m.backward() for m in run.ups], None, dx_rows)
        del dh
        spread(dx_rows, order, d_rows, run.experts, launch=launch)
