"""The exact model against every placement there is, and its bound where it is stopped."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from swap_problems import every_placement, problem_of, random_placement, random_trace

from headgate.placement.cluster.topology import Topology
from headgate.placement.problem import Objective
from headgate.placement.search import ilp as module
from headgate.placement.search.ilp import ilp
from headgate.placement.search.state import from_slots, score

CASES = {
    "crossings": (2, 4, Topology(1, 2), Objective(gpu=1), {}),
    "nodes": (2, 4, Topology(2, 2), Objective(gpu=1, node=3), {}),
    "nodes alone": (3, 4, Topology(2, 2), Objective(node=1), {}),
    "load": (2, 6, Topology(1, 3), Objective(gpu=1, load=0.5), {}),
    "only load": (1, 6, Topology(1, 2), Objective(load=1), {}),
    "a limit": (2, 6, Topology(1, 2), Objective(gpu=1, max_load=1.05), {}),
    "a limit that cannot be": (2, 4, Topology(1, 2), Objective(gpu=1, max_load=1.0), {}),
    "uneven": (2, 6, Topology(1, 3, slots=(1, 2, 3), speed=(1.0, 1.0, 2.0)), Objective(gpu=1, load=0.2), {}),
    "pins": (2, 4, Topology(1, 2), Objective(gpu=1), {"pins": np.array([[-1, 1, 1, -1], [-1, -1, -1, 0]])}),
    "groups": (2, 4, Topology(2, 1), Objective(gpu=1), {"groups": 2}),
    "one GPU": (2, 3, Topology(1, 1), Objective(gpu=1, load=1), {}),
    "one layer": (1, 4, Topology(1, 2), Objective(gpu=1, load=1), {}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_it_is_the_best_of_all_placements(name, seed):
    layers, experts, topology, objective, more = CASES[name]
    problem = problem_of(random_trace(seed, layers, experts, tokens=100), topology, objective, **more)
    found = ilp(problem)
    at = from_slots(found.expert_of_slot, problem.gpu_of_slot)
    every = list(every_placement(problem))
    best = min((score(problem, other) for other in every), key=lambda s: s.order)
    assert score(problem, at).order == pytest.approx(best.order, abs=1e-6)
    assert any((at == other).all() for other in every)
    assert (found.proved, found.source) == (True, "ilp")
    if best.excess == 0:
        assert found.bound == pytest.approx(best.total, abs=1e-5)


def test_several_scenarios():
    loads = np.random.default_rng(0).random((3, 2, 4))
    loads /= loads.sum(2, keepdims=True)
    problem = problem_of(random_trace(0, 2, 4), Topology(1, 2), Objective(gpu=0.2, load=1), loads=loads)
    at = from_slots(ilp(problem).expert_of_slot, problem.gpu_of_slot)
    best = min(score(problem, other).total for other in every_placement(problem))
    assert score(problem, at).total == pytest.approx(best, abs=1e-6)


def test_at_the_time_limit_the_bound_holds_and_the_search_helps():
    problem = problem_of(random_trace(0, 6, 16, tokens=200), Topology(2, 2), Objective(gpu=1, node=1, load=0.1))
    found = ilp(problem, time_limit=0.5)
    assert not found.proved
    at = from_slots(found.expert_of_slot, problem.gpu_of_slot)
    total = score(problem, at).total
    assert found.source == "search", "HiGHS finds none as good in half a second"
    assert 0 <= found.bound <= total
    for seed in range(5):
        assert total < score(problem, random_placement(problem, seed)).total


def test_an_incumbent_that_is_better_than_the_search_is_kept(monkeypatch):
    problem = problem_of(random_trace(0, 2, 4), Topology(1, 2), Objective(gpu=1))
    solve = module.milp
    monkeypatch.setattr(module, "milp", lambda *a, **k: stopped(solve(*a, **k)))
    worst = max(every_placement(problem), key=lambda at: score(problem, at).total)
    monkeypatch.setattr(module, "search", lambda *a, **k: worst)
    found = ilp(problem)
    assert (found.proved, found.source) == (False, "ilp")


def stopped(result):
    result.status = 1
    return result


def test_bad_arguments_are_refused():
    problem = problem_of(random_trace(0, 2, 4), Topology(1, 2))
    for limit in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="ilp: time_limit must be above 0 seconds, got"):
            ilp(problem, limit)
    with pytest.raises(ValueError, match="ilp: slots must be as many as experts, 4, got 6"):
        ilp(replace(problem, slots_of_gpu=np.array([3, 3], np.int32)))
