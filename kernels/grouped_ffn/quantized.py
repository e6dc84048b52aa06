"""grouped_ffn on frozen weights in few bits (see ../quantized.py): gradients reach rows, router weights and biases.

On CUDA devices the Triton form reads the weights as they are stored and widens them in registers, forward and backward;
so does the C++ form on CPU, forward (quantized_on_cpu.py). Elsewhere one expert at a time is widened to the rows' type.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import chip
from ..activation import Activation
from ..quantized import BLOCKS, Quantized, columns_of
from ..transforms import backward_of, implement, register_composite, register_second_backward, run
from . import composite, plain, quantized_on_cpu
from .thin_tiles import counted

_ARGS = (
    "Tensor rows, Tensor expert_ids, Tensor weights, Tensor[] w_gate_up, Tensor[]? w_up, Tensor[] w_down, "
    "Tensor? b_gate_up, Tensor? b_down"
)
_FORM = "str[] formats, int[] blocks, str activation, float[] params, bool gated, bool interleaved"

# As headgate::grouped_ffn. Each of w_gate_up, w_up (or None) and w_down is (data, scale); `formats` and `blocks`
# (rows, columns) are those of the first and of the last, and between them w_up's where it has others.
torch.library.define("headgate::grouped_ffn_quantized", f"({_ARGS}, {_FORM}, bool keep) -> (Tensor, Tensor)")
torch.library.define(
    "headgate::grouped_ffn_quantized_backward",
    f"(Tensor grad, {_ARGS}, Tensor h, {_FORM}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
)


class _Widened:
    """Quantised weights as plain.py reads weights [E, O, I]: an expert is widened when it is asked for."""

    def __init__(self, weight: Quantized, dtype: torch.dtype, turned: bool = False) -> None:
        self.weight, self.dtype, self.turned = weight, dtype, turned
        e, o, i = weight.shape
        self.shape = (e, i, o) if turned else (e, o, i)

    def transpose(self, _one: int, _two: int) -> _Widened:
        return _Widened(self.weight, self.dtype, not self.turned)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, e: int) -> Tensor:
        one = self.weight.expert(e, self.dtype)
        return one.T if self.turned else one


def unpacked(w1, w_up, w2, formats, blocks) -> tuple[Quantized, Quantized | None, Quantized]:
    """The weights out of the operator's lists."""
    first, *second, last = ((f, (blocks[2 * i], blocks[2 * i + 1])) for i, f in enumerate(formats))
    up = Quantized(w_up[0], w_up[1], *(second[0] if second else first)) if w_up else None
    return Quantized(w1[0], w1[1], *first), up, Quantized(w2[0], w2[1], *last)


def form_of(w1: Quantized, w_up: Quantized | None, w2: Quantized) -> tuple[list[str], list[int]]:
    """`formats` and `blocks`, as the operators have them."""
    there = [w1, w2] if w_up is None or w_up.format == w1.format else [w1, w_up, w2]
    return [w.format for w in there], [min(n, 2**31 - 1) for w in there for n in w.block]


def widened(dtype: torch.dtype, weights: tuple[Quantized | None, ...]) -> list[Any]:
    """For plain.py, in place of tensors."""
    return [None if w is None else _Widened(w, dtype) for w in weights]


def _forward(
    rows, expert_ids, weights, w1, w_up, w2, b1, b2, formats, blocks, kind, params, gated, interleaved, keep
) -> tuple[Tensor, Tensor]:
    packed = unpacked(w1, w_up, w2, formats, blocks)
    lib = None if keep else quantized_on_cpu.serves(rows.dtype, expert_ids.numel(), packed[2].shape[0], packed)
    if lib is not None:
        form = (kind, params, gated, interleaved)
        y = quantized_on_cpu.forward(lib, rows, expert_ids, weights, packed, b1, b2, form)
        return y, rows.new_empty(0, packed[2].shape[2] * (2 if gated else 1))
    first, second, last = widened(rows.dtype, packed)
    return plain.forward(
        rows, expert_ids, weights, first, second, last, b1, b2, kind, params, gated, False, interleaved, keep
    )


