"""The swap search: every number that it keeps against counting anew, what it promises, and what it finds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from swap_problems import every_placement, problem_of, random_placement, random_trace

from headgate.placement.cluster.topology import Topology
from headgate.placement.problem import Objective
from headgate.placement.search import loops
from headgate.placement.search.assign import assign
from headgate.placement.search.recombine import Pool
from headgate.placement.search.search import _Run, search
from headgate.placement.search.state import Counts, score, times
from headgate.placement.traces.generate import generate

UNEVEN = Topology(2, 2, slots=(1, 3, 2, 2), speed=(1.0, 2.0, 1.0, 1.5))
BOTH = Objective(gpu=1, node=2, load=0.1)


def scenarios(seed: int, number: int, layers: int, experts: int) -> np.ndarray:
    found = np.random.default_rng(seed).random((number, layers, experts))
    return found / found.sum(2, keepdims=True)


def same(state, other) -> None:
    """Everything that swaps change, against a state that was counted anew."""
    for name in ("at", "near", "near_node"):
        np.testing.assert_array_equal(getattr(state, name), getattr(other, name), err_msg=name)
    for name in ("time", "peak", "heat", "sum"):
        np.testing.assert_allclose(getattr(state, name), getattr(other, name), rtol=1e-9, atol=1e-9, err_msg=name)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    layers=st.integers(1, 4),
    number=st.integers(1, 3),
    topology=st.sampled_from([Topology(1, 4), Topology(2, 2), Topology(4, 1), UNEVEN]),
)
def test_what_a_swap_changes_is_what_counting_anew_says(seed, layers, number, topology):
    problem = problem_of(random_trace(seed, layers, 8), topology, BOTH, loads=scenarios(seed, number, layers, 8))
    run = _Run(problem, 0, lambda: False)
    state = run._state(random_placement(problem, seed))
    rng = np.random.default_rng(seed)
    for _ in range(10):
        layer, e, f = rng.integers(layers), *rng.choice(8, 2, replace=False)
        a, b = state.at[layer, e], state.at[layer, f]
        if a == b:
            continue
        before = score(problem, state.at)
        gpu, node = loops.crossings_saved(state, layer, e, f)
        peak = loops.peak_after(state, layer, e, f)
        smooth = loops._smooth_change(state, layer, e, f, a, b)
        most, total = loops._smooth_most(state, layer, a, b), state.sum[layer]
        loops.swap(state, layer, e, f)
        same(state, run._state(state.at))
        after, steep = score(problem, state.at), state.steep[layer]
        assert gpu == pytest.approx((before.gpu - after.gpu) * run.counts.total, abs=1e-6)
        assert node == pytest.approx((before.node - after.node) * run.counts.total, abs=1e-6)
        assert peak == pytest.approx(state.peak[layer], rel=1e-12)
        assert smooth == pytest.approx(np.log(state.sum[layer] / total) / steep, abs=1e-6)
        assert smooth >= -most - 1e-9
        assert state.peak[layer] <= 1 + np.log(state.sum[layer]) / steep + 1e-9


@pytest.mark.parametrize("groups", [1, 4])
def test_annealing_and_descent_keep_their_books_and_the_rules(groups):
    pins = np.full((3, 8), -1, np.int32)
    pins[0, 1], pins[2, 6] = 2, 0
    problem = problem_of(random_trace(1, 3, 8), Topology(2, 2), BOTH, pins=pins, groups=groups)
    run = _Run(problem, 0, lambda: False)
    start = assign(problem)
    state = run._state(start)
    price = run._price(0.1)
    loops.anneal(state, price, 0.05, 20)
    if groups > 1:
        loops.anneal_groups(state, price, 0.05, 20)
    same(state, run._state(state.at))
    assert (state.at != start).any()
    warm = score(problem, state.at).total
    assert loops.descend(state, price, np.inf, 50) > 0
    same(state, run._state(state.at))
    assert score(problem, state.at).total < warm
    for row, pin in zip(state.at, pins, strict=True):
        np.testing.assert_array_equal(np.bincount(row), [2, 2, 2, 2])
        assert (row[pin >= 0] == pin[pin >= 0]).all()
        if groups > 1:
            assert np.ptp((row // 2).reshape(4, 2), 1).max() == 0
    if groups > 1:
        nodes = state.at[:, ::2] // 2
        assert (nodes != start[:, ::2] // 2).any(), "groups change nodes"


def test_descent_stays_within_the_budget_and_relief_reaches_it():
    problem = problem_of(random_trace(1, 4, 12, tokens=200), Topology(1, 3), Objective(gpu=1, max_load=1.05))
    run = _Run(problem, 0, lambda: False)
    state = run._state(assign(problem))
    budget, price = 1.05 * 4, run._price(0.0)
    assert state.peak.sum() > budget
    assert loops.relieve(state, price, budget, 1) == 1
    loops.relieve(state, price, budget, 1000)
    assert state.peak.sum() <= budget
    same(state, run._state(state.at))
    loops.descend(state, price, budget, 20)
    assert state.peak.sum() <= budget
    assert score(problem, state.at).excess == 0


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    topology=st.sampled_from(
        [Topology(1, 3), Topology(3, 1), Topology(1, 3, slots=(1, 2, 3)), Topology(2, 2, slots=(1, 2, 1, 2))]
    ),
    load=st.sampled_from([0.0, 0.5]),
    pinned=st.booleans(),
)
def test_the_best_put_together_is_the_best_of_every_way(seed, topology, load, pinned):
    """Against every choice of a placement for each layer and every renaming that is allowed."""
    pins = np.full((3, 6), -1, np.int32)
    if pinned:
        pins[1, 2] = 0
    problem = problem_of(random_trace(seed, 3, 6), topology, Objective(gpu=1, node=1, load=load), pins=pins)
    pool = [assign(problem, seed_start(problem, seed + i), sweeps=1) for i in range(3)]
    found = Pool(problem, Counts(problem), pool)
    at = found.placement(found.path(load))
    assert ((pins < 0) | (at == pins)).all()
    names = [
        order
        for order in np.array(np.meshgrid(*[range(topology.gpus)] * topology.gpus)).T.reshape(-1, topology.gpus)
        if allowed(problem, order)
    ]
    best = np.inf
    for choice in np.ndindex(3, 3, 3):
        for first in names:
            for second in names:
                rows = [pool[choice[0]][0], first[pool[choice[1]][1]], second[pool[choice[2]][2]]]
                best = min(best, score(problem, np.array(rows)).total)
    assert score(problem, at).total == pytest.approx(best, abs=1e-9)


def seed_start(problem, seed):
    """A random placement with the pins kept."""
    at = random_placement(problem, seed)
    for layer, e in zip(*np.nonzero(problem.pins >= 0), strict=True):
        other = np.flatnonzero(at[layer] == problem.pins[layer, e])[0]
        at[layer, [e, other]] = at[layer, [other, e]]
    return at.astype(np.int32)


def allowed(problem, order) -> bool:
    """Whether GPU g may be called order[g]: a permutation within nodes or of nodes, equal slots, pinned ones fixed."""
    topology = problem.topology
    nodes = topology.node_of_gpu[order].reshape(topology.nodes, -1)
    pinned = np.unique(problem.pins[problem.pins >= 0])
    return (
        len(set(order)) == topology.gpus
        and (nodes == nodes[:, :1]).all()
        and (problem.slots_of_gpu[order] == problem.slots_of_gpu).all()
        and (order[pinned] == pinned).all()
    )


def test_a_limit_on_load_takes_the_cheapest_way_within_it():
    problem = problem_of(random_trace(2, 4, 12, tokens=300), Topology(1, 3), Objective(gpu=1, max_load=1.2))
    run = _Run(problem, 0, lambda: False)
    pool = [assign(problem), random_placement(problem).astype(np.int32)]
    for load in (0.3, 30.0):
        state = run._state(pool[0])
        loops.descend(state, run._price(load), np.inf, 50)
        pool.append(state.at)
    found = Pool(problem, Counts(problem), pool)
    free, tight = found.path(0.0), found.path(1e3)
    limit = (found._load(free) + found._load(tight)) / 2
    path = found.path_within(0.0, limit, 1e3)
    at = found.placement(path)
    assert found._load(path) == pytest.approx(times(problem, at).max((0, 2)).mean())
    assert found._load(tight) <= found._load(path) <= limit < found._load(free)
    assert score(problem, found.placement(free)).gpu <= score(problem, at).gpu
    assert found.path_within(0.0, 0.5, 1e3) == tight
    assert found.path_within(0.0, 99, 1e3) == free


@pytest.mark.parametrize(
    "objective", [Objective(gpu=1), BOTH, Objective(gpu=1, load=0.05, max_load=1.02), Objective(load=1)]
)
@pytest.mark.parametrize("topology", [Topology(2, 2), UNEVEN])
def test_a_tiny_case_is_solved_to_the_end(objective, topology):
    problem = problem_of(random_trace(3, 2, 5, tokens=100), topology, objective, slots_of_gpu=np.array([1, 1, 1, 2]))
    best = min(score(problem, at).order for at in every_placement(problem))
    found = score(problem, search(problem, proposals=1_000_000)).order
    assert found == pytest.approx(best, abs=1e-9)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    layers=st.integers(1, 4),
    proposals=st.sampled_from([0, 1, 3000]),
    topology=st.sampled_from([Topology(1, 1), Topology(1, 4), Topology(2, 2), UNEVEN]),
    limit=st.sampled_from([None, 1.0, 1.1]),
)
def test_never_worse_than_the_start(seed, layers, proposals, topology, limit):
    problem = problem_of(random_trace(seed, layers, 8), topology, replace(BOTH, max_load=limit))
    start = random_placement(problem, seed)
    at = search(problem, start, proposals=proposals, seed=seed)
    assert score(problem, at).order <= score(problem, start).order
    assert at.dtype == np.int32
    for row in at:
        np.testing.assert_array_equal(np.bincount(row, minlength=topology.gpus), problem.slots_of_gpu)


def test_pins_and_groups_are_kept_while_it_gets_better():
    pins = np.full((4, 16), -1, np.int32)
    pins[0, 3], pins[1, :3], pins[3, 15] = 1, [2, 2, 3], 0
    problem = problem_of(random_trace(5, 4, 16, tokens=300), Topology(2, 2), BOTH, pins=pins, groups=4)
    start = assign(problem)
    at = search(problem, start, proposals=200_000)
    assert score(problem, at).total < score(problem, start).total
    assert (at[pins >= 0] == pins[pins >= 0]).all()
    assert np.ptp((at // 2).reshape(4, 4, 4), 2).max() == 0


def test_same_seed_same_answer_and_another_seed_another():
    problem = problem_of(random_trace(6, 6, 24, tokens=300), Topology(1, 4), Objective(gpu=1, max_load=1.05))
    first, again = (search(problem, proposals=20_000, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert (search(problem, proposals=20_000, seed=4) != first).any()


def test_it_beats_assignment_and_holds_the_load():
    trace = generate(6, 24, 2, 2000, skew=1.0, seed=7)
    problem = problem_of(trace, Topology(1, 4), Objective(gpu=1))
    alone = score(problem, assign(problem))
    assert score(problem, search(problem, proposals=300_000)).total < alone.total
    even = replace(problem, objective=Objective(gpu=1, max_load=1.03))
    found = score(even, search(even, proposals=300_000))
    assert alone.load > 1.1
    assert found.load <= 1.03
    assert found.gpu < score(even, random_placement(even)).gpu - 0.05


def test_stop_is_asked_and_heard():
    problem = problem_of(random_trace(8, 4, 16), Topology(1, 4), BOTH)
    start = random_placement(problem)
    np.testing.assert_array_equal(search(problem, start, stop=lambda: True), start)
    asked = []

    def later() -> bool:
        asked.append(None)
        return len(asked) > 30

    at = search(problem, start, proposals=10**9, stop=later)  # minutes, if it were not stopped
    assert score(problem, at).total < score(problem, start).total
    assert len(asked) < 200


def test_bad_proposals_are_refused():
    problem = problem_of(random_trace(0, 2, 4), Topology(1, 2))
    for proposals in (-1, 0.5):
        with pytest.raises(ValueError, match="search: proposals must be a whole number of at least 0"):
            search(problem, proposals=proposals)
    with pytest.raises(ValueError, match="search: slots must be as many"):
        search(replace(problem, slots_of_gpu=np.array([3, 3], np.int32)))


def test_nothing_counted():
    for trace in (random_trace(0, 3, 4, tokens=0), random_trace(0, 1, 4, tokens=0)):
        problem = problem_of(trace, Topology(1, 2), replace(BOTH, max_load=1.0))
        assert score(problem, search(problem, proposals=1000)).total == pytest.approx(0.1)
