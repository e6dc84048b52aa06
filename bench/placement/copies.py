"""Rows copied per token and layer, there and back: EPLB's placement beside one found on the tokens, on other tokens."""

from __future__ import annotations

from time import process_time

import numpy as np
from numpy.typing import NDArray

from ...placement.affinity import expert_load
from ...placement.copies import improve_copies
from ...placement.copies_bound import copies_bound
from ...placement.eplb import eplb
from ...placement.place import problem_of
from ...placement.placement import Placement
from ...placement.problem import Objective, Problem
from ...placement.state import to_slots
from ...placement.topology import Topology
from ...placement.trace import Trace
from ...placement.walk import Foretold, walk


def measure(
    fit: Trace,
    judge: Trace,
    nodes: int = 1,
    gpus_per_node: int = 8,
    max_load: float = 1.05,
    proposals: int = 16_000_000,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Plans by the tokens of `fit`, walked by those of `judge`: `eplb` without replicas, and `found`, one placement for
    homes that stay and homes that move, searched with homes that move to most of a token's choices.

    Of each: `imbalance`; `copies` and `node_copies` with homes fixed, and `..._most`, `..._foretold` where they move by
    the walk's rules; for `found` also `cut...`, the share of EPLB's copies that is saved, `cpu_s` of the search, and
    `least`, what copies with fixed homes are certified not to be below on the tokens of `fit`.
    """
    topology = Topology(nodes, gpus_per_node)
    objective = Objective.copied(topology, "most", max_load=max_load)
    problem = problem_of(fit, fit, topology, None, objective)
    plan = eplb(expert_load(fit), problem.slots_of_gpu)
    found = {"eplb": _walked(problem, judge, plan)}
    began = process_time()
    gpu_of_expert = improve_copies(problem, seed=seed, proposals=proposals)
    spent = process_time() - began
    mine = _walked(problem, judge, to_slots(gpu_of_expert))
    for name in [key for key in mine if "copies" in key and mine[key]]:
        mine[f"cut_{name}"] = 1 - mine[name] / found["eplb"][name]
    stay = problem_of(fit, fit, topology, None, Objective.copied(topology))
    found["found"] = mine | {"cpu_s": spent, "least": copies_bound(stay)["copies"]}
    return found


def _walked(problem: Problem, judge: Trace, expert_of_slot: NDArray[np.integer]) -> dict[str, float]:
    placement = Placement(expert_of_slot, problem.num_experts, problem.topology, problem.slots_of_gpu)
    told = Foretold.of(problem.transitions, placement)
    fixed, most = walk(judge, placement), walk(judge, placement, home="most")
    ahead = walk(judge, placement, home="foretold", foretold=told)
    return {
        "imbalance": fixed.imbalance,
        "gpus_per_token": fixed.gpus_per_token,
        "copies": fixed.copies,
        "copies_most": most.copies,
        "copies_foretold": ahead.copies,
        "node_copies": fixed.node_copies,
        "node_copies_most": most.node_copies,
        "node_copies_foretold": ahead.node_copies,
    }
