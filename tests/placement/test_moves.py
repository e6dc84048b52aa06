"""Steps from one placement to another: what each leaves, and that no GPU is sent what it has."""

from __future__ import annotations

import numpy as np
import pytest
from placement_cases import random_slots

from headgate.placement.moves import Move, Step, after, at_once
from headgate.placement.placement import Placement
from headgate.placement.topology import Topology

NOW = Placement(np.array([[0, 1, 2, 3, 0, 2]]), 4, Topology(3, 1))  # GPUs: 0 1 | 2 3 | 0 2


def test_a_step_leaves_a_placement():
    swap = Step(0, (Move(1, 0, 1, 1, 3), Move(3, 1, 3, 0, 1)))
    assert after(NOW, swap).expert_of_slot.tolist() == [[0, 3, 2, 1, 0, 2]]
    assert NOW.expert_of_slot.tolist() == [[0, 1, 2, 3, 0, 2]]


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (Step(1, ()), r"Step: layer must be in 0 \.\. 0, got 1"),
        (Step(0, (Move(1, 0, 1, 2, 3),)), "Step: slots must be on their GPUs, got slot 3 on GPU 2"),
        (Step(0, (Move(1, 0, 1, 3, 6),)), "Step: slots must be on their GPUs, got slot 6 on GPU 3"),
        (Step(0, (Move(2, 0, 1, 1, 3),)), "Step: source_slot 1 must hold expert 2, got 1"),
        (
            Step(0, (Move(1, 0, 1, 2, 4), Move(3, 1, 3, 2, 4))),
            "Step: moves must have target slots of their own, got one twice in layer 0",
        ),
        (Step(0, (Move(1, 0, 1, 1, 3),)), "Placement: every expert must have a slot in layer 0, got none for 3"),
        (Step(0, (Move(0, 0, 0, 2, 5),)), "Placement: replicas must be on distinct GPUs"),
    ],
)
def test_what_is_no_step_is_refused(step, words):
    with pytest.raises(ValueError, match=words):
        after(NOW, step)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("before", "then"), [(1, 1), (0, 2), (2, 0)])
def test_at_once_leads_to_the_target_with_the_fewest_copies(seed, before, then):
    rng, topology, experts, layers = np.random.default_rng(seed), Topology(2, 2), 12, 3
    source, target = (
        Placement(random_slots(rng, layers, experts, np.full(4, 3 + spare)), experts, topology)
        for spare in (before, then)
    )
    for layer, step in enumerate(at_once(source, target, range(layers))):
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
        if before == then:
            assert after(source, step).expert_of_slot[layer].tolist() == slots.tolist()


def test_replicas_are_read_in_turn():
    target = Placement(np.array([[0, 1, 0, 2, 3, 0, 4, 0]]), 5, Topology(1, 4))
    source = Placement(np.array([[0, 1, 0, 2, 3, 4, 4, 1]]), 5, Topology(1, 4))
    (step,) = at_once(source, target, [0])
    assert sorted(m.source_gpu for m in step.moves if m.expert == 0) == [0, 1]
