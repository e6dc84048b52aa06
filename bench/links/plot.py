"""The picture of the report: published times with the model through them, and modelled times of the dispatchers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .published import DIRECTIONS, PER_NODE, Point
from .winners import BESIDE, OURS

_COLOURS = {
    "all_to_all": "#1f4e99", "hierarchical": "#2a9d8f", "all_gather": "#e08a00", "plain": "#999999",
    "pipelined": "#7a4fa3",
}  # fmt: skip
_NAMES = {"plain": "one row per expert", "pipelined": "hierarchical, both levels at once"}


def draw(points: Sequence[Point], rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Writes a PNG: above the fit, one panel a direction; below one panel for each number of tokens.

    Raises ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tokens = list(dict.fromkeys(r["tokens"] for r in rows))
    figure: Any = pyplot.figure(figsize=(max(10, 4.2 * len(tokens)), 8.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.15))
    for axis, direction in zip(above.subplots(1, 2), DIRECTIONS, strict=True):
        _fit(axis, [p for p in points if p.direction == direction and p.kernels == "low-latency"], direction)
    above.suptitle(
        "Published by DeepEP (low-latency kernels, H800), and the model through two of the points", fontsize=11
    )
    axes = below.subplots(1, len(tokens), squeeze=False)[0]
    for axis, count in zip(axes, tokens, strict=True):
        _times(axis, [r for r in rows if r["tokens"] == count], count)
    axes[0].set_ylabel("modelled us, dispatch + combine")
    handles, labels = axes[0].get_legend_handles_labels()
    below.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    below.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=90, pil_kwargs={"optimize": True})
    pyplot.close(figure)


def _fit(axis: Any, points: Sequence[Point], direction: str) -> None:
    many = [p for p in points if p.ranks > PER_NODE]  # in one node there are other links
    axis.plot([p.ranks for p in many], [1e6 * p.modelled_s for p in many], color="#1f4e99", label="modelled", zorder=1)
    for use, fill in (("fitted", "#c8553d"), ("held out", "white")):
        chosen = [p for p in points if p.use == use]
        x, y = [p.ranks for p in chosen], [1e6 * p.published_s for p in chosen]
        axis.scatter(x, y, s=46, color=fill, edgecolor="#c8553d", linewidth=1.6, label=f"published, {use}", zorder=2)
        for p in chosen if use == "held out" else ():
            axis.annotate(
                f"{100 * p.error:+.1f}%", (p.ranks, 1e6 * p.published_s), xytext=(0, -16 if p.error > 0 else 8),
                textcoords="offset points",
                ha="center", fontsize=9,
            )  # fmt: skip
    _ranks(axis, [p.ranks for p in points])
    axis.set_ylim(0, 1.15e6 * max(p.published_s for p in points))
    axis.set_title(direction, fontsize=11)
    axis.set_ylabel("us")
    axis.legend(fontsize=9, loc="lower right", frameon=False)


def _times(axis: Any, rows: Sequence[Mapping[str, Any]], tokens: int) -> None:
    from matplotlib import ticker

    ranks = [r["ranks"] for r in rows]
    for name in (*OURS, *BESIDE):
        ours = name in OURS
        style = {"linewidth": 2.2, "marker": "o", "markersize": 4} if ours else {"linewidth": 1.2, "linestyle": "--"}
        times = [r["modelled_us"][name] for r in rows]
        axis.plot(ranks, times, color=_COLOURS[name], label=_NAMES.get(name, name), **style)
    low = min(min(r["modelled_us"].values()) for r in rows)
    high = max(r["modelled_us"][name] for r in rows for name in ("all_to_all", "hierarchical", "plain"))
    axis.set_yscale("log")
    axis.set_ylim(0.62 * low, 2.2 * high)
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5, 7)))
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.text(0.01, 0.06, "fastest of the three solid ones:", transform=axis.transAxes, fontsize=8, color="#555555")
    for r in rows:  # a strip that says who wins
        axis.axvspan(r["ranks"] / 2**0.5, r["ranks"] * 2**0.5, 0, 0.05, color=_COLOURS[r["wins"]], linewidth=0)
    _ranks(axis, ranks)
    axis.set_xlim(ranks[0] / 2**0.5, ranks[-1] * 2**0.5)
    axis.set_title(f"{tokens:,} tokens per rank", fontsize=11)


def _ranks(axis: Any, ranks: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(set(ranks)), [str(r) for r in sorted(set(ranks))])
    axis.minorticks_off()
    axis.set_xlabel("ranks")
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
