"""Problems with the numbers of the traces they are given, and random ones without replicas."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np

from headgate.placement.cluster.topology import Topology
from headgate.placement.problem import Objective, Problem
from headgate.placement.traces.affinity import expert_load, transition_counts
from headgate.placement.traces.trace import Trace

WEIGHTS = Objective(gpu=1.0, node=2.0, load=0.1)


def random_trace(seed: int, layers: int, experts: int, tokens: int = 40, top_k: int = 2) -> Trace:
    """Tokens with two favourite experts in every layer, and an empty slot here and there."""
    rng = np.random.default_rng(seed)
    ids = np.empty((layers, tokens, top_k), np.uint8)
    kind = rng.integers(0, max(experts // 2, 1), tokens)
    for layer in range(layers):
        liked = rng.permutation(experts)
        for t in range(tokens):
            weight = np.ones(experts)
            weight[liked[[2 * kind[t] % experts, (2 * kind[t] + 1) % experts]]] = 10
            ids[layer, t] = rng.choice(experts, min(top_k, experts), replace=False, p=weight / weight.sum())
    return Trace(np.where(rng.random(ids.shape) < 0.05, 255, ids).astype(np.uint8), experts)


def problem_of(trace: Trace, topology: Topology, objective: Objective = WEIGHTS, **more) -> Problem:
    """The problem with the trace's own load as its only scenario, unless `loads` are given; no pins unless given."""
    layers, _, _ = trace.expert_ids.shape
    load = expert_load(trace)
    given = {
        "loads": (load / np.maximum(load.sum(1, keepdims=True), 1))[None],
        "pins": np.full((layers, trace.num_experts), -1, np.int32),
        "slots_of_gpu": topology.slots_of_gpu(trace.num_experts),
        **more,
    }
    transitions = tuple(transition_counts(trace, layer) for layer in range(layers - 1))
    ids = np.where(trace.live, trace.expert_ids.astype(np.int16), -1)
    return Problem(trace.num_experts, transitions, ids=ids, topology=topology, objective=objective, **given)


def random_placement(problem: Problem, seed: int = 0) -> np.ndarray:
    """[L, E] without regard to pins and groups."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(problem.gpu_of_slot) for _ in range(problem.layers)])


def every_placement(problem: Problem):
    """Every [L, E] that the problem allows."""
    node_of = problem.topology.node_of_gpu
    size = problem.num_experts // problem.groups
    layers = []
    for pins in problem.pins:
        found = {row for row in permutations(problem.gpu_of_slot.tolist()) if _kept(row, pins, node_of, size, problem)}
        layers.append(sorted(found))
    for rows in product(*layers):
        yield np.array(rows, np.int32)


def _kept(row, pins, node_of, size, problem) -> bool:
    at = np.array(row)
    if ((pins >= 0) & (pins != at)).any():
        return False
    nodes = node_of[at].reshape(-1, size)
    return problem.groups == 1 or bool((nodes == nodes[:, :1]).all())
