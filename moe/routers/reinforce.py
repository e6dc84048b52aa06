"""The REINFORCE router: experts are drawn, and what came of it is the gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...dispatch import collectives
from ...kernels.routing import Routing, pairs_of_experts
from ...kernels.topk import topk
from .given import NOTHING, Given
from .router import GatedRouter


class ReinforceRouter(GatedRouter):
    """While training, K experts are drawn without replacement by pi = softmax(l); at evaluation they are the K best.
    Every weight is 1 / K: the output teaches the gate nothing.

    What teaches it is a reward R [T] for each token, say its log-likelihood, which `headgate.moe.reward(model, R)`
    hands to all routers of a model between the forward and the backward pass. To the loss is then added

        - sum_t (R_t - baseline) log pi(drawn experts of t) - entropy_coef * sum_t H(pi_t),    over `scale`

    by its gradient alone. `baseline`, a buffer, is the running mean of R (`rate` of the way with each reward), over
    many ranks of all of theirs: `reward` is then one all-reduce of two numbers, on every rank. `scale` None divides by
    the tokens, as a mean loss is. Padding is no token; its R is not looked at. Without a reward there is no such
    gradient. What activation checkpointing runs again draws the same experts, as torch restores the random state.

    Source: Clark et al., Unified Scaling Laws for Routed Language Models (2022), RL-R; Williams (1992).

    >>> router = ReinforceRouter(hidden_size=16, num_experts=8, top_k=1)
    >>> router(torch.randn(5, 16)).weights.detach().unique()
    tensor([1.])
    """

    draws = True
    trains_gate = False
    baseline: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        entropy_coef: float = 0.0,
        rate: float = 0.01,
        scale: float | None = None,
        gate_bias: bool = False,
        jitter: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            hidden_size, num_experts, top_k, gate_bias=gate_bias, jitter=jitter, device=device, dtype=dtype
        )
        if not 0 <= entropy_coef < math.inf:
            raise ValueError(f"ReinforceRouter: entropy_coef must be finite and not negative, got {entropy_coef}")
        if not 0 <= rate <= 1:
            raise ValueError(f"ReinforceRouter: rate must be between 0 and 1, got {rate}")
        if scale is not None and not 0 < scale < math.inf:
            raise ValueError(f"ReinforceRouter: scale must be positive and finite, got {scale}")
        self.entropy_coef, self.rate, self.scale = entropy_coef, rate, scale
        self.register_buffer("baseline", torch.zeros((), device=device, dtype=torch.float32))
        self.advantage: Tensor | None = None
        self._seen = NOTHING

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.baseline.zero_()
        self.advantage, self._seen = None, NOTHING

    def choose(self, x: Tensor, given: Given) -> Routing:
        logits = self.logits(x)
        choice = logits.detach()
        if self.training:
            choice = choice - torch.empty_like(choice).exponential_().log()  # Gumbel: the K best are K drawn in turn
        ids = topk(choice, self.top_k, score="topk_softmax").expert_ids
        weights = torch.full(ids.shape, 1 / self.top_k, dtype=logits.dtype, device=logits.device)
        if self.training and logits.requires_grad:
            weights = _Reinforce.apply(weights, self._surprise(logits, ids), _entropy(logits), given.mask, self)
            self._seen = given
        counts = pairs_of_experts(ids, self.num_experts).int()
        return Routing(ids, weights, self.num_experts, counts, logits.softmax(1), logits)

    def weights_at(self, routing: Routing, ids: Tensor, none: Tensor) -> Tensor:
        """1 / K, and no gradient: the experts were not drawn by this router as it is now."""
        return torch.full_like(routing.weights, 1 / self.top_k)

    def _surprise(self, logits: Tensor, ids: Tensor) -> Tensor:
        """log of the chance [T] that these experts are drawn in this order."""
        rest, total = logits, logits.new_zeros(len(logits))
        for k in range(self.top_k):
            one = ids[:, k : k + 1].long()
            total = total + rest.log_softmax(1).gather(1, one)[:, 0]
            rest = rest.scatter(1, one, -math.inf)
        return total

    @torch.no_grad()
    def reward(self, reward: Tensor) -> None:
        """R [T] of the tokens of the forward pass just made: what the backward pass that follows takes. The baseline
        moves afterwards. Raises ValueError where it is not [T] of finite numbers, but for padding."""
        if reward.dim() != 1 or not reward.is_floating_point():
            raise ValueError(
                f"ReinforceRouter.reward: reward must be floating point [T], got {reward.dtype} {tuple(reward.shape)}"
            )
        mask, ranks = self._seen.mask, self._seen.ranks
        if mask is not None:
            if len(reward) != len(mask):
                raise ValueError(f"ReinforceRouter.reward: reward must be of {len(mask)} tokens, got {len(reward)}")
            reward = reward.masked_fill(~mask, 0)
        tokens = reward.new_tensor(len(reward), dtype=torch.float64) if mask is None else mask.sum().double()
        whole = torch.stack([reward.sum(dtype=torch.float64), tokens])
        if ranks is not None:
            whole = collectives.all_reduce(whole, ranks.group)
        if not whole.isfinite().all():  # known to every rank
            raise ValueError("ReinforceRouter.reward: reward must be finite, got some that is not")
        self.advantage = reward.detach() - self.baseline.to(reward.dtype)
        mean = torch.where(whole[1] > 0, whole[0] / whole[1].clamp_min(1), self.baseline.double())
        self.baseline.lerp_(mean.to(self.baseline), self.rate)


class _Reinforce(torch.autograd.Function):
    """weights as they are; the backward pass adds the policy's gradient, from what the router was given meanwhile."""

    @staticmethod
    def forward(ctx, weights: Tensor, surprise: Tensor, entropy: Tensor, mask: Tensor | None, router) -> Tensor:
        ctx.router, ctx.tokens, ctx.mask = router, len(weights), mask
        ctx.dtype = surprise.dtype
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx, grad: Tensor):
        router, advantage = ctx.router, ctx.router.advantage
        if advantage is None:
            return None, None, None, None, None
        if len(advantage) != ctx.tokens:
            raise ValueError(f"ReinforceRouter.reward: reward must be of {ctx.tokens} tokens, got {len(advantage)}")
        there = grad.new_ones(ctx.tokens, dtype=ctx.dtype) if ctx.mask is None else ctx.mask.to(ctx.dtype)
        there = there / (there.sum().clamp_min(1) if router.scale is None else router.scale)
        router.advantage = None
        return None, -advantage.to(ctx.dtype) * there, -router.entropy_coef * there, None, None


def _entropy(logits: Tensor) -> Tensor:
    """H of softmax(logits) [T]."""
    known = logits.log_softmax(1)
    return -(known.exp() * known).sum(1)


def reward(model: nn.Module, reward: Tensor) -> None:
    """Hands the reward R [T] of the last forward pass's tokens to every ReinforceRouter of a model; call it before the
    backward pass. Raises ValueError where the model has none, or R is not [T].

    >>> layer = headgate.MoE(16, 32, 8, 1, router="reinforce")
    >>> y = layer(torch.randn(5, 16)); headgate.moe.reward(layer, -y.detach().square().sum(1)); y.sum().backward()
    >>> layer.router.weight.grad.abs().sum() > 0
    tensor(True)
    """
    routers = [m for m in model.modules() if isinstance(m, ReinforceRouter)]
    if not routers:
        raise ValueError(f"reward: model must have a ReinforceRouter, got a {type(model).__name__} without any")
    for router in routers:
        router.reward(reward)
