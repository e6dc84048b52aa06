"""The balancing losses of a layer: which choice they count, whose tokens are one batch, and their norm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch.distributed as dist
from torch import Tensor, nn

from ..kernels.routing import Routing
from ..kernels.topk import topk
from .losses import TokenRanks, load_balancing_loss, scores_of
from .routers import Router

SCOPES = ("batch", "rank", "sequence", "global")
CHOICES = ("routed", "scores", "first")
NORMS = ("none", "topk")

Coef = float | Mapping[str, float]  # of one loss, or of a loss for each of these scopes


def balancing_losses(
    router: nn.Module,
    routing: Routing,
    coef: Coef,
    scope: str,
    choice: str,
    norm: str,
    sequences: int,
    ranks: TokenRanks | None,
) -> tuple[dict[str, Tensor], Tensor]:
    """(each loss by its name, their sum with coefficients) of a routing [T, K] of `sequences` equal parts.

    The name is "load_balancing", or "load_balancing_SCOPE" where `coef` names scopes. See MoE for the rest.
    """
    several = isinstance(coef, Mapping)
    parts = {"sequence": sequences, "rank": 1}  # scope "rank": the tokens of a rank, or of its cp x tp group, as one
    seen = counted(routing, choice)
    divisor = seen.expert_ids.shape[1] if norm == "topk" else 1
    balancing_loss = getattr(router, "balancing_loss", load_balancing_loss)
    losses: dict[str, Tensor] = {}  # Dynamo knows no dict[...]()
    weighted: list[Tensor] = []
    for each, factor in terms(coef, scope).items():
        loss = balancing_loss(seen if factor else seen.detach(), sequences=parts.get(each), ranks=ranks) / divisor
        losses[f"load_balancing_{each}" if several else "load_balancing"] = loss
        weighted.append(factor * loss)
    return losses, sum(weighted[1:], weighted[0])


def terms(coef: Coef, scope: str) -> dict[str, float]:
    """The coefficient of each scope."""
    return dict(coef) if isinstance(coef, Mapping) else {scope: coef}


def counted(routing: Routing, choice: str) -> Routing:
    """The routing with the pairs that a balancing loss counts, see MoE's `load_balancing_choice`."""
    if choice == "first":
        return replace(routing, expert_ids=routing.expert_ids[:, :1], weights=routing.weights[:, :1], counts=None)
    if choice == "scores":
        scores = scores_of(routing, "load_balancing_choice 'scores'").detach()
        anew = topk(scores, routing.expert_ids.shape[1], score="topk_softmax")  # by the scores as they are
        anew = replace(routing, expert_ids=anew.expert_ids, counts=anew.counts)
        return anew if routing.mask is None else anew.masked(routing.mask)
    return routing


def check_balancing(
    router: nn.Module, coef: Coef, scope: str, choice: str, norm: str, group: dist.ProcessGroup | None
) -> None:
    """Raises ValueError for what no balancing loss can be made of."""
    if isinstance(coef, Mapping):
        if not coef:
            raise ValueError(f"MoE: load_balancing_coef must name a scope or be a number, got {coef}")
        if scope != "batch":
            rule = "left out where load_balancing_coef names scopes"
            raise ValueError(f"MoE: load_balancing_scope must be {rule}, got {scope!r}")
    scopes = terms(coef, scope)
    for each, factor in scopes.items():
        if each not in SCOPES:
            raise ValueError(f"MoE: load_balancing_scope must be one of {', '.join(SCOPES)}, got {each!r}")
        if not (factor >= 0 and math.isfinite(factor)):
            raise ValueError(f"MoE: load_balancing_coef must be finite and not negative, got {factor}")
        if factor and not getattr(router, "balances", True):
            rule = f"0 for a {type(router).__name__}, which needs no balancing loss"
            raise ValueError(f"MoE: load_balancing_coef must be {rule}, got {factor}")
    if ("global" in scopes) != (group is not None):
        raise ValueError(
            "MoE: load_balancing_group must be given with load_balancing_scope='global' and only then, "
            f"got scope {', '.join(scopes)!r} and group {group}"
        )
    own = getattr(type(router), "balancing_loss", Router.balancing_loss) is not Router.balancing_loss
    for name, value, known in (
        ("load_balancing_choice", choice, CHOICES),
        ("load_balancing_norm", norm, NORMS),
    ):
        if value not in known:
            raise ValueError(f"MoE: {name} must be one of {', '.join(known)}, got {value!r}")
        if own and value != known[0]:
            rule = f"{known[0]!r} for a router with a balancing loss of its own"
            raise ValueError(f"MoE: {name} must be {rule}, got {value!r}")
