"""Experts in FP8 with block scales (transformers' FP8Experts): weights are widened one expert at a time.

The activations stay in the rows' dtype, so the result is nearer to the unquantised model than FP8 matmuls are.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.plan import plan
from .counting import mark

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def matches(module: nn.Module) -> bool:
    return hasattr(module, "down_proj_scale_inv") and hasattr(module, "has_gate")


def refusal(module: Any) -> str | None:
    dtype = module.down_proj.dtype
    if dtype not in _FP8:
        return f"down_proj must be float8 beside its scales, got {dtype}"
    return None


def prepare(module: nn.Module) -> str:
    _say(type(module).__name__)
    return "fp8 weights, widened expert by expert"


@torch.compiler.assume_constant_result
def _say(name: str) -> None:
    warnings.warn(
        f"headgate: {name} holds fp8 weights; they are widened to the rows' dtype one expert at a time, which saves "
        "memory but no time",
        stacklevel=3,
    )


def fp8_experts_forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """(hidden_states [T, D], top_k_index [T, K], top_k_weights [T, K]) -> [T, D]; frozen weights, gradients for the
    rest. Raises TypeError where the weights are not float8 (packed FP4)."""
    if (why := refusal(module)) is not None:
        raise TypeError(f"fp8 experts: {why}")
    mark(module)
    m: Any = module
    name = "gate_up_proj" if m.has_gate else "up_proj"
    gate = m._apply_gate if m.has_gate else m.act_fn
    rows, top_k = hidden_states.reshape(-1, hidden_states.shape[-1]), top_k_index.shape[-1]
    experts = m.down_proj.shape[0]
    order = plan(top_k_index, experts)
    pair, bounds = order.pair_of_row.long(), order.offsets.tolist()
    y = torch.zeros(rows.shape[0], m.down_proj.shape[1], dtype=torch.float32, device=rows.device)
    for e in range(experts):
        p = pair[bounds[e] : bounds[e + 1]]
        if not len(p):
            continue
        out = gate(rows[p // top_k] @ widen(module, name, e, rows.dtype).T)
        out = out.to(rows.dtype) @ widen(module, "down_proj", e, rows.dtype).T
        y.index_add_(0, p // top_k, out.float() * top_k_weights.reshape(-1)[p, None].float())
    return y.reshape(hidden_states.shape).to(hidden_states.dtype)


@torch.no_grad()
def widen(module: nn.Module, name: str, expert: int, dtype: torch.dtype) -> Tensor:
    """One expert's [out, in] weight: fp8 values times their blocks' scales, in `dtype`."""
    weight = getattr(module, name)[expert].float()
    scale = getattr(module, f"{name}_scale_inv")[expert].float()
    block = getattr(module, "block_size", None)
    for axis in (0, 1):
        size, parts = weight.shape[axis], scale.shape[axis]
        # without a block size each part of the axis has one scale; with one, the last block may be cut short
        step = block[axis] if block is not None and block[axis] * (parts - 1) < size else -(-size // parts)
        scale = scale.repeat_interleave(step, dim=axis).narrow(axis, 0, size)
    return (weight * scale).to(dtype)
