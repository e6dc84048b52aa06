"""expert_outputs on CPU: grouped_ffn's C++ form with a table of slots and an output for each pair, or the plain form.

Which of them serves is decided by the sizes of the whole batch, as grouped_ffn decides it.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .. import native
from ..grouped_ffn import quantized_on_cpu
from ..grouped_ffn.on_cpu import Call
from ..grouped_ffn.quantized import unpacked
from . import plain


def expert_outputs(
    rows, expert_ids, w1, w_up, w2, b1, b2, slots, out, formats, blocks, kind, params, gated, transposed, interleaved
) -> None:
    check_slot_numbers("expert_outputs", slots, w2[0].shape[0])
    sizes, packed = (rows.dtype, expert_ids.numel(), slots.shape[-1]), None
    if formats:
        packed = unpacked(w1, w_up, w2, formats, blocks)
        lib = quantized_on_cpu.serves(*sizes, packed)
    else:
        lib = native.serves(*sizes)
    if lib is None:
        plain.expert_outputs(
            rows, expert_ids, w1, w_up, w2, b1, b2, slots, out,
            formats, blocks, kind, params, gated, transposed, interleaved,
        )  # fmt: skip
    elif out.numel() and packed is not None:
        form = (kind, params, gated, interleaved)
        quantized_on_cpu.outputs(lib, rows, expert_ids, packed, b1, b2, slots, out, form)
    elif out.numel():
        weights = plain.stored(w1, w_up, w2, formats, blocks)
        call = Call(
            rows, expert_ids, None, *weights, b1, b2, kind, params, gated, transposed, interleaved,
            slots=slots, op="expert_outputs",
        )  # fmt: skip
        call.run(lib.hg_grouped_ffn_forward, pairs=out)


def check_slot_numbers(op: str, slots: Tensor, there: int) -> None:
    """Raises ValueError where a number of `slots` is no slot of the weights, or only some of an expert's are here."""
    numbers = slots.numpy()  # a tenth of the time of torch's
    least, most = int(numbers.min()), int(numbers.max())
    if least < -1 or most >= there:
        wrong = least if least < -1 else most
        raise ValueError(f"{op}: slot_of_expert must be -1 (not here) to S - 1 = {there - 1}, got {wrong}")
    if numbers.ndim == 2 and ((numbers < 0) != (numbers[0] < 0)).any():
        raise ValueError(f"{op}: slot_of_expert must have all weights of an expert here or none, got some -1")


def combine_outputs(out: Tensor, expert_ids: Tensor, weights: Tensor, num_experts: int, dtype: torch.dtype) -> Tensor:
    lib = native.serves(dtype, expert_ids.numel(), num_experts)
    if lib is None:
        return plain.combine_outputs(out, expert_ids, weights, num_experts, dtype)
    (rows, k), width = expert_ids.shape, out.shape[1]
    ids, weights = expert_ids.contiguous(), weights.to(torch.float32).contiguous()
    y = out.new_empty(rows, width, dtype=dtype)
    sizes = [native.DTYPES[dtype], torch.get_num_threads(), rows, k, num_experts, width]
    args = [*sizes, *(t.data_ptr() for t in (ids, weights, out, y))]
    if lib.hg_combine_outputs((ctypes.c_int64 * len(args))(*args)):
        raise MemoryError("combine_outputs: no memory for scratch space")
    return y
