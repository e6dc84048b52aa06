"""Who sends how many rows to which replica, once it is decided how many each slot takes: as near as can be."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray


def allot(
    counts: NDArray[np.int64],
    rows: NDArray[np.int64],
    expert_of_slot: NDArray[np.int32],
    gpu_of_slot: NDArray[np.int32],
    node_of_gpu: NDArray[np.int32],
) -> NDArray[np.int64]:
    """int64 [G, S]: rows from each GPU to each slot, from counts [G, E] of rows that each GPU has for each expert, and
    `rows` [S], which add up to the same for each expert.

    A GPU keeps what its own slot takes, then what slots of its node take, then the rest; at each stage GPUs and slots,
    both rising, are matched one after the other. No stage could place more rows than it does.
    """
    sent = np.zeros((len(counts), len(rows)), np.int64)
    left, free = counts.copy(), rows.copy()
    order = np.argsort(expert_of_slot, kind="stable")
    first = np.searchsorted(expert_of_slot[order], np.arange(counts.shape[1] + 1))
    _match(left, free, order, first, gpu_of_slot, node_of_gpu, sent)
    return sent


@njit(cache=True)
def _match(left, free, order, first, gpu_of_slot, node_of_gpu, sent):
    """Fills sent [G, S]. left [G, E] and free [S]: rows that are still to go, and places for them."""
    for e in range(len(first) - 1):
        for stage in range(3):
            for i in range(first[e], first[e + 1]):
                slot = order[i]
                at = gpu_of_slot[slot]
                for g in range(len(left)):
                    if free[slot] == 0:
                        break
                    if (
                        left[g, e] == 0
                        or (stage == 0 and g != at)
                        or (stage == 1 and node_of_gpu[g] != node_of_gpu[at])
                    ):
                        continue
                    moved = min(left[g, e], free[slot])
                    sent[g, slot] += moved
                    left[g, e] -= moved
                    free[slot] -= moved
