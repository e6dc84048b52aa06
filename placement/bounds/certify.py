"""What no placement can be below, proved by the run that found one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ..problem import Problem
from ..search.methods import Proof, Run
from . import METHODS, Bound, crossing_bound, load_bound
from .copies import copies_bound

SLACK = 1e-9  # relative: a score and its bound are sums of shares in another order


def certify(
    problem: Problem, parts: Mapping[str, float], score: float, proof: Proof | None, run: Run
) -> dict[str, Any]:
    """Bounds on each weighted part, their weighted sum, and the gap (score - bound) / score of the answer.

    Parts are bounded each for itself, by placements that need not be the same: the bound on the score is valid and not
    tight, above all where the objective trades parts against each other. `proof`: what the method proved on its way.
    `run.deadline` ends the search for a better bound.
    """
    began, weights = time.perf_counter(), problem.objective
    speed = problem.topology.speed_of_gpu
    found: dict[str, Any] = {"load": max(load_bound(loads, problem.slots_of_gpu, speed) for loads in problem.loads)}
    how = ["load: combinatorial"]
    if weights.copies or weights.node_copies:
        found |= copies_bound(problem)
        how.append("copies: co-activation")
    settled = proof is not None and proof.proved
    if weights.gpu or weights.node:
        crossing = crossing_bound(
            problem.transitions,
            problem.slots_of_gpu,
            problem.topology.node_of_gpu,
            gpu_weight=weights.gpu,
            node_weight=weights.node,
            methods=METHODS[:2] if settled else METHODS,
            time_limit=max(run.deadline - time.perf_counter(), 0.0),
            progress=lambda bound: run.interrupted.is_set() or _told(bound, run),
        )
        found |= {level.name: level.crossing / level.total if level.total else 0.0 for level in crossing.levels}
        how.append(crossing.method)
    bound = sum(getattr(weights, name) * value for name, value in found.items())
    if proof is not None and proof.score > bound:
        bound = proof.score
        how.append(f"score: {proof.method}")
    bound = min(bound, score) if bound <= score * (1 + SLACK) else bound
    proved = settled or abs(score - bound) <= SLACK * abs(score)
    return {
        **found,
        "score": bound,
        "gap": 0.0 if proved or not score else (score - bound) / score,
        "proved": proved,
        "reached": dict(parts),
        "method": "; ".join(how),
        "seconds": round(time.perf_counter() - began, 3),
    }


def _told(bound: Bound, run: Run) -> bool:
    run.say(f"bound: {', '.join(f'{v.name} {v.crossing / max(v.total, 1):.4f} ({v.method})' for v in bound.levels)}")
    return False
