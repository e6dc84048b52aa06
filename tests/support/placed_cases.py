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
from headgate.placement.cluster.topology import Topology
from headgate.placement.live.migrate import Migration, Move, Step
from headgate.placement.placement import Placement

CHECKS: dict[str, Callable[[], None]] = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def placement(seed: int, gpus: int, experts: int, spare: int = 0, layers: int = 1) -> Placement:
    """A random one, the same on every rank, on nodes of two GPUs, with `spare` more slots on each than it takes."""
    slots = np.full(gpus, min(experts // gpus + spare, experts))
    topology = Topology(gpus // 2, 2) if gpus % 2 == 0 else Topology(1, gpus)
    return Placement(random_slots(np.random.default_rng(seed), layers, experts, slots), experts, topology)


def random_migration(seed: int, source: Placement, count: int) -> Migration:
    """`count` steps of layer 0, each of which leaves a placement: two experts change places, or a replica becomes one
    of another expert."""
    rng, now, found = np.random.default_rng(seed), source, []
    gpus = source.gpu_of_slot.tolist()
    while len(found) < count:
        a, b = rng.choice(len(gpus), 2, replace=False).tolist()
        slots = now.expert_of_slot[0].tolist()
        there, back = (Move(slots[i], gpus[i], i, gpus[j], j) for i, j in ((a, b), (b, a)))
        for moves in ((there,), (there, back)):
            then = now.expert_of_slot.copy()
            then[0, [m.target_slot for m in moves]] = [m.expert for m in moves]
            try:
                now = Placement(then, now.num_experts, now.topology)
            except ValueError:
                continue
            found.append(Step(0, moves))
            break
    return Migration(source, now, tuple(found))


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
    mine = {}
    for name, part in module.named_modules():
        shards = shards_of(part)
        if shards is not None:
            slots = [(i, e) for i, e in enumerate(shards.held)]
            which = shards.fold.rank("etp")  # of slices
            mine |= {(name, key, which, e): of(getattr(part, key))[i] for key in shards.cuts for i, e in slots}
    for theirs in collectives.all_gather_objects(mine, dist.group.WORLD):
        for where in mine.keys() & theirs.keys():
            assert torch.equal(mine[where], theirs[where]), f"{what}: {where}"
