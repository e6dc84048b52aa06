"""Slots in pools: which of them an expert may stand in."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SCOPES = ("layer", "shared")  # of slots: see per_layer and shared


class Pools(NamedTuple):
    """Slots in pools: an expert may stand in those of its pool. See `per_layer` and `shared`."""

    of: NDArray[np.int32]  # [L, E] the pool of each expert
    first: NDArray[np.int32]  # [P + 1] where each pool's slots begin, and the number of slots

    @property
    def slots(self) -> int:
        return int(self.first[-1])


def pools(of: NDArray[np.integer], slots: NDArray[np.integer]) -> Pools:
    """Pools `of` [L, E] with `slots` [P] slots each. Raises ValueError where the two do not fit together."""
    pool, slots = np.ascontiguousarray(of, np.int32), np.asarray(slots)
    if pool.ndim != 2 or not pool.size:
        raise ValueError(f"pools: of must be [L, E] and not empty, got {pool.shape}")
    if slots.ndim != 1 or (slots < 1).any():
        raise ValueError(f"pools: slots must be [P] and at least 1 each, got {slots.tolist()}")
    if pool.min() < 0 or pool.max() >= len(slots):
        raise ValueError(f"pools: of must be 0 .. {len(slots) - 1}, got {pool.min()} .. {pool.max()}")
    return Pools(pool, np.concatenate([[0], np.cumsum(slots)]).astype(np.int32))


def per_layer(layers: int, experts: int, slots: int) -> Pools:
    """As many slots for each layer."""
    of = np.repeat(np.arange(layers), experts).reshape(layers, experts)
    return pools(of, np.full(layers, slots))


def shared(layers: int, experts: int, slots: int) -> Pools:
    """One pool of `slots` for all layers."""
    return pools(np.zeros((layers, experts), np.int32), np.array([slots]))
