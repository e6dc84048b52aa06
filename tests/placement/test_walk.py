"""What a placement costs: every count of the walk against a walk in plain Python, token by token."""

from __future__ import annotations

import numpy as np
import pytest
from brute_walk import brute_walk
from hypothesis import given, settings
from hypothesis import strategies as st
from placement_cases import random_case

from headgate.placement.cluster.links import Link, Links
from headgate.placement.cluster.topology import Topology, Workload
from headgate.placement.cost import Cost
from headgate.placement.placement import Placement
from headgate.placement.traces.trace import Trace
from headgate.placement.walk import Foretold, homes_of, walk

COUNTS = ("load", "rows", "node_rows", "back", "node_back", "transitions", "cross_gpu", "cross_node")


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    layers=st.integers(1, 4),
    tokens=st.integers(0, 12),
    nodes=st.integers(1, 3),
    per_node=st.integers(1, 3),
    spare=st.integers(0, 3),
    top_k=st.integers(1, 4),
    replica=st.sampled_from(["home", "follow"]),
    home=st.sampled_from(["fixed", "most", "foretold"]),
)
def test_the_walk_counts_what_plain_python_counts(seed, layers, tokens, nodes, per_node, spare, top_k, replica, home):
    trace, placement = random_case(seed, layers, tokens, nodes, per_node, spare, top_k)
    rng = np.random.default_rng(seed + 1)
    homes = rng.integers(0, placement.topology.gpus, tokens)
    foretold = None
    if home == "foretold":
        transitions = rng.integers(0, 9, (layers - 1, trace.num_experts, trace.num_experts))
        foretold = Foretold.of(transitions, placement)
    chosen = np.full(trace.expert_ids.shape, -7, np.int32)
    cost = walk(trace, placement, homes=homes, replica=replica, home=home, foretold=foretold, chosen=chosen)
    truth, slots = brute_walk(trace.expert_ids, trace.none, placement, homes, replica, home, foretold)
    for name in COUNTS:
        counts = getattr(cost, name)
        assert counts.dtype == np.int64
        expected = np.zeros_like(counts)
        for at, n in truth[name].items():
            expected[at] = n
        np.testing.assert_array_equal(counts, expected, err_msg=name)
    expected = np.full_like(chosen, -1)
    for at, slot in slots.items():
        expected[at] = slot
    np.testing.assert_array_equal(chosen, expected)


def small() -> tuple[Trace, Placement]:
    """Two layers, two GPUs on two nodes, four experts, by hand."""
    ids = np.array([[[0, 1], [2, 3], [0, 2]], [[0, 2], [1, 3], [0, 1]]], np.uint8)
    return Trace(ids, 4), Placement(np.array([[0, 1, 2, 3], [0, 1, 2, 3]]), 4, Topology(2, 1))


def test_an_example_by_hand():
    trace, placement = small()
    cost = walk(trace, placement, homes=np.array([0, 1, 0]))
    assert cost.load.tolist() == [[3, 3], [4, 2]]
    assert cost.rows.tolist() == [[[2, 1], [0, 1]], [[2, 1], [1, 1]]]
    assert cost.transitions.tolist() == [12]
    assert cost.cross_gpu.tolist() == [2 + 2 + 2]
    assert cost.cross_gpu_share == cost.cross_node_share == 0.5
    assert cost.imbalance == (1 + 4 / 3) / 2
    assert cost.gpus_per_token == (4 + 5) / 6
    assert cost.copies == cost.node_copies == 2 * 3 / 6


def test_predicted_seconds_by_hand():
    trace, placement = small()
    links = Links(Link(1.0, 1.0), Link(10.0, 0.5))
    topology = Topology(2, 1, links, speed=(1.0, 3.0))
    cost = walk(trace, Placement(placement.expert_of_slot, 4, topology), homes=np.array([0, 1, 0]))
    work = Workload(tokens_per_gpu=3, dispatch_bytes=1000.0, combine_bytes=2000.0, pair_us=5.0)
    steps = 3 * 2 / 3  # tokens of the step for each of the trace's
    experts = [steps * 5e-6 * 3 / 0.5, steps * 5e-6 * 4 / 0.5]  # speeds over their mean are 0.5 and 1.5
    there = [10e-6 + steps * 1 * 1000 / 0.5e9] * 2
    back = [10e-6 + steps * 1 * 2000 / 0.5e9] * 2
    np.testing.assert_allclose(cost.layer_seconds(work), np.stack([there, experts, back], 1))
    assert cost.seconds(work) == pytest.approx(sum(there + experts + back))
    summary = cost.summary(work)
    assert summary["seconds"] == pytest.approx(summary["dispatch_s"] + summary["experts_s"] + summary["combine_s"])


def test_one_gpu_moves_nothing():
    trace, _ = random_case(3, 3, 9, 1, 1, 0, 2)
    placement = Placement(np.tile(np.arange(trace.num_experts), (3, 1)), trace.num_experts, Topology(1, 1))
    cost = walk(trace, placement)
    assert (cost.cross_gpu_share, cost.copies, cost.node_copies, cost.imbalance) == (0, 0, 0, 1)
    there, experts, back = cost.layer_seconds().sum(0)
    assert there == back == 0 < experts


def test_an_empty_trace_costs_nothing():
    placement = Placement(np.array([[0, 1]]), 2, Topology(1, 2))
    cost = walk(Trace(np.zeros((1, 0, 2), np.uint8), 2), placement)
    assert isinstance(cost, Cost)
    assert (cost.cross_gpu_share, cost.copies, cost.imbalance) == (0, 0, 1)


def test_homes_keep_sequences_whole():
    sequence = np.array([4, 4, 7, 7, 7, 4], np.int32)
    trace = Trace(np.zeros((1, 6, 1), np.uint8), 1, sequence=sequence)
    assert homes_of(trace, 2).tolist() == [0, 0, 1, 1, 1, 0]
    assert homes_of(Trace(np.zeros((1, 5, 1), np.uint8), 1), 2).tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"homes": np.array([0, 1])}, r"homes must be integers \[T=3\]"),
        ({"homes": np.array([0.0, 1, 0])}, "homes must be integers"),
        ({"homes": np.array([0, 2, 0])}, r"homes must be in 0 \.\. 1, got 0 \.\. 2"),
        ({"replica": "near"}, "replica must be one of home, follow, foretold, got 'near'"),
        ({"home": "nowhere"}, "home must be one of fixed, most, foretold, got 'nowhere'"),
        ({"home": "foretold"}, "foretold must be given"),
        ({"chosen": np.zeros((2, 3, 2), np.int64)}, "chosen must be int32"),
    ],
)
def test_bad_arguments_are_named(change, says):
    trace, placement = small()
    with pytest.raises(ValueError, match=f"walk: {says}"):
        walk(trace, placement, **change)


def test_a_placement_of_another_model_is_refused():
    trace, placement = small()
    with pytest.raises(ValueError, match="walk: placement must have the trace's 2 layers, got 1"):
        walk(trace, Placement(placement.expert_of_slot[:1], 4, placement.topology))
    with pytest.raises(ValueError, match="walk: placement must have 4 experts, got 5"):
        walk(trace, Placement(np.array([[0, 1, 2, 3, 4, 0]] * 2), 5, placement.topology))
