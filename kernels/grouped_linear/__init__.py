"""grouped_linear: every expert's matrix on the rows sorted to it. What grouped_ffn cannot say is built from two."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..autocast import under_autocast
from ..chip import Chip, chip_of, say_once, why_no_grouped_gemm
from ..transforms import backward_of, implement, register_composite, register_second_backward, run
from . import on_cpu
from .composite import composite
from .reference import grouped_linear_reference

__all__ = ["grouped_linear", "grouped_linear_reference"]

torch.library.define(
    "headgate::grouped_linear", "(Tensor x, Tensor offsets, Tensor w, Tensor? b, bool transposed) -> Tensor"
)
torch.library.define(
    "headgate::grouped_linear_backward",
    "(Tensor grad, Tensor x, Tensor offsets, Tensor w, Tensor? b, bool transposed, bool[] needs) -> "
    "(Tensor, Tensor, Tensor)",
)
# One matmul per expert is right on every device; but the reading of the offsets waits for an accelerator.
implement("grouped_linear", "CompositeExplicitAutograd", on_cpu.forward)
implement("grouped_linear_backward", "CompositeExplicitAutograd", on_cpu.backward)


def _forward_on_cuda(x, offsets, w, *rest):
    form, how = _cuda_form(x, w)
    return form.forward(x, offsets, w, *rest, **how)


def _backward_on_cuda(grad, x, offsets, w, *rest):
    form, how = _cuda_form(x, w)
    return form.backward(grad, x, offsets, w, *rest, **how)


_TENSORS = (0, 2, 3)  # x, w and b have a gradient
_composite_backward = backward_of(composite, _TENSORS)
implement("grouped_linear", "cuda", _forward_on_cuda)
implement("grouped_linear_backward", "cuda", _backward_on_cuda)
register_composite("grouped_linear", composite)
register_composite("grouped_linear_backward", _composite_backward)


def _cuda_form(x: Tensor, w: Tensor) -> tuple[ModuleType, dict[str, Chip]]:
    """The Triton form and what it needs to know, or the loop of matmuls, which says so once."""
    why = why_no_grouped_gemm(x, w.shape[0])
    if why is not None:
        say_once("grouped_linear", why, "a loop of matmuls over experts, which waits for the device")
        return on_cpu, {}
    from . import on_triton

    return on_triton, {"chip": chip_of(x.device.index)}


@torch.library.register_fake("headgate::grouped_linear")
def _(x, offsets, w, b, transposed):
    return x.new_empty(x.shape[0], w.shape[2] if transposed else w.shape[1])


@torch.library.register_fake("headgate::grouped_linear_backward")
def _(grad, x, offsets, w, b, transposed, needs):
    return tuple(
        x.new_empty(0) if t is None or not need else t.new_empty(t.shape)
        for t, need in zip((x, w, b), needs, strict=True)
    )


def _setup_context(ctx, inputs, output):
    x, offsets, w, b, ctx.transposed = inputs
    ctx.save_for_backward(x, offsets, w, b)


def _backward(ctx, grad):
    x, offsets, w, b = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
    backward = torch.ops.headgate.grouped_linear_backward
    out = run(backward, _composite_backward, grad, x, offsets, w, b, ctx.transposed, needs)
    dx, dw, db = (o if need else None for o, need in zip(out, needs, strict=True))
    return dx, None, dw, db, None


torch.library.register_autograd("headgate::grouped_linear", _backward, setup_context=_setup_context)
register_second_backward("grouped_linear_backward", _composite_backward, _TENSORS)


def grouped_linear(
    x_sorted: Tensor, offsets: Tensor, w: Tensor, b: Tensor | None = None, *, transposed: bool = False
) -> Tensor:
    """y[i] = x_sorted[i] W_e^T + b_e for the rows offsets[e] <= i < offsets[e+1] of expert e.

    Shapes (weights as stored, never copied; any strides):
        x_sorted  [N, in]      fp64, fp32, bf16 or fp16, rows in expert order (see `Plan`)
        offsets   [E+1] int    rising from 0 to at most N; rows past offsets[E] belong to nobody and come out as zero
        w         [E, out, in], or [E, in, out] when `transposed`
        b         [E, out] or None
        returns   [N, out], dtype of x_sorted

    Under autocast the inputs are cast to autocast's dtype first. Cost: 2*N*in*out FLOPs forward, twice that backward.
    Raises ValueError / TypeError naming argument, rule and value.

    >>> x, w = torch.ones(3, 2), torch.stack([torch.eye(2), 2 * torch.eye(2)])
    >>> grouped_linear(x, torch.tensor([0, 1, 3]), w)
    tensor([[1., 1.],
            [2., 2.],
            [2., 2.]])
    """
    if under_autocast(x_sorted.device):
        to = torch.get_autocast_dtype(x_sorted.device.type)
        x_sorted, w, b = x_sorted.to(to), w.to(to), None if b is None else b.to(to)
    _check(x_sorted, offsets, w, b, transposed)
    return run(torch.ops.headgate.grouped_linear, composite, x_sorted, offsets, w, b, transposed)


def _check(x: Tensor, offsets: Tensor, w: Tensor, b: Tensor | None, transposed: bool) -> None:
    if x.dim() != 2:
        raise ValueError(f"grouped_linear: x_sorted must be [N, in], got {tuple(x.shape)}")
    if w.dim() != 3:
        raise ValueError(f"grouped_linear: w must be [E, out, in], got {tuple(w.shape)}")
    fan_in, fan_out = (w.shape[1], w.shape[2]) if transposed else (w.shape[2], w.shape[1])
    if fan_in != x.shape[1]:
        raise ValueError(
            f"grouped_linear: w must take x_sorted's {x.shape[1]} columns, got {tuple(w.shape)} with "
            f"transposed={transposed}"
        )
    if offsets.dtype.is_floating_point or offsets.dtype == torch.bool:
        raise TypeError(f"grouped_linear: offsets must be integers, got {offsets.dtype}")
    if offsets.device != x.device:
        raise ValueError(f"grouped_linear: offsets must be on x_sorted's device, got {offsets.device} and {x.device}")
    if tuple(offsets.shape) != (w.shape[0] + 1,):
        raise ValueError(f"grouped_linear: offsets must be [E+1] = [{w.shape[0] + 1}], got {tuple(offsets.shape)}")
    if b is not None and tuple(b.shape) != (w.shape[0], fan_out):
        raise ValueError(f"grouped_linear: b must be {(w.shape[0], fan_out)}, got {tuple(b.shape)}")
    if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"grouped_linear: x_sorted must be fp64, fp32, bf16 or fp16, got {x.dtype}")
    for name, t in (("w", w), ("b", b)):
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"grouped_linear: {name} must have the dtype of x_sorted, got {t.dtype} and {x.dtype}")
        if t is not None and t.device != x.device:
            raise ValueError(f"grouped_linear: {name} must be on x_sorted's device, got {t.device} and {x.device}")
