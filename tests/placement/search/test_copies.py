"""The search over tokens: every change it counts against a walk over all tokens, its answers against all there are."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from swap_problems import problem_of

from headgate.placement.cluster.topology import Topology
from headgate.placement.placement import Placement
from headgate.placement.problem import Objective, Problem
from headgate.placement.search import token_loops
from headgate.placement.search.copies import first_places, improve_copies, mean_load, score, state_of
from headgate.placement.traces.trace import Trace
from headgate.placement.walk import Foretold, walk

EVERYTHING = Objective(gpu=0.3, node=0.7, copies=1.0, node_copies=2.0, load=0.4)


def trace_of(layers=3, tokens=70, top_k=3, experts=8, seed=0, none=0.1) -> Trace:
    """Tokens that choose by a topic of their own, some choices missing."""
    rng = np.random.default_rng(seed)
    topic = rng.integers(0, 3, tokens)
    ids = np.zeros((layers, tokens, top_k), np.uint8)
    for layer in range(layers):
        likes = rng.dirichlet(np.full(experts, 0.5), 3) + 1e-6
        for t in range(tokens):
            p = likes[topic[t]] / likes[topic[t]].sum()
            ids[layer, t] = rng.choice(experts, top_k, replace=False, p=p)
    ids[rng.random(ids.shape) < none] = 255
    return Trace(ids, experts)


def placed(problem: Problem, gpu: np.ndarray) -> Placement:
    order = np.argsort(gpu, 1, kind="stable").astype(np.int32)
    return Placement(order, problem.num_experts, problem.topology, problem.slots_of_gpu)


def walked(problem: Problem, trace: Trace, gpu: np.ndarray) -> dict[str, float]:
    """The parts of the score by walking every token."""
    placement, home = placed(problem, gpu), problem.objective.home
    told = Foretold.of(problem.transitions, placement) if home == "foretold" else None
    cost = walk(trace, placement, homes=problem.homes, home=home, foretold=told)
    return {
        "gpu": cost.cross_gpu_share,
        "node": cost.cross_node_share,
        "copies": cost.copies,
        "node_copies": cost.node_copies,
        "load": cost.imbalance,
    }


@pytest.mark.parametrize("home", ["fixed", "most", "foretold"])
@pytest.mark.parametrize(("nodes", "per_node"), [(1, 4), (2, 2)])
def test_the_score_is_what_a_walk_counts(home, nodes, per_node):
    trace = trace_of()
    problem = problem_of(trace, Topology(nodes, per_node), replace(EVERYTHING, home=home))
    gpu = first_places(problem, 3)
    found, want = score(problem, gpu), walked(problem, trace, gpu)
    for name, value in want.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name
    weighed = sum(getattr(problem.objective, name) * value for name, value in want.items())
    assert found["score"] == pytest.approx(weighed)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    layers=st.integers(1, 4),
    tokens=st.integers(0, 140),
    top_k=st.integers(1, 4),
    shape=st.sampled_from([(1, 2, None), (2, 2, None), (1, 3, (4, 3, 1)), (2, 2, (1, 4, 2, 1))]),
)
def test_a_swap_changes_the_score_by_what_was_said(seed, layers, tokens, top_k, shape):
    nodes, per_node, slots = shape
    topology = Topology(nodes, per_node, slots=slots, speed=None if slots is None else tuple(map(float, slots)))
    trace = trace_of(layers, tokens, top_k, seed=seed)
    problem = problem_of(trace, topology, EVERYTHING)
    state, rng = state_of(problem, first_places(problem, seed)), np.random.default_rng(seed)
    before = score(problem, state.gpu)["score"]
    for _ in range(12):
        layer, e, f = rng.integers(layers), *rng.permutation(8)[:2]
        if state.gpu[layer, e] == state.gpu[layer, f]:
            continue
        said = token_loops.delta(state, layer, e, f)
        token_loops.swap(state, layer, e, f)
        after = score(problem, state.gpu)["score"]
        assert after - before == pytest.approx(said, abs=1e-9)
        before = after
    fresh = state_of(problem, state.gpu)
    for name in ("one", "any", "node_one", "node_any", "load", "on_gpu", "on_node"):
        np.testing.assert_allclose(getattr(state, name), getattr(fresh, name), atol=1e-9, err_msg=name)


def test_tiny_cases_come_out_as_the_best_of_all():
    splits = [np.array(p) for p in set(permutations([0, 0, 1, 1, 2, 2]))]
    for seed in range(5):
        trace = trace_of(1, 60, 3, experts=6, seed=seed)
        problem = problem_of(trace, Topology(1, 3), Objective(copies=1.0, load=0.2))
        best = min(score(problem, split[None])["score"] for split in splits)
        gpu = improve_copies(problem, seed=seed, proposals=20_000)
        assert score(problem, gpu)["score"] == pytest.approx(best), seed


def test_moving_homes_pay_for_layers_that_fit_together():
    trace = trace_of(4, 400, 3, seed=5, none=0.0)
    topology = Topology(1, 4)
    alone = improve_copies(problem_of(trace, topology, Objective(copies=1.0)), proposals=20_000)
    problem = problem_of(trace, topology, Objective(copies=1.0, home="most"))
    together = improve_copies(problem, proposals=20_000)
    assert score(problem, together)["copies"] < 0.97 * score(problem, alone)["copies"]


def test_the_load_wished_for_is_kept_and_paid_for_in_copies():
    trace = trace_of(4, 400, 3, experts=16, seed=2)
    free = problem_of(trace, Topology(1, 4), Objective(copies=1.0))
    bound = replace(free, objective=Objective(copies=1.0, max_load=1.05))
    loose, tight = (improve_copies(p, proposals=60_000) for p in (free, bound))
    assert mean_load(state_of(free, loose)) > 1.2
    assert mean_load(state_of(bound, tight)) <= 1.05
    assert score(free, loose)["copies"] < score(free, tight)["copies"]
    with_both = np.concatenate([free.loads, np.roll(free.loads, 3, 2)])
    both = replace(bound, loads=with_both)
    got = improve_copies(both, proposals=60_000)
    worst = [(load * np.eye(4)[got].transpose(2, 0, 1)).sum(2).max(0) * 4 for load in with_both]
    assert mean_load(state_of(both, got)) == pytest.approx(np.maximum(*worst).mean())


def test_pins_and_groups_hold():
    trace = trace_of(3, 80)
    topology = Topology(2, 2)
    pins = np.full((3, 8), -1, np.int32)
    pins[1, 2], pins[2, 7] = 3, 0
    problem = problem_of(trace, topology, EVERYTHING, pins=pins)
    gpu = improve_copies(problem, proposals=3000, seed=4)
    assert (gpu[1, 2], gpu[2, 7]) == (3, 0)
    assert (gpu != first_places(problem, 4)).any()
    grouped = replace(problem, groups=2)
    gpu = improve_copies(grouped, proposals=3000)
    node = topology.node_of_gpu[gpu].reshape(3, 2, 4)
    assert (node == node[:, :, :1]).all()
    assert (gpu[1, 2], gpu[2, 7]) == (3, 0)
    placed(grouped, gpu)
    with pytest.raises(ValueError, match="gpu_of_expert must keep groups on one node"):
        improve_copies(grouped, np.tile([0, 1, 2, 3], (3, 2)), proposals=0)
    with pytest.raises(ValueError, match="gpu_of_expert must keep the pins"):
        improve_copies(problem, np.repeat([[0, 1, 2, 3]], 3, 0).repeat(2, 1), proposals=0)


def test_the_same_seed_gives_the_same_answer_and_stop_the_best_so_far():
    problem = problem_of(trace_of(), Topology(1, 4), replace(EVERYTHING, max_load=1.2))
    once, again, other = (improve_copies(problem, seed=s, proposals=4000) for s in (1, 1, 2))
    assert (once == again).all()
    assert (once != other).any()
    start = first_places(problem, 9)
    assert (improve_copies(problem, start, proposals=4000, stop=lambda: True) == start).all()
    asked = iter(range(10**6))
    part = improve_copies(problem, start, proposals=4000, stop=lambda: next(asked) > 900 + 140)
    placed(problem, part)
    assert score(problem, part)["score"] <= score(problem, start)["score"]
    best = improve_copies(problem, once, seed=3, proposals=300)
    assert score(problem, best)["score"] <= score(problem, once)["score"]


@pytest.mark.parametrize("home", ["fixed", "most", "foretold"])
def test_tokens_without_choices_and_no_tokens(home):
    for trace in (trace_of(2, 0), trace_of(2, 5, none=1.0), trace_of(1, 40, 1)):
        problem = problem_of(trace, Topology(2, 2), replace(EVERYTHING, home=home))
        placed(problem, improve_copies(problem, proposals=200))


def test_what_cannot_be_is_refused():
    problem = problem_of(trace_of(), Topology(1, 4), EVERYTHING)
    for change, start, words in [
        ({"slots_of_gpu": np.full(4, 3, np.int32)}, None, "slots must be as many as experts, 8, got 4 more"),
        ({}, np.zeros((2, 8), int), r"gpu_of_expert must be \[L, E\] = \(3, 8\)"),
        ({}, np.zeros((3, 8), int), r"gpu_of_expert must fill \[2, 2, 2, 2\] slots in layer 0"),
        ({}, np.full((3, 8), -1), "gpu_of_expert must be GPUs from 0 on"),
        ({"pins": np.zeros((3, 8), np.int32)}, None, "pins must fit"),
    ]:
        with pytest.raises(ValueError, match=words):
            improve_copies(replace(problem, **change), start, proposals=10)
