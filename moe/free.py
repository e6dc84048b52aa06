"""Experts that cost no product: zero, copy and constant. A router that has some says which tokens go there."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels.router_logits import router_logits
from ..kernels.routing import Routing


class FreeExperts(nn.Module):
    """Z = `zero` + `copy` + `constant` experts beside E others, numbered E, E + 1, ... in this order.

        zero      0
        copy      x
        constant  a1 x + a2 v,   [a1, a2] = softmax(W x): its own `vectors` v [C, D] and `mixes` W [C, 2, D]

    To kernels and dispatchers, which know E experts, a pair with one of these has no expert: it costs no row of a
    product and no byte between ranks. `forward(x, routing)` gives the weighted sum [T, D] of what they add.

    Source: Jin et al., MoE++ (2024), equations 3-6.

    >>> free = FreeExperts(hidden_size=4, copy=1)
    >>> routing = Routing.from_topk(torch.tensor([[8], [3]]), torch.full((2, 1), 0.5), num_experts=8)
    >>> free(torch.ones(2, 4), routing)[:, 0].tolist()
    [0.5, 0.0]
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        zero: int = 0,
        copy: int = 0,
        constant: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, n in (("zero", zero), ("copy", copy), ("constant", constant)):
            if not hasattr(n, "__index__") or isinstance(n, bool) or n < 0:
                raise ValueError(f"FreeExperts: {name} must be a number of experts, 0 or more, got {n!r}")
        if not hasattr(hidden_size, "__index__") or hidden_size < 1:
            raise ValueError(f"FreeExperts: hidden_size must be a positive integer, got {hidden_size!r}")
        self.hidden_size, self.zero, self.copy, self.constant = hidden_size, zero, copy, constant
        where = {"device": device, "dtype": dtype}
        self.vectors = nn.Parameter(torch.empty(constant, hidden_size, **where)) if constant else None  # type: ignore[arg-type]
        self.mixes = nn.Parameter(torch.empty(constant, 2, hidden_size, **where)) if constant else None  # type: ignore[arg-type]
        self.reset_parameters()

    @property
    def number(self) -> int:
        """Z."""
        return self.zero + self.copy + self.constant

    def reset_parameters(self) -> None:
        """Uniform within 1 / sqrt(D), as nn.Linear."""
        for p in (self.vectors, self.mixes):
            if p is not None:
                nn.init.uniform_(p, -(self.hidden_size**-0.5), self.hidden_size**-0.5)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        first = routing.num_experts + self.zero
        place = routing.expert_ids - first
        copied = torch.where((place >= 0) & (place < self.copy), routing.weights, 0).sum(1, keepdim=True)
        if self.vectors is None or self.mixes is None:
            return (copied * x).to(x.dtype)
        own = place[:, :, None] - self.copy == torch.arange(self.constant, device=x.device)
        weights = torch.where(own, routing.weights[:, :, None], 0).sum(1)  # [T, C]
        parts = router_logits(x, self.mixes.flatten(0, 1)).unflatten(1, (-1, 2)).softmax(2)
        of_x = copied + (weights * parts[:, :, 0]).sum(1, keepdim=True)
        of_vectors = router_logits(weights * parts[:, :, 1], self.vectors.T)
        return (of_x * x + of_vectors).to(x.dtype)

    def extra_repr(self) -> str:
        return f"zero={self.zero}, copy={self.copy}, constant={self.constant}"