def _backward(
    grad, rows, expert_ids, weights, w1, w_up, w2, b1, b2, h, formats, blocks, kind, params, gated, interleaved, needs
) -> tuple[Tensor, ...]:
    first, second, last = widened(rows.dtype, unpacked(w1, w_up, w2, formats, blocks))
    out = plain.backward(
        grad, rows, expert_ids, weights, first, second, last, b1, b2, h, kind, params, gated, False, interleaved,
        [needs[0], needs[1], False, False, False, needs[2], needs[3]],
    )  # fmt: skip
    return out[0], out[1], out[5], out[6]


def triton_serves(
    rows: Tensor, weights: tuple[Quantized | None, ...], op: str = "grouped_ffn", keep: bool = True
) -> bool:
    """Whether the Triton form serves; says once why not. `keep`: as for a backward pass."""
    there = [w for w in weights if w is not None]
    why = chip.why_no_grouped_gemm(rows, counted(len(rows), there[0].shape[0], keep))
    for w in there:
        across = w.block[1]
        if across & (across - 1) and across < w.shape[2]:
            why = why or f"a scale's columns must be a power of 2, or all of them, for the Triton form, got {across}"
    first, second, _ = weights
    if first is not None and second is not None and first.format != second.format:
        why = why or f"w_up must have w_gate's format for the Triton form, got {second.format!r} and {first.format!r}"
    if why is not None:
        chip.say_once(op, why, "a loop that widens one expert after another, and waits for the device")
    return why is None


def _forward_on_cuda(
    rows, expert_ids, weights, w1, w_up, w2, b1, b2, formats, blocks, kind, params, gated, interleaved, keep
) -> tuple[Tensor, Tensor]:
    packed = unpacked(w1, w_up, w2, formats, blocks)
    if not triton_serves(rows, packed, keep=keep):
        rest = (formats, blocks, kind, params, gated, interleaved, keep)
        return _forward(rows, expert_ids, weights, w1, w_up, w2, b1, b2, *rest)
    from . import on_triton

    form, where = (kind, params, gated, False, interleaved, keep), chip.chip_of(rows.device.index)
    return on_triton.forward(rows, expert_ids, weights, *packed, b1, b2, *form, chip=where)


def _backward_on_cuda(
    grad, rows, expert_ids, weights, w1, w_up, w2, b1, b2, h, formats, blocks, kind, params, gated, interleaved, needs
) -> tuple[Tensor, ...]:
    packed = unpacked(w1, w_up, w2, formats, blocks)
    if not triton_serves(rows, packed):
        rest = (formats, blocks, kind, params, gated, interleaved, needs)
        return _backward(grad, rows, expert_ids, weights, w1, w_up, w2, b1, b2, h, *rest)
    from . import on_triton

    wanted = [needs[0], needs[1], False, False, False, needs[2], needs[3]]
    form, where = (kind, params, gated, False, interleaved, wanted), chip.chip_of(rows.device.index)
    out = on_triton.backward(grad, rows, expert_ids, weights, *packed, b1, b2, h, *form, chip=where)
    return out[0], out[1], out[5], out[6]


def _composite(
    rows, expert_ids, weights, w1, w_up, w2, b1, b2, formats, blocks, kind, params, gated, interleaved, keep
) -> tuple[Tensor, Tensor]:
    first, second, last = widened(rows.dtype, unpacked(w1, w_up, w2, formats, blocks))
    form = (kind, params, gated, False, interleaved, keep)
    return composite.forward(rows, expert_ids, weights, first, second, last, b1, b2, *form)


def _without_h(rows, expert_ids, weights, w1, w_up, w2, b1, b2, _h, *form) -> Tensor:
    return _composite(rows, expert_ids, weights, w1, w_up, w2, b1, b2, *(*form, False))[0]


_TENSORS = (0, 2, 6, 7)  # those of _ARGS that have a gradient
_composite_backward = backward_of(_without_h, _TENSORS)
implement("grouped_ffn_quantized", "CompositeExplicitAutograd", _forward)
implement("grouped_ffn_quantized", "cuda", _forward_on_cuda)
implement("grouped_ffn_quantized_backward", "CompositeExplicitAutograd", _backward)
implement("grouped_ffn_quantized_backward", "cuda", _backward_on_cuda)
register_composite("grouped_ffn_quantized", _composite)
register_composite("grouped_ffn_quantized_backward", _composite_backward)


