"""Whether torch.autocast is on, and its end: asked in a way that torch.compile of every supported torch can follow."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def under_autocast(device: torch.device) -> bool:
    """Whether autocast is on for tensors of `device`. "meta" is the one type that knows none, and asking raises;
    torch.amp.is_autocast_available would tell, but torch 2.11 cannot compile it."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def no_autocast(device: torch.device) -> AbstractContextManager:
    return torch.autocast(device.type, enabled=False) if under_autocast(device) else nullcontext()
