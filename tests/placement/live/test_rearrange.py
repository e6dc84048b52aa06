"""Slot by slot from one placement to another: what each step leaves, and that no GPU is sent what it has."""

from __future__ import annotations

import numpy as np
import pytest
from placement_cases import random_slots

from headgate.placement.cluster.topology import Topology
from headgate.placement.live.rearrange import rearrange
from headgate.placement.placement import Placement


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("before", "then"), [(1, 1), (0, 2), (2, 0)])
def test_every_slot_gets_its_expert_and_no_gpu_what_it_has(seed, before, then):
    rng, topology, experts, layers = np.random.default_rng(seed), Topology(2, 2), 12, 3
    source, target = (
        Placement(random_slots(rng, layers, experts, np.full(4, 3 + spare)), experts, topology)
        for spare in (before, then)
    )
    for layer, step in enumerate(rearrange(source, target)):
        assert step.layer == layer
        slots = np.full(target.expert_of_slot.shape[1], -1)
        for gpu in range(4):  # what stays has the same place on its GPU
            old, new = (p.expert_of_slot[layer, p.gpu_of_slot == gpu] for p in (source, target))
            least = min(len(old), len(new))
            slots[gpu * len(new) : gpu * len(new) + least] = old[:least]
        crossing = []
        for move in step.moves:
            assert source.expert_of_slot[layer, move.source_slot] == move.expert
            assert source.gpu_of_slot[move.source_slot] == move.source_gpu
            assert target.gpu_of_slot[move.target_slot] == move.target_gpu
            slots[move.target_slot] = move.expert
            if move.source_gpu != move.target_gpu:
                crossing.append((move.target_gpu, move.expert))
                near = [g for g in source.gpus_of(layer, move.expert) if g // 2 == move.target_gpu // 2]
                assert move.source_gpu in near or not near
        assert slots.tolist() == target.expert_of_slot[layer].tolist()
        lacking = {
            (gpu, e)
            for gpu in range(4)
            for e in target.expert_of_slot[layer, target.gpu_of_slot == gpu].tolist()
            if gpu not in source.gpus_of(layer, e)
        }
        assert sorted(crossing) == sorted(lacking)


def test_replicas_are_read_in_turn():
    source = Placement(np.array([[0, 1, 0, 2, 3, 4, 4, 1]]), 5, Topology(1, 4))
    target = Placement(np.array([[0, 1, 0, 2, 3, 0, 4, 0]]), 5, Topology(1, 4))
    (step,) = rearrange(source, target)
    assert [m.source_gpu for m in step.moves if m.expert == 0] == [0, 1]