@torch.library.register_fake("headgate::grouped_ffn_quantized")
def _(rows, expert_ids, weights, w1, w_up, w2, b1, b2, formats, blocks, kind, params, gated, interleaved, keep):
    f = columns_of(formats[-1], w2[0].shape[2])
    pairs = expert_ids.shape[0] * expert_ids.shape[1] if keep else 0
    return rows.new_empty(rows.shape[0], w2[0].shape[1]), rows.new_empty(pairs, 2 * f if gated else f)


@torch.library.register_fake("headgate::grouped_ffn_quantized_backward")
def _(grad, rows, expert_ids, weights, w1, w_up, w2, b1, b2, h, formats, blocks, kind, params, gated, il, needs):
    return tuple(
        rows.new_empty(0) if t is None or not need else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, need in zip((rows, weights, b1, b2), needs, strict=True)
    )


def _setup_context(ctx, inputs, output):
    rows, expert_ids, weights, w1, w_up, w2, b1, b2, *form, keep = inputs
    assert keep, "the public function keeps h whenever a gradient will be asked for"
    ctx.save_for_backward(rows, expert_ids, weights, *w1, *(w_up or ()), *w2, b1, b2, output[1])
    ctx.form, ctx.w_up = form, None if w_up is None else [None] * len(w_up)
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_y, _grad_h):
    if grad_y is None:
        return None, None, None, [None] * 2, ctx.w_up, [None] * 2, *(None,) * 9
    rows, ids, weights, *packed, b1, b2, h = ctx.saved_tensors
    w1, w_up, w2 = packed[:2], packed[2:-2] or None, packed[-2:]
    g = ctx.needs_input_grad
    needs = [g[0], g[2], g[6], g[7]]
    out = run(
        torch.ops.headgate.grouped_ffn_quantized_backward, _composite_backward,
        grad_y, rows, ids, weights, w1, w_up, w2, b1, b2, h, *ctx.form, needs,
    )  # fmt: skip
    d = [o if need else None for o, need in zip(out, needs, strict=True)]
    return d[0], None, d[1], [None] * 2, ctx.w_up, [None] * 2, d[2], d[3], *(None,) * 7


torch.library.register_autograd("headgate::grouped_ffn_quantized", _gradients, setup_context=_setup_context)
register_second_backward("grouped_ffn_quantized_backward", _composite_backward, _TENSORS)


def check(w_gate_up: object, w_up: object, w_down: object, transposed: bool, op: str) -> None:
    """Raises where some of an experts' weights are Quantized and the rest do not go with them."""
    weights = [w for w in (w_gate_up, w_up, w_down) if w is not None]
    if not all(isinstance(w, Quantized) for w in weights):
        got = ", ".join(type(w).__name__ for w in weights)
        raise TypeError(f"{op}: weights must be all Quantized or all tensors, got {got}")
    if transposed:
        raise ValueError(f"{op}: transposed must be False for Quantized weights, which are [E, out, in]")
    if isinstance(w_up, Quantized) and isinstance(w_gate_up, Quantized):
        one, two = ((w.format, w.block, w.scale.dtype) for w in (w_gate_up, w_up))
        as_long = one[1] == two[1] and one[0] in BLOCKS and two[0] in BLOCKS  # these of GGUF may differ
        if one != two and not as_long:
            raise ValueError(f"{op}: w_up must have w_gate's format, block and scales, got {two} and {one}")


def call(tensors: list[Any], act: Activation, interleaved: bool) -> Tensor:
    """The operator on what the public function has checked: rows to b_down in its order."""
    rows, expert_ids, weights, w1, w_up, w2, b1, b2 = tensors
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (rows, weights, b1, b2))
    packed = [None if w is None else [w.data, w.scale] for w in (w1, w_up, w2)]  # AOTInductor forgets empty lists
    return run(
        torch.ops.headgate.grouped_ffn_quantized, _composite,
        rows, expert_ids, weights, *packed, b1, b2, *form_of(w1, w_up, w2),
        act.kind, act.params, act.gated, interleaved, keep,
    )[0]  # fmt: skip
