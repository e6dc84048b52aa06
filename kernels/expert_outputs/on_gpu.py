"""expert_outputs on CUDA devices: the Triton form, or the plain one where that cannot serve, which says so once."""

from __future__ import annotations

from torch import Tensor

from ..chip import chip_of, say_once, why_no_grouped_gemm
from ..grouped_ffn.quantized import triton_serves
from . import plain


def expert_outputs(
    rows, expert_ids, w1, w_up, w2, b1, b2, slots, out, formats, blocks, kind, params, gated, transposed, interleaved
) -> None:
    weights = plain.stored(w1, w_up, w2, formats, blocks)
    why = why_no_grouped_gemm(rows, max(slots.numel(), w2[0].shape[0]))
    if why is None and (not formats or triton_serves(rows, weights, "expert_outputs")):
        from . import on_triton

        on_triton.expert_outputs(
            rows, expert_ids, *weights, b1, b2, slots, out, kind, params, gated, transposed, interleaved,
            chip=chip_of(rows.device.index),
        )  # fmt: skip
        return
    if why is not None:
        say_once("expert_outputs", why, "a loop of matmuls over experts, which waits for the device")
    plain.expert_outputs(
        rows, expert_ids, w1, w_up, w2, b1, b2, slots, out,
        formats, blocks, kind, params, gated, transposed, interleaved,
    )  # fmt: skip


def combine_outputs(out: Tensor, expert_ids: Tensor, weights: Tensor, num_experts: int, dtype) -> Tensor:
    if why_no_grouped_gemm(out, num_experts) is not None:
        return plain.combine_outputs(out, expert_ids, weights, num_experts, dtype)
    from . import on_triton

    return on_triton.combine_outputs(out, expert_ids, weights, num_experts, dtype)
