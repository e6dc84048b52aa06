"""Token rounding: while training, every expert has a whole number of a kernel's row tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.routing import Routing, pairs_of_experts
from ...kernels.topk import check_choice, topk
from ...kernels.topk.reference import EPS
from .given import Given
from .router import GatedRouter

ROUNDINGS = ("nearest", "stochastic", "up", "down")


class TileRouter(GatedRouter):
    """Softmax and the K best, as SoftmaxRouter; while training each expert's number of tokens is rounded to a multiple
    of `tile`, so that no grouped product computes rows of padding.

    An expert whose number goes down loses the tokens with the lowest scores; one whose number goes up takes the best
    of those that did not choose it. So a token has between 0 and `most` experts (None: E), the best first, and other
    places have id -1. Of equal scores the first token stays. `rounding`: "nearest" (half goes up), "stochastic" (up
    with the chance that leaves the expected number as it is), "up", "down". No expert takes more tokens than there
    are: with few of them, "nearest" leaves most experts none, so let `tile` be well below T K / E. Over many ranks
    each rounds its own tokens; sums of multiples are multiples.

    Evaluation takes the plain K best. Weights are the scores, divided by a token's sum of them if `renormalize`, times
    `scale`. `gate_bias`, `jitter`: see GatedRouter.

    Source: Guo et al., SonicMoE: Accelerating MoE with IO and Tile-aware Optimizations (2025), token rounding.

    >>> router = TileRouter(hidden_size=16, num_experts=8, top_k=2, tile=16)
    >>> (router(torch.randn(256, 16)).counts % 16).any()
    tensor(False)
    """

    fixed_k = False
    joint = True

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        tile: int = 128,
        rounding: str = "nearest",
        most: int | None = None,
        renormalize: bool = False,
        scale: float = 1.0,
        gate_bias: bool = False,
        jitter: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_choice(num_experts, top_k, "softmax", 1, 1, "max", scale, who="TileRouter")
        if not hasattr(tile, "__index__") or tile < 1:
            raise ValueError(f"TileRouter: tile must be a positive integer, got {tile!r}")
        if rounding not in ROUNDINGS:
            raise ValueError(f"TileRouter: rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
        most = num_experts if most is None else most
        if not hasattr(most, "__index__") or not top_k <= most <= num_experts:
            raise ValueError(f"TileRouter: most must be an integer from {top_k} to {num_experts}, got {most!r}")
        super().__init__(
            hidden_size, num_experts, top_k, gate_bias=gate_bias, jitter=jitter, device=device, dtype=dtype
        )
        self.tile, self.rounding, self.most = tile, rounding, most
        self.renormalize, self.scale = renormalize, scale
        self.draws = rounding == "stochastic"

    def choose(self, x: Tensor, given: Given) -> Routing:
        logits = self.logits(x)
        if not self.training:
            return topk(logits, self.top_k, renormalize=self.renormalize, scale=self.scale)
        every = topk(logits, self.top_k)
        assert every.scores is not None
        scores, known = every.scores, every.scores.detach()
        taken = self.rounded(known, every.expert_ids, given.mask)
        ids = topk(torch.where(taken, known, -1.0), self.most, score="topk_softmax").expert_ids
        gone = ~taken.gather(1, ids.long())
        weights, ids = scores.gather(1, ids.long()).masked_fill(gone, 0), ids.masked_fill(gone, -1)
        if self.renormalize:
            weights = weights / (weights.sum(1, keepdim=True) + EPS)
        counts = pairs_of_experts(ids, self.num_experts).int()
        return Routing(ids, weights * self.scale, self.num_experts, counts, scores, logits)

    @torch.no_grad()
    def rounded(self, scores: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Which experts take which tokens, bool [T, E], where the tokens chose `ids` [T, K] by `scores` [T, E]."""
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, ids.long(), True)
        key = torch.where(chosen, scores + 2, scores)  # who chose the expert comes before who did not
        there: int | Tensor = len(scores)
        if mask is not None:
            chosen, key, there = chosen & mask[:, None], key.masked_fill(~mask[:, None], -1), mask.sum()
        number = self._numbers(chosen.sum(0)).clamp(max=there)
        order = key.sort(dim=0, descending=True, stable=True).indices
        turn = torch.arange(len(scores), device=order.device)[:, None].expand_as(order)
        return torch.empty_like(order).scatter(0, order, turn) < number

    def _numbers(self, counts: Tensor) -> Tensor:
        """Multiples of `tile`, int64 [E]."""
        down = counts // self.tile * self.tile
        over = counts - down
        if self.rounding == "stochastic":
            up = torch.rand(counts.shape, device=counts.device) * self.tile < over
        else:
            up = {"nearest": 2 * over >= self.tile, "up": over > 0, "down": over < 0}[self.rounding]
        return down + self.tile * up

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, tile={self.tile}, rounding={self.rounding!r}"
