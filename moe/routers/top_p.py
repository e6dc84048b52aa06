"""The top-p router: as many experts as a token's certainty asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.routing import Routing, pairs_of_experts
from ...kernels.topk import check_choice, topk
from ...kernels.topk.reference import EPS
from ..losses import (
    TokenRanks,
    load_balancing_loss,
    of_tokens,
    over_batch,
    per_sequence,
    scores_of,
    tokens_of,
    xlogx,
)
from .given import Given
from .router import GatedRouter


class TopPRouter(GatedRouter):
    """The smallest set of experts whose probabilities sum to `p` at least, but `top_k` experts at most.

    A softmax over the logits; the weight is the probability, divided by the sum of the chosen ones if `renormalize`,
    times `scale`. Places that a token does not need have id -1. With `top_k` = E the mass is always reached.
    The balancing loss has a second term, see `balancing_loss`. `gate_bias`, `jitter`: see GatedRouter.

    Source: Huang et al., Harder Tasks Need More Experts: Dynamic Routing in MoE Models (2024), p = 0.4.

    >>> routing = TopPRouter(hidden_size=16, num_experts=8, top_k=8, p=0.4)(torch.randn(5, 16))
    >>> (routing.weights.sum(1) >= 0.4).all()
    tensor(True)
    """

    fixed_k = False

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        p: float = 0.4,
        entropy_coef: float = 0.01,
        renormalize: bool = False,
        scale: float = 1.0,
        gate_bias: bool = False,
        jitter: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_choice(num_experts, top_k, "softmax", 1, 1, "max", scale, who="TopPRouter")
        if not 0 < p <= 1:
            raise ValueError(f"TopPRouter: p must be above 0 and at most 1, got {p}")
        if not 0 <= entropy_coef < float("inf"):
            raise ValueError(f"TopPRouter: entropy_coef must be finite and not negative, got {entropy_coef}")
        super().__init__(
            hidden_size, num_experts, top_k, gate_bias=gate_bias, jitter=jitter, device=device, dtype=dtype
        )
        self.p, self.entropy_coef, self.renormalize, self.scale = p, entropy_coef, renormalize, scale

    def choose(self, x: Tensor, given: Given) -> Routing:
        every = topk(self.logits(x), self.top_k)
        chosen = every.weights.detach()
        gone = chosen.cumsum(1) - chosen >= self.p  # those before it are enough; the first one never goes
        weights, ids = every.weights.masked_fill(gone, 0), every.expert_ids.masked_fill(gone, -1)
        if self.renormalize:
            weights = weights / (weights.sum(1, keepdim=True) + EPS)
        counts = pairs_of_experts(ids, self.num_experts).int()
        return Routing(ids, weights * self.scale, self.num_experts, counts, every.scores, every.logits)

    def balancing_loss(
        self, routing: Routing, *, sequences: int | None = None, ranks: TokenRanks | None = None
    ) -> Tensor:
        """load_balancing_loss + entropy_coef * the mean entropy of a token's probabilities, which keeps the router from
        asking for many experts: the paper's 1e-2 and 1e-4. Arguments as in `load_balancing_loss`."""
        who = "TopPRouter.balancing_loss"
        level = load_balancing_loss(routing, sequences=sequences, ranks=ranks)
        if not self.entropy_coef:
            return level
        scores = scores_of(routing, who)
        entropy = -xlogx(scores).sum(1, keepdim=True)
        sums = per_sequence(of_tokens(entropy, routing), sequences, who).sum(1)
        tokens = tokens_of(routing, sequences, who)

        def weigh(counts: Tensor, tokens: int | Tensor) -> Tensor:
            return counts.new_ones(sums.shape) / tokens

        none = sums.new_zeros(len(sums), 0)
        return level + self.entropy_coef * over_batch(sums, none, weigh, tokens, sequences, ranks)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}"
