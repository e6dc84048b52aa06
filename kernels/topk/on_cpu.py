"""topk on CPU: the reference's arithmetic with the sort replaced by a selection, in few calls for few tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .reference import EPS, limit_to_groups, score_of

_SORT_BELOW = 1024  # scores: up to here one stable sort costs less than a selection and the look at its ties


def _select(choice: Tensor, k: int) -> Tensor:
    """The k largest of each row, in falling order, the lowest id first among equals: int64 [T, K].

    torch.topk is 2-4 times as fast as a stable sort, but says nothing about ties: the few rows that have one among
    their best k + 1 are sorted again.
    """
    experts = choice.shape[1]
    if choice.numel() <= _SORT_BELOW:
        return choice.sort(dim=1, descending=True, stable=True)[1][:, :k]
    best, ids = choice.topk(min(k + 1, experts), dim=1)
    tied = (best[:, 1:] == best[:, :-1]).any(1).nonzero()[:, 0]
    ids = ids[:, :k]
    if tied.numel():
        ids[tied] = choice[tied].sort(dim=1, descending=True, stable=True)[1][:, :k]
    return ids


def _check_finite(logits: Tensor, bias: Tensor | None) -> None:
    if bias is not None and not math.isfinite(bias.sum().item()) and not bias.isfinite().all():
        raise ValueError(f"topk: bias must be finite, got {bias.tolist()}")
    # one pass for the good case: a sum is finite unless a term is not (or it overflows, which the second look forgives)
    if math.isfinite(logits.sum().item()):
        return
    bad = logits.isfinite().logical_not_().nonzero()
    if bad.numel():
        t, e = bad[0].tolist()
        raise ValueError(
            f"topk: logits (the router's scores) must be finite, got {logits[t, e].item()} for token {t}, expert {e} "
            f"({bad.shape[0]} of {logits.numel()} are not)"
        )


def forward(
    logits: Tensor,
    k: int,
    bias: Tensor | None,
    score: str,
    groups: int,
    topk_groups: int,
    group_score: int,
    renormalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = (logits if logits.dtype == torch.float64 else logits.float()).contiguous()  # as the fake says
    _check_finite(logits, bias)
    scores = score_of(logits, score)
    choice = logits if score == "topk_softmax" else scores
    if bias is not None:
        choice = choice + bias
    if topk_groups < groups:
        choice = limit_to_groups(choice, groups, topk_groups, group_score)
    ids = _select(choice, k)
    if score == "topk_softmax":
        weights = logits.gather(1, ids).softmax(dim=1)
    else:
        weights = scores.gather(1, ids)
        if renormalize:
            weights /= weights.sum(1, keepdim=True) + EPS
    if scale != 1.0:
        weights *= scale
    ids = ids.int()
    counts = torch.bincount(ids.view(-1), minlength=logits.shape[1])
    return weights, scores, ids, counts.int()
