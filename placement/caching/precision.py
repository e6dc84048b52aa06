"""Which expert is stored in how many bits: the least error in a number of bytes, or the fewest bytes under an error.

Each expert takes one of B choices: the multiple-choice knapsack. Where its table is small it is solved exactly, by
bytes (Dudzinski & Walukiewicz, 1987). Else by its linear relaxation: along the lower convex hull of each expert's
(bytes, error) the steps that pay most are taken while they fit, which bounds what any choice can reach; then single
changes and pairs of changes that still help are made. The gap between the two is reported.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

_TABLE = 30_000_000  # entries of the exact method's table, a byte each
_CHANGES = 200  # made to the relaxed choice at most


@dataclass(frozen=True)
class Precision:
    """`choice` int64 [X]; the `error` and `bytes` that it makes; `sought`, "error" or "bytes", is the one that was to
    be small, and `bound` what no choice can bring it below."""

    choice: NDArray[np.int64]
    error: float
    bytes: int
    sought: str
    bound: float

    @property
    def gap(self) -> float:
        """How far what was sought is above the bound, as a share of it; 0: proved to be the least."""
        value = self.error if self.sought == "error" else self.bytes
        return 0.0 if value <= self.bound else (value - self.bound) / self.bound if self.bound > 0 else np.inf


def assign(
    error: ArrayLike,
    bytes: ArrayLike,
    *,
    budget_bytes: int | None = None,
    error_budget: float | None = None,
    uses: ArrayLike | None = None,
) -> Precision:
    """The choice of each expert.

    error         [X, B]: what an expert's outputs are wrong by in each choice, 0 or more, in any unit that adds up
    bytes         integers [B], or [X, B] where experts differ in size
    budget_bytes  for all experts together: the least error is sought
    error_budget  for all experts together: the fewest bytes are sought. One of the two
    uses          [X], 0 or more: how often each expert is used, by which its error is multiplied; None: all once

    Deterministic. Cost: at most 30 MB and about a second, whatever X.
    Raises ValueError / TypeError naming argument, rule and value, also where no choice meets the budget.

    >>> assign([[0.0, 1.0], [0.0, 5.0], [0.0, 2.0]], [4, 1], budget_bytes=9).choice
    array([1, 0, 1])
    """
    costs, sizes = _checked(error, bytes, uses)
    if (budget_bytes is None) == (error_budget is None):
        raise ValueError(
            f"assign: one of budget_bytes and error_budget must be given, got {budget_bytes} and {error_budget}"
        )
    by_bytes = budget_bytes is not None
    given = float(budget_bytes if budget_bytes is not None else error_budget)  # type: ignore[arg-type]
    value, weight = (costs, sizes) if by_bytes else (sizes, costs)
    least = float(weight.min(1).sum())
    if not given >= least:  # a NaN too
        name, what = ("budget_bytes", "bytes") if by_bytes else ("error_budget", "error")
        raise ValueError(f"assign: {name} must be at least the least {what} there is, {least:g}, got {given:g}")
    choice = _by_table(costs, sizes, given, by_bytes)
    bound = np.inf  # what the exact choice reaches is its own bound
    if choice is None:
        choice, bound = _relaxed(value.astype(float), weight.astype(float), given)
    rows = np.arange(len(choice))
    total, size = float(costs[rows, choice].sum()), int(sizes[rows, choice].sum())
    return Precision(choice, total, size, "error" if by_bytes else "bytes", min(bound, total if by_bytes else size))


def _checked(error: ArrayLike, size: ArrayLike, uses: ArrayLike | None) -> tuple[NDArray, NDArray]:
    """Errors times uses, float64 [X, B], and sizes, int64 [X, B]."""
    costs, sizes = np.asarray(error, float), np.asarray(size)
    if costs.ndim != 2 or not costs.size:
        raise ValueError(f"assign: error must be [X, B], at least one of each, got {costs.shape}")
    if sizes.dtype.kind not in "iu":
        raise TypeError(f"assign: bytes must be integers, got {sizes.dtype}")
    if sizes.shape not in (costs.shape[1:], costs.shape):
        raise ValueError(f"assign: bytes must be [B] or [X, B] for error {costs.shape}, got {sizes.shape}")
    if sizes.min() < 0:
        raise ValueError(f"assign: bytes must be 0 or more, got {sizes.min()}")
    often = np.ones(len(costs)) if uses is None else np.asarray(uses, float)
    if often.shape != costs.shape[:1]:
        raise ValueError(f"assign: uses must be [X] for error {costs.shape}, got {often.shape}")
    for name, given in (("error", costs), ("uses", often)):
        if not (np.isfinite(given) & (given >= 0)).all():
            raise ValueError(f"assign: {name} must be finite and 0 or more, got {given.min()} to {given.max()}")
    return costs * often[:, None], np.broadcast_to(sizes, costs.shape).astype(np.int64)


def _by_table(costs: NDArray, sizes: NDArray, budget: float, by_bytes: bool) -> NDArray[np.int64] | None:
    """The best choice, by the least error for every number of bytes; None where the table would be too large."""
    base = sizes.min(1)
    extra = sizes - base[:, None]  # what is counted is what lies above the fewest bytes
    unit = max(1, int(np.gcd.reduce(extra, axis=None)))
    extra //= unit
    room = int(extra.max(1).sum())
    if by_bytes:
        room = min(room, int((int(budget) - base.sum()) // unit))
    if len(costs) * (room + 1) > _TABLE or costs.shape[1] > 255:
        return None
    best, taken = np.zeros(room + 1), np.zeros((len(costs), room + 1), np.uint8)
    for x in range(len(costs)):
        before, best = best, np.full(room + 1, np.inf)
        for b in range(costs.shape[1]):
            shift = int(extra[x, b])
            if shift > room:
                continue
            through = before[: room + 1 - shift] + costs[x, b]
            better = through < best[shift:]
            best[shift:][better] = through[better]
            taken[x, shift:][better] = b
    # best[u]: with at most u units above the fewest bytes, for the first row of all is zero everywhere
    at = room
    if not by_bytes:
        enough = np.flatnonzero(best <= budget * (1 + 1e-12))
        at = int(enough[0]) if enough.size else room
    choice = np.zeros(len(costs), np.int64)
    for x in reversed(range(len(costs))):
        choice[x] = taken[x, at]
        at -= int(extra[x, choice[x]])
    return choice


def _relaxed(value: NDArray, weight: NDArray, budget: float) -> tuple[NDArray[np.int64], float]:
    """(a choice of little value within the budget of weight, what the value cannot go below)."""
    rows = np.arange(len(value))
    lightest = weight == weight.min(1, keepdims=True)
    choice = np.where(lightest, value, np.inf).argmin(1)
    left, bound = budget - float(weight[rows, choice].sum()), float(value[rows, choice].sum())
    for gain, heavier, x, option in _steps(value, weight, choice):
        if heavier > left:
            bound -= gain * left / heavier
            break
        choice[x], left, bound = option, left - heavier, bound - gain
    return _improved(value, weight, choice, budget), bound


def _steps(value: NDArray, weight: NDArray, start: NDArray[np.int64]) -> list[tuple[float, float, int, int]]:
    """(value saved, weight added, expert, option) along the lower convex hull of each expert, those that pay most
    first."""
    steps = []
    for x, at in enumerate(start.tolist()):
        while True:
            saved, added = value[x, at] - value[x], weight[x] - weight[x, at]
            pays = np.where((saved > 0) & (added > 0), saved / np.where(added > 0, added, 1), 0.0)
            most = np.flatnonzero(pays == pays.max())
            to = int(most[added[most].argmax()])
            if pays[to] <= 0:
                break
            steps.append((float(saved[to]), float(added[to]), x, to))
            at = to
    return sorted(steps, key=lambda s: -s[0] / s[1])  # stable: an expert's steps pay less and less


def _improved(value: NDArray, weight: NDArray, choice: NDArray[np.int64], budget: float) -> NDArray[np.int64]:
    """Single changes that save value, then pairs, one of which makes room for the other, while there are any."""
    rows, options = np.arange(len(value)), value.shape[1]
    for _ in range(_CHANGES):
        dv, dw = value - value[rows, choice][:, None], weight - weight[rows, choice][:, None]
        left = budget - float(weight[rows, choice].sum())
        single = np.where(dw <= left, dv, 0.0)
        x, b = np.unravel_index(single.argmin(), single.shape)
        if single[x, b] < 0:
            choice[x] = b
            continue
        # by weight: the change that saves most among those no heavier, and the best of another expert's
        order = dw.argsort(axis=None, kind="stable")
        best, second = _two_best(dv.reshape(-1)[order], order // options)
        room = left - dw.reshape(-1)
        upto = np.searchsorted(dw.reshape(-1)[order], room, side="right") - 1
        own = np.repeat(rows, options)
        other = np.where(order[best[upto]] // options != own, best[upto], second[upto])
        sums = np.where((upto >= 0) & (other >= 0), dv.reshape(-1) + dv.reshape(-1)[order][other], 0.0)
        one = int(sums.argmin())
        if not sums[one] < -1e-12 * value.max():
            break
        for flat in (one, int(order[other[one]])):
            choice[flat // options] = flat % options
    return choice


def _two_best(saved: NDArray, owner: NDArray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each place, the place of the least of all up to it, and of the least of another owner (-1: none)."""
    best, second = np.zeros(len(saved), np.int64), np.full(len(saved), -1)
    one, two = 0, -1
    for i, (v, who) in enumerate(zip(saved.tolist(), owner.tolist(), strict=True)):
        if v < saved[one]:
            one, two = i, one if owner[one] != who else two
        elif who != owner[one] and (two < 0 or v < saved[two]):
            two = i
        best[i], second[i] = one, two
    return best, second
