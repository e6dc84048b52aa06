"""Migration: every step leaves a valid placement, nothing moves that need not, and the fewest bytes do."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from placement_cases import random_slots

from headgate.placement.cluster.links import Link, Links
from headgate.placement.cluster.topology import Topology
from headgate.placement.live.migrate import Move, migrate, relabelled
from headgate.placement.placement import Placement, check

cases = given(
    seed=st.integers(0, 2**31),
    nodes=st.integers(1, 3),
    per_node=st.integers(1, 3),
    spare=st.integers(0, 2),
    layers=st.integers(1, 3),
    most=st.sampled_from([None, 1, 2, 5]),
)


def two(seed, nodes, per_node, spare, layers) -> tuple[Placement, Placement]:
    rng = np.random.default_rng(seed)
    topology = Topology(nodes, per_node)
    experts = topology.gpus + 1 + int(rng.integers(0, 8))
    slots = topology.slots_of_gpu(experts)
    slots = np.minimum(slots + spare, experts)
    make = [Placement(random_slots(rng, layers, experts, slots), experts, topology, slots) for _ in range(2)]
    return make[0], make[1]


def held(placement: Placement, layer: int) -> list[set[int]]:
    slots, gpu = placement.expert_of_slot[layer], placement.gpu_of_slot
    return [set(slots[gpu == g].tolist()) for g in range(placement.topology.gpus)]


@settings(max_examples=150, deadline=None)
@cases
def test_every_step_leaves_a_valid_placement_and_reads_what_stands(seed, nodes, per_node, spare, layers, most):
    source, target = two(seed, nodes, per_node, spare, layers)
    plan = migrate(source, target, most_moves=most)
    now = source.expert_of_slot.copy()
    for step, after in zip(plan.steps, list(plan.placements())[1:], strict=True):
        for move in step.moves:
            assert now[step.layer, move.source_slot] == move.expert
            assert plan.target.gpu_of_slot[[move.source_slot, move.target_slot]].tolist() == [
                move.source_gpu,
                move.target_gpu,
            ]
        for move in step.moves:
            now[step.layer, move.target_slot] = move.expert
        np.testing.assert_array_equal(now, after)
        check(now, source.num_experts, source.slots_of_gpu, source.topology)
    np.testing.assert_array_equal(now, plan.target.expert_of_slot)
    for layer in range(layers):
        assert held(plan.target, layer) == held(target, layer)


@settings(max_examples=100, deadline=None)
@cases
def test_nothing_moves_that_need_not(seed, nodes, per_node, spare, layers, most):
    source, target = two(seed, nodes, per_node, spare, layers)
    plan = migrate(source, target, most_moves=most)
    node = source.topology.node_of_gpu
    needed, crossing = 0, 0
    for layer in range(layers):
        here, there = held(source, layer), held(target, layer)
        for gpu, wanted in enumerate(there):
            needed += len(wanted - here[gpu])
            near = set().union(*(here[g] for g in range(len(here)) if node[g] == node[gpu]))
            crossing += len(wanted - here[gpu] - near)
    assert plan.moved == needed
    if most is None:
        assert plan.across == crossing


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), nodes=st.integers(1, 2), per_node=st.integers(1, 3))
def test_relabelling_is_the_best_of_all_names(seed, nodes, per_node):
    """All permutations of GPUs that keep nodes together, tried out."""
    rng = np.random.default_rng(seed)
    topology = Topology(nodes, per_node)
    slots, experts = np.full(topology.gpus, 2), 2 * topology.gpus
    source, target = (Placement(random_slots(rng, 2, experts, slots), experts, topology, slots) for _ in range(2))
    best = min(
        migrate(source, renamed(target, names)).moved
        for names in permutations(range(topology.gpus))
        if all(len({names[g] // per_node for g in range(n * per_node, (n + 1) * per_node)}) == 1 for n in range(nodes))
    )
    assert migrate(source, target, relabel=True).moved == best


def renamed(placement: Placement, names) -> Placement:
    by_gpu = placement.expert_of_slot.reshape(len(placement.expert_of_slot), placement.topology.gpus, -1)
    return replace(placement, expert_of_slot=by_gpu[:, np.argsort(names)].reshape(len(by_gpu), -1))


def test_a_swap_of_two_full_gpus_is_one_step():
    one = Topology(1, 2)
    source, target = Placement(np.array([[0, 1, 2, 3]]), 4, one), Placement(np.array([[2, 0, 1, 3]]), 4, one)
    plan = migrate(source, target, most_moves=1)
    assert [step.moves for step in plan.steps] == [(Move(2, 1, 2, 0, 1), Move(1, 0, 1, 1, 2))]
    assert plan.target.expert_of_slot.tolist() == [[0, 2, 1, 3]]


def test_a_replica_comes_from_the_own_node():
    topology = Topology(2, 2, Links(Link(0, 10.0), Link(0, 1.0)))
    source = Placement(np.array([[0, 1, 1, 2, 3, 0, 4, 1]]), 5, topology)
    target = Placement(np.array([[0, 1, 1, 2, 3, 0, 4, 0]]), 5, topology)
    plan = migrate(source, target)
    assert plan.steps[0].moves == (Move(0, 2, 5, 3, 7),)
    assert (plan.moved, plan.across) == (1, 0)
    assert plan.seconds(expert_bytes=1e9) == pytest.approx(0.1)


def test_to_where_one_stands_is_no_step():
    source, _ = two(0, 2, 2, 1, 2)
    assert migrate(source, source).steps == ()
    assert migrate(source, source).seconds(1e9) == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"topology": Topology(2, 1)}, "nodes of target must be those of source, 1, got 2"),
        ({"num_experts": 3, "expert_of_slot": np.array([[0, 1, 2, 0]])}, "num_experts of target must be"),
        ({"expert_of_slot": np.array([[0, 1, 2, 3]] * 2)}, "layers of target must be those of source, 1, got 2"),
        ({"slots_of_gpu": np.array([1, 3])}, r"slots_of_gpu of target must be those of source, \[2, 2\]"),
    ],
)
def test_placements_that_do_not_fit(change, says):
    source = Placement(np.array([[0, 1, 2, 3]]), 4, Topology(1, 2))
    with pytest.raises(ValueError, match=f"migrate: {says}"):
        migrate(source, replace(source, **change))


def test_bad_arguments():
    source = Placement(np.array([[0, 1, 2, 3]]), 4, Topology(1, 2))
    with pytest.raises(ValueError, match="most_moves must be at least 1, got 0"):
        migrate(source, source, most_moves=0)
    uneven = replace(source, slots_of_gpu=np.array([1, 3]))
    with pytest.raises(ValueError, match="relabel must be left out where GPUs differ"):
        relabelled(uneven, uneven)
