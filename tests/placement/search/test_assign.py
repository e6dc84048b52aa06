"""One layer after the other, exactly: against every placement of a layer; and a placement's score against the walk."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from swap_problems import every_placement, problem_of, random_placement, random_trace

from headgate.placement.cluster.topology import Topology
from headgate.placement.placement import Placement
from headgate.placement.problem import Objective
from headgate.placement.search.assign import assign
from headgate.placement.search.state import Counts, from_slots, score, times, to_slots
from headgate.placement.search.transport import transport
from headgate.placement.walk import walk

UNEVEN = Topology(2, 2, slots=(1, 3, 2, 2), speed=(1.0, 2.0, 1.0, 1.5))


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**31), columns=st.integers(1, 7), whole=st.booleans(), guess=st.booleans())
def test_transport_is_worth_as_much_as_scipys_assignment(seed, columns, whole, guess):
    rng = np.random.default_rng(seed)
    room = rng.integers(0, 4, columns)
    worth = (
        rng.integers(-4, 5, (room.sum(), columns)).astype(float) if whole else rng.normal(size=(room.sum(), columns))
    )
    found = transport(worth, room, rng.normal(size=columns) * guess)
    np.testing.assert_array_equal(np.bincount(found, minlength=columns), room)
    column_of = np.repeat(np.arange(columns), room)
    rows, chosen = linear_sum_assignment(worth[:, column_of], maximize=True)
    best = worth[rows, column_of[chosen]].sum()
    assert worth[np.arange(len(worth)), found].sum() == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("topology", [Topology(1, 4), Topology(2, 2), UNEVEN])
def test_the_score_is_the_walks(topology):
    trace = random_trace(1, 4, 8)
    problem = problem_of(trace, topology)
    at = random_placement(problem)
    cost = walk(trace, Placement(to_slots(at), 8, topology, problem.slots_of_gpu))
    found = score(problem, at)
    assert (found.gpu, found.node) == (cost.cross_gpu_share, cost.cross_node_share)
    assert found.load == pytest.approx(cost.imbalance, rel=1e-12)
    assert found.total == pytest.approx(found.gpu + 2 * found.node + 0.1 * found.load, rel=1e-12)
    assert found.excess == 0
    limited = score(replace(problem, objective=Objective(gpu=1, max_load=1.0)), at)
    assert limited.excess == pytest.approx(found.load - 1)


def test_the_load_is_the_worst_scenarios_in_each_layer():
    problem = problem_of(random_trace(0, 2, 4), Topology(1, 2))
    loads = np.array([[[1, 0, 0, 0], [0.25] * 4], [[0.25] * 4, [0, 0, 0, 0]], [[0, 0, 0.5, 0.5], [0, 0.5, 0, 0.5]]])
    at = np.array([[0, 1, 0, 1], [0, 0, 1, 1]], np.int32)
    problem = replace(problem, loads=loads)
    assert times(problem, at).tolist() == [[[2, 0], [1, 1]], [[1, 1], [0, 0]], [[1, 1], [1, 1]]]
    assert score(problem, at).load == (2 + 1) / 2


def test_sparse_counts_are_counts():
    problem = problem_of(random_trace(0, 3, 6), Topology(1, 3))
    sparse = replace(problem, transitions=tuple(csr_array(matrix) for matrix in problem.transitions))
    at = random_placement(problem)
    assert score(sparse, at) == score(problem, at)
    np.testing.assert_array_equal(Counts(sparse).after, np.stack(problem.transitions))


def test_counts_beyond_int32_are_kept():
    problem = problem_of(random_trace(0, 2, 4), Topology(1, 2), Objective(gpu=1))
    huge = replace(problem, transitions=tuple(matrix * 2**33 for matrix in problem.transitions))
    assert Counts(huge).after.dtype == np.int64
    assert Counts(problem).after.dtype == np.int32
    assert (assign(huge) == assign(problem)).all()


def test_slots_and_back():
    problem = problem_of(random_trace(0, 3, 8), UNEVEN)
    at = random_placement(problem)
    slots = to_slots(at)
    np.testing.assert_array_equal(from_slots(slots, problem.gpu_of_slot), at)
    assert all((np.diff(part) > 0).all() for part in np.split(slots[0], np.cumsum(problem.slots_of_gpu)[:-1]))


@pytest.mark.parametrize("topology", [Topology(1, 3), Topology(3, 1), Topology(3, 1, slots=(1, 2, 3))])
def test_at_the_fixpoint_no_layer_can_be_placed_better(topology):
    problem = problem_of(random_trace(3, 3, 6), topology, Objective(gpu=1, node=3))
    at = assign(problem)
    best = score(problem, at).total
    rows = {
        tuple(row[0]) for row in every_placement(replace(problem, loads=problem.loads[:, :1], pins=problem.pins[:1]))
    }
    for layer in range(3):
        for row in rows:
            other = at.copy()
            other[layer] = row
            assert score(problem, other).total >= best - 1e-12


def test_a_price_on_load_moves_load_away():
    problem = problem_of(random_trace(5, 1, 8), Topology(1, 2), Objective(gpu=1))
    price = np.array([[1.0, 0.0]])
    found = times(problem, assign(problem, price=price))[0, 0]
    lightest = np.sort(problem.loads[0, 0])[:4].sum() * 2
    assert found[0] == pytest.approx(lightest)


def test_never_worse_than_the_start_and_stoppable():
    problem = problem_of(random_trace(2, 4, 8), Topology(2, 2), Objective(gpu=1, node=1))
    start = random_placement(problem)
    assert score(problem, assign(problem, start)).total < score(problem, start).total
    np.testing.assert_array_equal(assign(problem, start, stop=lambda: True), start)
    np.testing.assert_array_equal(assign(problem, start, sweeps=0), start)


def test_pins_and_groups_are_kept():
    pins = np.full((3, 8), -1, np.int32)
    pins[0, 5], pins[1, 0], pins[2, 7] = 0, 3, 1
    problem = problem_of(random_trace(4, 3, 8), Topology(2, 2), Objective(gpu=1, node=1), pins=pins, groups=4)
    at = assign(problem)
    assert (at[0, 5], at[1, 0], at[2, 7]) == (0, 3, 1)
    assert np.ptp((at // 2).reshape(3, 4, 2), 2).max() == 0
    for row in at:
        np.testing.assert_array_equal(np.bincount(row), [2, 2, 2, 2])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"slots_of_gpu": np.array([4, 2, 2, 2], np.int32)}, "slots must be as many as experts, 8, got 10"),
        ({"objective": Objective(copies=1)}, "copies must have no weight, got 1"),
        ({"pins": np.full((2, 8), -1, np.int32)}, "pins must be .L=3, E=8., got"),
        ({"pins": np.full((3, 8), 4, np.int32)}, "pins must be GPUs below 4, or -1"),
        ({"pins": np.full((3, 8), 1, np.int32)}, "pins of layer 0 must fit GPU 1's 2 slots, got 8"),
        ({"groups": 3}, "groups must divide the experts, 8, got 3"),
        ({"groups": 4, "slots_of_gpu": np.array([3, 2, 2, 1], np.int32)}, "groups must fill each node, 2 experts each"),
        ({"groups": 4, "pins": np.array([[0, 3] + [-1] * 6] * 3, np.int32)}, "pins of a group must be on one node"),
        ({"groups": 4, "pins": np.array([[0, -1, 0, -1, 1, -1, -1, -1]] * 3, np.int32)}, "leave each node room"),
    ],
)
def test_what_cannot_be_is_refused(change, words):
    problem = problem_of(random_trace(0, 3, 8), Topology(2, 2))
    with pytest.raises(ValueError, match=f"assign: .*{words}"):
        assign(replace(problem, **change))


@pytest.mark.parametrize(
    ("start", "error", "words"),
    [
        (np.zeros((3, 8)), TypeError, "start must be integers, got float64"),
        (np.zeros((3, 7), int), ValueError, r"start must be .L, E. = \(3, 8\), got \(3, 7\)"),
        (np.full((3, 8), 4), ValueError, "start must have GPUs below 4"),
        (np.zeros((3, 8), int), ValueError, "start must fill the slots of layer 0"),
        (np.tile([1, 1, 0, 0, 2, 2, 3, 3], (3, 1)), ValueError, "start must keep the pins"),
        (np.tile([0, 2, 0, 1, 1, 2, 3, 3], (3, 1)), ValueError, "start must keep each group on one node"),
    ],
)
def test_a_start_that_is_none_is_refused(start, error, words):
    pins = np.full((3, 8), -1, np.int32)
    pins[:, 0] = 0
    problem = problem_of(random_trace(0, 3, 8), Topology(2, 2), pins=pins, groups=4)
    with pytest.raises(error, match=words):
        assign(problem, start)


def test_one_layer_one_gpu_and_nothing_counted():
    for layers, topology in ((1, Topology(1, 2)), (3, Topology(1, 1)), (1, Topology(1, 1))):
        problem = problem_of(random_trace(0, layers, 4), topology)
        assert assign(problem).shape == (layers, 4)
    empty = problem_of(random_trace(0, 3, 4, tokens=0), Topology(1, 2))
    assert score(empty, assign(empty)).total == pytest.approx(0.1)
