"""Doge: 16,384 experts of one hidden unit, kept in two embeddings, chosen by the product of two sets of keys."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.grouped_ffn import grouped_ffn
from ...kernels.routing import Routing
from .counting import mark
from .gate import activation_of, hooked


def doge_forward(module: nn.Module, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """DogeCDMoE: hidden_states [B, S, D] -> (output [B, S, D], router logits [2, B*S, keys])."""
    m: Any = module
    activation = activation_of(module, False)
    if activation is None or not (_plain(m.down_embed) and _plain(m.up_embed)):
        return type(module).forward(module, hidden_states, **kwargs)
    mark(module)
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    router_logits = m.router_gate(hidden_states).view(2, rows.shape[0], -1)
    ids, weights = choice(m, (hidden_states, router_logits))
    routing = Routing.from_topk(ids, weights, m.num_experts)
    # expert e is act(<down_embed[e], x>) * up_embed[e]: a feed-forward network with F = 1
    down, up = m.down_embed.weight[:, None, :], m.up_embed.weight[:, :, None]
    routed = grouped_ffn(rows, routing, down, up, activation=activation, gated=False)
    shared = m.down_proj(m.act_fn(m.gate_proj(hidden_states)) * m.up_proj(hidden_states))
    return shared + routed.view(hidden_states.shape), router_logits


def choice(module: nn.Module, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(ids, weights) [T, K] of the best pairs of keys, from what a DogeCDMoE returns, logits [2, T, keys] last."""
    m: Any = module
    router_logits = output[1]
    (scores_x, scores_y), (ids_x, ids_y) = router_logits.topk(m.num_keys, dim=-1)
    scores = (scores_x.unsqueeze(-1) + scores_y.unsqueeze(-2)).flatten(-2)
    ids = (ids_x.unsqueeze(-1) * m.num_keys + ids_y.unsqueeze(-2)).flatten(-2)
    scores, place = scores.topk(m.top_k, dim=-1)
    weights = F.softmax(scores, dim=-1)
    if m.norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return ids.gather(-1, place), weights


def _plain(embedding: nn.Module) -> bool:
    """Whether the embedding's rows are its weight's rows: no adapter around it, nobody listening, no option set."""
    if type(embedding) is not nn.Embedding or hooked(embedding) or hasattr(embedding, "_hf_hook"):
        return False
    return embedding.max_norm is None and not embedding.scale_grad_by_freq and not embedding.sparse


def prepare(module: nn.Module) -> str:
    activation = activation_of(module, False)
    return "rank-1 experts, " + ("own block" if activation is None else f"{activation.kind}, fused")
