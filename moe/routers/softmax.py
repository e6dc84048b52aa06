"""The softmax router of most families: Switch, Mixtral, Qwen-MoE, OLMoE, DeepSeek-V2, gpt-oss, GraniteMoE."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.routing import Routing
from ...kernels.topk import check_choice, topk
from .given import Given
from .router import GatedRouter, warn_of_constant_weights

ORDERS = {"softmax_topk": "softmax", "topk_softmax": "topk_softmax"}


class SoftmaxRouter(GatedRouter):
    """Softmax over the experts' logits and the K best of them, in either order.

    `order` "softmax_topk" takes the probabilities of the K best, divided by their sum if `renormalize` (Mixtral,
    Qwen3); "topk_softmax" takes the softmax of the K best logits, which sums to one by itself (gpt-oss, GraniteMoE).
    `scale` multiplies the weights. `groups`, `topk_groups`, `group_score` limit the choice as in `topk` (DeepSeek-V2:
    "max").
    `gate_bias` adds a learned bias to the logits (gpt-oss). `jitter`: see GatedRouter.

    >>> SoftmaxRouter(hidden_size=16, num_experts=8, top_k=2, renormalize=True)(torch.randn(5, 16)).weights.shape
    torch.Size([5, 2])
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        order: str = "softmax_topk",
        renormalize: bool = False,
        scale: float = 1.0,
        groups: int = 1,
        topk_groups: int = 1,
        group_score: str | int = "max",
        gate_bias: bool = False,
        jitter: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if order not in ORDERS:
            raise ValueError(f"SoftmaxRouter: order must be one of {', '.join(ORDERS)}, got {order!r}")
        check_choice(num_experts, top_k, ORDERS[order], groups, topk_groups, group_score, scale, who="SoftmaxRouter")
        how = f"order={order!r}" if order == "topk_softmax" else "renormalize=True"
        warn_of_constant_weights("SoftmaxRouter", top_k, how, renormalize or order == "topk_softmax")
        super().__init__(
            hidden_size, num_experts, top_k, gate_bias=gate_bias, jitter=jitter, device=device, dtype=dtype
        )
        self.score, self.renormalize, self.scale = ORDERS[order], renormalize, scale
        self.groups, self.topk_groups, self.group_score = groups, topk_groups, group_score

    def weights_at(self, routing: Routing, ids: Tensor, none: Tensor) -> Tensor:
        if self.score != "topk_softmax":
            return super().weights_at(routing, ids, none)
        assert routing.logits is not None
        wide = routing.logits if routing.logits.dtype == torch.float64 else routing.logits.float()
        chosen = wide.gather(1, ids).masked_fill(none, -torch.inf)
        chosen = chosen.masked_fill(none.all(1, keepdim=True), 0)
        return chosen.softmax(1) * self.scale

    def choose(self, x: Tensor, given: Given) -> Routing:
        return topk(
            self.logits(x),
            self.top_k,
            score=self.score,
            groups=self.groups,
            topk_groups=self.topk_groups,
            group_score=self.group_score,
            renormalize=self.renormalize,
            scale=self.scale,
        )
