"""What no placement can be below, proved by the run that found one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ..problem import Problem
from ..search.methods import Proof, Run
from . import METHODS, Bound, crossing_bound, load_bound
from ._pace import Pace
from .copies import copies_bound

AFTER_s = 2.0  # of Ctrl-C, the bound may take
SLACK = 1e-9  # relative: a score and its bound are sums of shares in another order


def certify(
    problem: Problem, parts: Mapping[str, float], score: float, proof: Proof | None, run: Run
) -> dict[str, Any]:
    """Bounds on each weighted part, their weighted sum, and the gap (score - bound) / score of the answer.

    Parts are bounded each for itself, by placements that need not be the same: the bound on the score is valid and not
    tight, above all where the objective trades parts against each other. `proof`: what the method proved on its way.
    `run.deadline` ends the search for a better bound; "method" says what there was no time for.
    """
    began, weights = time.perf_counter(), problem.objective
    deadline = min(run.deadline, began + AFTER_s) if run.interrupted.is_set() else run.deadline
    pace, speed = Pace(deadline), problem.topology.speed_of_gpu
    soon = pace.share(10).deadline
    load = [
        load_bound(loads, problem.slots_of_gpu, speed, stop=lambda: time.perf_counter() > soon)
        for loads in problem.loads
    ]
    found: dict[str, Any] = {"load": max(load)}
    how = ["load: combinatorial"]
    settled = proof is not None and proof.proved
    if weights.copies or weights.node_copies:
        found |= copies_bound(problem, pace.share(2) if weights.gpu or weights.node else pace)
        short = f" without time for all {' and '.join(sorted(pace.missed))}" if pace.missed else ""
        how.append(f"copies: {'homes and slots' if problem.spare else 'co-activation'}{short}")
    if weights.gpu or weights.node:
        crossing = crossing_bound(
            problem.transitions,
            problem.slots_of_gpu,
            problem.topology.node_of_gpu,
            gpu_weight=weights.gpu,
            node_weight=weights.node,
            methods=METHODS[:2] if settled else METHODS,
            time_limit=pace.left_s,
            clock=pace.clock,
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
