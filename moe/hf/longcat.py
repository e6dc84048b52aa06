"""LongCat: the last experts are the identity and cost nothing; gate_up_proj has rows for them, down_proj has none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.grouped_ffn import grouped_ffn
from ...kernels.routing import Routing
from .counting import mark
from .experts import as_rows, describe, own_gate_forward
from .gate import activation_of
from .llama4 import split_gate


def longcat_forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """hidden_states [T, D], top_k_index [T, K] in [0, routed + zero experts), top_k_weights [T, K] -> [T, D]."""
    mark(module)
    m: Any = module
    routed = m.num_routed_experts
    zero = (top_k_index >= routed) & (top_k_index < m.total_experts)
    scale = torch.where(zero, top_k_weights, 0).sum(1, keepdim=True)
    identity = hidden_states * scale
    if not routed:
        return identity.to(hidden_states.dtype)
    w1, w2 = m.gate_up_proj, m.down_proj
    w1 = w1 if w1.shape[0] == routed else w1[:routed]
    rows, routing = as_rows(hidden_states, w1), Routing.from_topk(top_k_index, top_k_weights, routed)
    activation = activation_of(module, True)
    if activation is not None:
        y = grouped_ffn(rows, routing, w1, w2, activation=activation)
    else:
        y = own_gate_forward(rows, routing, (w1, None), (w2, None), split_gate(m.act_fn), False)
    return (y + identity).to(hidden_states.dtype)


def prepare(module: nn.Module) -> str:
    return f"identity experts, {describe(activation_of(module, True))}"
