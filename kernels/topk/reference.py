"""topk in plain torch, any device, differentiable: the truth."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-20  # DeepSeek-V3's guard under the sum of the chosen scores


def score_of(logits: Tensor, score: str) -> Tensor:
    """The scores [T, E] of fp32 (or fp64) `logits` [T, E]."""
    if score == "sigmoid":
        return logits.sigmoid()
    if score == "sqrtsoftplus":
        return F.softplus(logits).sqrt()
    return logits.softmax(dim=1)


def best_of(group_score: str | int) -> int:
    """How many of a group's best experts are its score."""
    return group_score if not isinstance(group_score, str) else {"max": 1, "top2": 2}.get(group_score, 0)


def limit_to_groups(choice: Tensor, groups: int, topk_groups: int, group_score: str | int) -> Tensor:
    """`choice` [T, E] with -inf at the experts outside the best `topk_groups` of `groups` equal groups of experts."""
    grouped = choice.unflatten(1, (groups, choice.shape[1] // groups))
    value, *others = grouped.topk(best_of(group_score), dim=2)[0].unbind(2)
    for other in others:
        value = value + other
    best = value.sort(dim=1, descending=True, stable=True)[1][:, :topk_groups]
    out = torch.ones_like(value, dtype=torch.bool).scatter(1, best, False)
    return grouped.masked_fill(out[:, :, None], -torch.inf).flatten(1)


def topk_reference(
    logits: Tensor,
    k: int,
    bias: Tensor | None = None,
    score: str = "softmax",
    groups: int = 1,
    topk_groups: int = 1,
    group_score: str | int = "top2",
    renormalize: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(weights [T, K], scores [T, E], expert_ids int32 [T, K], counts int32 [E]) of `logits` [T, E]; see `topk`."""
    logits = (logits if logits.dtype == torch.float64 else logits.float()).contiguous()
    scores = score_of(logits, score)
    choice = (logits if score == "topk_softmax" else scores).detach()
    if bias is not None:
        choice = choice + bias
    if topk_groups < groups:
        choice = limit_to_groups(choice, groups, topk_groups, group_score)
    ids = choice.sort(dim=1, descending=True, stable=True)[1][:, :k]
    if score == "topk_softmax":
        weights = logits.gather(1, ids).softmax(dim=1)
    else:
        weights = scores.gather(1, ids)
        if renormalize:
            weights = weights / (weights.sum(1, keepdim=True) + EPS)
    ones = torch.ones_like(ids, dtype=torch.int32).flatten()
    counts = ones.new_zeros(logits.shape[1]).scatter_add(0, ids.flatten(), ones)
    return weights * scale, scores, ids.int(), counts
