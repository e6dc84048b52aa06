"""Moves of experts from slot to slot: the steps that lead from one placement to another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .placement import Placement


@dataclass(frozen=True)
class Move:
    """An expert is copied from a slot, in which it stands, to another. Slots are numbered 0 .. S - 1 over all GPUs."""

    expert: int
    source_gpu: int
    source_slot: int
    target_gpu: int
    target_slot: int


@dataclass(frozen=True)
class Step:
    """Moves of one layer that are made at once: all of them read before any writes."""

    layer: int
    moves: tuple[Move, ...]


def after(placement: Placement, step: Step) -> Placement:
    """The placement that a step leaves, with as many slots as before.

    Raises ValueError where a move's expert is not in its source, a slot is not on its GPU or is written twice, or what
    comes out is no placement (see `check`).
    """
    slots, gpus = placement.expert_of_slot.copy(), placement.gpu_of_slot
    layers, count = slots.shape
    if not 0 <= step.layer < layers:
        raise ValueError(f"Step: layer must be in 0 .. {layers - 1}, got {step.layer}")
    for move in step.moves:
        for gpu, slot in ((move.source_gpu, move.source_slot), (move.target_gpu, move.target_slot)):
            if not 0 <= slot < count or gpus[slot] != gpu:
                raise ValueError(f"Step: slots must be on their GPUs, got slot {slot} on GPU {gpu}")
        if placement.expert_of_slot[step.layer, move.source_slot] != move.expert:
            found = placement.expert_of_slot[step.layer, move.source_slot]
            raise ValueError(f"Step: source_slot {move.source_slot} must hold expert {move.expert}, got {found}")
        slots[step.layer, move.target_slot] = move.expert
    if len({move.target_slot for move in step.moves}) < len(step.moves):
        raise ValueError(f"Step: moves must have target slots of their own, got one twice in layer {step.layer}")
    return Placement(slots, placement.num_experts, placement.topology, placement.slots_of_gpu)


def at_once(source: Placement, target: Placement, layers: Iterable[int]) -> tuple[Step, ...]:
    """A step for each of `layers`, whose slots become the target's: the fewest copies between GPUs.

    A GPU gets an expert that it has not from its node's GPUs in turn, else from all in turn; its own it copies from
    slot to slot. The two may differ in their numbers of slots: then every slot of the target that is not the same in
    the source (GPU, place on it and expert) has a move.
    """
    found = []
    for layer in layers:
        before, then = source.expert_of_slot[layer], target.expert_of_slot[layer]
        turns = np.zeros(source.num_experts, np.int64)
        moves = []
        for slot, expert in enumerate(then.tolist()):
            gpu = int(target.gpu_of_slot[slot])
            same = slot - _first(target, gpu) + _first(source, gpu)
            if same < _first(source, gpu + 1) and before[same] == expert:
                continue
            held = np.flatnonzero(before == expert)
            on = source.gpu_of_slot[held]
            node = source.topology.node_of_gpu
            for near in (on == gpu, node[on] == node[gpu], on >= 0):
                if near.any():
                    break
            from_slot = int(held[near][turns[expert] % near.sum()])
            turns[expert] += 1
            moves.append(Move(expert, int(source.gpu_of_slot[from_slot]), from_slot, gpu, slot))
        found.append(Step(layer, tuple(moves)))
    return tuple(found)


def _first(placement: Placement, gpu: int) -> int:
    """The first slot of a GPU."""
    return int(placement.slots_of_gpu[:gpu].sum())
