"""router_logits in plain torch, any device: the truth, and the CPU form."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_autocast(device: torch.device) -> AbstractContextManager:
    kind = device.type  # some, such as meta, know no autocast at all
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def router_logits_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, everything cast up before the product."""
    to = wide(x.dtype)
    with no_autocast(x.device):
        logits = F.linear(x.to(to), weight.to(to))
        return logits if bias is None else logits + bias.to(to)
