"""From one placement to another slot by slot, whatever numbers of slots the two have: a step for each layer."""

from __future__ import annotations

import numpy as np

from ..placement import Placement
from .migrate import Move, Step


def rearrange(source: Placement, target: Placement) -> tuple[Step, ...]:
    """Steps after which every slot holds the target's expert; `migrate` leaves experts in the slots they have.

    A GPU copies an expert that it holds from slot to slot, and gets each other once: from its node's GPUs in turn,
    else from all in turn. A slot has no move where the same place on the same GPU holds its expert already, so source
    slots are the source's numbers, target slots the target's.

    >>> two = Topology(nodes=1, gpus_per_node=2)
    >>> one_each, both = (Placement(np.array([slots]), 2, two) for slots in ([0, 1], [0, 1, 0, 1]))
    >>> rearrange(one_each, both)[0].moves[0]
    Move(expert=1, source_gpu=1, source_slot=1, target_gpu=0, target_slot=1)
    """
    return tuple(Step(layer, _moves(source, target, layer)) for layer in range(len(target.expert_of_slot)))


def _moves(source: Placement, target: Placement, layer: int) -> tuple[Move, ...]:
    before, then = source.expert_of_slot[layer], target.expert_of_slot[layer]
    start, end = (np.concatenate([[0], np.cumsum(p.slots_of_gpu)]) for p in (source, target))
    node = target.topology.node_of_gpu
    turns = np.zeros(source.num_experts, np.int64)
    moves = []
    for slot, (expert, gpu) in enumerate(zip(then.tolist(), target.gpu_of_slot.tolist(), strict=True)):
        same = start[gpu] + slot - end[gpu]
        if same < start[gpu + 1] and before[same] == expert:
            continue
        held = np.flatnonzero(before == expert)
        on = source.gpu_of_slot[held]
        near = next(near for near in (on == gpu, node[on] == node[gpu], on >= 0) if near.any())
        chosen = int(turns[expert] % near.sum())
        turns[expert] += 1
        moves.append(Move(expert, int(on[near][chosen]), int(held[near][chosen]), gpu, slot))
    return tuple(moves)
