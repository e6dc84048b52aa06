"""Routing that is not the router's own: an even one, for benchmarks of everything behind it; or one that was told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..kernels.routing import Routing
from .losses import counts_of

FORCED = ("random", "round_robin")
_FOLLOW = "_headgate_follow"


def forced(routing: Routing, how: str) -> Routing:
    """The routing with other expert ids [T, K]: weights and scores, and so their gradients, stay the router's.

    "random": K different experts for each token, each as likely as any, drawn anew in every call. Ranks that pass the
    same tokens (replicated activations) must have the same random state. "round_robin": pair t * K + k of this rank
    goes to expert (t * K + k) mod E. A pair without an expert, or with one that costs nothing, stays as it is, and is
    not counted there.
    """
    own, experts = routing.expert_ids, routing.num_experts
    there = (own >= 0) & (own < experts)
    ids = _drawn(routing, experts)[:, : own.shape[1]] if how == "random" else _in_turn(there, experts)
    new = replace(routing, expert_ids=torch.where(there, ids.int(), own), counts=None)
    new = replace(new, counts=counts_of(new, None)[0].int())
    return new if routing.mask is None else new.masked(routing.mask)


def _drawn(routing: Routing, experts: int) -> Tensor:
    return torch.rand(routing.expert_ids.shape[0], experts, device=routing.expert_ids.device).argsort(1)


def _in_turn(there: Tensor, experts: int) -> Tensor:
    return ((there.flatten().cumsum(0) - 1) % experts).view_as(there)


@contextmanager
def follow(layer: nn.Module, route: Callable) -> Iterator[None]:
    """For the length of a `with`, a MoE layer goes by route(layer, its router's routing, tokens, sequences)."""
    if _FOLLOW in vars(layer):
        raise ValueError("replay: model must not follow a trace already, got one that does")
    vars(layer)[_FOLLOW] = route
    try:
        yield
    finally:
        vars(layer).pop(_FOLLOW)


def followed(layer: nn.Module, routing: Routing, tokens: Tensor, sequences: int) -> Routing:
    """The routing that the layer was told, or its own."""
    route = vars(layer).get(_FOLLOW)
    return routing if route is None else route(layer, routing, tokens, sequences)
