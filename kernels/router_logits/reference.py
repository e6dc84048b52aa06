"""router_logits in plain torch, any device: the truth, and the CPU form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autocast import no_autocast


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def router_logits_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, everything cast up before the product."""
    to = wide(x.dtype)
    with no_autocast(x.device):
        logits = F.linear(x.to(to), weight.to(to))
        return logits if bias is None else logits + bias.to(to)
