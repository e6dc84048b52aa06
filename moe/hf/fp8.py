"""Experts in FP8 with block scales (transformers' FP8Experts): grouped_ffn reads the weights as they are stored.

The activations stay in the rows' dtype, so the result is nearer to the unquantised model than FP8 matmuls are. What the
operation cannot say (a gate of the module's own, blocks that do not fit its tiles) is widened one expert at a time.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.chip import say_once
from ...kernels.grouped_ffn import grouped_ffn
from ...kernels.plan import plan
from ...kernels.quantized import Quantized
from ...kernels.routing import Routing
from .counting import mark
from .experts import describe, flags
from .gate import activation_of

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = (torch.float32, torch.bfloat16, torch.float16)
_LOOP = "a loop that widens one expert after another around it"


def matches(module: nn.Module) -> bool:
    return hasattr(module, "down_proj_scale_inv") and hasattr(module, "has_gate")


def refusal(module: Any) -> str | None:
    dtype = module.down_proj.dtype
    if dtype not in _FP8:
        return f"down_proj must be float8 beside its scales, got {dtype}"
    if flags(module)[2]:
        return "down_proj must be [E, out, in] beside its scales, got is_transposed"
    return None


def _learned(module: nn.Module) -> str | None:
    for name in (_first(module), "down_proj"):
        weight = getattr(module, name)
        if weight.requires_grad and not weight.is_leaf:  # an adapter on it, which would get no gradient
            return f"{name} must be frozen, got one that is computed with a gradient"
    return None


def prepare(module: nn.Module) -> str:
    """Warns where time is lost; says what will run, on whichever device the module will then be."""
    activation, weights = _activation(module), as_stored(module)
    if activation is None:
        return "fp8 weights, widened expert by expert around their own gate"
    if isinstance(weights, str):
        _say_why(type(module).__name__, weights)
        return "fp8 weights, widened expert by expert"
    if weights[1].device.type != "cuda":
        _say_device(type(module).__name__, weights[1].device.type)
    return f"fp8 weights, {describe(activation)}, read as stored on CUDA devices, widened expert by expert elsewhere"


@torch.compiler.assume_constant_result
def _say_device(name: str, device: str) -> None:
    warnings.warn(
        f"headgate: {name} holds fp8 weights; CUDA devices read them as stored, but on {device} they are widened "
        "to the rows' dtype one expert at a time, which saves memory but no time",
        stacklevel=4,
    )


@torch.compiler.assume_constant_result
def _say_why(name: str, why: str) -> None:
    say_once(f"the fp8 weights of {name}", why, "a loop that widens one expert after another")


def fp8_experts_forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """(hidden_states [T, D], top_k_index [T, K], top_k_weights [T, K]) -> [T, D]; frozen weights, gradients for the
    rest. Raises TypeError where the weights are not float8 (packed FP4), or computed by something that learns."""
    why = refusal(module) or (_learned(module) if torch.is_grad_enabled() else None)
    if why is not None:
        raise TypeError(f"fp8 experts: {why}")
    mark(module)
    gated, _biased, _transposed, interleaved, _normed = flags(module)
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    activation = _activation(module)
    if activation is not None:
        weights = as_stored(module)
        if not isinstance(weights, str):
            routing = Routing.from_topk(top_k_index, top_k_weights, weights[1].shape[0])
            b1, b2 = _biases(module)
            y = grouped_ffn(
                rows, routing, *weights, b_gate_up=b1, b_down=b2, activation=activation,
                gated=gated, interleaved=interleaved,
            )  # fmt: skip
            return y.reshape(hidden_states.shape).to(hidden_states.dtype)
        _say_why(type(module).__name__, weights)
    return _expert_by_expert(module, rows, top_k_index, top_k_weights).view_as(hidden_states)


def _activation(module: nn.Module):
    gated, _biased, _transposed, interleaved, normed = flags(module)
    return activation_of(module, gated, interleaved, normed, instead=_LOOP)


def _first(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def _biases(module: Any) -> tuple[Tensor | None, Tensor | None]:
    if not getattr(module, "has_bias", False):
        return None, None
    return getattr(module, f"{_first(module)}_bias"), module.down_proj_bias


def as_stored(module: nn.Module) -> tuple[Quantized, Quantized] | str:
    """The module's weights as grouped_ffn takes them, no number copied; or why it cannot."""
    try:
        return _view(module, _first(module)), _view(module, "down_proj")
    except (TypeError, ValueError) as error:
        return str(error)


def _view(module: nn.Module, name: str) -> Quantized:
    weight, scale = getattr(module, name).detach(), getattr(module, f"{name}_scale_inv").detach()
    if scale.dim() != 3:
        raise ValueError(f"{name}_scale_inv must be [E, ., .], got {tuple(scale.shape)}")
    # Scales that are exponents (ue8m0) become fp32 in every call: few numbers, and one kept copy could go stale.
    scale = scale if scale.dtype in _SCALES else scale.float()
    return Quantized.from_deepseek_fp8(weight, scale, _block(module, weight.shape[1:], scale.shape[1:]))


def _block(module: nn.Module, size: tuple[int, ...], parts: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of one scale: the module's block size (the last block may be cut short), or equal parts where
    there is none, or where it is so large that gate and up have one scale each."""
    given = getattr(module, "block_size", None) or (0, 0)
    down, across = (b if b and b * (p - 1) < n else -(-n // p) for b, n, p in zip(given, size, parts, strict=True))
    return int(down), int(across)


def _expert_by_expert(module: nn.Module, rows: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    m: Any = module
    gate, (b1, b2) = m._apply_gate if m.has_gate else m.act_fn, _biases(module)
    top_k, experts = top_k_index.shape[-1], m.down_proj.shape[0]
    order = plan(top_k_index, experts)
    pair, bounds = order.pair_of_row.long(), order.offsets.tolist()
    y = torch.zeros(rows.shape[0], m.down_proj.shape[1], dtype=torch.float32, device=rows.device)
    for e in range(experts):
        p = pair[bounds[e] : bounds[e + 1]]
        if not len(p):
            continue
        h = rows[p // top_k] @ widen(module, _first(module), e, rows.dtype).T
        h = gate(h if b1 is None else h + b1[e])
        out = h.to(rows.dtype) @ widen(module, "down_proj", e, rows.dtype).T
        out = out if b2 is None else out + b2[e]
        y.index_add_(0, p // top_k, out.float() * top_k_weights.reshape(-1)[p, None].float())
    return y.to(rows.dtype)


@torch.no_grad()
def widen(module: nn.Module, name: str, expert: int, dtype: torch.dtype) -> Tensor:
    """One expert's [out, in] weight: fp8 values times their blocks' scales, in `dtype`."""
    weight = getattr(module, name)[expert].float()
    scale = getattr(module, f"{name}_scale_inv")[expert].float()
    for axis, step in enumerate(_block(module, weight.shape, scale.shape)):
        scale = scale.repeat_interleave(step, dim=axis).narrow(axis, 0, weight.shape[axis])
    return (weight * scale).to(dtype)
