"""DBRX: all experts' matrices stacked in three flat [E*F, D] parameters, seen here as [E, F, D] without a copy."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...kernels.grouped_ffn import grouped_ffn
from ...kernels.grouped_linear import grouped_linear
from ...kernels.plan import plan
from ...kernels.routing import Routing
from .counting import mark
from .experts import as_rows, combine, describe
from .gate import activation_of


def dbrx_forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """hidden_states [B, S, D], top_k_index and top_k_weights [B*S, K] -> [B, S, D]."""
    mark(module)
    m: Any = module
    w1, v1, w2 = (w.view(m.num_experts, m.ffn_hidden_size, m.hidden_size) for w in (m.mlp.w1, m.mlp.v1, m.mlp.w2))
    rows, routing = as_rows(hidden_states, w1), Routing.from_topk(top_k_index, top_k_weights, m.num_experts)
    activation = activation_of(m.mlp, True, function="activation_fn")
    if activation is not None:
        y = grouped_ffn(rows, routing, (w1, v1), w2.transpose(1, 2), activation=activation)
    else:
        order = plan(routing.expert_ids, m.num_experts)
        x = rows[(order.pair_of_row // top_k_index.shape[1]).long()]
        gate, up = grouped_linear(x, order.offsets, w1), grouped_linear(x, order.offsets, v1)
        a = (m.mlp.activation_fn(gate) * up).to(gate.dtype)
        y = combine(grouped_linear(a, order.offsets, w2, transposed=True), top_k_weights, order)
    return y.reshape(hidden_states.shape).to(hidden_states.dtype)


def prepare(module: nn.Module) -> str:
    m: Any = module
    return f"flat weights, {describe(activation_of(m.mlp, True, function='activation_fn'))}"
