"""What one more slot on each GPU is worth: transitions that cross GPUs, with replicas and without, on other tokens."""

from __future__ import annotations

from time import process_time

from ...placement.place import problem_of
from ...placement.placement import Placement
from ...placement.problem import Objective
from ...placement.replicate import replicate
from ...placement.search import search
from ...placement.state import to_slots
from ...placement.topology import Topology
from ...placement.trace import Trace
from ...placement.walk import Foretold, walk


def measure(
    fit: Trace,
    judge: Trace,
    gpus: int = 8,
    spare: int = 1,
    max_load: tuple[float, float] = (1.04, 1.025),
    loose: float = 1.2,
    swaps: int = 30_000_000,
    proposals: int = 400_000,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Placements by the tokens of `fit`, walked by those of `judge`: `without` replicas, and with `spare` more slots on
    each GPU by the rules `follow` and `foretold` of the walk. The search for replicas begins with a placement of load
    `loose`, which the replicas then level. `max_load`: the loads wished for on `fit`, without replicas and with.

    Of each: `cross_gpu`, the share of transitions; `imbalance`; `cpu_s` of the search; with replicas `below`, by how
    many points (hundredths) cross_gpu lies below `without`.
    """
    topology = Topology(1, gpus)
    each = -(-fit.num_experts // gpus)
    found = {}
    single = {}
    for limit in (max_load[0], loose):
        problem = problem_of(fit, fit, topology, None, Objective.transitions(topology, max_load=limit))
        began = process_time()
        single[limit] = search(problem, proposals=swaps, seed=seed)
        spent = process_time() - began
    placement = Placement(to_slots(single[max_load[0]]), fit.num_experts, topology, problem.slots_of_gpu)
    cost = walk(judge, placement)
    found["without"] = {"cross_gpu": cost.cross_gpu_share, "imbalance": cost.imbalance, "cpu_s": spent}
    objective = Objective.transitions(topology, max_load=max_load[1], load=0.3)
    more = problem_of(fit, fit, topology, each + spare, objective)
    for rule in ("follow", "foretold"):
        began = process_time()
        slots = replicate(more, single[loose], replica=rule, seed=seed, proposals=proposals)
        spent = process_time() - began
        placement = Placement(slots, fit.num_experts, topology, more.slots_of_gpu)
        told = Foretold.of(more.transitions, placement) if rule == "foretold" else None
        cost = walk(judge, placement, replica=rule, foretold=told)
        below = 100 * (found["without"]["cross_gpu"] - cost.cross_gpu_share)
        found[rule] = {
            "cross_gpu": cost.cross_gpu_share,
            "imbalance": cost.imbalance,
            "below": below,
            "cpu_s": spent,
        }
    return found
