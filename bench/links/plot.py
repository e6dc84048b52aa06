"""The picture of the report: published times with the model through them, and modelled times of the dispatchers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import draw as pictures
from .published import DIRECTIONS, PER_NODE, Point
from .winners import BESIDE, OURS

_COLOURS = {
    "all_to_all": "#1f4e99", "hierarchical": "#2a9d8f", "all_gather": "#e08a00", "plain": "#999999",
    "pipelined": "#7a4fa3",
}  # fmt: skip
_NAMES = {"plain": "one row per expert", "pipelined": "hierarchical, both levels at once"}


def draw(points: Sequence[Point], rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Writes a .png or .svg: above the fit, one panel a direction; below one panel for each number of tokens."""
    tokens = list(dict.fromkeys(r["tokens"] for r in rows))
    pictures.write(path, max(960, 400 * len(tokens)), 840, lambda figure: _fill(figure, points, rows, tokens, title))


def _fill(
    figure: Any, points: Sequence[Point], rows: Sequence[Mapping[str, Any]], tokens: Sequence[int], title: str
) -> None:
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.15))
    for axis, direction in zip(above.subplots(1, 2), DIRECTIONS, strict=True):
        _fit(axis, [p for p in points if p.direction == direction and p.kernels == "low-latency"], direction)
    above.suptitle(
        "Published by DeepEP (low-latency kernels, H800), and the model through two of the points", fontsize=12
    )
    axes = below.subplots(1, len(tokens), squeeze=False)[0]
    for axis, count in zip(axes, tokens, strict=True):
        _times(axis, [r for r in rows if r["tokens"] == count], count)
    axes[0].set_ylabel("modelled us of dispatch and combine")
    handles, labels = axes[0].get_legend_handles_labels()
    below.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    below.suptitle(title, fontsize=12)


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
    pictures.plain(axis)
    pictures.doubling(axis, [p.ranks for p in points], "ranks")
    axis.set_ylim(0, 1.15e6 * max(p.published_s for p in points))
    axis.set_title(direction)
    axis.set_ylabel("us")
    axis.legend(fontsize=9, loc="lower right", frameon=False)


def _times(axis: Any, rows: Sequence[Mapping[str, Any]], tokens: int) -> None:
    ranks = [r["ranks"] for r in rows]
    for name in (*OURS, *BESIDE):
        ours = name in OURS
        style = {"linewidth": 2.2, "marker": "o", "markersize": 4} if ours else {"linewidth": 1.2, "linestyle": "--"}
        times = [r["modelled_us"][name] for r in rows]
        axis.plot(ranks, times, color=_COLOURS[name], label=_NAMES.get(name, name), **style)
    low = min(min(r["modelled_us"].values()) for r in rows)
    high = max(r["modelled_us"][name] for r in rows for name in ("all_to_all", "hierarchical", "plain"))
    axis.text(0.01, 0.06, "fastest of the three solid ones:", transform=axis.transAxes, fontsize=9)
    pictures.plain(axis)
    pictures.doubling(axis, ranks, "ranks")
    pictures.logarithmic(axis, 0.62 * low, 2.2 * high)
    pictures.strip(axis, ranks, [_COLOURS[r["wins"]] for r in rows])
    axis.set_title(f"{tokens:,} tokens per rank")
