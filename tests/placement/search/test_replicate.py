"""Replicas: what an exchange changes against a fresh count, choices against the walk, answers against all there are."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import swap_problems
from hypothesis import given, settings
from hypothesis import strategies as st

from headgate.placement.cluster.topology import Topology
from headgate.placement.placement import Placement
from headgate.placement.problem import Objective, Problem
from headgate.placement.search import replica_loops
from headgate.placement.search.replicate import replicate, score, state_of, with_spares
from headgate.placement.traces.trace import Trace
from headgate.placement.walk import REPLICA, Foretold, walk

EVERYTHING = Objective(gpu=1.0, node=0.7, copies=0.2, node_copies=0.3, load=0.4)


def trace_of(layers=3, tokens=70, top_k=3, experts=8, seed=0, none=0.1) -> Trace:
    """Experts of which the first are busiest, followed by neighbours of their own; some choices missing."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((layers, tokens, top_k), np.uint8)
    for t in range(tokens):
        at = rng.integers(0, experts, top_k)
        for layer in range(layers):
            ids[layer, t] = at
            at = np.where(
                rng.random(top_k) < 0.3, rng.integers(0, 3, top_k), (at + rng.integers(0, 2, top_k)) % experts
            )
    ids[rng.random(ids.shape) < none] = 255
    return Trace(ids, experts)


def problem_of(trace: Trace, topology: Topology, slots: list[int], objective=EVERYTHING, **more) -> Problem:
    return swap_problems.problem_of(trace, topology, objective, slots_of_gpu=np.array(slots, np.int32), **more)


def placed(problem: Problem, slot: np.ndarray) -> Placement:
    return Placement(slot, problem.num_experts, problem.topology, problem.slots_of_gpu)


def walked(problem: Problem, trace: Trace, slot: np.ndarray, replica: str, chosen=None):
    placement = placed(problem, slot)
    told = Foretold.of(problem.transitions, placement) if replica == "foretold" else None
    return walk(trace, placement, homes=problem.homes, replica=replica, foretold=told, chosen=chosen)


def anew(problem: Problem, state, replica: str):
    """The same placement, looking ahead by the same tables, with every token choosing again."""
    fresh = state_of(problem, state.slot, replica)
    fresh.ahead[:] = state.ahead
    replica_loops.fill(fresh)
    return fresh


def weighed(problem: Problem, state) -> float:
    """The score, by its parts."""
    pairs, gpu, node, rows, node_rows = replica_loops.counts(state).tolist()
    objective, every = problem.objective, max(1, problem.ids.shape[0] * problem.ids.shape[1])
    crossing = objective.gpu * (pairs - gpu) + objective.node * (pairs - node)
    moved = objective.copies * rows + objective.node_copies * node_rows
    return crossing / max(1, pairs) + 2 * moved / every + objective.load * state.load.max(1).mean()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    layers=st.integers(1, 5),
    tokens=st.integers(0, 90),
    top_k=st.integers(1, 4),
    shape=st.sampled_from([(1, 2, (6, 5)), (2, 2, (3, 3, 3, 3)), (1, 3, (5, 3, 2)), (2, 2, (2, 4, 3, 1))]),
    replica=st.sampled_from(REPLICA),
)
def test_an_exchange_changes_the_score_by_what_was_said_and_undo_takes_it_back(
    seed, layers, tokens, top_k, shape, replica
):
    nodes, per_node, slots = shape
    speed = tuple(map(float, slots)) if seed % 2 else None
    problem = problem_of(
        trace_of(layers, tokens, top_k, seed=seed), Topology(nodes, per_node, speed=speed), list(slots)
    )
    state = state_of(problem, with_spares(problem, None), replica, seed)
    before = weighed(problem, state)
    for step in range(40):
        layer = step % layers
        a, b, e, f = replica_loops.draw(state, layer)
        if a < 0:
            continue
        said = replica_loops.exchange(state, layer, a, b, e, f)
        placed(problem, state.slot)
        fresh = anew(problem, state, replica)
        assert weighed(problem, fresh) - before == pytest.approx(said, abs=1e-9)
        if step % 3 == 0:
            replica_loops.undo(state, layer, a, b, e, f)
        else:
            before = weighed(problem, fresh)
    fresh = anew(problem, state, replica)
    for name in ("on", "gpu_count", "node_count", "held", "copies", "load", "heaviest"):
        np.testing.assert_allclose(getattr(state, name), getattr(fresh, name), atol=1e-9, err_msg=name)


