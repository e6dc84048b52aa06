"""The picture: hit rate over slots, every policy below Belady's optimum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw(sizes: Sequence[int], rates: Mapping[str, Sequence[float]], experts: int, path: Path, title: str) -> None:
    """Writes a PNG or SVG, by the name's end. Policies are named at the right, the best on top.

    Raises ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure: Any = pyplot.figure(figsize=(9, 5.6), layout="constrained")
    axis = figure.subplots()
    best = rates["belady"]
    axis.fill_between(sizes, best, 1.0, color="#eeeeee", linewidth=0)
    axis.text(sizes[0], 0.985, " no policy without prefetch", va="top", fontsize=9, color="#777777")
    axis.plot(sizes, best, color="black", linewidth=2.4, label="belady")
    colours = matplotlib.color_sequences["tab20"]
    names = sorted((n for n in rates if n != "belady"), key=lambda n: -sum(rates[n]))
    for i, name in enumerate(names):
        style = "--" if name in ("lru", "random") else "-"
        axis.plot(sizes, rates[name], style, color=colours[i % len(colours)], linewidth=1.5, label=name)
    axis.set_xlabel(f"slots a layer, of {experts} experts")
    axis.set_ylabel("hit rate")
    axis.set_ylim(0, 1)
    axis.set_xlim(sizes[0], sizes[-1])
    axis.set_xticks(sizes)
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.legend(loc="outside right center", fontsize=9, frameon=False)
    axis.set_title(title, fontsize=11)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
