"""How even the load can be at all, whatever goes where."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._checks import positive_whole, real

MARGIN = 1 - 1e-12  # for the roundings of sums of up to some thousand loads and one division


def load_bound(
    load: ArrayLike,
    slots_of_gpu: ArrayLike,
    speed: ArrayLike | None = None,
    *,
    stop: Callable[[], bool] = lambda: False,
) -> float:
    """A lower bound on the mean over layers of (time of the busiest GPU) / (time if all shared the load by speed).

    load [L, E], not negative; slots_of_gpu [G], at least 1 each; speed [G], positive, relative, 1 unless given. Where
    slots are as many as experts each expert has one; where there are more, an expert's load may be divided among its
    replicas at will, on distinct GPUs. A layer without load counts 1. At least 1 by definition, within a rounding.

    Per layer the largest of: 1; for each j, some GPU must hold as many of the j heaviest experts as make it slow (no
    replicas); the time at which the slots suffice to divide every expert (replicas). Cost: L E^2 log E. Once `stop` is
    true, j is 1 in the layers that are left.

    Raises ValueError where shapes do not fit, slots are fewer than experts, or a number is out of range.

    >>> load_bound([[9, 1, 1, 1]], [2, 2])      # the heaviest has a companion: 10 of 12, where 6 would be even
    1.66...
    >>> load_bound([[9, 1, 1, 1]], [3, 3])      # two more slots: it is halved
    1.0
    """
    loads = real("load_bound", "load", load, 2, 0.0)
    slots = positive_whole("load_bound", "slots_of_gpu", slots_of_gpu)
    speeds = np.ones(len(slots)) if speed is None else real("load_bound", "speed", speed, 1, 0.0)
    if not (len(speeds) == len(slots) and (speeds > 0).all()):
        raise ValueError(f"load_bound: speed must be positive, one for each of {len(slots)} GPUs, got {speeds}")
    experts = loads.shape[1]
    if slots.sum() < experts:
        raise ValueError(f"load_bound: slots_of_gpu must sum to at least E={experts}, got {slots.sum()}")
    ratios = []
    for row in np.sort(loads, axis=1)[:, ::-1]:
        even = row.sum() / speeds.sum()
        time = _packed(row, slots, speeds, stop) if slots.sum() == experts else _divided(row, int(slots.sum()), speeds)
        ratios.append(max(1.0, time / even * MARGIN) if even > 0 else 1.0)
    return float(np.mean(ratios)) if ratios else 1.0


def _packed(
    load: NDArray[np.float64], slots: NDArray[np.int64], speeds: NDArray[np.float64], stop: Callable[[], bool]
) -> float:
    """One slot for each expert, load [E] falling. A GPU that holds k of the j heaviest holds at least the k lightest
    of them, and fills up with the lightest of all: its time is at least t(j, k). All j fit into a time only if it
    reaches the j-th smallest of all GPUs' t(j, 1), t(j, 2), ..."""
    experts, worst = len(load), 0.0
    below = np.r_[0, np.cumsum(load)]
    kinds, many = np.unique(np.c_[slots, speeds], axis=0, return_counts=True)
    for j in range(1, 2 if stop() else experts + 1):
        times = []
        for (room, pace), count in zip(kinds, many, strict=True):
            room = int(room)
            held = np.arange(1, min(room, j) + 1)
            least = below[j] - below[j - held] + below[experts] - below[experts - room + held]
            times.append(np.tile(least / pace, count))
        pool = np.concatenate(times)
        worst = max(worst, float(np.partition(pool, j - 1)[j - 1]))
    return worst


def _divided(load: NDArray[np.float64], slots: int, speeds: NDArray[np.float64]) -> float:
    """Each expert in as many slots as it likes, one per GPU. Within a time t an expert of load p needs r replicas if
    the r fastest GPUs reach p in it and r - 1 do not: the slots beyond one each are those (p, r) that do not."""
    fastest = np.cumsum(np.sort(speeds)[::-1])
    short = (load[:, None] / fastest[None, :-1]).ravel()
    spare = slots - len(load)
    return float(np.sort(short)[::-1][spare]) if spare < len(short) else 0.0
