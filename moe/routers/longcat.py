"""LongCat's router: identity experts among the others, and a bias that keeps the mean number of real ones."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.routing import Routing, pairs_of_experts
from ...kernels.topk import check_choice, topk
from ..free import FreeExperts
from .given import Given
from .steered import SteeredRouter


class LongCatRouter(SteeredRouter):
    """Softmax over E FFN experts and `identity` Z ones that answer x; the K best by score + bias; weights are the
    scores times `scale`. So a token has between 0 and K FFN experts, and on average `ffn_k` of them.

    `expert_bias` [E] of the FFN experts is steered (`update_bias`): b_e += bias_rate * (ffn_k / (K E) - the share of
    the K T pairs that e has). Identity experts have none: while the FFN experts have too few pairs, all biases rise.
    ids E .. E + Z - 1 are the identity experts', `counts` [E] the others'. `gate_bias`, `jitter`: see GatedRouter.

    Source: LongCat-Flash technical report (2025), section 2.1, equations 1-2.

    >>> router = LongCatRouter(hidden_size=16, num_experts=8, top_k=4, identity=4, ffn_k=3.0)
    >>> routing = router(torch.randn(5, 16)); routing.scores.shape, routing.counts.shape
    (torch.Size([5, 12]), torch.Size([8]))
    """

    fixed_k = False
    balances = False
    steered = ("expert_bias",)
    expert_bias: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        identity: int,
        ffn_k: float | None = None,
        scale: float = 1.0,
        bias_rate: float = 1e-3,
        gate_bias: bool = False,
        jitter: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_choice(num_experts, top_k, "softmax", 1, 1, "max", scale, who="LongCatRouter")
        free = FreeExperts(hidden_size, copy=identity)
        ffn_k = top_k * num_experts / (num_experts + identity) if ffn_k is None else ffn_k
        if not 0 < ffn_k <= top_k:
            raise ValueError(f"LongCatRouter: ffn_k must be above 0 and at most top_k ({top_k}), got {ffn_k}")
        if not bias_rate >= 0:
            raise ValueError(f"LongCatRouter: bias_rate must not be negative, got {bias_rate}")
        super().__init__(
            hidden_size, num_experts, top_k, gate_bias=gate_bias, jitter=jitter, rows=num_experts + identity,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.free, self.ffn_k, self.scale, self.bias_rate = free, ffn_k, scale, bias_rate
        self.register_buffer("expert_bias", torch.zeros(num_experts, device=device, dtype=torch.float32))

    @property
    def load_shape(self) -> tuple[int, ...]:
        return (self.num_experts + 1,)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.expert_bias.zero_()
        self.load = None

    def choose(self, x: Tensor, given: Given) -> Routing:
        bias = torch.cat([self.expert_bias, self.expert_bias.new_zeros(self.free.number)])
        every = topk(self.logits(x), self.top_k, bias=bias, scale=self.scale)
        counts = pairs_of_experts(every.expert_ids, self.num_experts).int()
        return Routing(every.expert_ids, every.weights, self.num_experts, counts, every.scores, every.logits)

    def saw(self, routing: Routing) -> None:
        assert routing.counts is not None
        tokens = routing.counts.new_zeros(1)
        tokens = tokens + (len(routing.expert_ids) if routing.mask is None else routing.mask.sum())
        self._add(torch.cat([routing.counts, tokens.to(routing.counts.dtype)]))

    def _step(self, load: Tensor) -> None:
        """b_e += bias_rate * (ffn_k / (K E) - count_e / (K T))."""
        counts, tokens = load[:-1], load[-1]
        share = counts / (self.top_k * tokens.clamp_min(1))
        aim = self.ffn_k / (self.top_k * self.num_experts)
        self.expert_bias += torch.where(tokens > 0, self.bias_rate * (aim - share), 0.0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, identity={self.free.number}, ffn_k={self.ffn_k}"
