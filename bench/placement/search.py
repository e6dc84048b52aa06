"""Placements without replicas, fitted on one trace and judged on another; and how long a large case takes.

Times are CPU seconds of this process, compilation apart. Everything that is judged is walked, token by token.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from time import process_time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...placement.affinity import expert_load
from ...placement.assign import assign
from ...placement.eplb import eplb
from ...placement.placement import Placement
from ...placement.problem import Objective, Problem
from ...placement.search import search
from ...placement.state import score, to_slots
from ...placement.statistics import statistics
from ...placement.steady import steady_load
from ...placement.topology import Topology
from ...placement.trace import Trace
from ...placement.walk import walk

# What to weigh, and the load to ask for so that the one that is judged stays below 1.09 and 1.13
ONE_NODE = Objective(gpu=1.0, load=0.01, max_load=1.06)
TWO_NODES = Objective(gpu=1.0, node=3.0, load=0.01, max_load=1.065)


def measure(
    fit: Trace,
    judge: Trace,
    topology: Topology,
    objective: Objective,
    *,
    labels: NDArray[np.integer] | None = None,
    proposals: int = 30_000_000,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Figures of EPLB's plan, of exact layers in turn (affinity alone) and of the search, by name.

    `labels` [T]: the domain of each token of `fit`, whose steady load the search keeps (see `steady_load`). Each has
    `gpu`, `node` and `load`: the shares of transitions that cross and the mean of max / mean load, on `judge`; `fitted`
    and `fitted_load`, what the search saw of it; and `cpu_s`.
    """
    problem = _problem(fit, topology, objective, labels)
    _warm_up(problem)
    found = {}
    for name, plan in (
        ("eplb", lambda: eplb(expert_load(fit), problem.slots_of_gpu)),
        ("assign", lambda: to_slots(assign(problem))),
        ("search", lambda: to_slots(search(problem, proposals=proposals, seed=seed))),
    ):
        began = process_time()
        slots = plan()
        seconds = process_time() - began
        found[name] = _judged(fit, judge, problem, slots) | {"cpu_s": seconds}
    return found


def measure_scale(trace: Trace, topology: Topology, *, proposals: int = 100_000_000, seed: int = 0) -> dict[str, Any]:
    """A large case by affinity alone: score and CPU seconds of the first answer (layers in turn, once), of the fixpoint
    of layers in turn, and of the search from there, each with those before it; `load` of each on the trace."""
    problem = _problem(trace, topology, Objective.transitions(topology, load=0.0), None)
    _warm_up(problem)
    began = process_time()
    first = assign(problem, sweeps=0)
    found = {"first": asdict(score(problem, first)) | {"cpu_s": process_time() - began}}
    fixpoint = assign(problem, first)
    found["assign"] = asdict(score(problem, fixpoint)) | {"cpu_s": process_time() - began}
    best = search(problem, fixpoint, proposals=proposals, seed=seed)
    found["search"] = asdict(score(problem, best)) | {"cpu_s": process_time() - began}
    return found


def _problem(trace: Trace, topology: Topology, objective: Objective, labels: NDArray[np.integer] | None) -> Problem:
    layers, _, _ = trace.shape
    return Problem(
        trace.num_experts,
        statistics(trace).transitions,
        steady_load(trace, labels)[None],
        np.zeros((layers, 0, 1), np.int16),
        topology,
        topology.slots_of_gpu(trace.num_experts),
        objective,
        np.full((layers, trace.num_experts), -1, np.int32),
    )


def _warm_up(problem: Problem) -> None:
    """Compiles what is measured."""
    small = replace(problem, transitions=problem.transitions[:1], loads=problem.loads[:, :2], pins=problem.pins[:2])
    search(small, proposals=1)
    score(small, assign(small))


def _judged(fit: Trace, judge: Trace, problem: Problem, slots: NDArray[np.integer]) -> dict[str, float]:
    placement = Placement(slots, problem.num_experts, problem.topology, problem.slots_of_gpu)
    seen, cost = walk(fit, placement), walk(judge, placement)
    return {
        "gpu": cost.cross_gpu_share,
        "node": cost.cross_node_share,
        "load": cost.imbalance,
        "fitted": seen.cross_gpu_share,
        "fitted_load": seen.imbalance,
    }
