"""Routing whose load is even whatever the router has learned: for benchmarks of everything behind it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.routing import Routing
from .losses import counts_of

FORCED = ("random", "round_robin")


def forced(routing: Routing, how: str) -> Routing:
    """The routing with other expert ids [T, K]: weights and scores, and so their gradients, stay the router's.

    "random": K different experts for each token, each as likely as any, drawn anew in every call. Ranks that pass the
    same tokens (replicated activations) must have the same random state. "round_robin": pair t * K + k of this rank
    goes to expert (t * K + k) mod E.
    """
    (tokens, k), experts = routing.expert_ids.shape, routing.num_experts
    ids = _drawn(routing, experts)[:, :k] if how == "random" else _in_turn(routing, tokens * k).view(tokens, k)
    new = replace(routing, expert_ids=ids.int(), counts=None)
    new = replace(new, counts=counts_of(new, None)[0].int())
    return new if routing.mask is None else new.masked(routing.mask)


def _drawn(routing: Routing, experts: int) -> Tensor:
    return torch.rand(routing.expert_ids.shape[0], experts, device=routing.expert_ids.device).argsort(1)


def _in_turn(routing: Routing, pairs: int) -> Tensor:
    return torch.arange(pairs, device=routing.expert_ids.device) % routing.num_experts
