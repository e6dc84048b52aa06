"""Small cases against every placement there is, each walked: what `place` says is what the walk counts, near the best
of all, behind no simpler method, and never below its own bound."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest

from headgate.placement.cluster.topology import Topology, Workload
from headgate.placement.place import place
from headgate.placement.placement import Placement
from headgate.placement.problem import Objective
from headgate.placement.traces.generate import generate
from headgate.placement.traces.statistics import statistics
from headgate.placement.traces.trace import Trace
from headgate.placement.walk import Foretold, walk

MOST = 1500  # placements of a case
SHAPES = [(1, 2), (1, 3), (2, 1), (2, 2), (1, 4)]


def layouts(experts: int, slots: tuple[int, ...]) -> list[list[int]]:
    """All placements of one layer, or none where they are too many."""
    each = [list(combinations(range(experts), room)) for room in slots]
    if np.prod([len(way) for way in each], dtype=float) > 40 * MOST:
        return []
    ways = [sum(way, ()) for way in product(*each)]
    return [list(way) for way in ways if len(set(way)) == experts]


def objective_of(rng: np.random.Generator) -> str | Objective:
    kind = int(rng.integers(7))
    if kind < 4:
        return ("time", "transitions", "copies", "load")[kind]
    if kind == 4:
        return Objective(*rng.random(5).round(2).tolist())
    return Objective(copies=1.0, node_copies=1.0, load=0.1, home="most" if kind == 5 else "foretold")


def case(seed: int) -> tuple[Trace, Topology, str | Objective, list[list[int]]]:
    rng = np.random.default_rng(seed)
    while True:
        layers, experts, top_k = int(rng.integers(1, 4)), int(rng.integers(3, 7)), int(rng.integers(1, 4))
        nodes, per_node = SHAPES[rng.integers(len(SHAPES))]
        gpus, spare = nodes * per_node, int(rng.integers(0, 4))
        room = np.bincount(np.arange(experts + spare) % gpus, minlength=gpus)
        if room.min() < 1 or room.max() > experts:
            continue
        slots = tuple(rng.permutation(room).tolist())
        ways = layouts(experts, slots)
        if ways and len(ways) ** layers <= MOST:
            break
    tokens, chances = int(rng.integers(4, 40)), rng.dirichlet(np.full(experts, 0.7), layers)
    ids = np.stack([np.argsort(-(chances[n] ** 0.5) * rng.random((tokens, experts)))[:, :top_k] for n in range(layers)])
    ids = np.where(rng.random(ids.shape) < 0.05, 255, ids).astype(np.uint8)
    speed = tuple(rng.choice([1.0, 2.0], gpus).tolist()) if rng.random() < 0.3 else None
    sequence = np.sort(rng.integers(0, 6, tokens)).astype(np.int32) if rng.random() < 0.5 else None
    topology = Topology(nodes, per_node, slots=slots, speed=speed)
    return Trace(ids, experts, sequence=sequence), topology, objective_of(rng), ways


def counted(trace: Trace, placement: Placement, weights: Objective) -> float:
    """The objective's sum, of nothing but what a walk counts."""
    told = "foretold" in (weights.home, weights.replica)
    tell = Foretold.of(statistics(trace).transitions, placement) if told else None
    cost = walk(trace, placement, replica=weights.replica, home=weights.home, foretold=tell)
    return (
        weights.gpu * cost.cross_gpu_share
        + weights.node * cost.cross_node_share
        + weights.copies * cost.copies
        + weights.node_copies * cost.node_copies
        + weights.load * cost.imbalance
    )


def weights_of(given: str | Objective, trace: Trace, topology: Topology) -> Objective:
    if isinstance(given, Objective):
        return given
    if given == "time":
        return Objective.time(topology, Workload(), trace.shape[0], trace.shape[2])
    if given == "load":
        return Objective(load=1.0)
    return Objective.transitions(topology) if given == "transitions" else Objective.copied(topology)


def check(seed: int) -> None:
    trace, topology, given, ways = case(seed)
    weights = weights_of(given, trace, topology)
    every = product(ways, repeat=trace.shape[0])
    best = min(counted(trace, Placement(np.array(way), trace.num_experts, topology, np.array(topology.slots)), weights)
               for way in every)  # fmt: skip
    found = place(trace, topology, objective=given, effort=0.01)
    score, note = found.cost["score"], (seed, given, topology)
    assert score == pytest.approx(counted(trace, found, weights), rel=1e-9), note
    assert best * (1 - 1e-9) <= score <= best * 1.01 + 1e-12, (score, best, note)
    assert found.bound["score"] <= best * (1 + 1e-9), (found.bound["score"], best, note)
    for method in ("balance", "eplb", "linear") if len(set(topology.slots)) == 1 else ("balance", "linear"):
        other = place(trace, topology, method=method, objective=given, bound=False)
        assert score <= other.cost["score"] * (1 + 1e-9), (method, note)


@pytest.mark.parametrize("seed", range(12))
def test_as_good_as_the_best_of_all(seed):
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(12, 512, 50))
def test_as_good_as_the_best_of_all_in_many_cases(first):
    for seed in range(first, first + 50):
        check(seed)


@pytest.mark.parametrize("objective", ["time", "copies"])
def test_an_expert_at_every_home_is_worth_all_of_its_rows(objective):
    trace = Trace(np.full((1, 64, 1), 3, np.uint8), 8)
    found = place(trace, Topology(1, 4), 3, objective=objective, effort=0.01)
    assert len(found.gpus_of(0, 3)) == 4
    assert found.cost["copies"] == 0
    assert found.bound["reached"]["copies"] == 0


@pytest.mark.parametrize("objective", ["time", "transitions", "copies", "load"])
@pytest.mark.parametrize("per_gpu", [None, 12])
def test_never_behind_a_simpler_method_however_short_the_search(objective, per_gpu):
    """Too large to be tried out, and nearly no search."""
    source = generate(layers=3, experts=40, top_k=2, tokens=300, seed=1)
    ours = place(source, Topology(1, 4), per_gpu, objective=objective, effort=1e-6, bound=False)
    for method in ("balance", "eplb", "linear"):
        other = place(source, Topology(1, 4), per_gpu, method, objective=objective, bound=False)
        assert ours.cost["score"] <= other.cost["score"] * (1 + 1e-9)
