"""The figures Headgate sets itself: one table, measured in one run; what falls short is called short."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .case import Bench
from .shapes import SHAPES, Case

Result = Mapping[str, Any]
FINE, FEW, OSS = SHAPES["qwen3"], SHAPES["mixtral"], SHAPES["gpt-oss"]
ALL = ("eager", "batched_mm", "grouped_mm")
PEAKS = ("headgate", "grouped_mm")


@dataclass(frozen=True)
class Figure:
    """One row: `value` reads it from the case's result (None: not measured). `fewer`: smaller is better. `or_share`: a
    share of the read bound that serves as well as the stretch."""

    text: str
    case: Case
    value: Callable[[Result], float | None]
    reach: float | None
    stretch: float | None
    unit: str = "x"
    fewer: bool = False
    or_share: float | None = None
    rivals: tuple[str, ...] = ALL

    def row(self, result: Result) -> dict[str, Any]:
        value = None if "skipped" in result else self.value(result)
        share = result["ratios"].get("share_of_read")
        aside = "" if share is None else f"{share:.2f} of the read bound"
        verdict = self._verdict(value)
        if verdict in ("PASS", "short") and self.or_share is not None and share is not None and share >= self.or_share:
            verdict = "stretch"
        if self.value is _kept and value is not None:
            aside = f"{result['memory']['kept_bytes']['headgate']:,} bytes"
        if value is None:
            aside = result.get("skipped") or _why_not(result)
        return {
            "case": self.text, "value": value, "reach": self.reach, "stretch": self.stretch, "unit": self.unit,
            "verdict": verdict, "aside": aside,
        }  # fmt: skip

    def _verdict(self, value: float | None) -> str:
        if value is None:
            return "not measured"
        if self.reach is None:
            return "(no figure set)"
        sign = -1 if self.fewer else 1
        if self.stretch is not None and sign * value >= sign * self.stretch:
            return "stretch"
        return "PASS" if sign * value >= sign * self.reach else "short"


def _why_not(result: Result) -> str:
    reasons = [
        f"{n}: {i.get('refused') or i['skipped']}" for n, i in result["implementations"].items() if "median_s" not in i
    ]
    reasons += [p["skipped"] for p in result["memory"].get("peak", {}).values() if "skipped" in p]
    return "; ".join(reasons) or "no value"


def _share(result: Result) -> float | None:
    return result["ratios"].get("share_of_matmuls")


def _best(result: Result) -> float | None:
    return result["ratios"].get("best", {}).get("times_headgate")


def _eager(result: Result) -> float | None:
    return result["ratios"].get("times_headgate", {}).get("eager")


def _kept(result: Result) -> float | None:
    """Bytes kept over bytes promised."""
    memory = result["memory"]
    ours = memory.get("kept_bytes", {}).get("headgate")
    return None if ours is None else ours / memory["expected_kept_bytes"]


def _peak(result: Result) -> float | None:
    peaks = result["memory"].get("peak", {})
    ours, theirs = (peaks.get(name, {}).get("backward_bytes") for name in PEAKS)
    return None if ours is None or theirs is None else ours / theirs


def _large() -> list[Figure]:
    """Many tokens in bf16: speed and memory."""
    rows = []
    for name, shape, shares, bests in (
        ("fine-grained", FINE, ((0.80, 0.92), (0.72, 0.88)), ((1.4, 1.6), (1.6, 1.9))),
        ("few large", FEW, ((0.90, 0.95), (0.85, 0.92)), ((None, None), (None, None))),
    ):
        for kind, share, best in zip(("forward", "train"), shares, bests, strict=True):
            case = Case(shape, 2048, "bf16", kind)
            what = f"T 2048 bf16 {name}, {'forward' if kind == 'forward' else 'forward+backward'}"
            rows.append(Figure(f"{what}: share of the bare matmuls", case, _share, *share, unit=""))
            rows.append(Figure(f"{what}: against transformers' best", case, _best, *best))
    for name, shape in (("E 64", FINE), ("E 32", OSS)):
        case = Case(shape, 2048, "bf16", "train")
        rows.append(Figure(f"training, T 2048 bf16, {name} ({shape.name}): against eager", case, _eager, 8.0, 40.0))
    for name, shape in (("fine-grained", FINE), ("few large", FEW)):
        case = Case(shape, 2048, "bf16", "train")
        text = f"T 2048 bf16 {name}: bytes kept for backward / (rows + H + routing)"
        rows.append(Figure(text, case, _kept, 1.0, None, unit="", fewer=True))
        text = f"T 2048 bf16 {name}: highest memory in backward / grouped_mm's"
        rows.append(Figure(text, case, _peak, 1.0, 0.8, unit="", fewer=True))
    return rows


def _small() -> list[Figure]:
    """Few tokens, and fp16."""
    rows = []
    for tokens in (1, 16):
        for name, shape in (("fine-grained", FINE), ("few large", FEW)):
            text = f"T {tokens} bf16 {name}, forward: against transformers' best"
            rows.append(Figure(text, Case(shape, tokens, "bf16", "forward"), _best, 1.6, 2.2, or_share=0.8))
    for tokens, kind in ((1, "forward"), (16, "forward"), (256, "forward"), (2048, "forward"), (256, "train")):
        text = f"T {tokens} fp16 fine-grained, {kind}: against transformers' best"
        # eager's backward takes seconds for each call here and is never the best
        rivals = ALL if kind == "forward" else ("grouped_mm",)
        rows.append(Figure(text, Case(FINE, tokens, "fp16", kind), _best, 5.0, 10.0, rivals=rivals))
    return rows


FIGURES = [*_large(), *_small()]


def run_figures(bench: Bench, show: Callable[[Result], None], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measures each case of FIGURES once, shows it, appends it to `results`, and returns the rows of the table."""
    done: dict[Case, dict[str, Any]] = {}
    for figure in FIGURES:
        if figure.case not in done:
            result = bench.run(figure.case, figure.rivals)
            done[figure.case] = result
            results.append(result)
            show(result)
    return [figure.row(done[figure.case]) for figure in FIGURES]
