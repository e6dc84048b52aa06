"""router_logits: a router's scores for every expert, in fp32 whatever the model's dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from ..autocast import no_autocast
from ..chip import chip_of, say_once, why_not
from ..transforms import implement, register_composite, run
from .reference import router_logits_reference, wide

__all__ = ["router_logits", "router_logits_reference"]

_HALF = (torch.bfloat16, torch.float16)

torch.library.define("headgate::router_logits", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def _on_cuda(x, weight, bias):
    if x.dtype == torch.float64 or weight.dtype == torch.float64:
        return router_logits_reference(x, weight, bias)
    why = why_not(x.device.index)
    if why is not None:
        say_once("router_logits", why, "a product of widened copies")
        return router_logits_reference(x, weight, bias)
    from .on_triton import router_logits_on_triton, serves

    if serves(x):
        return router_logits_on_triton(x, weight, bias, chip=chip_of(x.device.index))
    if x.dtype == weight.dtype and x.dtype in _HALF:
        with no_autocast(x.device):
            logits = torch.mm(x, weight.T, out_dtype=torch.float32)
        return logits if bias is None else logits.add_(bias)
    return router_logits_reference(x, weight, bias)


implement("router_logits", "CompositeExplicitAutograd", router_logits_reference)
implement("router_logits", "cuda", _on_cuda)
register_composite("router_logits", router_logits_reference)


@torch.library.register_fake("headgate::router_logits")
def _(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0], dtype=wide(x.dtype))


def _setup_context(ctx, inputs, output):
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)  # as they are: a plain cast and product would keep a wider copy of every row
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad
    with no_autocast(grad.device):
        return (
            (grad @ weight.to(grad.dtype)).to(x.dtype) if need_x else None,
            (grad.T @ x.to(grad.dtype)).to(weight.dtype) if need_weight else None,
            grad.sum(0).to(ctx.bias_dtype) if need_bias else None,
        )


torch.library.register_autograd("headgate::router_logits", _backward, setup_context=_setup_context)


def router_logits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in fp32 (fp64 for fp64 x): half types keep their ties apart; untouched by autocast.

    `x` [T, D] and `weight` [E, D] of any strides, dtypes may differ; `bias` [E] or None. Returns [T, E].
    Backward keeps x and weight as they are, and may be differentiated again. On CUDA devices up to 64 tokens take one
    launch that reads the weights once, more go to cuBLAS with half operands and fp32 results; nowhere is a widened copy
    made but on CPU and of fp32 x beside half weights.

    Raises ValueError / TypeError naming argument, rule and value. Cost: 2*T*E*D FLOPs.

    >>> router_logits(torch.ones(2, 8, dtype=torch.bfloat16), torch.ones(4, 8, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    if x.dim() != 2:
        raise ValueError(f"router_logits: x must be [T, D], got {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"router_logits: weight must be [E, D] with D={x.shape[1]}, got {tuple(weight.shape)}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"router_logits: bias must be [E] = ({weight.shape[0]},), got {tuple(bias.shape)}")
    for name, t in (("x", x), ("weight", weight), ("bias", bias)):
        if t is None:
            continue
        if t is not x and not t.dtype.is_floating_point:  # x of integers is cast up like any other
            raise TypeError(f"router_logits: {name} must be floating point, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"router_logits: {name} must be on the device of x, got {t.device} and {x.device}")
    # without a graph there is nothing to keep, and on CPU the product alone takes half the time for one token
    if x.device.type == "cpu" and not torch.is_grad_enabled():
        return router_logits_reference(x, weight, bias)
    return run(torch.ops.headgate.router_logits, router_logits_reference, x, weight, bias)
