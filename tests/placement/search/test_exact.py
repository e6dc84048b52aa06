"""Walked searches: their counts against the walk's, their layouts against every way to fill slots, what they keep."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from swap_problems import problem_of, random_trace

from headgate.placement.cluster.topology import Topology
from headgate.placement.problem import Objective, Problem
from headgate.placement.search import walk_loops
from headgate.placement.search.exact import improve, layouts, walked_of
from headgate.placement.search.replicate import with_spares

WEIGHTS = {"gpu": 0.3, "node": 0.7, "copies": 1.0, "node_copies": 2.0, "load": 0.4}
RANDOM = np.ones(1, np.uint64)


def ranked(problem: Problem, slots: np.ndarray) -> tuple[float, float]:
    placement = problem.placement(slots)
    return problem.rank(problem.parts(problem.walked(placement), placement))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    layers=st.integers(1, 3),
    home=st.sampled_from(["fixed", "most", "foretold"]),
    left_out=st.sampled_from(["", "copies", "gpu"]),
    slots=st.sampled_from([(2, 2, 1, 1), (3, 2, 2, 2), (3, 3, 3, 3)]),
    kind=st.sampled_from(["counted", "scenarios", "expected"]),
)
def test_the_loops_count_what_a_walk_counts(seed, layers, home, left_out, slots, kind):
    rng = np.random.default_rng(seed)
    weights = {name: 0.0 if name.startswith(left_out or "-") else value for name, value in WEIGHTS.items()}
    topology = Topology(2, 2, speed=(1.0, 2.0, 1.0, 1.0) if seed % 2 else None)
    more = {} if kind == "counted" else {"loads": rng.dirichlet(np.ones(6), (3, layers)), "counted": kind != "expected"}
    problem = problem_of(
        random_trace(seed, layers, 6),
        topology,
        Objective(**weights, home=home, max_load=1.3 if seed % 3 == 0 else None),
        slots_of_gpu=np.array(slots, np.int32),
        homes=rng.integers(0, 4, 40).astype(np.int32),
        **more,
    )
    at = with_spares(problem, None)
    found, _, _ = walk_loops.descend(walked_of(problem), at.copy(), 0, 0, 0, True, 1, RANDOM)
    assert found == pytest.approx(ranked(problem, at), abs=1e-9)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("pins", [{}, {1: 2, 3: 0}])
def test_layouts_are_all_that_there_are(groups, pins):
    topology, slots = Topology(2, 2), np.array([2, 1, 2, 1], np.int32)
    table = np.full((1, 4), -1, np.int32)
    for e, g in pins.items():
        table[0, e] = g
    problem = problem_of(random_trace(0, 1, 4), topology, slots_of_gpu=slots, pins=table, groups=groups)
    found = {tuple(row) for row in layouts(problem, 0, 10_000).tolist()}
    gpu, node = problem.gpu_of_slot, topology.node_of_gpu[problem.gpu_of_slot]
    want = set()
    for row in product(range(4), repeat=6):
        rising = all(a < b for a, b, g, h in zip(row, row[1:], gpu, gpu[1:], strict=False) if g == h)
        pinned = all(any(row[s] == e and gpu[s] == g for s in range(6)) for e, g in pins.items())
        whole = groups == 1 or all(len({node[s] for s in range(6) if row[s] // 2 == n}) == 1 for n in range(2))
        if rising and pinned and whole and len(set(row)) == 4:
            want.add(row)
    assert found == want
    assert len(layouts(problem, 0, len(want) - 1)) == 0


@pytest.mark.parametrize("groups", [1, 2])
def test_descents_keep_pins_and_groups_and_the_start(groups):
    pins = np.full((2, 8), -1, np.int32)
    pins[0, 1], pins[1, 7] = 1, 3
    problem = problem_of(
        random_trace(3, 2, 8), Topology(2, 2), Objective(**WEIGHTS), slots_of_gpu=np.full(4, 3, np.int32), pins=pins,
        groups=groups,
    )  # fmt: skip
    start = with_spares(problem, None)
    found = improve(problem, start, choices=10_000_000)
    placement = problem.placement(found)  # checked as it is made
    assert 1 in placement.gpus_of(0, 1)
    assert 3 in placement.gpus_of(1, 7)
    assert ranked(problem, found) < ranked(problem, start)
    assert (found == improve(problem, start, choices=10_000_000)).all()
    node = problem.topology.node_of_gpu[problem.gpu_of_slot]
    for row in found if groups > 1 else []:
        assert all(len(set(node[row // 4 == group].tolist())) == 1 for group in range(2))
    assert (improve(problem, start, choices=10) == start).all()
