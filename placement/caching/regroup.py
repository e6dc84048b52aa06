"""Which requests to run together: batches that touch few experts, from the paths that requests are expected to take.

A batch touches an expert of a layer unless all its requests pass by it: with chances p_i, 1 - prod_i (1 - p_i) of the
time. What is counted is the sum of that over layers, experts and batches (after He et al., ExpertFlow, 2024). Batches
are filled one after the other, by the request that adds least; then requests of two batches change places as long as
that helps. For i of batch a to change with j of batch b, with u the chance that everybody else passes by,

    gain = M[i, i] + M[j, j] - M[i, j] - M[j, i],    M[i, j] = sum of u_(a without i) * p_j

so one product of matrices judges all exchanges. Places that stay free are requests of nobody: to move is to exchange.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

_SMALL = 1e-9  # less of a gain is rounding


@dataclass(frozen=True)
class Regrouping:
    """`batches`: the numbers of the requests in each, int64, rising; `touched`: distinct experts, all layers, expected
    over all batches. No grouping into batches of that size touches fewer than `bound`."""

    batches: tuple[NDArray[np.int64], ...]
    touched: float
    bound: float

    @property
    def order(self) -> NDArray[np.int64]:
        """The requests, batch after batch."""
        return np.concatenate([*self.batches, np.empty(0, np.int64)]).astype(np.int64)


def regroup(paths: ArrayLike, batch: int, *, exchanges: int = 10_000) -> Regrouping:
    """Batches of at most `batch` requests, as few as possible, that touch few experts.

    paths      [N, L, E]: the experts that each request uses, bool, or how likely it uses each, in 0 .. 1
    exchanges  at most so many, the best one first

    Deterministic. Never more touched than by the order of arrival. Cost: N^2 * L * E multiplications, and batch * N * L
    * E for each exchange. Raises ValueError / TypeError naming argument, rule and value.

    >>> paths = np.eye(3, dtype=bool)[[0, 1, 0, 1]][:, None]  # requests 0 and 2 use one expert, 1 and 3 another
    >>> regroup(paths, 2).batches
    (array([0, 2]), array([1, 3]))
    """
    p = _checked(paths, batch, exchanges)
    n = len(p)
    if not n:
        return Regrouping((), 0.0, 0.0)
    count = -(-n // batch)
    p = np.concatenate([p, np.zeros((count * batch - n, p.shape[1]))])
    best, least = None, np.inf
    for start in (_filled(p, n, batch), np.arange(len(p)).reshape(count, batch)):
        members = _exchanged(p, start.copy(), exchanges)
        total = _total(p, members)
        if total < least - _SMALL:
            best, least = members, total
    assert best is not None
    batches = (np.sort(row[row < n]).astype(np.int64) for row in best)
    return Regrouping(tuple(sorted((b for b in batches if len(b)), key=lambda b: int(b[0]))), least, _bound(p, batch))


def touched(paths: ArrayLike, batches: list[NDArray[np.int64]] | tuple[NDArray[np.int64], ...]) -> float:
    """Distinct experts of all layers, expected over all batches."""
    p = np.asarray(paths, np.float64).reshape(len(paths), -1)  # type: ignore[arg-type]
    return float(sum((1 - np.prod(1 - p[b], axis=0)).sum() for b in batches))


def _checked(paths: ArrayLike, batch: int, exchanges: int) -> NDArray[np.float64]:
    given = np.asarray(paths)
    if given.dtype.kind not in "bf":
        raise TypeError(f"regroup: paths must be bool or floating point, got {given.dtype}")
    if given.ndim != 3:
        raise ValueError(f"regroup: paths must be [N, L, E], got shape {given.shape}")
    if given.size and not (given.min() >= 0 and given.max() <= 1):  # NaN is neither
        raise ValueError(f"regroup: paths must be in 0 .. 1, got {given.min()} .. {given.max()}")
    if batch < 1:
        raise ValueError(f"regroup: batch must be at least 1, got {batch}")
    if exchanges < 0:
        raise ValueError(f"regroup: exchanges must not be negative, got {exchanges}")
    return given.reshape(len(given), given.shape[1] * given.shape[2]).astype(np.float64)


def _total(p: NDArray[np.float64], members: NDArray[np.int64]) -> float:
    return float(sum((1 - np.prod(1 - p[row], axis=0)).sum() for row in members))


def _filled(p: NDArray[np.float64], n: int, batch: int) -> NDArray[np.int64]:
    """[B, batch]: each batch begins with the request that uses most, and takes whoever adds least, of equals the one
    that uses most; places that stay free are in the last."""
    left, size = np.ones(n, bool), p[:n].sum(1)
    order = np.empty(len(p), np.int64)
    order[n:] = np.arange(n, len(p))
    for place in range(n):
        if place % batch == 0:
            passed_by, added = np.ones(p.shape[1]), -size
        else:
            added = np.round(p[:n] @ passed_by, 9) - 1e-12 * size
        order[place] = np.argmin(np.where(left, added, np.inf))
        left[order[place]] = False
        passed_by = passed_by * (1 - p[order[place]])
    return order.reshape(-1, batch)


def _exchanged(p: NDArray[np.float64], members: NDArray[np.int64], exchanges: int) -> NDArray[np.int64]:
    """[B, batch], changed: the exchange that gains most, again and again until none gains."""
    at = np.empty(len(p), np.int64)  # the batch of each request
    at[members.ravel()] = np.repeat(np.arange(len(members)), members.shape[1])
    matrix = np.empty((len(p), len(p)))
    for row in members:
        matrix[row] = _without_each(p[row]) @ p.T
    for _ in range(exchanges):
        own = np.diagonal(matrix)
        gain = own[:, None] + own[None, :] - matrix - matrix.T
        gain[at[:, None] == at[None, :]] = 0.0
        i, j = divmod(int(np.argmax(gain)), len(p))
        if gain[i, j] <= _SMALL:
            break
        a, b = at[i], at[j]
        members[a, members[a] == i], members[b, members[b] == j] = j, i
        at[i], at[j] = b, a
        for row in (members[a], members[b]):
            matrix[row] = _without_each(p[row]) @ p.T
    return members


def _without_each(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of p [B, X]: the chances [B, X] that all rows but this one pass by, without a division (1 - p may be 0)."""
    ahead, behind = np.ones_like(p), np.ones_like(p)
    np.cumprod(1 - p[:-1], axis=0, out=ahead[1:])
    behind[:-1] = np.cumprod(1 - p[:0:-1], axis=0)[::-1]
    return ahead * behind


def _bound(p: NDArray[np.float64], batch: int) -> float:
    """Each expert by itself is touched least where those who use it most are together: with s_b the sums of log(1 - p)
    over batches, sum_b exp(s_b) is convex, and sums of sorted runs majorise all others."""
    by_expert = -np.sort(-p, axis=0)
    runs = (1 - by_expert).reshape(len(p) // batch, batch, p.shape[1])
    return float((1 - np.prod(runs, axis=1)).sum())
