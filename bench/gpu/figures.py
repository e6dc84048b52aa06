"""The figures Headgate sets itself on an H200 in bf16, and what a report says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .. import screen
from .shapes import SONIC, STANDARD

Result = Mapping[str, Any]
Found = tuple[float, str]
# whom the third group of figures compares with
COMMON = ("torch", "hf-grouped", "hf-batched", "hf-eager", "scattermoe")


@dataclass(frozen=True)
class Figure:
    """`value` gives every (value, case) of a result that counts; the worst of them is the figure's. `fewer`: smaller is
    better. `needs_rival`: the stretch is to be ahead of this contestant, in place of a number."""

    text: str
    value: Callable[[Result], Iterable[Found]]
    reach: float
    stretch: float | None
    unit: str
    fewer: bool = False
    rival: str | None = None

    def row(self, results: Iterable[Result]) -> dict[str, Any]:
        found = [pair for result in results for pair in self.value(result)]
        row: dict[str, Any] = {
            "figure": self.text, "reach": self.reach, "stretch": self.stretch, "unit": self.unit, "cases": len(found),
        }  # fmt: skip
        if not found:
            return row | {"value": None, "best": None, "worst_case": None, "verdict": "not measured"}
        sign = -1 if self.fewer else 1
        worst, where = min(found, key=lambda pair: sign * pair[0])
        best = max(found, key=lambda pair: sign * pair[0])[0]
        good = sum(sign * v >= sign * self.reach for v, _ in found)
        verdict = "reached" if good == len(found) else "short"
        if self.stretch is not None and sign * worst >= sign * self.stretch:
            verdict = "stretch"
        return row | {"value": worst, "best": best, "worst_case": where, "reached_in": good, "verdict": verdict}


def median(result: Result, name: str, step: str) -> float | None:
    """Microseconds."""
    return result.get("contestants", {}).get(name, {}).get(step, {}).get("median_us")


def flops(result: Result, step: str) -> float:
    """Matrix FLOPs of one step of a case: 6NDF forward, 12NDF backward."""
    s = result["sizes"]
    return {"forward": 6, "backward": 12, "step": 18}[step] * result["tokens"] * s["K"] * s["D"] * s["F"]


def tflops(result: Result, name: str, step: str) -> float | None:
    us = median(result, name, step)
    return None if us is None else flops(result, step) / us / 1e6


def _where(result: Result) -> str:
    return f"{result['shape']} T {result['tokens']}"


def _rate(step: str, fine: bool | None) -> Callable[[Result], Iterable[Found]]:
    def value(result: Result) -> Iterable[Found]:
        shape = SONIC.get(result["shape"])
        if shape is None or result["pass"] != "train" or (fine is not None and (shape.intermediate == 256) != fine):
            return
        if fine is False and shape.intermediate < 768:
            return
        rate = tflops(result, "headgate", step)
        if rate is not None:
            yield rate, _where(result)

    return value


def _of_cublas(result: Result) -> Iterable[Found]:
    shape = SONIC.get(result["shape"])
    ours, theirs = median(result, "headgate", "forward"), median(result, "cublas", "forward")
    if shape is not None and shape.intermediate >= 768 and result["pass"] == "train" and ours and theirs:
        yield theirs / ours, _where(result)


def _against(step: str) -> Callable[[Result], Iterable[Found]]:
    def value(result: Result) -> Iterable[Found]:
        ours = median(result, "headgate", step)
        if result["shape"] not in STANDARD or result["pass"] != "train" or result["tokens"] < 4096 or not ours:
            return
        for name in COMMON:
            theirs = median(result, name, step)
            if theirs:
                yield theirs / ours, f"{_where(result)} against {name}"

    return value


def _ahead(step: str) -> Callable[[Result], Iterable[Found]]:
    def value(result: Result) -> Iterable[Found]:
        ours, theirs = median(result, "headgate", step), median(result, "sonicmoe", step)
        if result["shape"] in SONIC and ours and theirs:
            yield theirs / ours, _where(result)

    return value


def _bandwidth(result: Result) -> Iterable[Found]:
    ours = median(result, "headgate", "forward")
    if result["pass"] == "decode" and result["shape"] in ("qwen3", "gpt-oss") and 8 <= result["tokens"] <= 64 and ours:
        yield result["weight_bytes"] / ours / 1e3 / result["copy_GBps"], _where(result)


def _layer(result: Result) -> Iterable[Found]:
    ours = median(result, "headgate", "forward")
    if result["pass"] == "layer" and result["shape"] == "qwen3" and result["tokens"] == 1 and ours:
        yield ours, _where(result)


def _saved(result: Result) -> Iterable[Found]:
    ours = result.get("saved_bytes", {}).get("headgate")
    if ours is not None and result.get("expected_saved_bytes"):
        yield ours / result["expected_saved_bytes"], _where(result)


FIGURES = (
    Figure("training forward, SonicMoE set with F >= 768", _rate("forward", False), 500, None, "TFLOP/s"),
    Figure("the same, share of cuBLAS", _of_cublas, 0.70, None, ""),
    Figure("training forward, fine-grained F = 256", _rate("forward", True), 380, None, "TFLOP/s"),
    Figure("backward, SonicMoE set", _rate("backward", None), 450, None, "TFLOP/s"),
    Figure("forward, times as fast as SonicMoE (stretch of the rows above)", _ahead("forward"), 1.0, None, "x"),
    Figure("backward, times as fast as SonicMoE (stretch of the rows above)", _ahead("backward"), 1.0, None, "x"),
    Figure("forward, T >= 4096, against torch, ScatterMoE, transformers", _against("forward"), 1.3, 1.8, "x"),
    Figure("forward + backward, T >= 4096, against the same", _against("step"), 1.3, 1.8, "x"),
    Figure("decode, 8 <= T <= 64, qwen3 and gpt-oss: share of the copy bandwidth", _bandwidth, 0.70, 0.85, ""),
    Figure("decode, T = 1, whole layer incl. router (qwen3)", _layer, 30, 20, "us", fewer=True),
    Figure("saved for backward / (rows + H + routing)", _saved, 1.0, None, "", fewer=True),
)


def rows(results: Iterable[Result]) -> list[dict[str, Any]]:
    """The table of figures."""
    kept = list(results)
    return [figure.row(kept) for figure in FIGURES]


def lines(table: Iterable[Mapping[str, Any]]) -> list[str]:
    found = [("figure", "worst", "best", "reach", "stretch", "unit", "verdict")]
    for r in table:
        cells = (_cell(r[k]) for k in ("value", "best", "reach", "stretch"))
        where = f" in {r['reached_in']} of {r['cases']}; worst at {r['worst_case']}" if r["cases"] else ""
        found.append((r["figure"], *cells, r["unit"], f"{r['verdict']}{where}"))
    return screen.lines(found, left=(0, 5, 6), rule=True)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if abs(value) >= 100 else f"{value:.2f}"
