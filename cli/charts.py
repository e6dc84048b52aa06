"""Pictures as SVG written by hand: no plotting library to install, sharp at any size, light and dark by the page's CSS.

Colours are the page's variables (report.py): --accent for what is ours, --quiet for what it is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray


def _figure(title: str, width: int, height: int, body: str, wide: bool = False) -> str:
    kind = "wide" if wide else "part"
    caption = f"<figcaption>{escape(title)}</figcaption>" if title else ""
    return (
        f'<figure class="{kind}">{caption}<svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title or "chart")}">{body}</svg></figure>\n'
    )


def _text(x: float, y: float, words: str, kind: str = "", anchor: str = "start", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}" {more}>{escape(words)}</text>'


def _rect(x: float, y: float, w: float, h: float, style: str, tip: str = "", radius: float = 0) -> str:
    inner = f"<title>{escape(tip)}</title>" if tip else ""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="{radius}" {style}>{inner}</rect>'


def figure_number(value: float) -> str:
    """A number as short as it can be read: 12,345, 123, 4.6."""
    return f"{value:,.0f}" if abs(value) >= 20 else f"{value:.2g}" if abs(value) < 1 else f"{value:.1f}"


def bars(title: str, values: dict[str, float], ours: str, unit: str, less_is_better: bool = False) -> str:
    """Horizontal bars from zero, ours in the accent colour, with its ratio to the best of the others."""
    width, row, left, right = 420, 34, 92, 74
    most = max(values.values()) or 1
    others = [value for name, value in values.items() if name != ours]
    factor = min(others) / values[ours] if less_is_better else values[ours] / max(others)
    body = []
    for i, (name, value) in enumerate(values.items()):
        y = 6 + i * row
        style = 'class="accent"' if name == ours else 'class="quiet"'
        length = (width - left - right) * value / most
        body.append(_text(left - 10, y + 16, name, "strong" if name == ours else "", "end"))
        body.append(_rect(left, y, max(length, 1.5), 23, style, f"{name}: {value:,.1f} {unit}", 3))
        body.append(_text(left + length + 8, y + 16, figure_number(value), "strong" if name == ours else ""))
    head = f"{title}, {unit}: {factor:.2f}× {'less than ' if less_is_better else ''}the best other"
    return _figure(head, width, 6 + row * len(values), "".join(body))


def loss(train: list[float], held_out: list[list[float]], baselines: dict[str, float], steps: int) -> str:
    """Bits per byte over steps: the training curve, the held-out points, and what knows less as dashed lines."""
    width, height, left, right, top, bottom = 860, 340, 44, 150, 12, 40
    values = [*train, *(v for _, v in held_out), *baselines.values()]
    low, high = np.floor(min(values) * 2) / 2, np.ceil(max(values) * 2) / 2
    span = max(high - low, 0.5)

    def x(step: float) -> float:
        return left + (width - left - right) * step / max(steps, 1)

    def y(value: float) -> float:
        return top + (height - top - bottom) * (high - value) / span

    body = []
    for tick in np.arange(np.ceil(low), high + 0.01, 1):
        body.append(f'<line x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" class="rule"/>')
        body.append(_text(left - 8, y(tick) + 4, f"{tick:.0f}", "soft", "end"))
    step, last = held_out[-1]
    for name, value in baselines.items():
        body.append(f'<line x1="{left}" x2="{width - right}" y1="{y(value):.1f}" y2="{y(value):.1f}" class="dash"/>')
        free = abs(y(value) - y(last)) > 14 or x(step) < width - right - 120  # else the last point's label is there
        body.append(_text(width - right + 8, y(value) + (4 if free else -8), f"{name} {value:.2f}", "soft"))
    for tick in _ticks(steps):
        body.append(_text(x(tick), height - bottom + 20, f"{tick:,}", "soft", "middle"))
    body.append(_text((left + width - right) / 2, height - 4, "steps", "soft", "middle"))
    if train:
        points = " ".join(f"{x(i + 1):.1f},{y(v):.1f}" for i, v in enumerate(train))
        body.append(f'<polyline points="{points}" class="line"/>')
    held = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in held_out)
    body.append(f'<polyline points="{held}" class="held"/>')
    for at, value in held_out:
        tip = f"step {at:.0f}: {value:.2f} bits per byte on held-out text"
        body.append(f'<circle cx="{x(at):.1f}" cy="{y(value):.1f}" r="4.5" class="dot"><title>{tip}</title></circle>')
    body.append(_text(x(step) + 9, y(last) + 4, f"held-out {last:.2f}", "strong"))
    return _figure("bits per byte: training text (line), held-out text (dots)", width, height, "".join(body), wide=True)


def _ticks(steps: int) -> list[int]:
    for gap in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000):
        if steps / gap <= 6:
            return list(range(0, steps + 1, gap))
    return [0, steps]


def heat_map(values: NDArray, rows: str, columns: str, top: float, unit: str, title: str = "") -> str:
    """Cells [rows, columns], from nothing to `top` and more in one hue; for few rows and many columns."""
    count, wide = values.shape
    left, width = 64.0, 860.0
    cell = (width - left) / wide
    tall = min(26.0, max(cell, 14.0))
    body = []
    for i, row in enumerate(values):
        body.append(_text(left - 10, i * tall + tall / 2 + 4, f"{rows} {i}", "soft", "end"))
        body += [
            _cell(left + j * cell, i * tall, cell, tall, value, top, f"{rows} {i}, {columns} {j}: {value:.2f} {unit}")
            for j, value in enumerate(row)
        ]
    height = count * tall + 50
    for j in _ticks(wide - 1):
        body.append(_text(left + (j + 0.5) * cell, count * tall + 16, str(j), "soft", "middle"))
    body.append(_text(left, height - 8, columns, "soft"))
    body.append(_legend(width - 8, height - 20, top, unit))
    return _figure(title or f"load of every expert, {unit}", int(width), int(height), "".join(body), wide=True)


def matrix(
    values: NDArray,
    order: Sequence[int],
    rows: str,
    columns: str,
    top: float,
    *,
    title: str = "transitions, times chance",
    unit: str = "× chance",
    names: Sequence[int] | None = None,
    lines: tuple[Sequence[int], Sequence[int]] = ((), ()),
) -> str:
    """A square of cells [rows, columns] in one hue; `order`: which row comes first, second, ... `names` of the columns;
    `lines`: after how many rows, and columns, a line is drawn."""
    size, left, up = 356.0, 26.0, 8.0
    cell = size / max(values.shape)
    names = range(values.shape[1]) if names is None else names
    body = [
        _cell(left + j * cell, up + i * cell, cell, cell, value, top, f"{row} → {names[j]}: {value:.1f} {unit}")
        for i, row in enumerate(order)
        for j, value in enumerate(values[row])
    ]
    for at in lines[0]:
        y = up + at * cell
        body.append(f'<line x1="{left}" x2="{left + size}" y1="{y:.1f}" y2="{y:.1f}" class="rule"/>')
    for at in lines[1]:
        x = left + at * cell
        body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{up}" y2="{up + size}" class="rule"/>')
    turned = f'transform="rotate(-90 14 {up + size / 2:.0f})"'
    body.append(_text(14, up + size / 2, rows, "soft", "middle", turned))
    body.append(_text(left + size / 2, up + size + 20, columns, "soft", "middle"))
    body.append(_legend(left + size, up + size + 34, top, unit))
    return _figure(title, 400, int(up + size + 52), "".join(body))


def _cell(x: float, y: float, w: float, h: float, value: float, top: float, tip: str) -> str:
    strength = min(max(float(value) / top, 0.0), 1.0)
    return _rect(x + 0.5, y + 0.5, w - 1, h - 1, f'class="cell" fill-opacity="{0.04 + 0.96 * strength:.2f}"', tip, 2)


def _legend(right: float, y: float, top: float, unit: str) -> str:
    """Five steps of the hue, flush right at `right`."""
    label = f"{top:.0f}+ {unit}"
    width = 7 * len(label)
    start = right - width - 100
    cells = [
        _rect(start + i * 18, y, 17, 10, f'class="cell" fill-opacity="{0.04 + 0.96 * i / 4:.2f}"', "", 2)
        for i in range(5)
    ]
    return _text(start - 6, y + 9, "0", "soft", "end") + "".join(cells) + _text(start + 96, y + 9, label, "soft")


def dumbbells(rows: Sequence[tuple[str, float, float]], before: str, after: str) -> str:
    """One line per row from one share to another, both 0 .. 1."""
    width, row, left, right, top = 400, 34, 56, 20, 30
    most = max(0.1, np.ceil(10 * max(max(a, b) for _, a, b in rows)) / 10)
    height = top + row * len(rows) + 30

    def x(share: float) -> float:
        return left + (width - left - right) * share / most

    body = []
    for share in np.arange(0, most + 0.001, 0.1 if most <= 0.6 else 0.2):
        body.append(f'<line x1="{x(share):.1f}" x2="{x(share):.1f}" y1="{top - 8}" y2="{height - 24}" class="rule"/>')
        body.append(_text(x(share), height - 8, f"{share:.0%}", "soft", "middle"))
    body.append(f'<circle cx="{left + 6}" cy="10" r="5" class="quiet"/>' + _text(left + 16, 14, before, "soft"))
    body.append(f'<circle cx="{left + 106}" cy="10" r="5" class="accent"/>' + _text(left + 116, 14, after, "soft"))
    for i, (name, a, b) in enumerate(rows):
        y = top + i * row + row / 2
        body.append(_text(left - 10, y + 4, name, "soft", "end"))
        body.append(f'<line x1="{x(a):.1f}" x2="{x(b):.1f}" y1="{y}" y2="{y}" class="link"/>')
        body.append(f'<circle cx="{x(a):.1f}" cy="{y}" r="5" class="quiet"><title>{before} {a:.1%}</title></circle>')
        body.append(f'<circle cx="{x(b):.1f}" cy="{y}" r="6" class="accent"><title>{after} {b:.1%}</title></circle>')
    return _figure("share of transitions to the favourite successors", width, height, "".join(body))
