"""The pictures of a placement, in one HTML page: loads, affinity in the placement's order, traffic between GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...bench import draw, html
from ...bench.output import write_text
from ...placement.cost import Cost
from ...placement.placement import Placement
from ...placement.search.simple import linear
from ...placement.traces.statistics import statistics
from ...placement.traces.trace import Trace
from ...placement.walk import walk


def write(path: Path, placement: Placement, trace: Trace, rows: dict[str, dict[str, Any]]) -> None:
    """Writes the page, whole or not at all. `rows`: method -> figures, to compare with."""
    layers, _, top_k = trace.shape
    topology = placement.topology
    about = (
        f"{layers} layers, {top_k} of {placement.num_experts} experts for each token, "
        f"{placement.expert_of_slot.shape[1]} slots on {topology.gpus} GPUs, {topology.nodes} node(s)."
    )
    body = f"<section>{pictures(placement, trace, rows)}</section>"
    text = html.page("headgate place", "Where the experts live", about, body)
    write_text(path, text)


def pictures(placement: Placement, trace: Trace, rows: dict[str, dict[str, Any]]) -> str:
    """The pictures and their words, as HTML."""
    cost = walk(trace, placement)
    start = Placement(
        linear(len(cost.load), placement.num_experts, placement.slots_of_gpu).astype(np.int32),
        placement.num_experts,
        placement.topology,
        placement.slots_of_gpu,
    )
    default = walk(trace, start)
    parts = [comparison(rows)] if rows else []
    parts += [
        html.subtitle("Load of the GPUs"),
        html.prose(
            "Each cell is a GPU in a layer: its share of the layer's work over the mean. First in the order that "
            "frameworks start with, then as placed."
        ),
        _load(default, "as frameworks start"),
        _load(cost, "as placed"),
        html.subtitle("Affinity and traffic"),
        html.prose(
            "Left: how many times more often than by chance an expert is followed by one of the next layer, where "
            "that is strongest; experts stand in the placement's order, and the lines are GPUs: what is dark "
            "inside a square of the diagonal stays where it is. Right: rows from each GPU to each, of all layers, "
            "over an even share."
        ),
        html.grid([_affinity(placement, trace), _traffic(cost)]),
    ]
    return "".join(parts)


def comparison(rows: dict[str, dict[str, Any]]) -> str:
    """A table of methods."""
    head = ["method", "busiest / mean", "GPUs a token", "copies", "across GPUs", "across nodes", "predicted ms"]
    body = [
        [
            name,
            f"{found['imbalance']:.3f}",
            f"{found['gpus_per_token']:.2f}",
            f"{found['copies']:.2f}",
            f"{found['cross_gpu_share']:.1%}",
            f"{found['cross_node_share']:.1%}",
            f"{1e3 * found['seconds']:.2f}",
        ]
        for name, found in rows.items()
    ]
    return html.table([head, *body])


def _load(cost: Cost, title: str) -> str:
    time = cost.load / cost.topology.speed_of_gpu
    values = time / np.maximum(time.mean(1, keepdims=True), 1e-9)
    return draw.inline(
        lambda axis: draw.heat(axis, values, "layer", "GPU", top=2.0, unit="× mean"),
        f"load of every GPU {title}, full colour: twice the mean or more", 860, 60 + 22 * min(len(values), 24),
    )  # fmt: skip


def _affinity(placement: Placement, trace: Trace) -> str:
    """Transitions over chance between the two layers with the strongest tie, experts by the placement's first slots."""
    if trace.shape[0] < 2:
        return ""
    lifts = [_lift(matrix.toarray()) for matrix in statistics(trace).transitions]
    layer = int(np.argmax([np.sort(lift.ravel())[-len(lift) :].mean() for lift in lifts]))
    order = [_order(placement, n) for n in (layer, layer + 1)]
    ends = [np.cumsum(np.bincount(gpu, minlength=placement.topology.gpus)) for _, gpu in order]
    values = lifts[layer][:, order[1][0]]

    def picture(axis: draw.Axes) -> None:
        names, lines = order[1][0].tolist(), (ends[0][:-1].tolist(), ends[1][:-1].tolist())
        sides = (f"expert in layer {layer}, GPU by GPU", f"expert in layer {layer + 1}, GPU by GPU")
        draw.matrix(axis, values, order[0][0].tolist(), *sides, 4.0, "× chance", names, lines)

    return draw.inline(picture, "transitions, full colour: four times chance or more", 420, 420)


def _order(placement: Placement, layer: int) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Experts by the first slot that holds them, and their GPUs."""
    experts, first = np.unique(placement.expert_of_slot[layer], return_index=True)
    order = experts[np.argsort(first)]
    return order, placement.gpu_of_slot[np.sort(first)]


def _lift(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Times chance; transitions of rare experts are drawn towards chance."""
    expected = counts.sum(1, keepdims=True) * counts.sum(0, keepdims=True) / max(counts.sum(), 1)
    return (counts + 5.0) / (expected + 5.0)


def _traffic(cost: Cost) -> str:
    rows = cost.rows.sum(0).astype(float)
    even = rows.sum() / rows.size
    values, sides = rows / max(even, 1e-9), ("a token's home GPU", "the GPU of its experts")
    return draw.inline(
        lambda axis: draw.matrix(axis, values, range(len(rows)), *sides, 2.0, "× an even share"),
        "rows, full colour: twice an even share or more", 420, 420,
    )  # fmt: skip
