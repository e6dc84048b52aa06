"""expert_gradients on CPU: grouped_ffn's C++ form with a table of slots and a gradient for each pair, or the plain one.

Which of them serves is decided by the sizes of the whole batch, as grouped_ffn decides it. Weights in few bits are
widened, an expert at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..expert_outputs.on_cpu import check_slot_numbers
from ..expert_outputs.plain import stored
from ..grouped_ffn.on_cpu import Call
from . import plain


def expert_gradients(
    grad, rows, expert_ids, weights, w1, w_up, w2, b1, b2, slots, d_rows, d_weights,
    formats, blocks, kind, params, gated, transposed, interleaved,
) -> None:  # fmt: skip
    check_slot_numbers("expert_gradients", slots, w2[0].shape[0])
    form = (kind, params, gated, transposed, interleaved)
    lib = native.serves(rows.dtype, expert_ids.numel(), slots.shape[-1])
    if lib is None:
        plain.expert_gradients(
            grad, rows, expert_ids, weights, w1, w_up, w2, b1, b2, slots, d_rows, d_weights, formats, blocks, *form
        )
        return
    held, batch = stored(w1, w_up, w2, formats, blocks), (grad, rows, expert_ids, weights)
    if not formats:
        _native(lib, *batch, *held, b1, b2, slots, d_rows, d_weights, form)
        return
    ids = expert_ids.reshape(-1).long()
    here = torch.bincount(ids[(ids >= 0) & (ids < slots.numel())], minlength=slots.numel()) > 0
    for e in ((slots >= 0) & here).nonzero().flatten().tolist():
        s = int(slots[e])
        first, second, last = (None if w is None else w.expert(s, rows.dtype)[None] for w in held)
        b_first, b_last = (None if b is None else b[s : s + 1] for b in (b1, b2))
        only = torch.full_like(slots, -1)
        only[e] = 0
        _native(lib, *batch, first, second, last, b_first, b_last, only, d_rows, d_weights, form)


def _native(
    lib, grad, rows, expert_ids, weights, w1, w_up, w2, b1, b2, slots, d_rows: Tensor | None, d_weights, form
) -> None:
    kind, params, gated, transposed, interleaved = form
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    f = w2.shape[1] if transposed else w2.shape[2]
    h = rows.new_empty(expert_ids.numel(), 2 * f if gated else f)  # written where an expert is here
    call = Call(
        rows, expert_ids, weights, w1, w_up, w2, b1, b2, kind, params, gated, transposed, interleaved,
        slots=slots, op="expert_gradients",
    )  # fmt: skip
    call.run(lib.hg_grouped_ffn_forward, h=h)
    ds = 0 if d_weights is None else d_weights.data_ptr()
    call.run(
        lib.hg_grouped_ffn_backward, h=h, pairs=d_rows, gradients=(grad.data_ptr(), grad.stride(0), 0, ds, *(0,) * 14)
    )
