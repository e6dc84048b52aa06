"""Models that accelerate has placed (`device_map`, `cpu_offload`, `disk_offload`): where they compute, their weights.

Such a model's parameters may be on the meta device between calls: accelerate's hook on each module brings them for the
time of a forward pass, and moves what the module is called with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: accelerate's execution device, else that of the first parameter with numbers."""
    for module in model.modules():
        device = getattr(_hook(module), "execution_device", None)
        if device is not None and torch.device(device).type != "meta":
            return torch.device(device)
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def keeps_weights(module: nn.Module) -> bool:
    """Whether accelerate keeps the module's weights elsewhere between calls, on the host or on disk."""
    return bool(getattr(_hook(module), "offload", False))


@contextmanager
def weights_there(module: nn.Module) -> Iterator[None]:
    """The module's own parameters with their numbers, for the time being."""
    hook: Any = _hook(module) if keeps_weights(module) else None
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def _hook(module: nn.Module) -> object | None:
    """accelerate's AlignDevicesHook of a module, also inside a SequentialHook."""
    hook = getattr(module, "_hf_hook", None)
    inside = (one for one in getattr(hook, "hooks", (hook,)) if hasattr(one, "execution_device"))
    return next(inside, None)
