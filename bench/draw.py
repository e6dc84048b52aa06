"""The one place that draws, by matplotlib: into a .png or .svg file, or into a page.

A picture is a function that fills one pair of axes: the same one serves a page, a file, and a sheet of several. In a
page the colours follow the reader's screen, light or dark, and marks tell their values under the mouse. matplotlib is
loaded with the first picture; it comes with the extra `plot`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..placement.files import write_whole
from . import machine
from .output import write_text

# A page knows these by name (html.py); `accent` is for what is ours, `quiet` for what it is compared with.
PALETTE = {
    "ink": "#1d2126", "soft": "#6c737c", "rule": "#e6e3dd", "accent": "#0b6e75", "quiet": "#b9bfc4", "warm": "#c8541a",
    "card": "#fffffe",
}  # fmt: skip
INK, SOFT, RULE, ACCENT, QUIET, WARM, CARD = PALETTE.values()
STYLE: Any = {
    "font.family": "sans-serif", "font.size": 12, "svg.fonttype": "none", "svg.hashsalt": "headgate",
    "text.color": INK, "axes.edgecolor": RULE, "axes.labelcolor": SOFT, "axes.titlesize": 13, "axes.titlecolor": SOFT,
    "xtick.color": RULE, "ytick.color": RULE, "xtick.labelcolor": SOFT, "ytick.labelcolor": SOFT,
}  # fmt: skip
TIP = "tip "  # the beginning of a mark's gid; what follows is told under the mouse, of a mesh for each cell in turn
MOST_CELLS = 4096  # with more the cells are dots of an image: a page of a million shapes would not open
SHARPNESS = 1.6  # pixels of a .png to a pixel of a page

Axes = Any  # matplotlib.axes.Axes
Picture = Callable[[Axes], None]


# --- frames ----------------------------------------------------------------------------------------------------------


def check(path: Path, who: str) -> None:
    """Refuses a picture file before the work is done: ValueError for its name or folder, RuntimeError where matplotlib
    is not installed."""
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"{who}: --plot must end in .png or .svg, got {path}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{who}: the folder of {path} must exist, got none")
    if path.is_dir():
        raise ValueError(f"{who}: --plot must be a file, got the folder {path}")
    machine.need(f"{who}: --plot", "matplotlib", "plot")


def write(path: Path, width: float, height: float, fill: Callable[[Any], None]) -> None:
    """A .png or .svg file. `fill` gets the empty figure; sizes are pixels of a page."""
    with _style():
        figure = _figure(width, height)
        fill(figure)
        if path.suffix == ".svg":
            write_text(path, _svg(figure))
        else:
            write_whole(path, lambda file: figure.savefig(file, format="png", dpi=72 * SHARPNESS, facecolor="white"))


def inline(picture: Picture, caption: str, width: float = 420, height: float = 140) -> str:
    """A picture as a <figure> of a page; one wider than 600 pixels scrolls where the screen is narrow."""
    with _style():
        figure = _figure(width, height)
        picture(figure.subplots())
        svg = _svg(figure)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)  # a page has them by itself
    for name, colour in PALETTE.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = svg[svg.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{escape(caption)}" ', 1)
    kind = "wide" if width > 600 else "part"
    return f'<figure class="{kind}"><figcaption>{escape(caption)}</figcaption>{svg}</figure>\n'


def _style() -> Any:
    machine.need("plot", "matplotlib", "plot")
    import matplotlib

    return matplotlib.rc_context(STYLE)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72), layout="constrained")


def _svg(figure: Any) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", file.getvalue(), flags=re.S)
    svg = re.sub(rf'<g id="{TIP}([^"]*)">(.*?)</g>', _tell, svg, flags=re.S)
    return re.sub(r' id="[a-z]+_\d+"|(?i: id="(figure|axes|legend|text|patch|matplotlib)[^"]*")', "", svg)


def _tell(mark: re.Match) -> str:
    """The words of a mark's name become its tooltip; the lines of a mesh's name those of its cells."""
    words = iter(mark[1].split("|"))
    if "|" not in mark[1]:
        return f"<g><title>{next(words)}</title>{mark[2]}</g>"
    body = re.sub(r"<path ([^>]*)/>", lambda path: f"<path {path[1]}><title>{next(words)}</title></path>", mark[2])
    return f"<g>{body}</g>"


def plain(axis: Axes, grid: str | None = "y", spines: Sequence[str] = ("left", "bottom")) -> None:
    """The look of all axes: thin lines behind what is drawn, no frame."""
    for side, spine in axis.spines.items():
        spine.set_visible(side in spines)
    axis.tick_params(length=0)
    axis.set_axisbelow(True)
    if grid:
        axis.grid(axis=grid, color=RULE, linewidth=0.8)


def number(value: float) -> str:
    """A number as short as it can be read: 12,345, 123, 4.6."""
    return f"{value:,.0f}" if abs(value) >= 20 else f"{value:.2g}" if abs(value) < 1 else f"{value:.1f}"


# --- pictures --------------------------------------------------------------------------------------------------------


def bars(axis: Axes, values: Mapping[str, float], ours: str, unit: str = "") -> None:
    """Horizontal bars from zero, ours in the accent colour."""
    plain(axis, None, ())
    names = list(values)
    marks = axis.barh(range(len(names)), list(values.values()), 0.68, color=[_of(n == ours) for n in names])
    for mark, (name, value) in zip(marks, values.items(), strict=True):
        mark.set_gid(f"{TIP}{name}: {value:,.1f} {unit}".rstrip())
    said = axis.bar_label(marks, [number(v) for v in values.values()], padding=6)
    axis.set_yticks(range(len(names)), names, color=INK)
    for words, label, name in zip(said, axis.get_yticklabels(), names, strict=True):
        words.set_weight("bold" if name == ours else "normal")
        label.set_weight("bold" if name == ours else "normal")
    axis.set_xlim(0, 1.18 * (max(values.values()) or 1))
    axis.set_xticks([])
    axis.invert_yaxis()


def _of(ours: bool) -> str:
    return ACCENT if ours else QUIET


def columns(
    axis: Axes, names: Sequence[str], series: Mapping[str, Sequence[float | None]], colours: Mapping[str, str]
) -> None:
    """Groups of upright bars, one bar of each series to a group; None: no bar."""
    plain(axis)
    width = 0.85 / max(1, len(series))
    for i, (name, values) in enumerate(series.items()):
        there = [(j + i * width, value) for j, value in enumerate(values) if value is not None]
        at, high = zip(*there, strict=True) if there else ((), ())
        axis.bar(at, high, width, label=name, color=colours.get(name))
    axis.set_xticks([j + 0.4 for j in range(len(names))], names, rotation=45, ha="right", fontsize=9)
    if series:
        beside(axis)
    axis.margins(x=0.01)


def ceiling(axis: Axes, value: float) -> None:
    """A dashed line that nothing can be above."""
    axis.axhline(value, color=INK, linewidth=1, linestyle="--")


def beside(axis: Axes) -> None:
    """The legend, to the right of the axes."""
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=10, frameon=False)


def loss(
    axis: Axes,
    train: Sequence[float],
    held_out: Sequence[Sequence[float]],
    baselines: Mapping[str, float],
    steps: int,
) -> None:
    """Bits per byte over steps: the training curve, the held-out points, and what knows less as dashed lines."""
    plain(axis)
    axis.plot(range(1, len(train) + 1), train, color=ACCENT, linewidth=1.3, alpha=0.8)
    at, bits = zip(*held_out, strict=True)
    axis.plot(at, bits, color=WARM, linewidth=2)
    for step, value in held_out:
        tip = f"{TIP}step {step:.0f}: {value:.2f} bits per byte on held-out text"
        axis.plot(step, value, "o", color=WARM, markersize=8, markeredgecolor=CARD, clip_on=False, gid=tip)
    for value in baselines.values():
        axis.axhline(value, color=SOFT, linewidth=1, linestyle=(0, (4, 5)))
    values = [*train, *bits, *baselines.values()]
    low, high = np.floor(min(values) * 2) / 2, np.ceil(max(values) * 2) / 2 + 0.2
    names = [(bits[-1], f"held-out {bits[-1]:.2f}", INK), *((v, f"{n} {v:.2f}", SOFT) for n, v in baselines.items())]
    names.sort()
    places = apart([value for value, *_ in names], 0.075 * (high - low))
    for y, (_, words, colour) in zip(places, names, strict=True):
        axis.text(1.015, y, words, color=colour, va="center", transform=axis.get_yaxis_transform(),
                  weight="bold" if colour == INK else "normal")  # fmt: skip
    axis.set(xlim=(0, max(steps, 1)), ylim=(low, high), xlabel="steps", ylabel="bits per byte")


def apart(places: Sequence[float], gap: float) -> list[float]:
    """Rising places, pushed up to be at least `gap` from one another."""
    found: list[float] = []
    for place in places:
        found.append(max(place, found[-1] + gap) if found else place)
    return found


def heat(axis: Axes, values: NDArray, rows: str, columns: str, top: float, unit: str) -> None:
    """Cells [rows, columns] in one hue, from nothing to `top` and more."""
    count, wide = values.shape
    tips = [f"{rows} {i}, {columns} {j}: {values[i, j]:.2f} {unit}" for i in range(count) for j in range(wide)]
    _cells(axis, values, top, tips)
    for ticks, size in ((axis.set_xticks, wide), (axis.set_yticks, count)):
        every = next(gap for gap in (1, 2, 4, 8, 16, 32, 64, 128, size + 1) if size / gap <= 16)
        shown = range(0, size, every)
        ticks([i + 0.5 for i in shown], [str(i) for i in shown])
    axis.set(xlabel=columns, ylabel=rows)


def matrix(
    axis: Axes,
    values: NDArray,
    order: Sequence[int],
    rows: str,
    columns: str,
    top: float,
    unit: str,
    names: Sequence[int] | None = None,
    lines: tuple[Sequence[int], Sequence[int]] = ((), ()),
) -> None:
    """A square of cells [rows, columns] in one hue; `order`: which row comes first, second, ... `names` of the columns;
    `lines`: after how many rows, and columns, a line is drawn."""
    names = range(values.shape[1]) if names is None else names
    tips = [
        f"{row} → {name}: {value:.1f} {unit}" for row in order for name, value in zip(names, values[row], strict=True)
    ]
    _cells(axis, values[list(order)], top, tips)
    for at in lines[0]:
        axis.axhline(at, color=INK, linewidth=1.2)
    for at in lines[1]:
        axis.axvline(at, color=INK, linewidth=1.2)
    axis.set(xlabel=columns, ylabel=rows, xticks=[], yticks=[], aspect="equal")


def _cells(axis: Axes, values: NDArray, top: float, tips: Sequence[str]) -> None:
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    plain(axis, None, ())
    hue = LinearSegmentedColormap.from_list("hue", [to_rgba(ACCENT, 0.05), to_rgba(ACCENT, 1.0)])
    few = values.size <= MOST_CELLS
    edges = {"edgecolors": CARD, "linewidth": 0.6} if few else {"rasterized": True}
    mesh = axis.pcolormesh(values, cmap=hue, vmin=0, vmax=top, **edges)
    if few:
        mesh.set_gid(TIP + "|".join([*tips, ""]))
    axis.invert_yaxis()


def dumbbells(axis: Axes, rows: Sequence[tuple[str, float, float]], before: str, after: str) -> None:
    """One line per row from one share to another, both 0 .. 1."""
    plain(axis, "x", ())
    for y, (_, a, b) in enumerate(rows):
        axis.plot([a, b], [y, y], color=QUIET, linewidth=3, zorder=1)
        axis.plot(a, y, "o", color=QUIET, markersize=9, label=None if y else before, gid=f"{TIP}{before} {a:.1%}")
        axis.plot(b, y, "o", color=ACCENT, markersize=11, label=None if y else after, gid=f"{TIP}{after} {b:.1%}")
    most = max(0.1, np.ceil(10 * max(max(a, b) for _, a, b in rows)) / 10)
    step = 0.1 if most <= 0.6 else 0.2
    ticks = np.arange(0, most + 0.001, step)
    axis.set_xticks(ticks, [f"{share:.0%}" for share in ticks])
    axis.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlim(-0.02, most + 0.02)
    beside(axis)


def hit_rates(axis: Axes, sizes: Sequence[int], rates: Mapping[str, Sequence[float]], experts: int) -> None:
    """Hit rate over slots, every policy below Belady's optimum. Policies are named at the right, the best on top."""
    from matplotlib import color_sequences

    plain(axis, "both")
    best = rates["belady"]
    axis.fill_between(sizes, best, 1.0, color=RULE, alpha=0.5, linewidth=0)
    axis.text(sizes[0], 0.985, " no policy without prefetch", va="top", fontsize=10, color=SOFT)
    axis.plot(sizes, best, color=INK, linewidth=2.4, label="belady")
    names = sorted((n for n in rates if n != "belady"), key=lambda n: -sum(rates[n]))
    for i, name in enumerate(names):
        style = "--" if name in ("lru", "random") else "-"
        axis.plot(sizes, rates[name], style, color=color_sequences["tab20"][i % 20], linewidth=1.6, label=name)
    shown = [size for i, size in enumerate(sizes) if i in (0, len(sizes) - 1) or size - sizes[i - 1] > experts / 32]
    axis.set(xlim=(sizes[0], max(sizes[-1], sizes[0] + 1)), ylim=(0, 1), xticks=shown)
    axis.set(xlabel=f"slots a layer, of {experts} experts", ylabel="hit rate")
    beside(axis)


def doubling(axis: Axes, at: Sequence[int], name: str) -> None:
    """A horizontal axis on which each number is twice the one before."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(set(at)), [str(x) for x in sorted(set(at))])
    axis.minorticks_off()
    axis.set_xlabel(name)


def logarithmic(axis: Axes, low: float, high: float) -> None:
    """A vertical axis by powers of ten, with readable numbers between them."""
    from matplotlib import ticker

    axis.set_yscale("log")
    axis.set_ylim(low, high)
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5, 7)))
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.yaxis.set_minor_formatter(ticker.NullFormatter())


def strip(axis: Axes, at: Sequence[int], colours: Sequence[str]) -> None:
    """Along the bottom of a doubling axis, a colour around each place."""
    for x, colour in zip(at, colours, strict=True):
        axis.axvspan(x / 2**0.5, x * 2**0.5, 0, 0.05, color=colour, linewidth=0)
    axis.set_xlim(at[0] / 2**0.5, at[-1] * 2**0.5)
