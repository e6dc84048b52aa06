"""The Sinkhorn router of S-BASE: while training, a choice that is balanced by optimal transport."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...dispatch import collectives
from ...kernels.routing import Routing, pairs_of_experts
from ...kernels.topk import check_choice, topk
from .given import Given
from .router import GatedRouter


class SinkhornRouter(GatedRouter):
    """While training, experts are chosen by a plan that gives each token and each expert its share; at evaluation by
    the logits alone.

    The plan is exp(l_te + r_t + c_e), whose rows all have one sum and whose columns all have one sum: `iterations`
    rounds, in logarithms, so that no logit is too large, and adding a constant to all of them changes nothing. Over
    many ranks the columns are those of all tokens (`token_ranks` of the layer): one all-gather of E numbers a round. No
    gradient goes through the plan. The weight is sigmoid(l) for K = 1, else softmax(l), at the chosen experts, times
    `scale`. There is no balancing loss. `gate_bias`, `jitter`: see GatedRouter.

    Source: Clark et al., Unified Scaling Laws for Routed Language Models (2022), S-BASE; Megatron-Core's "sinkhorn".

    >>> router, x = SinkhornRouter(hidden_size=16, num_experts=8, top_k=1), torch.randn(64, 16) + 1
    >>> router(x).counts.max() <= router.eval()(x).counts.max()
    tensor(True)
    """

    joint = True
    balances = False

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        iterations: int = 16,
        scale: float = 1.0,
        gate_bias: bool = False,
        jitter: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_choice(num_experts, top_k, "softmax", 1, 1, "max", scale, who="SinkhornRouter")
        if not hasattr(iterations, "__index__") or iterations < 1:
            raise ValueError(f"SinkhornRouter: iterations must be a positive integer, got {iterations!r}")
        super().__init__(
            hidden_size, num_experts, top_k, gate_bias=gate_bias, jitter=jitter, device=device, dtype=dtype
        )
        self.iterations, self.scale = iterations, scale

    def choose(self, x: Tensor, given: Given) -> Routing:
        logits = self.logits(x)
        choice = logits.detach()
        if self.training:
            choice = choice + self.columns(choice, given)
        ids = topk(choice, self.top_k, score="topk_softmax").expert_ids
        scores = logits.sigmoid() if self.top_k == 1 else logits.softmax(1)
        weights = scores.gather(1, ids.long()) * self.scale
        counts = pairs_of_experts(ids, self.num_experts).int()
        return Routing(ids, weights, self.num_experts, counts, scores, logits)

    @torch.no_grad()
    def columns(self, logits: Tensor, given: Given) -> Tensor:
        """c [E] of the plan for logits [T, E]: what is added to an expert's logits so that it gets its share."""
        c = logits.new_zeros(logits.shape[1])
        for _ in range(self.iterations):
            rows = logits - (logits + c).logsumexp(1, keepdim=True)
            if given.mask is not None:
                rows = rows.masked_fill(~given.mask[:, None], -math.inf)
            came = rows.logsumexp(0)
            if given.ranks is not None:
                came = collectives.all_gather(came[None], given.ranks.group).logsumexp(0)
            c = torch.where(came.isfinite(), came.amax() - came, 0.0)  # nothing is asked of a batch without tokens
        return c

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, iterations={self.iterations}"
