"""LocMoE's router: a gate without parameters, a loss that keeps tokens near, and the capacity that its angles need."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.routing import Routing
from ...kernels.topk import check_choice, topk
from ..losses import TokenRanks, load_balancing_loss, of_tokens, over_batch, scores_of, tokens_of, xlogx
from .given import Given
from .router import Router

_FAR = 1e-3  # of the localised distribution, what the experts that are not near have together


class LocMoERouter(Router):
    """The logit of expert e is the mean of the e-th of E slices of x (grouped average pooling): gate directions that
    are orthogonal, and that nothing has to learn. Softmax, the K best; `renormalize`, `scale`: see SoftmaxRouter.

    D must be a multiple of E. What the layers before write into the slices decides; a norm right before the router
    makes their means small.

    `near` are the experts of this rank's own node, which `balancing_loss` pulls its tokens to: set it on each rank
    (None: no such loss). `locality_coef` is the weight of that term beside the load's.

    Source: Li et al., LocMoE: A Low-Overhead MoE for Large Language Model Training (2024), sections 3.1-3.2.

    >>> router = LocMoERouter(hidden_size=16, num_experts=8, top_k=1)
    >>> router(torch.eye(16)[[0, 3, 15]] * 9).expert_ids[:, 0].tolist(), len(list(router.parameters()))
    ([0, 1, 7], 0)
    """

    trains_gate = False

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        near: Sequence[int] | None = None,
        locality_coef: float = 1.0,
        renormalize: bool = False,
        scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_choice(num_experts, top_k, "softmax", 1, 1, "max", scale, who="LocMoERouter")
        super().__init__(hidden_size, num_experts, top_k)
        if hidden_size % num_experts:
            raise ValueError(
                f"LocMoERouter: hidden_size must be a multiple of num_experts ({num_experts}), got {hidden_size}"
            )
        if not 0 <= locality_coef < math.inf:
            raise ValueError(f"LocMoERouter: locality_coef must be finite and not negative, got {locality_coef}")
        if near is not None and (not len(near) or not all(0 <= e < num_experts for e in near)):
            raise ValueError(f"LocMoERouter: near must be experts between 0 and {num_experts - 1}, got {list(near)}")
        self.near, self.locality_coef = near, locality_coef
        self.renormalize, self.scale = renormalize, scale

    def reset_parameters(self) -> None:
        """There are none."""

    def logits(self, x: Tensor) -> Tensor:
        """fp32 [T, E] (fp64 for fp64 x) of x [T, D]."""
        wide = x if x.dtype == torch.float64 else x.float()
        return wide.unflatten(1, (self.num_experts, self.hidden_size // self.num_experts)).mean(2)

    def choose(self, x: Tensor, given: Given) -> Routing:
        return topk(self.logits(x), self.top_k, renormalize=self.renormalize, scale=self.scale)

    def balancing_loss(
        self, routing: Routing, *, sequences: int | None = None, ranks: TokenRanks | None = None
    ) -> Tensor:
        """load_balancing_loss + locality_coef * KL(P || N): P_e the mean probability of e over this rank's tokens, N
        the experts of this node in equal parts, with a little for the others, so that it is finite. Arguments as there;
        the second term is of this rank's tokens, and its value the mean over `ranks`."""
        who = "LocMoERouter.balancing_loss"
        level = load_balancing_loss(routing, sequences=sequences, ranks=ranks)
        if self.near is None or not self.locality_coef:
            return level
        scores = of_tokens(scores_of(routing, who), routing)
        tokens = tokens_of(routing, None, who)
        count = tokens.clamp_min(1)[0] if isinstance(tokens, Tensor) else max(tokens, 1)
        mean = scores.sum(0) / count
        wanted = mean.new_full((self.num_experts,), _FAR / self.num_experts)
        wanted[list(self.near)] += (1 - _FAR) / len(self.near)
        apart = (xlogx(mean) - mean * wanted.log()).sum()
        if ranks is not None:
            none = apart.new_zeros(1, 0)
            apart = over_batch(apart.view(1, 1), none, lambda c, t: c.new_ones(1, 1) / t, 1, None, ranks)
        return level + self.locality_coef * apart

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, near={self.near}"


def capacity_bound(num_experts: int, hidden_size: int, delta: float) -> float:
    """The share of the tokens that an expert must take at least, so that it gets all those whose angle with its gate
    has a cosine of `delta` or more: 1 / (E erfc(sqrt(delta^2 D / (2 - delta^2)))), which exceeds
    exp(delta^2 D / (2 - delta^2)) / E; infinite where fp64 cannot say it. LocMoE measured delta near 0.03.
    Source: LocMoE (2024), theorem 2.

    Raises ValueError where delta is not in [0, 1) or a size is not positive.

    >>> capacity_bound(num_experts=8, hidden_size=1024, delta=0.0)
    0.125
    """
    for name, size in (("num_experts", num_experts), ("hidden_size", hidden_size)):
        if size < 1:
            raise ValueError(f"capacity_bound: {name} must be at least 1, got {size}")
    if not 0 <= delta < 1:
        raise ValueError(f"capacity_bound: delta must be in [0, 1), got {delta}")
    chance = math.erfc(math.sqrt(delta**2 * hidden_size / (2 - delta**2)))
    return 1 / (num_experts * chance) if chance else math.inf
