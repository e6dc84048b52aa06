"""Who sends how many rows to which replica, once it is decided how many each slot takes: as near as can be."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def allot(
    counts: NDArray[np.integer],
    rows: NDArray[np.integer],
    expert_of_slot: NDArray[np.integer],
    gpu_of_slot: NDArray[np.integer],
    node_of_gpu: NDArray[np.integer],
) -> NDArray[np.int64]:
    """int64 [G, S]: rows from each GPU to each slot, from counts [G, E] of rows that each GPU has for each expert, and
    `rows` [S], which add up to the same for each expert.

    A GPU keeps what its own slot takes, then what slots of its node take, then the rest; at each stage GPUs and slots,
    both rising, are matched one after the other. No stage could place more rows than it does.
    """
    supply = counts[:, expert_of_slot].astype(np.int64)  # [G, S]: what is left of the expert of each slot
    quota = rows.astype(np.int64).copy()
    sent = np.zeros_like(supply)
    gpus = np.arange(len(counts))
    node_of_slot = node_of_gpu[gpu_of_slot]
    for reach in (gpus[:, None] == gpu_of_slot, node_of_gpu[:, None] == node_of_slot, np.ones_like(supply, bool)):
        moved = _matched(supply, quota, reach, expert_of_slot)
        sent += moved
        quota -= moved.sum(0)
        for g in gpus:
            gone = np.bincount(expert_of_slot, moved[g], counts.shape[1]).astype(np.int64)
            supply[g] -= gone[expert_of_slot]
    return sent


def _matched(
    supply: NDArray[np.int64], quota: NDArray[np.int64], reach: NDArray[np.bool_], expert_of_slot: NDArray[np.integer]
) -> NDArray[np.int64]:
    """[G, S]: for each expert, the GPUs' rows and the slots' quotas laid end to end within reach, where they overlap.

    `reach` [G, S] falls into blocks of GPUs that reach the same slots.
    """
    ends = np.where(reach, supply, 0).cumsum(0)
    starts = ends - supply
    same = (expert_of_slot[:, None] == expert_of_slot) & (reach.T.astype(np.int64) @ reach > 0)  # [S, S]
    until = (np.tril(same) * quota).sum(1)
    overlap = np.minimum(ends, until) - np.maximum(starts, until - quota)
    return np.where(reach, np.maximum(overlap, 0), 0)
