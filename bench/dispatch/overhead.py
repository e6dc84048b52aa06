"""What lies between the router and the sum, on one rank: Experts with Local beside a bare call of grouped_ffn."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from ...moe import Experts
from ..case import Bench, Settings
from ..rivals import IMPLEMENTATIONS, Forward
from ..shapes import DTYPES, PASSES, SHAPES, Case, Problem, as_routing

SHAPE, TOKENS, REACH = SHAPES["qwen3"], 2048, 3.0  # E 64, K 8, D 1024, F 512; percent


def experts(problem: Problem) -> Forward:
    """The layer around the problem's own parameters: the dispatcher of one rank, and its checks."""
    s, p = problem.shape, problem.parameters
    layer = Experts(s.experts, s.hidden, s.intermediate, dtype=problem.x.dtype)
    layer.w_gate_up, layer.w_down = p["gate_up_proj"], p["down_proj"]
    return lambda x, ids, weights: layer(x, as_routing(s, ids, weights))


def run_overhead(
    dtypes: list[str], passes: list[str], budget_s: float, show: Callable[[dict[str, Any]], None], tokens: int = TOKENS
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(cases, figures): both in turns, numbers first, as `headgate bench moe` does it; a figure is the median of the
    ratios of neighbouring samples, in percent above 1."""
    table = {"headgate": IMPLEMENTATIONS["headgate"], "experts": experts}
    bench = Bench(Settings(rivals=("experts",), bounds=(), budget_s=budget_s, implementations=table))
    cases, figures = [], []
    for dtype in dtypes or list(DTYPES)[:2]:
        for kind in passes or PASSES:
            result = bench.run(Case(SHAPE, tokens, dtype, kind))
            cases.append(result)
            figures.append(figure(result))
            show(result)
    return cases, figures


def figure(result: dict[str, Any]) -> dict[str, Any]:
    """One row of the table of figures (bench/figures.py)."""
    found = result["implementations"]
    bare, whole = (found.get(n, {}) for n in ("headgate", "experts"))
    value, aside = None, bare.get("refused") or whole.get("refused") or result.get("skipped", "")
    if "samples_s" in bare and "samples_s" in whole:
        pairs = zip(whole["samples_s"], bare["samples_s"], strict=True)
        value = 100 * (statistics.median(w / b for w, b in pairs) - 1)
        aside = f"ratio of medians {whole['median_s'] / bare['median_s']:.4f}, {result['rounds']} rounds"
    verdict = "not measured" if value is None else "PASS" if value <= REACH else "short"
    text = f"T {result['tokens']} {result['dtype']} {result['pass']}: Experts with Local above grouped_ffn"
    return {
        "case": text, "value": value, "reach": REACH, "stretch": None, "unit": "%", "verdict": verdict, "aside": aside,
    }  # fmt: skip
