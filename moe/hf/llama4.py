"""Llama 4: the router's weight goes on the expert's input, and transformers runs every expert on every token.

Here only the chosen (token, expert) pairs are computed: the block hands its experts the choice, and they the weighted
rows to the fused operation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.grouped_ffn import grouped_ffn
from ...kernels.routing import Routing
from ..experts import by_pairs
from .counting import mark
from .experts import as_rows, describe, own_gate_forward
from .gate import activation_of


def block_forward(module: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Llama4TextMoe: hidden_states [..., D] -> (output [T, D], router logits [T, E])."""
    m: Any = module
    hidden_states = hidden_states.reshape(-1, m.hidden_dim)
    scores, logits = m.router(hidden_states)
    routed = m.experts(hidden_states, *choice(m, (scores, logits)))
    return m.shared_expert(hidden_states) + routed, logits


def choice(module: nn.Module, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(ids, weights) [T, K] of what a Llama4Router returns, scores and logits [T, E]; block and router know K."""
    m: Any = module
    scores, logits = output
    ids = torch.topk(logits, m.top_k, dim=1).indices
    return ids, scores.gather(1, ids)


def experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
) -> Tensor:
    """Llama4TextExperts: sum_k expert_k(weight_k * x) of [T, D]; called with rows alone, it is the original."""
    if top_k_index is None or top_k_weights is None:
        return type(module).forward(module, hidden_states)
    mark(module)
    m: Any = module
    w1, w2 = m.gate_up_proj, m.down_proj
    activation = activation_of(module, True)

    def compute(pairs: Tensor, routing: Routing) -> Tensor:
        rows = as_rows(pairs, w1)
        if activation is None:
            return own_gate_forward(rows, routing, (w1, None), (w2, None), split_gate(m.act_fn), True)
        return grouped_ffn(rows, routing, w1, w2, activation=activation, transposed=True)

    routing = Routing.from_topk(top_k_index, top_k_weights, w2.shape[0])
    return by_pairs(hidden_states, routing, compute).to(hidden_states.dtype)


def split_gate(act):
    """gate_up [N, 2F] -> act(gate) * up [N, F]."""

    def gate(gate_up: Tensor) -> Tensor:
        left, right = gate_up.chunk(2, dim=-1)
        return act(left) * right

    return gate


def prepare(module: nn.Module) -> str:
    return f"weights on the input, {describe(activation_of(module, True))}"
