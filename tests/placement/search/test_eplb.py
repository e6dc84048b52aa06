"""EPLB as published: its own worked example, what its program prints for others, and what its policies promise."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headgate.placement.cluster.topology import Topology
from headgate.placement.place import place
from headgate.placement.search.eplb import apart, eplb
from headgate.placement.slots import gpu_load
from headgate.placement.traces.trace import Trace

# The worked example of github.com/deepseek-ai/EPLB: 2 layers, 12 experts in 4 groups, 16 replicas, 2 nodes, 8 GPUs
LOAD = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
PLAN = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_the_published_example():
    assert eplb(LOAD, [2] * 8, nodes=2, groups=4).tolist() == PLAN
    assert eplb(np.float64(LOAD), np.full(8, 2), 2, 4).dtype == np.int64


@pytest.mark.parametrize(
    ("slots", "nodes", "groups", "plan"),
    [
        (  # three groups do not go to two nodes: the global policy
            [4] * 4,
            2,
            3,
            [
                [10, 8, 3, 7, 10, 1, 1, 4, 0, 5, 4, 2, 11, 5, 9, 6],
                [1, 9, 3, 11, 2, 8, 8, 10, 5, 6, 7, 0, 5, 6, 7, 4],
            ],
        ),
        (  # one group on each node
            [6] * 3,
            3,
            3,
            [
                [1, 1, 3, 0, 0, 2, 5, 5, 4, 4, 6, 7, 11, 8, 10, 10, 10, 9],
                [3, 1, 1, 2, 2, 0, 7, 5, 5, 6, 6, 4, 9, 8, 8, 8, 11, 10],
            ],
        ),
    ],
)
def test_what_the_original_program_prints(slots, nodes, groups, plan):
    assert eplb(LOAD, slots, nodes, groups).tolist() == plan


def test_a_gpu_can_hold_an_expert_twice():
    assert eplb(LOAD, [6] * 4)[1, :6].tolist() == [3, 1, 1, 2, 9, 11]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_groups_stay_on_a_node_and_replicas_are_the_best_that_counts_can_do(data):
    nodes, groups, each = data.draw(st.sampled_from([(1, 1, 3), (1, 2, 2), (2, 2, 2), (2, 4, 1)]))
    experts, gpus = groups * each, nodes * data.draw(st.integers(1, 2))
    room = -(-experts // gpus) + data.draw(st.integers(0, 2))
    load = data.draw(st.lists(st.integers(0, 50), min_size=experts, max_size=experts))
    plan = eplb([load], [room] * gpus, nodes, groups)[0]
    node = np.repeat(np.arange(nodes), room * gpus // nodes)
    copies = np.bincount(plan, minlength=experts)
    assert (copies >= 1).all()
    for group in range(groups):
        assert len(set(node[plan // each == group])) == 1
    for n in range(nodes):
        mine = np.unique(plan[node == n])
        extra = room * gpus // nodes - len(mine)
        ways = (np.bincount(c, minlength=len(mine)) + 1 for c in product(range(len(mine)), repeat=extra))
        best = min((np.array(load)[mine] / np.array(c)).max() for c in ways)
        assert (np.array(load)[mine] / copies[mine]).max() == pytest.approx(best)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"load": [1, 2]}, r"load must be \[L, E\]"),
        ({"load": [[1, np.nan, 1, 1]]}, "load must be finite and not negative, got nan at layer 0, expert 1"),
        ({"load": [[1, 2, -3, 1]]}, r"got -3 at layer 0, expert 2"),
        ({"slots_of_gpu": [3, 2]}, r"slots_of_gpu must be the same on every GPU, got \[3, 2\]"),
        ({"slots_of_gpu": [1, 1]}, "slots_of_gpu must hold each of 4 experts, got 2 slots"),
        ({"slots_of_gpu": []}, r"slots_of_gpu must be \[G\]"),
        ({"nodes": 3}, "nodes must divide the 2 GPUs, got 3"),
        ({"groups": 3}, "groups must divide the 4 experts, got 3"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        eplb(**{"load": [[1, 2, 3, 4]], "slots_of_gpu": [2, 2], **change})


def test_bad_types():
    with pytest.raises(TypeError, match="load must be numbers"):
        eplb([["a", "b"]], [1, 1])
    with pytest.raises(TypeError, match="slots_of_gpu must be whole numbers"):
        eplb([[1, 2]], [1.0, 1.0])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), gpus=st.integers(2, 5), each=st.integers(2, 4), hot=st.floats(1, 30))
def test_replicas_are_parted_and_nothing_else_is_lost(seed, gpus, each, hot):
    rng = np.random.default_rng(seed)
    experts = max(each + 1, gpus * each - int(rng.integers(0, gpus)))
    if experts > gpus * each:
        experts = gpus * each
    load = rng.integers(1, 50, (3, experts)) * np.where(rng.random((3, experts)) < 0.2, hot, 1)
    plan = eplb(load, [each] * gpus)
    parted, replaced = apart(plan, load, [each] * gpus)
    most = max(np.bincount(layer).max() for layer in plan)
    assert replaced == 0 or most > 1
    for before, after in zip(plan, parted, strict=True):
        if not replaced:
            np.testing.assert_array_equal(np.sort(before), np.sort(after))
        assert set(after.tolist()) == set(range(experts))
        for held in after.reshape(gpus, each):
            assert len(set(held.tolist())) == each
        if all(len(set(held.tolist())) == each for held in before.reshape(gpus, each)):
            np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    "load",
    [[90, 1, 2, 3], [0, 0, 0, 0], [1, 0, 0, 0]],
    ids=["one dominant", "no load", "one alone"],
)
def test_more_copies_than_gpus_give_way_to_other_experts(load):
    """EPLB wants expert 0 five times on two GPUs. Two copies of it beside each other do not lower anybody's load."""
    slots = [4, 4]
    plan = eplb([load], slots)
    assert np.bincount(plan[0])[0] == 5
    parted, replaced = apart(plan, [load], slots)
    assert replaced == 3
    for held in parted.reshape(2, 4):
        assert sorted(held.tolist()) == [0, 1, 2, 3]
    owner = np.repeat([0, 1], 4)
    assert gpu_load([load], parted, owner, 2).max() <= gpu_load([load], plan, owner, 2).max()


def test_place_takes_such_a_plan_and_says_so():
    ids = np.zeros((2, 40, 1), np.uint8)
    ids[1, :, 0] = np.arange(40) % 4
    found = place(Trace(ids, 4), Topology(nodes=1, gpus_per_node=2), 4, "eplb", bound=False)
    assert found.method["copies_replaced"] == 3
    assert "copies_replaced" not in place(Trace(ids[1:], 4), Topology(1, 2), 2, "eplb", bound=False).method
