"""Placements that look at no load: what frameworks start with, and chance."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..slots import checked_slots


def linear(layers: int, experts: int, slots_of_gpu: ArrayLike) -> NDArray[np.int64]:
    """int64 [L, S], every layer alike: experts in order, as many on each GPU as its share of the slots.

    Each spare slot takes the next expert, round robin, that its GPU does not hold. Raises ValueError where the slots do
    not hold every expert, or a GPU has more slots than there are experts.

    >>> linear(1, 4, [3, 3])
    array([[0, 1, 2, 2, 3, 0]])
    """
    slots = checked_slots("linear", slots_of_gpu, experts)
    return np.tile(_fill(np.arange(experts), slots), (layers, 1))


def random(layers: int, experts: int, slots_of_gpu: ArrayLike, seed: int = 0) -> NDArray[np.int64]:
    """int64 [L, S]: as `linear`, with the experts of each layer in an order drawn from `seed`. Raises the same."""
    slots = checked_slots("random", slots_of_gpu, experts)
    rng = np.random.default_rng(seed)
    plan = np.empty((layers, int(slots.sum())), np.int64)
    for layer in range(layers):
        plan[layer] = _fill(rng.permutation(experts), slots)
    return plan


def _fill(order: NDArray[np.int64], slots: NDArray[np.int64]) -> NDArray[np.int64]:
    """[S]: the experts in this order over the GPUs, in proportion to their slots, then the spare slots."""
    bounds = np.cumsum(slots) * len(order) // slots.sum()  # the last is E, and no GPU gets more than its slots
    held = [part.tolist() for part in np.split(order, bounds[:-1])]
    turn = 0
    for mine, room in zip(held, slots, strict=True):
        while len(mine) < room:
            if order[turn % len(order)] not in mine:
                mine.append(order[turn % len(order)])
            turn += 1
    return np.array([expert for mine in held for expert in mine], np.int64)
