"""Where a placement's cost is: layer by layer, GPU by GPU, and what its bound says."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ...placement.cluster.topology import Workload
from ...placement.cost import Cost
from ...placement.placement import Placement
from ...placement.traces.trace import Trace
from ...placement.walk import walk

NAMES = {
    "gpu": "transitions across GPUs",
    "node": "transitions across nodes",
    "copies": "rows that leave a GPU, a token and layer",
    "node_copies": "rows that leave a node, a token and layer",
    "load": "busiest GPU / mean, mean of layers",
    "score": "the objective",
}


def lines(placement: Placement, trace: Trace, workload: Workload | None = None) -> Iterator[str]:
    """Text: the bound, the layers, the GPUs, the replicas."""
    cost = walk(trace, placement)
    yield ""
    yield from _bound(placement)
    yield from _layers(cost, workload)
    yield from _gpus(cost, placement)
    yield from _replicas(placement)


def _bound(placement: Placement) -> Iterator[str]:
    bound, cost = placement.bound, placement.cost
    if not bound:
        yield "No bound was asked for."
        return
    yield "What no placement can be below, and how far this one may be from the best:"
    for name, words in NAMES.items():
        if bound.get(name) is None:
            continue
        reached = cost["score"] if name == "score" else bound["reached"][name]
        gap = (reached - bound[name]) / reached if reached else 0.0
        yield f"  {words:<44} {reached:12.4f}   bound {bound[name]:12.4f}   gap {max(gap, 0.0):6.1%}"
    if bound.get("proved"):
        yield "  This placement is proved to be the best."


def _layers(cost: Cost, workload: Workload | None) -> Iterator[str]:
    seconds = cost.layer_seconds(workload)
    speed = cost.topology.speed_of_gpu
    yield "Layers: busiest GPU / mean, rows sent to a GPU and a node per token, transitions from the layer before,"
    yield "predicted microseconds of dispatch, experts, combine (a model, not a measurement):"
    yield "  layer   load   GPUs  nodes   cross GPU  cross node   dispatch   experts   combine"
    tokens = max(cost.tokens, 1)
    for layer, load in enumerate(cost.load):
        even = load.sum() / speed.sum()
        busy = float((load / speed).max() / even) if even else 1.0
        crossed = ["", ""]
        if layer:
            pairs = max(int(cost.transitions[layer - 1]), 1)
            crossed = [f"{cost.cross_gpu[layer - 1] / pairs:.1%}", f"{cost.cross_node[layer - 1] / pairs:.1%}"]
        times = "".join(f"{1e6 * s:10.0f}" for s in seconds[layer])
        gpus, nodes = cost.rows[layer].sum() / tokens, cost.node_rows[layer].sum() / tokens
        yield f"  {layer:5d}  {busy:5.2f}  {gpus:5.2f}  {nodes:5.2f}  {crossed[0]:>10}  {crossed[1]:>10} {times}"


def _gpus(cost: Cost, placement: Placement) -> Iterator[str]:
    share = cost.load.sum(0) / max(int(cost.load.sum()), 1)
    busiest = np.bincount((cost.load / cost.topology.speed_of_gpu).argmax(1), minlength=len(share))
    yield "GPUs: share of all choices, slots, in how many layers it is the busiest:"
    for gpu, part in enumerate(share):
        node = cost.topology.node_of_gpu[gpu]
        yield f"  GPU {gpu} (node {node})  {part:6.2%}   {placement.slots_of_gpu[gpu]} slots   {busiest[gpu]} layers"


def _replicas(placement: Placement) -> Iterator[str]:
    extra = placement.replicas - 1
    if not extra.any():
        return
    yield "Replicas, layer by layer: expert x copies:"
    for layer, more in enumerate(extra):
        named = ", ".join(
            f"{expert} x {more[expert] + 1}" for expert in np.flatnonzero(more)[np.argsort(-more[more > 0])]
        )
        yield f"  {layer:5d}  {named}"
