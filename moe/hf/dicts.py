"""Experts kept as modules of their own: Switch, NLLB (dictionaries of feed-forward networks), ViTPose (linear layers).

Stacking them would copy the weights, so each expert's own module runs on the rows sorted to it; whatever has been done
to these modules (LoRA, hooks, quantisation) keeps its effect.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.plan import plan
from .counting import mark


def switch_forward(
    module: nn.Module, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor
) -> Tensor:
    """hidden_states [T, D], selected_experts one-hot [T, 1, E] (zero: dropped), routing_weights [T, 1] -> [T, D]."""
    mark(module)
    return _each_expert(module, hidden_states, *switch_choice(module, selected_experts, routing_weights))


def switch_choice(_module: nn.Module, selected_experts: Tensor, routing_weights: Tensor) -> tuple[Tensor, Tensor]:
    """(ids [T, 1], -1 where dropped, and weights [T, 1]) of Switch's one-hot [T, 1, E] and weights [T, 1]."""
    chosen = selected_experts.amax(-1) > 0
    return torch.where(chosen, selected_experts.argmax(-1), -1), routing_weights


def nllb_forward(module: nn.Module, hidden_states: Tensor, router_mask: Tensor, router_probs: Tensor) -> Tensor:
    """hidden_states [T, D], router_mask [T, K] expert ids, router_probs [T, K] -> [T, D].

    transformers hands over its first choice's one-hot mask (K = E) as ids, so that a token meets the same expert many
    times. Where no dropout tells these times apart, each (token, expert) is computed once with its summed weight.
    """
    mark(module)
    dropping = module.training and any(isinstance(d, nn.Dropout) and d.p > 0 for d in module.modules())
    choice = (router_mask, router_probs) if dropping else nllb_choice(module, router_mask, router_probs)
    return _each_expert(module, hidden_states, *choice)


def nllb_choice(module: nn.Module, router_mask: Tensor, router_probs: Tensor) -> tuple[Tensor, Tensor]:
    """(ids [T, E], each expert at most once and -1 elsewhere, and its summed weights [T, E]) of NLLB's mask [T, K]."""
    m: Any = module
    shape = (router_mask.shape[0], m.num_experts)
    met = torch.zeros(shape, dtype=torch.bool, device=router_mask.device).scatter(1, router_mask, True)
    ids = torch.where(met, torch.arange(m.num_experts, device=met.device), -1)
    return ids, router_probs.new_zeros(shape).scatter_add(1, router_mask, router_probs)


def _each_expert(module: nn.Module, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Every `expert_<i>` of `module` on its rows. Within an expert rows come in transformers' order (choice, then
    token), so that dropout draws the same numbers."""
    m: Any = module
    tokens = rows.shape[0]
    drop = getattr(m, "moe_token_dropout", 0)
    order = plan(ids.T, m.num_experts)
    place, bounds = order.pair_of_row.long(), order.offsets.tolist()
    scale = weights.T.reshape(-1)
    out = torch.zeros_like(rows)
    for e in range(m.num_experts):
        p = place[bounds[e] : bounds[e + 1]]
        if not len(p):
            continue
        token = p % tokens
        y = m[f"expert_{e}"](rows[token]) * scale[p, None]
        if drop > 0:
            y = m.token_dropout(y) if m.training else y * (1 - drop)
        out.index_add_(0, token, y.to(out.dtype))
    return out


def vitpose_forward(module: nn.Module, hidden_state: Tensor, indices: Tensor) -> Tensor:
    """hidden_state [B, S, F], indices [B, 1, 1] (the dataset of each image) -> [B, S, part]: one expert per image.

    Every expert runs, on no image if it must, so that all get a gradient as in the dense original. A compiled graph
    keeps the original.
    """
    if torch.compiler.is_compiling():  # dense and free of data-dependent shapes: what a graph needs
        return type(module).forward(module, hidden_state, indices)
    mark(module)
    m: Any = module
    order = plan(indices.reshape(-1, 1).expand(hidden_state.shape[0], 1), m.num_experts)
    place, bounds = order.pair_of_row.long(), order.offsets.tolist()
    parts = [m[e](hidden_state[place[bounds[e] : bounds[e + 1]]]) for e in range(m.num_experts)]
    parts.append(parts[0].new_zeros(len(place) - bounds[-1], *parts[0].shape[1:]))
    return torch.cat(parts)[order.row_of_pair.long()]
