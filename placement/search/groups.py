"""Whole groups of experts to nodes, as group-limited routers want them: DeepSeek-V3 takes a token to few groups."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def homes(
    load: NDArray[np.float64],
    groups: int,
    power: NDArray[np.float64],
    pinned: NDArray[np.bool_],
    known: NDArray[np.int64] | None,
) -> list[NDArray[np.int64]]:
    """Ways to give the groups of one layer to nodes, one or two of int64 [groups], groups / N of them to each node.

    First `known`, or without it the heaviest group to the node that would finish it first; then what swaps of groups
    make of that. load [E]; power [N]: the speed of each node; pinned bool [E, G]: a group with a pinned replica goes to
    its node. Raises ValueError where pins tear a group apart or crowd a node.
    """
    nodes, room, weight = len(power), groups // len(power), load.reshape(groups, -1).sum(1)
    forced = np.any(pinned.reshape(groups, len(load) // groups, nodes, -1), axis=(1, 3))
    torn = np.flatnonzero(forced.sum(1) > 1)
    if torn.size:
        raise ValueError(f"balance: pins must keep a group on one node, got group {torn[0]} on {forced[torn[0]].sum()}")
    if (forced.sum(0) > room).any():
        raise ValueError(f"balance: pins must put at most {room} groups on a node, got {forced.sum(0).max()}")
    stuck = forced.any(1)
    first = _heaviest_first(weight, forced, room, power) if known is None or stuck.any() else known
    better = _swapped(weight, first, power, stuck)
    return [first] if np.array_equal(first, better) else [first, better]


def _heaviest_first(
    weight: NDArray[np.float64], forced: NDArray[np.bool_], room: int, power: NDArray[np.float64]
) -> NDArray[np.int64]:
    home = np.where(forced.any(1), forced.argmax(1), -1)
    work, filled = weight @ forced, forced.sum(0)
    for group in np.argsort(-weight, kind="stable"):
        if home[group] < 0:
            node = np.where(filled < room, (work + weight[group]) / power, np.inf).argmin()
            home[group] = node
            work[node] += weight[group]
            filled[node] += 1
    return home


def _swapped(
    weight: NDArray[np.float64], home: NDArray[np.int64], power: NDArray[np.float64], stuck: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """`home` after the best swaps of a group of the busiest node with one of another, while they make it less busy."""
    home = home.copy()
    while True:
        work = np.bincount(home, weight, len(power))
        busiest = (work / power).argmax()
        mine = np.flatnonzero((home == busiest) & ~stuck)[:, None]
        theirs = np.flatnonzero((home != busiest) & ~stuck)[None, :]
        if not mine.size or not theirs.size:
            return home
        less = weight[mine] - weight[theirs]
        other = home[theirs]
        after = np.maximum((work[busiest] - less) / power[busiest], (work[other] + less) / power[other])
        a, b = np.unravel_index(after.argmin(), after.shape)
        if not after[a, b] < (work / power).max() * (1 - 1e-12):
            return home
        home[mine[a, 0]], home[theirs[0, b]] = home[theirs[0, b]], busiest
