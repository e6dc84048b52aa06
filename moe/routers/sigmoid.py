"""The sigmoid router of DeepSeek-V3 and its descendants, balanced by a bias instead of a loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.routing import Routing
from ...kernels.topk import check_choice, topk
from .given import Given
from .router import warn_of_constant_weights
from .steered import SteeredRouter


class SigmoidRouter(SteeredRouter):
    """Sigmoid scores; the choice, and nothing else, is made on score + `expert_bias`; weights normalised and scaled.

    Source: DeepSeek-V3 technical report (2024), section 2.1.2; Wang et al., auxiliary-loss-free load balancing (2024).

    `renormalize` divides a token's weights by their sum; None: where K > 1, as in Megatron-Core and DeepSeek's
    own code. (transformers' DeepSeek-V3 does so at K = 1 too: every weight is 1, and y teaches the router nothing.)
    `groups`, `topk_groups`, `group_score` limit the choice as in `topk` (DeepSeek-V3: 8 groups, 4 chosen, "top2").
    `score` "sigmoid", or "sqrtsoftplus" (DeepSeek-V4). `bias_rate` is the step of `update_bias`. `gate_bias`, `jitter`:
    see GatedRouter.

    `expert_bias` fp32 [E] is a buffer, saved with the model, that stays fp32 when the model is cast: its steps are
    smaller than bf16 can tell apart. `load` int32 [E] or None adds up the counts of the training forwards since the
    last `update_bias`, so that it works over accumulated micro-steps: call it once after each optimizer step, or let
    `headgate.update_biases` do so for a whole model. What activation checkpointing runs again does not count.

    >>> router = SigmoidRouter(hidden_size=16, num_experts=8, top_k=2, groups=4, topk_groups=2, scale=2.5)
    >>> for micro_step in range(4): routing = router(torch.randn(32, 16))
    >>> router.update_bias(); router.expert_bias.abs().max()
    tensor(0.0010)
    """

    steered = ("expert_bias",)
    expert_bias: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        score: str = "sigmoid",
        renormalize: bool | None = None,
        scale: float = 1.0,
        groups: int = 1,
        topk_groups: int = 1,
        group_score: str | int = "top2",
        bias_rate: float = 1e-3,
        gate_bias: bool = False,
        jitter: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if score not in ("sigmoid", "sqrtsoftplus"):
            raise ValueError(f"SigmoidRouter: score must be 'sigmoid' or 'sqrtsoftplus', got {score!r}")
        if not bias_rate >= 0:
            raise ValueError(f"SigmoidRouter: bias_rate must not be negative, got {bias_rate}")
        check_choice(num_experts, top_k, score, groups, topk_groups, group_score, scale, who="SigmoidRouter")
        warn_of_constant_weights("SigmoidRouter", top_k, "renormalize=True", bool(renormalize))
        renormalize = top_k > 1 if renormalize is None else renormalize
        super().__init__(
            hidden_size, num_experts, top_k, gate_bias=gate_bias, jitter=jitter, device=device, dtype=dtype
        )
        self.score, self.renormalize, self.scale, self.bias_rate = score, renormalize, scale, bias_rate
        self.groups, self.topk_groups, self.group_score = groups, topk_groups, group_score
        self.register_buffer("expert_bias", torch.zeros(num_experts, device=device, dtype=torch.float32))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.expert_bias.zero_()
        self.load = None

    def choose(self, x: Tensor, given: Given) -> Routing:
        return topk(
            self.logits(x),
            self.top_k,
            score=self.score,
            bias=self.expert_bias,
            groups=self.groups,
            topk_groups=self.topk_groups,
            group_score=self.group_score,
            renormalize=self.renormalize,
            scale=self.scale,
        )

    def saw(self, routing: Routing) -> None:
        assert routing.counts is not None
        self._add(routing.counts)

    def _step(self, load: Tensor) -> None:
        """expert_bias_e += bias_rate * sign(mean load - load of e). Only the sign of the error counts, so that a
        compiled layer that eager checkpointing runs again, and that counts twice, takes the same step."""
        self.expert_bias += self.bias_rate * (load.mean() - load).sign()
