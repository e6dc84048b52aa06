"""What the checks of placements on live models share: random placements, and rows counted on the wire."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from placement_cases import random_slots
from torch import nn

from headgate.dispatch import collectives
from headgate.moe.shards import shards_of
from headgate.placement.placement import Placement
from headgate.placement.topology import Topology

CHECKS: dict[str, Callable[[], None]] = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def placement(seed: int, gpus: int, experts: int, spare: int = 0, layers: int = 1) -> Placement:
    """A random one, the same on every rank, on nodes of two GPUs, with `spare` more slots on each than it takes."""
    slots = np.full(gpus, min(experts // gpus + spare, experts))
    topology = Topology(gpus // 2, 2) if gpus % 2 == 0 else Topology(1, gpus)
    return Placement(random_slots(np.random.default_rng(seed), layers, experts, slots), experts, topology)


@contextmanager
def messages() -> Iterator[list[tuple[list[int], list[int], int]]]:
    """Every all-to-all of this rank meanwhile: (sent to each rank, received from each, bytes of one row)."""
    seen: list[tuple[list[int], list[int], int]] = []
    whole = collectives.all_to_all

    def counted(x, received, sent, group):
        seen.append((list(sent), list(received), x[:1].nbytes if len(x) else 0))
        return whole(x, received, sent, group)

    collectives.all_to_all = counted
    try:
        yield seen
    finally:
        collectives.all_to_all = whole


def replicas_are_equal(module: nn.Module, what: str, of=lambda p: p.detach()) -> None:
    """To the bit: whatever stands on several ranks is the same on all of them."""
    for name, part in module.named_modules():
        shards = shards_of(part)
        if shards is None:
            continue
        for key in shards.cuts:
            mine = of(getattr(part, key))
            for slots in collectives.all_gather_objects({e: mine[i] for i, e in enumerate(shards.held)}, dist.group.WORLD):
                for i, e in enumerate(shards.held):
                    if shards.etp == 1 and e in slots:
                        assert torch.equal(slots[e], mine[i]), f"{what}: {name}.{key} of expert {e}"
