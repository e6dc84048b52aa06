"""The routers of ROUTERS, made for any sizes: what a router must be given beside them stands here, once."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

import headgate
from headgate.moe.routers import ROUTERS, BilevelRouter, Given

OPTIONS: dict[str, dict[str, Any]] = {
    "expert_choice": {"inference": "choice"},
    "hash": {"vocab_size": 50},
    "top_p": {"p": 0.2},
    "relu": {"strength": 0.1},
    "longcat": {"identity": 4},
    "soft": {"inference": "whole"},
    "tile": {"tile": 4},
}


D, E, K = 16, 8, 2


def skewed(tokens: int = 256, seed: int = 0) -> Tensor:
    """Rows [tokens, D] that most routers would send to the same few experts."""
    return torch.randn(tokens, D, generator=torch.Generator().manual_seed(seed)) + 1


def fitting(name: str) -> Callable[..., Any]:
    """The class of a router; where it must have more options than sizes, some that fit them."""
    router = ROUTERS[name]
    more = OPTIONS.get(name, {})

    @wraps(router)
    def made(hidden_size, num_experts, top_k, **options):
        if router is BilevelRouter:
            nodes = 1 if num_experts % 2 else 2
            options = {"nodes": nodes, "topk_nodes": nodes if top_k == num_experts else 1} | options
        return router(hidden_size, num_experts, top_k, **more | options)

    return made


def route(router: nn.Module, x: Tensor, state: Tensor | None = None):
    """The Routing of x [T, D], with token ids that follow from x."""
    return router(x, Given(ids=_ids(x) if router.needs_ids else None, state=state))


def _ids(x: Tensor) -> Tensor:
    return x.detach()[..., 0].nan_to_num(0, 0, 0).mul(1000).long() % 50


def layer_of(name: str, hidden: int = 120, experts: int = 8, k: int = 2, dtype=torch.float64, **options: Any):
    """A layer with such a router, in fp64."""
    router = fitting(name)(hidden, experts, k, dtype=dtype)
    return headgate.MoE(hidden, 12, experts, k, router=router, dtype=dtype, **options)


def call(layer: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """y of a layer, which gets what its router asks for: token ids that follow from x, so that equal rows have equal
    ids. A state is not handed over."""
    more = {"ids": _ids(x)} if layer.router.needs_ids else {}
    y = layer(x, mask, **more)
    return y[0] if layer.router.carries_state else y
