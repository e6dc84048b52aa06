"""What any multipliers prove about the placements of a chain of layers: the one place where a bound is certified.

A placement gives each expert of each layer one of G parts with C experts per layer. "Same part" is a matrix of zeros
and ones on all experts; its piece on two consecutive layers, [2E, 2E], is one matrix of the set

    Q = { J / G + Y :  Y symmetric, Y 1_layer = 0 for both layers, eigenvalues in 0 .. 2C, trace Y = 2C (G - 1) }

and its entries z, shared by the pieces, lie in 0 .. 1, are 1 on the diagonal and fulfil the triangle inequalities. So
for all multipliers S_p [2E, 2E] and prices t >= 0 the local weight, max of sum <W, z>, is at most

    sum_p max { <S_p, Q> }  +  max over 0 <= z <= 1 of { <W - sum S_p - cuts' prices, z> }  +  sum t * right-hand side

(an entry that is known, with its value) and both maxima are closed forms: the first is the sum of the G - 1 largest
eigenvalues of S_p, centred, times 2C. Nothing else is asked of the multipliers: a solver may stop anywhere, and be
wrong, and the bound holds.

Source: chordal decomposition after Zheng, Fantuzzi & Papachristodoulou (2021); the set Q after Graham, Hu, Im, Li &
Wolkowicz, "A restricted dual Peaceman-Rachford splitting method" (2022).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .triangles import Cuts

EPS = float(np.finfo(np.float64).eps)
NOTHING_FIXED = np.zeros(0, np.int64)


def crossing(
    weights: NDArray[np.float64],
    capacity: int,
    parts: int,
    multipliers: NDArray[np.float64],
    cuts: Cuts | None = None,
    fixed: NDArray[np.int64] = NOTHING_FIXED,
) -> NDArray[np.float64]:
    """float64 [P]: numbers whose sum no placement's crossing weight is below; single ones prove nothing.

    weights [P, E, E], not negative, between layers p and p + 1, E = capacity * parts; multipliers [P, 2E, 2E], any
    numbers: the symmetric part counts, negative prices count as none. fixed [A]: the parts of the last A experts of
    every layer, which are known. A margin for every rounding is taken off.
    """
    pairs, experts, _ = weights.shape
    inside = np.zeros((pairs + 1, experts, experts))
    between = weights.copy()
    local, mass = np.zeros(pairs), weights.sum((1, 2))
    for p in range(pairs):
        s = (multipliers[p] + multipliers[p].T) / 2
        local[p], norm = spectral_maximum(s, capacity, parts)
        mass[p] += np.abs(s).sum() + 2 * capacity * parts * norm
        inside[p] -= 2 * s[:experts, :experts]
        inside[p + 1] -= 2 * s[experts:, experts:]
        between[p] -= 2 * s[:experts, experts:]
    right = 0.0
    if cuts is not None and len(cuts):
        flat, prices = np.concatenate([inside.ravel(), between.ravel()]), np.maximum(cuts.price, 0)
        right = type(cuts)(cuts.key, cuts.entry, prices).subtract(flat, np.ones_like(flat))
        mass[0] += 4 * prices.sum()
        inside, between = (part.reshape(-1, experts, experts) for part in np.split(flat, [inside.size]))
    of_layer = np.einsum("lii->l", inside) / 2 + _most(np.triu(inside, 1), fixed)
    local += _most(between, fixed)
    local += np.r_[of_layer[0], of_layer[1:-1] / 2] + np.r_[of_layer[1:-1] / 2, of_layer[-1]]  # halves between pairs
    local[0] += right
    # an entry stands in at most 8 * 2E cuts: no sum above has a longer chain of roundings than the factor here
    margin = (16 * experts + 64) * EPS * mass
    found = weights.sum((1, 2)) - local - margin
    return found if np.isfinite(found).all() else np.full(pairs, -np.inf)


def _most(gain: NDArray[np.float64], fixed: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of each block of gain [.., E, E]: the most that entries of 0 .. 1 can make of it, fixed ones as they are."""
    known = gain.shape[-1] - len(fixed)
    best = np.maximum(gain, 0)
    best[:, known:, known:] = gain[:, known:, known:] * (fixed[:, None] == fixed)
    return best.sum((1, 2))


def spectral_maximum(s: NDArray[np.float64], capacity: int, parts: int) -> tuple[float, float]:
    """(max of <s, q> over Q, the norm of what was decomposed, which the error of eigenvalues is relative to)."""
    centred, norm = centre(s)
    if not np.isfinite(norm):
        return float("inf"), 0.0
    values = np.linalg.eigvalsh(centred)
    return float(2 * capacity * values[len(values) - (parts - 1) :].sum() + s.sum() / parts), norm


def centre(s: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """s [2E, 2E] with both layers' all-one vectors made eigenvectors below all others; and a bound on its norm."""
    experts = len(s) // 2
    blocks = s.reshape(2, experts, 2, experts)
    blocks = blocks - blocks.mean(1, keepdims=True)
    blocks -= blocks.mean(3, keepdims=True)
    norm = float(np.sqrt(np.vdot(blocks, blocks))) + 1e-300
    blocks[0, :, 0] -= norm / experts
    blocks[1, :, 1] -= norm / experts
    return blocks.reshape(s.shape), 3 * norm