@pytest.mark.parametrize("replica", REPLICA)
@pytest.mark.parametrize("nodes", [1, 2])
def test_tokens_choose_as_they_do_in_a_walk(nodes, replica):
    """On two GPUs no turn is ever taken, and every choice is the walk's."""
    trace = trace_of(4, 200)
    problem = problem_of(trace, Topology(nodes, 2 // nodes), [7, 6])
    slot = replicate(problem, replica=replica, proposals=400)
    chosen = np.zeros(trace.expert_ids.shape, np.int32)
    cost = walked(problem, trace, slot, replica, chosen)
    on = state_of(problem, slot, replica).on
    assert (on == np.where(chosen < 0, -1, problem.gpu_of_slot[chosen])).all()
    found = score(problem, slot, replica)
    assert found["gpu"] == pytest.approx(cost.cross_gpu_share)
    assert found["node"] == pytest.approx(cost.cross_node_share)
    assert found["copies"] == pytest.approx(cost.copies)
    assert found["node_copies"] == pytest.approx(cost.node_copies)
    assert found["load"] == pytest.approx(cost.imbalance)


@pytest.mark.parametrize("replica", REPLICA)
def test_where_turns_are_taken_the_walk_is_near(replica):
    trace = trace_of(4, 3000, experts=16)
    problem = problem_of(trace, Topology(2, 2), [7, 6, 5, 4])
    slot = with_spares(problem, None)
    cost = walked(problem, trace, slot, replica)
    found = score(problem, slot, replica)
    assert found["gpu"] == pytest.approx(cost.cross_gpu_share, rel=0.02)
    assert found["copies"] == pytest.approx(cost.copies, rel=0.02)
    assert found["load"] == pytest.approx(cost.imbalance, rel=0.03)


def test_tiny_cases_come_out_as_the_best_of_all():
    for seed in range(3):
        problem = problem_of(trace_of(2, 80, 2, experts=3, seed=seed), Topology(1, 2), [2, 2])
        layer = [s for s in product(range(3), repeat=4) if s[0] < s[1] and s[2] < s[3] and len(set(s)) == 3]
        every = [score(problem, np.array(both))["score"] for both in product(layer, repeat=2)]
        slot = replicate(problem, seed=seed, proposals=4000, heat=1.0)
        assert score(problem, slot)["score"] == pytest.approx(min(every)), seed


def test_replicas_bring_crossings_and_load_down():
    trace = trace_of(5, 1500, experts=16)
    gpu = np.tile(np.arange(16) % 4, (5, 1))
    alone = problem_of(trace, Topology(1, 4), [4] * 4)
    more = replace(alone, slots_of_gpu=np.full(4, 6, np.int32), objective=Objective(gpu=1.0, max_load=1.1))
    before, after = score(alone, with_spares(alone, gpu)), score(more, replicate(more, gpu, proposals=8000))
    assert before["load"] > 1.15
    assert after["load"] <= 1.1
    assert after["gpu"] < before["gpu"] - 0.1


def test_pins_groups_and_uneven_slots_hold():
    pins = np.full((3, 8), -1, np.int32)
    pins[0, 1], pins[2, 7] = 3, 0
    topology = Topology(2, 2)
    problem = problem_of(trace_of(), topology, [4, 2, 1, 5], pins=pins)
    start, slot = with_spares(problem, None), replicate(problem, proposals=3000)
    placement = placed(problem, slot)
    assert 3 in placement.gpus_of(0, 1)
    assert 0 in placement.gpus_of(2, 7)
    assert (slot != start).any()
    grouped = replace(problem, groups=2, slots_of_gpu=np.array([4, 2, 3, 3], np.int32))
    slot = replicate(grouped, proposals=3000)
    assert (slot != with_spares(grouped, None)).any()
    placement = placed(grouped, slot)
    for layer in range(3):
        for group in (range(4), range(4, 8)):
            nodes = {int(topology.node_of_gpu[g]) for e in group for g in placement.gpus_of(layer, e)}
            assert len(nodes) == 1
    assert 3 in placement.gpus_of(0, 1)


def test_the_same_seed_gives_the_same_answer_and_stop_the_best_so_far():
    problem = problem_of(trace_of(), Topology(1, 4), [3] * 4, replace(EVERYTHING, max_load=1.2))
    once, again, other = (replicate(problem, seed=s, proposals=2000, heat=0.3) for s in (1, 1, 2))
    assert (once == again).all()
    assert (once != other).any()
    assert (replicate(problem, stop=lambda: True) == with_spares(problem, None)).all()
    asked = iter(range(1000))
    part = replicate(problem, proposals=2000, stop=lambda: next(asked) > 30)
    placed(problem, part)
    whole = replicate(problem, proposals=2000)
    start = score(problem, with_spares(problem, None))
    assert min(score(problem, part)["load"], 1.2) <= max(start["load"], 1.2)
    assert (part != whole).any()


def test_tokens_without_choices_no_tokens_and_no_spare_slots():
    for trace in (trace_of(2, 0), trace_of(2, 5, none=1.0), trace_of(1, 40, 1)):
        problem = problem_of(trace, Topology(2, 2), [3, 3, 3, 2])
        placed(problem, replicate(problem, proposals=200))
    problem = problem_of(trace_of(), Topology(1, 4), [2] * 4)
    slot = replicate(problem, proposals=2000)
    assert score(problem, slot)["score"] < score(problem, with_spares(problem, None))["score"]


def test_homes_that_move_get_fewer_rows_too():
    trace = trace_of(4, 600, experts=12)
    problem = problem_of(trace, Topology(1, 3), [6, 6, 6], Objective(copies=1.0, load=0.1, home="most"))
    start, slot = with_spares(problem, None), replicate(problem, proposals=6000)
    before, after = (walk(trace, placed(problem, s), home="most", replica="follow") for s in (start, slot))
    assert after.copies < 0.97 * before.copies


def test_what_cannot_be_is_refused():
    problem = problem_of(trace_of(), Topology(1, 4), [3] * 4)
    pins = np.zeros((3, 8), np.int32)
    for change, at, rule, words in [
        ({}, None, "nearest", "replica must be one of home, follow, foretold, got 'nearest'"),
        ({}, np.full((3, 8), 4), "home", "gpu_of_expert must be .* of 0 .. 3"),
        ({}, np.zeros((3, 8), int), "home", r"must fit \[3, 3, 3, 3\] slots in layer 0"),
        ({"pins": pins}, None, "home", "must fit"),
        ({"pins": np.where(np.arange(8) == 0, 1, -1) * np.ones((3, 1), int)}, np.tile(np.arange(8) % 4, (3, 1)), "home",
         "must keep the pins"),
        ({"groups": 2, "topology": Topology(2, 2)}, np.tile(np.arange(8) % 4, (3, 1)), "home", "groups on one node"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            replicate(replace(problem, **change), at, replica=rule, proposals=10)
