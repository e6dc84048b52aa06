"""The expert that every token goes to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.routing import Routing
from .experts import Experts


class SharedExpert(nn.Module):
    """x [T, D] -> FFN(x) [T, D], or sigmoid(gate(x)) FFN(x) with `gate` (Qwen2-MoE).

    It is one expert of the same operation, whose routing is known beforehand and whose weight is 1 or the gate.
    `form` is what Experts takes: activation, gated, bias, device, dtype. A token where `mask` bool [T] is False has no
    expert: its y is 0.

    >>> SharedExpert(hidden_size=16, intermediate_size=32, gate=True)(torch.randn(5, 16)).shape
    torch.Size([5, 16])
    """

    def __init__(self, hidden_size: int, intermediate_size: int, *, gate: bool = False, **form: Any) -> None:
        super().__init__()
        self.ffn = Experts(1, hidden_size, intermediate_size, **form)
        where = {name: form.get(name) for name in ("device", "dtype")}
        self.gate = nn.Linear(hidden_size, 1, bias=False, **where) if gate else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        ids = torch.zeros(x.shape[0], 1, dtype=torch.int32, device=x.device)
        if mask is not None:
            ids = ids.masked_fill(~mask[:, None], -1)
        weights = torch.ones_like(ids, dtype=x.dtype) if self.gate is None else self.gate(x).sigmoid()
        return self.ffn(x, Routing(ids, weights, 1))
