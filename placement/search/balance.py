"""Replicas and their GPUs so that the busiest GPU has as little to do as can be: load alone, no traffic.

In each layer, max over GPUs of (sum of load / replicas) / speed is made small: replicas to the experts with most load
per replica, the heaviest to the GPU that would finish it first, or EPLB's plan where that is better; then a search with
random kicks (`balance_search.py`), which also changes who is replicated. No expert is twice on one GPU.

At the same slots it is never worse than EPLB's plan where that, too, keeps replicas apart. Where EPLB has two on one
GPU, which splits an expert's tokens unevenly, the search starts from its plan with the two parted, and goes on longer
while EPLB's figure is not reached; in some small cases no plan with replicas apart can reach it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..slots import Pin, checked_load, checked_nodes, checked_pins, checked_slots, checked_speed, gpu_load, gpu_of_slot
from .balance_search import search
from .eplb import eplb
from .groups import homes

KICKS = 100
SLOTS = 64  # layers with fewer are searched longer: their descents are short, and end far apart
ENOUGH = 1e-4  # a layer this near, relative, to a perfect spread is left alone


def balance(
    load: ArrayLike,
    slots_of_gpu: ArrayLike,
    nodes: int = 1,
    groups: int | None = None,
    speed: ArrayLike | None = None,
    pins: Sequence[Pin] | None = None,
    seed: int = 0,
    kicks: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> NDArray[np.int64]:
    """int64 [L, S]: the expert of each slot, GPUs in order, ids rising inside a GPU, from load [L, E].

    slots_of_gpu   [G], uneven if need be, none above E
    nodes, groups  groups of E / groups consecutive experts stay whole, groups / nodes of them on each node; GPUs stand
                   node by node. None: any expert anywhere, and `nodes` does not matter
    speed          [G] or None: rows per second of each GPU, in any unit
    pins           triples (layer, expert, gpu): a replica that must be there
    seed           of the kicks; the same seed gives the same plan
    kicks          random disturbances of each layer, a descent after each; 0: the first descent alone; None: 100, or
                   6400 / S where that is more
    stop           asked before each layer: once true, the layers left get the heaviest first, and no search

    Raises ValueError where the slots do not hold every expert, groups do not fit nodes, or pins do not fit either.
    """
    weight = checked_load("balance", load)
    layers, experts = weight.shape
    slots = checked_slots("balance", slots_of_gpu, experts)
    fast = checked_speed("balance", speed, len(slots))
    pinned = checked_pins("balance", pins, layers, experts, slots)
    checked_nodes("balance", nodes, len(slots))
    if groups is None:
        nodes = groups = 1
    if groups < 1 or experts % groups or groups % nodes:
        rule = f"a multiple of nodes={nodes} that divides the {experts} experts"
        raise ValueError(f"balance: groups must be {rule}, got {groups}")
    if kicks is not None and kicks < 0:
        raise ValueError(f"balance: kicks must be 0 or more, got {kicks}")
    if kicks is None:
        kicks = KICKS * max(SLOTS, int(slots.sum())) // int(slots.sum())
    known = eplb(weight, slots, nodes, groups) if (slots == slots[0]).all() else None
    seeds = np.random.default_rng(seed).integers(2**31, size=(layers,))
    plan = np.empty((layers, int(slots.sum())), np.int64)
    for n in range(layers):
        kicks = -1 if stop() else kicks
        theirs = None if known is None else known[n]
        ways = _ways(weight[n], theirs, groups, nodes, slots, fast, pinned[n])
        found = [_layer(weight[n], home, slots, fast, pinned[n], theirs, kicks, int(seeds[n])) for home in ways]
        plan[n] = min(found, key=lambda each: each[0])[1]
    return plan


def _ways(
    load: NDArray[np.float64],
    known: NDArray[np.int64] | None,
    groups: int,
    nodes: int,
    slots: NDArray[np.int64],
    speed: NDArray[np.float64],
    pinned: NDArray[np.bool_],
) -> list[NDArray[np.int64]]:
    """The node of each expert, int64 [E], in the ways worth a search; ValueError where a node cannot hold them."""
    each, node_of_slot = len(load) // groups, gpu_of_slot(slots) // (len(slots) // nodes)
    theirs = None
    if known is not None:
        theirs = np.empty(groups, np.int64)
        theirs[known // each] = node_of_slot
    ways = [np.repeat(way, each) for way in homes(load, groups, speed.reshape(nodes, -1).sum(1), pinned, theirs)]
    experts = len(load) // nodes
    for node, here in enumerate(slots.reshape(nodes, -1)):
        if here.sum() < experts or here.max() > experts:
            rule = f"at least the {experts} experts of a node on it and at most so many on a GPU"
            raise ValueError(f"balance: slots_of_gpu must be {rule}, got {here.tolist()} on node {node}")
        on = pinned.reshape(len(load), nodes, -1)[:, node]
        for way in ways:
            homeless = (~on[way == node].any(1)).sum()
            if homeless > here.sum() - on.sum():
                got = f"{here.sum() - on.sum()} free slots on node {node} for {homeless} experts"
                raise ValueError(f"balance: pins must leave a slot for every other expert, got {got}")
    return ways


def _layer(
    load: NDArray[np.float64],
    home: NDArray[np.int64],
    slots: NDArray[np.int64],
    speed: NDArray[np.float64],
    pinned: NDArray[np.bool_],
    known: NDArray[np.int64] | None,
    kicks: int,
    seed: int,
) -> tuple[float, NDArray[np.int64]]:
    """(largest time, plan [S]) of one layer whose expert e must be on node home[e]: node by node.

    `known`: a plan [S] to be not worse than, on the nodes that have the same experts there.
    """
    owner, nodes = gpu_of_slot(slots), int(home.max()) + 1
    plan, worst = np.empty(len(owner), np.int64), 0.0
    beat = np.inf if known is None else (gpu_load(load[None], known[None], owner, len(slots)) / speed).max()
    for node, gpus in enumerate(np.split(np.arange(len(slots)), nodes)):
        experts, here = np.flatnonzero(home == node), np.isin(owner, gpus)
        first = np.concatenate([[0], np.cumsum(slots[gpus])])
        must, start = pinned[np.ix_(experts, gpus)], np.empty(0, np.int64)
        if known is not None and not must.any() and np.array_equal(np.unique(known[here]), experts):
            start = np.searchsorted(experts, known[here])
        goal = load[experts].sum() / speed[gpus][slots[gpus] > 0].sum() * (1 + ENOUGH)
        held, time = search(load[experts], first, speed[gpus], must, start, beat, goal, kicks, seed)
        plan[here] = experts[np.concatenate([np.sort(part) for part in np.split(held, first[1:-1])])]
        worst = max(worst, time)
    return worst, plan
