"""Rows from GPUs to replicas: nothing lost, quotas met, and no stage keeps less than it could."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from placement_cases import random_slots

from headgate.placement.cluster.topology import Topology
from headgate.placement.live.allot import allot
from headgate.placement.live.choice import Choice


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2))
def test_every_row_goes_somewhere_and_every_slot_gets_its_number(seed, nodes, per_node, spare):
    rng = np.random.default_rng(seed)
    topology = Topology(nodes, per_node)
    experts = topology.gpus + int(rng.integers(1, 8))
    slots = np.minimum(topology.slots_of_gpu(experts) + spare, experts)
    plan, gpu = random_slots(rng, 1, experts, slots)[0], np.repeat(np.arange(topology.gpus), slots)
    counts = rng.integers(0, 20, (topology.gpus, experts)) * rng.integers(0, 2, (topology.gpus, experts))
    rows = Choice(plan, gpu).rows(counts.sum(0))
    node = topology.node_of_gpu
    sent = allot(counts, rows, plan, gpu, node)
    assert (sent >= 0).all()
    np.testing.assert_array_equal(sent.sum(0), rows)
    for g in range(topology.gpus):
        np.testing.assert_array_equal(np.bincount(plan, sent[g], experts), counts[g])
    own = gpu == np.arange(topology.gpus)[:, None]
    np.testing.assert_array_equal(sent[own], np.minimum(counts[:, plan], rows)[own])
    free = rows - (sent * own).sum(0)
    for n in range(nodes):  # inside a node as much as its GPUs still have, or its slots still take
        for e in range(experts):
            here, stand = node == n, (node[gpu] == n) & (plan == e)
            kept_at_home = (sent * own)[np.ix_(here, plan == e)].sum()
            has = counts[here, e].sum() - kept_at_home
            moved = (sent * ~own)[np.ix_(here, stand)].sum()
            assert moved >= min(has, free[stand].sum())


def test_an_example():
    """GPU 0 keeps 3 of its 5 rows, its node's GPU 1 takes 1, and 1 crosses."""
    plan, gpu, node = np.array([0, 0, 0, 1]), np.array([0, 1, 2, 3]), np.array([0, 0, 1, 1])
    counts = np.array([[5, 0], [0, 2], [1, 0], [0, 0]])
    found = allot(counts, np.array([3, 1, 2, 2]), plan, gpu, node)
    assert found.tolist() == [[3, 1, 1, 0], [0, 0, 0, 2], [0, 0, 1, 0], [0, 0, 0, 0]]
