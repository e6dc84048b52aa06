"""expert_gradients on CUDA devices: the Triton form, or the plain one where that cannot serve, which says so once."""

from __future__ import annotations

import torch
from torch import Tensor

from ..chip import chip_of, say_once, why_no_grouped_gemm
from ..expert_outputs.plain import stored
from ..grouped_ffn.quantized import triton_serves
from . import plain


def expert_gradients(
    grad, rows, expert_ids, weights, w1, w_up, w2, b1, b2, slots, d_rows, d_weights,
    formats, blocks, kind, params, gated, transposed, interleaved,
) -> None:  # fmt: skip
    held, form = stored(w1, w_up, w2, formats, blocks), (kind, params, gated, transposed, interleaved)
    why = why_no_grouped_gemm(rows, max(slots.numel(), w2[0].shape[0]))
    if why is None and (not formats or triton_serves(rows, held, "expert_gradients")):
        from . import on_triton

        on_triton.expert_gradients(
            grad, rows, expert_ids, weights, *held, b1, b2, slots, d_rows, d_weights, *form,
            chip=chip_of(rows.device.index),
        )  # fmt: skip
        return
    if why is not None:
        say_once("expert_gradients", why, "a loop of matmuls over experts, which waits for the device")
    plain.expert_gradients(
        grad, rows, expert_ids, weights, w1, w_up, w2, b1, b2, slots, d_rows, d_weights, formats, blocks, *form
    )


def combine_gradients(d_rows: Tensor, expert_ids: Tensor, num_experts: int, dtype: torch.dtype) -> Tensor:
    if why_no_grouped_gemm(d_rows, num_experts) is not None:
        return plain.combine_gradients(d_rows, expert_ids, num_experts, dtype)
    from ..expert_outputs.on_triton import combine_outputs

    return combine_outputs(d_rows, expert_ids, None, num_experts, dtype)
