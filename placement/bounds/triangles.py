"""Triangle inequalities of "same part": who is with i and with j has i and j together, z_ij + z_ik - z_jk <= 1.

With two parts, two of any three items are together as well: z_ij + z_ik + z_jk >= 1. The items of clique p are the E
experts of layer p and then the E of layer p + 1. The variables z of all cliques lie in one flat array: L blocks
[E, E] inside the layers, of which the upper triangles count, then L - 1 blocks [E, E] between layers.

Source: the triangle cuts of Grötschel & Wakabayashi, "A cutting plane algorithm for a clustering problem" (1989).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

# which of z_ij, z_ik, z_jk has which sign, and the right-hand side: kind 0 .. 3
_SIGN = np.array([[1.0, 1.0, -1.0], [1.0, -1.0, 1.0], [-1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]])
_RIGHT = np.array([1.0, 1.0, 1.0, -1.0])


@dataclass(frozen=True)
class Cuts:
    """M inequalities, and the price of each.

    key    int64 [M], rising: clique, i, j, k and kind in one number
    entry  int64 [M, 3]: where z_ij, z_ik and z_jk lie
    price  float64 [M]: the multipliers, not negative
    """

    key: NDArray[np.int64]
    entry: NDArray[np.int64]
    price: NDArray[np.float64]

    @classmethod
    def none(cls) -> Cuts:
        return cls(np.zeros(0, np.int64), np.zeros((0, 3), np.int64), np.zeros(0))

    def __len__(self) -> int:
        return len(self.key)

    def priced(self) -> Cuts:
        """Those with a price."""
        keep = self.price > 0
        return Cuts(self.key[keep], self.entry[keep], self.price[keep])

    def joined(self, key: NDArray[np.int64], entry: NDArray[np.int64]) -> Cuts:
        """With others, free of charge, where they are not there yet."""
        new = ~np.isin(key, self.key)
        keys = np.concatenate([self.key, key[new]])
        order = np.argsort(keys, kind="stable")
        entries = np.concatenate([self.entry, entry[new]])
        return Cuts(keys[order], entries[order], np.concatenate([self.price, np.zeros(new.sum())])[order])

    def subtract(self, flat: NDArray[np.float64], scale: NDArray[np.float64]) -> float:
        """flat -= scale * (price * left-hand sides), in place; returns the sum of price * right-hand side."""
        return _subtract(flat, scale, self.key, self.entry, self.price)

    def project(self, flat: NDArray[np.float64], scale: NDArray[np.float64], passes: int) -> None:
        """Moves `flat`, in place, and the prices towards the nearest point, in the norm of 1 / scale, that clipped to
        0 .. 1 fulfils all: Hildreth's method, from the prices of the last call."""
        _project(flat, scale, self.key, self.entry, self.price, passes)


def violated(
    z: NDArray[np.float64], clique: int, cliques: int, parts: int, threshold: float, most: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(key [M], entry [M, 3]) of the at most `most` inequalities that z [2E, 2E] of a clique violates worst, by more
    than `threshold`. Those inside layer p + 1 are left to the next clique, if there is one."""
    room = 4 * most
    while True:  # a full room has not seen all: look for the worse ones only
        key, entry, by = np.empty(room, np.int64), np.empty((room, 3), np.int64), np.empty(room)
        found = _violated(z, clique, cliques, parts == 2, threshold, key, entry, by)
        if found < room:
            break
        threshold *= 1.5
    worst = np.argsort(-by[:found], kind="stable")[:most]
    return key[worst], entry[worst]


@njit(cache=True)
def _place(i, j, clique, cliques, experts):
    if j < experts:
        return (clique * experts + i) * experts + j
    if i >= experts:
        return ((clique + 1) * experts + i - experts) * experts + j - experts
    return ((cliques + 1 + clique) * experts + i) * experts + j - experts


@njit(cache=True)
def _violated(z, clique, cliques, two, threshold, key, entry, by):
    n, found = len(z), 0
    experts = n // 2
    end = n if clique == cliques - 1 else experts
    for i in range(end):
        for j in range(i + 1, n):
            ij = z[i, j]
            for k in range(j + 1, n):
                ik, jk = z[i, k], z[j, k]
                worst, kind = ij + ik - jk - 1.0, 0
                if ij + jk - ik - 1.0 > worst:
                    worst, kind = ij + jk - ik - 1.0, 1
                if ik + jk - ij - 1.0 > worst:
                    worst, kind = ik + jk - ij - 1.0, 2
                if two and 1.0 - ij - ik - jk > worst:
                    worst, kind = 1.0 - ij - ik - jk, 3
                if worst > threshold:
                    if found == len(key):
                        return found
                    key[found] = (((clique * n + i) * n + j) * n + k) * 4 + kind
                    entry[found, 0] = _place(i, j, clique, cliques, experts)
                    entry[found, 1] = _place(i, k, clique, cliques, experts)
                    entry[found, 2] = _place(j, k, clique, cliques, experts)
                    by[found] = worst
                    found += 1
    return found


@njit(cache=True)
def _subtract(flat, scale, key, entry, price):
    right = 0.0
    for c in range(len(key)):
        kind, p = key[c] & 3, price[c]
        right += p * _RIGHT[kind]
        for s in range(3):
            flat[entry[c, s]] -= p * _SIGN[kind, s] * scale[entry[c, s]]
    return right


@njit(cache=True)
def _project(flat, scale, key, entry, price, passes):
    for _ in range(passes):
        for c in range(len(key)):
            kind = key[c] & 3
            over, weight = -_RIGHT[kind], 0.0
            for s in range(3):
                over += _SIGN[kind, s] * min(max(flat[entry[c, s]], 0.0), 1.0)
                weight += scale[entry[c, s]]
            step = max(-price[c], over / weight)
            if step != 0.0:
                price[c] += step
                for s in range(3):
                    flat[entry[c, s]] -= step * _SIGN[kind, s] * scale[entry[c, s]]
