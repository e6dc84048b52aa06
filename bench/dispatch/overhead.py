"""What lies between the router and the sum, on one rank: Experts with Local beside a bare call of grouped_ffn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from ...moe import Experts
from ..case import Bench, LeftOut, Settings
from ..measure import interleave
from ..rivals import IMPLEMENTATIONS, Forward
from ..shapes import SHAPES, Case, Problem, as_routing, make_parameters, make_problem

SHAPE, TOKENS, REACH = SHAPES["qwen3"], 2048, 3.0  # E 64, K 8, D 1024, F 512; percent
ROUNDS = (9, 60)


def experts(problem: Problem) -> Forward:
    """The layer around the problem's own parameters: the dispatcher of one rank, and its checks."""
    s, p = problem.shape, problem.parameters
    layer = Experts(s.experts, s.hidden, s.intermediate, dtype=problem.x.dtype)
    layer.w_gate_up, layer.w_down = p["gate_up_proj"], p["down_proj"]
    return lambda x, ids, weights: layer(x, as_routing(s, ids, weights))


def added_us(calls: int = 2000) -> float:
    """What the layer adds to a call where there is almost nothing to compute: the difference of the medians, in turns.
    Local moves no row, so that it is the same for any number of them."""
    shape = replace(SHAPE, hidden=8, intermediate=8, experts=2, top_k=1)
    problem = make_problem(shape, 2, torch.float32, make_parameters(shape, torch.float32))
    both = IMPLEMENTATIONS["headgate"](problem), experts(problem)
    samples: tuple[list[float], list[float]] = [], []
    with torch.no_grad():
        for _ in range(calls):
            for forward, into in zip(both, samples, strict=True):
                began = time.perf_counter()
                forward(problem.x, *problem.routings[0])
                into.append(time.perf_counter() - began)
    bare, whole = (statistics.median(s) for s in samples)
    return 1e6 * (whole - bare)


class Overhead:
    """Measures cases one after another: numbers first, in turns, as `headgate bench moe` does it. `clock`: "wall", or
    "cpu" with one thread, which bears other work on the machine."""

    def __init__(self, budget_s: float, clock: str) -> None:
        table = {"headgate": IMPLEMENTATIONS["headgate"], "experts": experts}
        self.bench = Bench(Settings(budget_s=budget_s, clock=clock, implementations=table))

    def run(self, case: Case) -> dict[str, Any]:
        s = self.bench.settings
        problem = self.bench.problem(case)
        who = {name: self.bench.enter(case, problem, name) for name in s.implementations}
        slowest = max(w.first_s * w.calls for w in who.values())
        rounds = interleave(who, max(s.budget_s, 20 * slowest), s.clock, rounds=ROUNDS)
        found = {name: w.summary() for name, w in who.items()}
        medians = [statistics.median(w.samples_s) for w in who.values()]
        return {
            "shape": asdict(case.shape), "tokens": case.tokens, "dtype": case.dtype, "pass": case.kind,
            "rounds": rounds, "pairs": case.tokens * case.shape.top_k,
            "experts_hit": sum(c > 0 for c in problem.counts(0)), "implementations": found, "memory": {},
            "ratios": {"times_headgate": {"headgate": 1.0, "experts": medians[1] / medians[0]}},
        }  # fmt: skip


def figure(result: dict[str, Any], added: float) -> dict[str, Any]:
    """A row of the table of figures (bench/figures.py): the median of the ratios of neighbouring samples, in percent
    above 1. Beside it `added`, the microseconds of a call of next to nothing, as a share of this case's."""
    bare, whole = (result["implementations"][n]["samples_s"] for n in ("headgate", "experts"))
    value = 100 * (statistics.median(w / b for w, b in zip(whole, bare, strict=True)) - 1)
    share = 100 * added / 1e6 / result["implementations"]["headgate"]["median_s"]
    return {
        "case": f"T {result['tokens']} {result['dtype']} {result['pass']}: Experts with Local above grouped_ffn",
        "value": value, "reach": REACH, "stretch": None, "unit": "%", "verdict": "PASS" if value <= REACH else "short",
        "aside": f"{result['rounds']} rounds; the layer alone adds {added:.1f} us to a call, {share:.3f}% of this one",
    }  # fmt: skip


def run_overhead(
    cases: list[Case], budget_s: float, clock: str, show: Callable[[dict[str, Any]], None], report: dict[str, Any]
) -> list[str]:
    """Fills the report's `cases` and `figures`; returns why cases were left out: wrong numbers, too little memory."""
    overhead, problems = Overhead(budget_s, clock), []
    report["figures"], report["added_us"] = [], added_us()
    for case in cases:
        try:
            result = overhead.run(case)
        except LeftOut as left:
            problems.append(f"{case}: {left.kind}: {left.reason}")
            continue
        report["cases"].append(result)
        report["figures"].append(figure(result, report["added_us"]))
        show(result)
    return problems
