"""Soft MoE: experts work on slots, mixtures of a sequence's tokens, and every token gets a mixture of all slots."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...kernels.router_logits import router_logits
from ...kernels.routing import Routing, pairs_of_experts
from ...kernels.transforms import under_transform
from .given import Given
from .router import GatedRouter

_EPS = 1e-6  # under the root of a norm: a row of zeros stays zero
INFERENCE = (None, "whole")

Back = Callable[[Tensor], Tensor]


class SoftRouter(GatedRouter):
    """E P slots, P = `slots_per_expert`, for each sequence X [S, D], slot i of expert i // P:

        L = gain * norm(X) norm(W)^T        [S, E P], norm: rows of length 1
        rows = softmax over tokens(L)^T X   [E P, D]: what the experts compute
        Y = softmax over slots(L) outputs   [S, D]

    So no choice is made, nothing is dropped, every expert has P rows a sequence, and gradients go through all. The
    Routing is one of slots, [B E P, 1] with weight 1; `top_k` says nothing here. A layer calls `mix`. Of x [T, D] all T
    tokens are one sequence, of [B, S, D] each of the B for itself. Padding is in no slot.

    It is not causal: a slot holds later tokens too, so that a decoder that generates one token after another would see
    another function than it was trained with. Evaluation is refused until `inference="whole"` says that every call has
    whole sequences, as an encoder's do.

    `weight` W [E P, D], `gain` [1]. `jitter`: see GatedRouter.

    Source: Puigcerver et al., From Sparse to Soft Mixtures of Experts (2023), sections 2.1-2.3.

    Raises ValueError where a sequence is cut over ranks (context parallelism).

    >>> layer = headgate.MoE(16, 32, num_experts=8, top_k=1, router="soft")
    >>> y = layer(torch.randn(3, 5, 16)); layer.last_routing.counts.tolist()
    [3, 3, 3, 3, 3, 3, 3, 3]
    """

    causal = False
    per_token = False
    fixed_k = False
    balances = False
    slots = True

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        slots_per_expert: int = 1,
        inference: str | None = None,
        jitter: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not hasattr(slots_per_expert, "__index__") or slots_per_expert < 1:
            raise ValueError(f"SoftRouter: slots_per_expert must be a positive integer, got {slots_per_expert!r}")
        if inference not in INFERENCE:
            known = " or ".join(map(repr, INFERENCE))
            raise ValueError(f"SoftRouter: inference must be {known}, got {inference!r}")
        rows = num_experts * slots_per_expert
        super().__init__(hidden_size, num_experts, top_k, jitter=jitter, rows=rows, device=device, dtype=dtype)
        self.slots_per_expert, self.inference = slots_per_expert, inference
        self.gain = nn.Parameter(torch.ones(1, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.ones_(self.gain)

    def logits(self, x: Tensor) -> Tensor:
        """L, fp32 [T, E P] (fp64 for fp64 x), of x [T, D]."""
        return router_logits(_unit(self.jittered(x)), _unit(self.weight)) * self.gain

    def choose(self, x: Tensor, given: Given) -> Routing:
        return self.mix(x, given)[1]

    def mix(self, x: Tensor, given: Given) -> tuple[Tensor, Routing, Back]:
        """(the slots' rows [R, D] in x's dtype, their Routing, and what makes y [T, D] of their outputs [R, D]), with
        R = B E P slots for the B sequences of x [T, D]."""
        self._check(given)
        logits = self.logits(x)
        if x.device.type == "cpu" and not torch.compiler.is_compiling() and not under_transform():
            _check_finite(logits)
        parts = given.sequences
        length = len(x) // max(parts, 1)
        each = logits.view(parts, length, logits.shape[1])
        into, full = each, torch.ones(parts, dtype=torch.bool, device=x.device)
        if given.mask is not None:
            there = given.mask.view(parts, length, 1)
            into, full = each.masked_fill(~there, torch.finfo(each.dtype).min), there.any(1)[:, 0]
        into = into.softmax(1)
        if given.mask is not None:
            into = into.masked_fill(~there, 0)
        rows = (into.mT.to(x.dtype) @ x.view(parts, length, x.shape[1])).to(x.dtype).flatten(0, 1)
        out = each.softmax(2)

        expert = torch.arange(logits.shape[1], dtype=torch.int32, device=x.device) // self.slots_per_expert
        ids = torch.where(full[:, None], expert, -1).view(-1, 1)  # a sequence that is padding alone has no slots
        weights = torch.ones(ids.shape, dtype=logits.dtype, device=x.device)
        counts = pairs_of_experts(ids, self.num_experts).int()
        routing = Routing(ids, weights, self.num_experts, counts)

        def back(y: Tensor) -> Tensor:
            return (out.to(y.dtype) @ y.view(parts, logits.shape[1], y.shape[1])).to(y.dtype).flatten(0, 1)

        return rows, routing, back

    def at(self, routing: Routing, ids: Tensor) -> Routing:
        raise TypeError("replay: a router must choose experts for tokens, got a SoftRouter, whose experts have slots")

    def _check(self, given: Given) -> None:
        if not self.training and self.inference is None:
            raise ValueError(
                'SoftRouter: inference must be "whole" outside training, because a slot holds the later tokens of a '
                "sequence too, which generation has not seen, got None"
            )
        if given.ranks is not None and given.ranks.sequence is not None and given.ranks.sequence.size() > 1:
            raise ValueError("SoftRouter: sequences must be whole on a rank, got ranks that hold parts of them")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, slots_per_expert={self.slots_per_expert}"


def _unit(t: Tensor) -> Tensor:
    """The rows of t [n, D], fp32 or fp64, with length 1."""
    wide = t if t.dtype == torch.float64 else t.float()
    return wide * (wide.square().sum(1, keepdim=True) + _EPS).rsqrt()


def _check_finite(logits: Tensor) -> None:
    bad = logits.detach().isfinite().all(1).logical_not_().nonzero()
    if len(bad):
        t = int(bad[0])
        worst = logits[t][~logits[t].isfinite()][0].item()
        raise ValueError(f"SoftRouter: logits (the router's scores) must be finite, got {worst} for token {t}")
