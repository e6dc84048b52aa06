"""DeepSeek's Expert Parallelism Load Balancer, as published: the method that others are compared with.

Source: the algorithm of github.com/deepseek-ai/EPLB, whose worked example tests/placement/search/test_eplb.py repeats.
It can put two replicas of an expert on one GPU; `balance.py` does not.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..slots import checked_load, checked_nodes, checked_slots, gpu_of_slot


def eplb(load: ArrayLike, slots_of_gpu: ArrayLike, nodes: int = 1, groups: int = 1) -> NDArray[np.int64]:
    """int64 [L, S]: the expert of each slot, GPUs in order, from load [L, E].

    Where `nodes` divides `groups`, the hierarchical policy: whole groups of E / groups consecutive experts go to nodes,
    and a node's replicas stay on it. Otherwise the global one, as if there were one node. Sums and quotients are
    float32, as in the original, and ties go to the lowest index.

    Raises ValueError where slots_of_gpu is uneven or too small, or the numbers do not divide each other.
    """
    weight = checked_load("eplb", load).astype(np.float32)
    layers, experts = weight.shape
    slots = checked_slots("eplb", slots_of_gpu, experts, distinct=False)
    gpus, each = len(slots), int(slots[0])
    checked_nodes("eplb", nodes, gpus)
    if (slots != each).any():
        raise ValueError(f"eplb: slots_of_gpu must be the same on every GPU, got {slots.tolist()}")
    if groups < 1 or experts % groups:
        raise ValueError(f"eplb: groups must divide the {experts} experts, got {groups}")
    if groups % nodes:
        nodes = groups = 1
    # 1. groups to nodes; `order` lists the experts node by node
    of_group = weight.reshape(layers, groups, -1).sum(-1, dtype=np.float32)
    node, rank = _pack(of_group, nodes)
    place = node * (groups // nodes) + rank
    members = np.arange(experts).reshape(groups, -1)
    order = members[np.argsort(place, axis=1)].reshape(layers * nodes, experts // nodes)
    # 2. replicas inside each node
    mine = np.take_along_axis(np.repeat(weight, nodes, axis=0), order, 1)
    expert, copies = _replicate(mine, gpus * each // nodes)
    # 3. replicas to the node's GPUs
    gpu, rank = _pack(np.take_along_axis(np.divide(mine, copies, dtype=np.float32), expert, 1), gpus // nodes)
    slot = np.argsort(gpu * each + rank, axis=1)
    return np.take_along_axis(order, np.take_along_axis(expert, slot, 1), 1).reshape(layers, -1)


def _pack(weight: NDArray[np.float32], packs: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """weight [X, n] -> pack and rank in it, int64 [X, n]: n / packs items each, the heaviest first to the lightest pack
    that has room."""
    rows, items = weight.shape
    room = items // packs
    if room == 1:
        return np.tile(np.arange(items), (rows, 1)), np.zeros((rows, items), np.int64)
    pack, rank = np.empty((rows, items), np.int64), np.empty((rows, items), np.int64)
    filled, carried = np.zeros((rows, packs), np.int64), np.zeros((rows, packs), np.float32)
    every = np.arange(rows)
    for item in np.argsort(-weight, axis=1, kind="stable").T:
        to = np.where(filled < room, carried, np.inf).argmin(1)
        pack[every, item], rank[every, item] = to, filled[every, to]
        carried[every, to] += weight[every, item]
        filled[every, to] += 1
    return pack, rank


def _replicate(weight: NDArray[np.float32], slots: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """weight [X, n] -> the item of each slot [X, slots] and the copies [X, n]: always one more of the item with most
    weight per copy."""
    rows, items = weight.shape
    item = np.tile(np.arange(slots), (rows, 1))
    copies, every = np.ones((rows, items), np.int64), np.arange(rows)
    for slot in range(items, slots):
        item[:, slot] = (weight / copies.astype(np.float32)).argmax(1)
        copies[every, item[:, slot]] += 1
    return item, copies


def apart(
    expert_of_slot: NDArray[np.integer], load: ArrayLike, slots_of_gpu: ArrayLike
) -> tuple[NDArray[np.int64], int]:
    """The plan [L, S] with no expert twice on one GPU, and how many slots hold another expert than EPLB says.

    A second copy changes places with the slot of another GPU that leaves the busier of the two least busy. Where no
    slot will do, as where EPLB wants more copies of an expert than there are GPUs, the copy gives way to the expert
    with most load per copy that its GPU does not hold: the GPU's load is then lower, or the same. Raises ValueError
    where a GPU has more slots than there are experts.
    """
    plan, weight = np.array(expert_of_slot, np.int64), np.asarray(load, np.float64)
    experts, owner, replaced = weight.shape[1], gpu_of_slot(slots_of_gpu), 0
    checked_slots("apart", slots_of_gpu, experts)
    for layer, row in enumerate(plan):
        while True:
            _, first = np.unique(owner * experts + row, return_index=True)
            double = np.setdiff1d(np.arange(len(row)), first)
            if not double.size:
                break
            slot = int(double[0])
            share = weight[layer] / np.maximum(np.bincount(row, minlength=experts), 1)
            time = np.bincount(owner, share[row], len(np.asarray(slots_of_gpu)))
            mine = owner == owner[slot]
            takes = np.isin(owner, owner[row == row[slot]], invert=True) & ~np.isin(row, row[mine])
            if takes.any():
                more = share[row[slot]] - share[row]
                worse = np.where(takes, np.maximum(time[owner] + more, time[owner[slot]] - more), np.inf)
                other = int(worse.argmin())
                row[slot], row[other] = row[other], row[slot]
            else:
                row[slot] = np.where(np.isin(np.arange(experts), row[mine]), -1.0, share).argmax()
                replaced += 1
    return plan, replaced
