"""Balance by a bias for a whole model: every router's step, over all ranks, after each step of the optimizer."""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..dispatch import collectives
from .layer import MoE
from .routers.steered import SteeredRouter


def update_biases(
    module: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, group: dist.ProcessGroup | None = None
) -> RemovableHandle | None:
    """One step of `update_bias` for every router in `module` that has one: now, or after each optimizer step. Those are
    "sigmoid", "quantile", "relu", "longcat" and "expert_choice" (see SteeredRouter).

    With an `optimizer` it runs after each of its steps from now on, so that gradients may add up over any number of
    forwards; the handle that is returned ends this by `remove()`. Without one it runs once: call it after each step.
    The load is that of the training forwards since the last update. Forwards that activation checkpointing runs again
    do not count, evaluation does not count, and a router that saw nothing stays as it is.

    Loads are added up over the ranks whose tokens make one batch: a layer's `token_ranks`, which `parallelize` sets,
    or `group` where it has none (under DDP, say); None: this rank alone. One all-reduce for all layers of a group, so
    every rank must come by, or make its optimizer's step.

    Raises ValueError where the module has no such router, TypeError where `optimizer` is no torch optimizer.

    >>> layer = headgate.MoE(16, 32, num_experts=8, top_k=2, router="sigmoid")
    >>> optimizer = torch.optim.AdamW(layer.parameters())
    >>> handle = headgate.update_biases(layer, optimizer)
    >>> layer(torch.randn(64, 16)).square().mean().backward()
    >>> optimizer.step(); layer.router.expert_bias.abs().max()
    tensor(0.0010)
    """
    if not any(isinstance(m, SteeredRouter) for m in module.modules()):
        what = f"got a {type(module).__name__} without any"
        raise ValueError(f"update_biases: module must hold routers with a bias (such as SigmoidRouter), {what}")
    if optimizer is None:
        _update(module, group)
        return None
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"update_biases: optimizer must be a torch.optim.Optimizer or None, got {optimizer!r}")
    return optimizer.register_step_post_hook(lambda *_: _update(module, group))


def _update(module: nn.Module, group: dist.ProcessGroup | None) -> None:
    known = {m.router: m.token_ranks.group for m in module.modules() if isinstance(m, MoE) and m.token_ranks}
    by_group = defaultdict[dist.ProcessGroup | None, list[SteeredRouter]](list)
    for router in module.modules():
        if isinstance(router, SteeredRouter):
            by_group[known.get(router, group)].append(router)
    for among, routers in by_group.items():
        loads = [_load_of(router) for router in routers]
        if among is not None:
            sizes = [load.numel() for load in loads]
            summed = collectives.all_reduce(torch.cat([load.flatten() for load in loads]), among).split(sizes)
            loads = [one.view_as(load) for one, load in zip(summed, loads, strict=True)]
        for router, load in zip(routers, loads, strict=True):
            router.update_bias(load)


def _load_of(router: SteeredRouter) -> Tensor:
    """fp64 [*load_shape], in which counts are exact: zeros where nothing was seen, which moves nothing."""
    device = getattr(router, router.steered[0]).device
    nothing = torch.zeros(router.load_shape, dtype=torch.float64, device=device)
    return nothing if router.load is None else nothing + router.load
