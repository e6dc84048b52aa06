"""Where a placement's cost is: layer by layer, GPU by GPU, and what its bound says."""

from __future__ import annotations

import numpy as np

from ...bench.screen import Screen
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


def show(placement: Placement, trace: Trace, screen: Screen, workload: Workload | None = None) -> None:
    """The bound, the layers, the GPUs, the replicas."""
    cost = walk(trace, placement)
    screen.say()
    _bound(placement, screen)
    _layers(cost, workload, screen)
    _gpus(cost, placement, screen)
    _replicas(placement, screen)


def _bound(placement: Placement, screen: Screen) -> None:
    bound, cost = placement.bound, placement.cost
    if not bound:
        screen.say("No bound was asked for.")
        return
    screen.say("What no placement can be below, and how far this one may be from the best:")
    rows = [("", "this one", "bound", "gap")]
    for name, words in NAMES.items():
        if bound.get(name) is None:
            continue
        reached = cost["score"] if name == "score" else bound["reached"][name]
        gap = (reached - bound[name]) / reached if reached else 0.0
        rows.append((words, f"{reached:.4f}", f"{bound[name]:.4f}", f"{max(gap, 0.0):.1%}"))
    screen.table(rows)
    if bound.get("proved"):
        screen.say("  This placement is proved to be the best.")


def _layers(cost: Cost, workload: Workload | None, screen: Screen) -> None:
    seconds = cost.layer_seconds(workload)
    speed = cost.topology.speed_of_gpu
    screen.say(
        "Layers: busiest GPU / mean; rows sent to a GPU and to a node, per token; transitions from the layer before;"
    )
    screen.say("predicted microseconds of dispatch, experts, combine (a model, not a measurement):")
    head = ("layer", "load", "GPUs", "nodes", "cross GPU", "cross node", "dispatch", "experts", "combine")
    rows: list[tuple[str, ...]] = [head]
    tokens = max(cost.tokens, 1)
    for layer, load in enumerate(cost.load):
        even = load.sum() / speed.sum()
        busy = float((load / speed).max() / even) if even else 1.0
        crossed = ["", ""]
        if layer:
            pairs = max(int(cost.transitions[layer - 1]), 1)
            crossed = [f"{cost.cross_gpu[layer - 1] / pairs:.1%}", f"{cost.cross_node[layer - 1] / pairs:.1%}"]
        gpus, nodes = cost.rows[layer].sum() / tokens, cost.node_rows[layer].sum() / tokens
        times = (f"{1e6 * s:.0f}" for s in seconds[layer])
        rows.append((str(layer), f"{busy:.2f}", f"{gpus:.2f}", f"{nodes:.2f}", *crossed, *times))
    screen.table(rows)


def _gpus(cost: Cost, placement: Placement, screen: Screen) -> None:
    share = cost.load.sum(0) / max(int(cost.load.sum()), 1)
    busiest = np.bincount((cost.load / cost.topology.speed_of_gpu).argmax(1), minlength=len(share))
    screen.say("GPUs: share of all choices, slots, in how many layers it is the busiest:")
    rows = [("", "node", "share", "slots", "busiest in")]
    for gpu, part in enumerate(share):
        node, slots = cost.topology.node_of_gpu[gpu], placement.slots_of_gpu[gpu]
        rows.append((f"GPU {gpu}", str(node), f"{part:.2%}", str(slots), f"{busiest[gpu]} layers"))
    screen.table(rows)


def _replicas(placement: Placement, screen: Screen) -> None:
    extra = placement.replicas - 1
    if not extra.any():
        return
    screen.say("Replicas, layer by layer: expert x copies:")
    for layer, more in enumerate(extra):
        named = ", ".join(
            f"{expert} x {more[expert] + 1}" for expert in np.flatnonzero(more)[np.argsort(-more[more > 0])]
        )
        screen.say(f"  {layer:5d}  {named}")
