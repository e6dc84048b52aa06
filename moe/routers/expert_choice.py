"""The expert-choice router: each expert takes the tokens that suit it best."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.routing import Routing, pairs_of_experts
from ...kernels.topk import topk
from .given import Given
from .steered import SteeredRouter

INFERENCE = (None, "choice", "threshold")


class ExpertChoiceRouter(SteeredRouter):
    """S = softmax over E; each expert takes its C = T K / E best tokens (rounded up) by S, which is the weight, too.

    The load is even by construction, so there is no balancing loss. A token has any number of experts, none too: up to
    `most` (None: E), the best first; other places have id -1. Padding is no token. T is this rank's in a call.

    It is not causal: whether a token is taken depends on the tokens after it. So evaluation must say what it wants:

        inference=None         evaluation is refused
        inference="threshold"  an expert takes a token whose score is at least its `threshold`: the score of the last
                               token that it took in training, averaged (`update_bias` moves it `rate` of the way). Each
                               token is judged alone, as generation needs it, and the load is even on average only
        inference="choice"     as in training, over the tokens of the call

    Source: Zhou et al., Mixture-of-Experts with Expert Choice Routing (2022), where K is the capacity factor c.

    >>> router = ExpertChoiceRouter(hidden_size=16, num_experts=8, top_k=2)
    >>> router(torch.randn(64, 16)).counts.tolist()
    [16, 16, 16, 16, 16, 16, 16, 16]
    """

    fixed_k = False
    joint = True
    balances = False
    steered = ("threshold",)
    threshold: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        inference: str | None = None,
        rate: float = 0.01,
        most: int | None = None,
        gate_bias: bool = False,
        jitter: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            hidden_size, num_experts, top_k, gate_bias=gate_bias, jitter=jitter, device=device, dtype=dtype
        )
        if inference not in INFERENCE:
            known = ", ".join(map(repr, INFERENCE))
            raise ValueError(f"ExpertChoiceRouter: inference must be one of {known}, got {inference!r}")
        if not 0 < rate <= 1:
            raise ValueError(f"ExpertChoiceRouter: rate must be above 0 and at most 1, got {rate}")
        most = num_experts if most is None else most
        if not hasattr(most, "__index__") or not 1 <= most <= num_experts:
            raise ValueError(f"ExpertChoiceRouter: most must be an integer from 1 to {num_experts}, got {most!r}")
        self.inference, self.rate, self.most = inference, rate, most
        self.causal = self.per_token = inference == "threshold"
        self.register_buffer("threshold", torch.empty(num_experts, device=device, dtype=torch.float32))
        self.threshold.fill_(top_k / num_experts)

    @property
    def load_shape(self) -> tuple[int, ...]:
        return (self.num_experts, 2)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.threshold.fill_(self.top_k / self.num_experts)
        self.load = None

    def choose(self, x: Tensor, given: Given) -> Routing:
        if not self.training and self.inference is None:
            raise ValueError(
                'ExpertChoiceRouter: inference must be "threshold" or "choice" outside training, because a choice '
                "among all tokens depends on those that come later, got None"
            )
        logits = self.logits(x)
        scores = logits.softmax(1)
        known = scores.detach()
        if not self.training and self.inference == "threshold":
            taken = known >= self.threshold
        else:
            taken = self.taken(known, given.mask)
        marks = torch.where(taken, known, -1.0)
        ids = topk(marks, self.most, score="topk_softmax").expert_ids
        gone = ~taken.gather(1, ids.long())
        weights, ids = scores.gather(1, ids.long()).masked_fill(gone, 0), ids.masked_fill(gone, -1)
        counts = pairs_of_experts(ids, self.num_experts).int()
        return Routing(ids, weights, self.num_experts, counts, scores, logits)

    def taken(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """Which experts take which tokens, bool [T, E]: of equal scores the first token."""
        tokens = scores.shape[0]
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -1.0)
        order = scores.sort(dim=0, descending=True, stable=True).indices
        turn = torch.arange(tokens, device=order.device)[:, None].expand_as(order)
        place = torch.empty_like(order).scatter(0, order, turn)
        there = tokens if mask is None else mask.sum()
        taken = place * self.num_experts < there * self.top_k  # the first T K / E, rounded up
        return taken if mask is None else taken & mask[:, None]

    @torch.no_grad()
    def saw(self, routing: Routing) -> None:
        """The least score that each expert took, weighed by the tokens of the call."""
        assert routing.scores is not None
        if not len(routing.scores):
            return
        took = self.taken(routing.scores, routing.mask)
        least = torch.where(took, routing.scores, torch.inf).amin(0).double()
        tokens = took.any(1).sum() * least.isfinite()
        self._add(torch.stack([torch.where(tokens > 0, least, 0.0) * tokens, tokens], 1))

    def _step(self, load: Tensor) -> None:
        total, tokens = load.unbind(1)
        mean = torch.where(tokens > 0, total / tokens.clamp_min(1), self.threshold.double())
        self.threshold.copy_(torch.lerp(self.threshold.double(), mean, self.rate))
