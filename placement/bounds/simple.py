"""Bounds that need no solver: by the experts' best partners, and by singular values."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .dual import EPS

SWEEPS, ENOUGH = 30, 1e-4  # no more than so many, and none after one that gains less than this share


def matching(weights: NDArray[np.float64], slots: NDArray[np.int64]) -> NDArray[np.float64]:
    """float64 [P]: no placement's crossing weight of weights [P, E, E] is below these, pair by pair.

    An expert on part g has at most slots[g] partners there in the next layer, so that local weight is that of a
    graph whose degrees are bounded: a transportation problem, bounded by its dual. slots [G] may sum to more than E:
    then an expert may stand on several parts, at most one slot each, and a transition is local where any part has
    both. Two sides of prices u, v are improved in turns, each to its best answer to the other, within 1e-3 of the
    optimum as a rule; what they prove does not depend on it.
    """
    pairs, experts, _ = weights.shape
    widest = int(min(slots.max(), experts))
    u = v = np.zeros((pairs, experts))
    best = _local(weights, u, v, slots)
    for sweep in range(SWEEPS):
        u = _answer(weights - v[:, None, :], widest)
        v = _answer((weights - u[:, :, None]).transpose(0, 2, 1), widest)
        before, best = best, np.minimum(best, _local(weights, u, v, slots))
        if sweep and best.sum() > before.sum() * (1 - ENOUGH):
            break
    if slots.sum() > experts:  # a price above which it is cheaper to have replicas
        for share in np.linspace(0, 0.9, 10):
            most = np.quantile(u, share, axis=1, keepdims=True), np.quantile(v, share, axis=1, keepdims=True)
            best = np.minimum(best, _local(weights, np.minimum(u, most[0]), np.minimum(v, most[1]), slots))
    total = weights.sum((1, 2))
    return np.maximum(total - best - (4 * experts + 64) * EPS * (total + 3 * best), 0)


def _answer(rest: NDArray[np.float64], degree: int) -> NDArray[np.float64]:
    """The price [P, E] at which `degree` of each row of rest [P, E, E] are worth it."""
    experts = rest.shape[-1]
    if degree >= experts:
        return np.zeros(rest.shape[:-1])
    cut = (experts - degree - 1, experts - degree)
    edge = np.partition(rest, cut, axis=-1)[..., cut]
    return np.maximum(edge.mean(-1), 0)


def _local(
    weights: NDArray[np.float64], u: NDArray[np.float64], v: NDArray[np.float64], slots: NDArray[np.int64]
) -> NDArray[np.float64]:
    """The dual's value [P]: what above the prices is taken, and the prices of all degrees."""
    above = np.maximum(weights - u[:, :, None] - v[:, None, :], 0).sum((1, 2))
    return above + _priced(u, slots) + _priced(v, slots)


def _priced(prices: NDArray[np.float64], slots: NDArray[np.int64]) -> NDArray[np.float64]:
    """The most that degrees cost at prices [P, E]: the widest parts to the dearest experts, and the replicas too."""
    experts = prices.shape[1]
    spare = int(slots.sum()) - experts
    dearest = np.sort(prices, axis=1)[:, ::-1]
    if spare:
        each = np.clip(spare - np.arange(experts) * (len(slots) - 1), 0, len(slots) - 1)
        dearest = np.repeat(dearest, 1 + each, axis=1)
    degree = np.repeat(np.sort(slots)[::-1], np.sort(slots)[::-1])[: dearest.shape[1]]
    return dearest @ np.minimum(degree, experts).astype(np.float64)


def spectral(weights: NDArray[np.float64], slots: NDArray[np.int64]) -> NDArray[np.float64]:
    """float64 [P]: as `matching`, without replicas, by singular values (Donath & Hoffman, 1973).

    Local weight is <W, X X'^T> of indicators whose columns are orthogonal with norms sqrt(slots): at most the sum of
    slots * singular values. Equal parts have the all-one vector in common, which is taken out first.
    """
    pairs, experts, _ = weights.shape
    total, parts = weights.sum((1, 2)), len(slots)
    widest = np.sort(slots)[::-1].astype(np.float64)
    rest, local = weights, np.zeros(pairs)
    if widest[0] == widest[-1]:
        rest = weights - weights.mean(1, keepdims=True)
        rest -= rest.mean(2, keepdims=True)
        local, widest = total / parts, widest[1:]
    values = np.linalg.svd(rest, compute_uv=False)[:, : len(widest)]
    local = local + values @ widest[: values.shape[1]]
    norm = np.sqrt((weights**2).sum((1, 2)))
    return np.maximum(total - local - (8 * experts + 64) * EPS * (total + slots.sum() * norm), 0)
