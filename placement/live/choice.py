"""Which replica takes how many rows of a batch: the linear program of one layer, solved exactly and in whole rows.

With c_e rows for expert e: minimise t, where sum over slots p of e of x_p = c_e, sum over slots p of GPU g of x_p <=
t * speed_g, x >= 0. That is a flow: t is large enough unless a set A of GPUs is locked, which holds every replica of
experts with more than t * speed(A) rows. So: start from an even split and the t of all GPUs together; move rows along
shortest paths from GPUs above their limit to GPUs below theirs; where no path is left, those reached are locked, and t
rises to what they need (Newton's method on cuts, after Dinkelbach, 1967). Each t is a lower bound; the last is reached.
With limits rounded down to whole rows every step stays whole, and the result is the best that whole rows can do.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from ..slots import checked_speed


class Choice:
    """Prepared for one placement, called for every batch.

    expert_of_slot  integers [S], or [L, S]: every expert 0 .. E - 1 is in a slot of every layer
    gpu_of_slot     integers [S], 0 .. G - 1
    speed           [G] or None: rows per second of each GPU, in any unit

    Raises ValueError / TypeError where these do not fit together.

    >>> choice = Choice([0, 1, 0, 2], [0, 0, 1, 1])  # two GPUs, expert 0 on both
    >>> choice.rows([6, 5, 1]), choice.least_time([6, 5, 1])
    (array([1, 5, 5, 1]), array(6.))
    """

    def __init__(self, expert_of_slot: ArrayLike, gpu_of_slot: ArrayLike, speed: ArrayLike | None = None) -> None:
        plan, gpus = np.asarray(expert_of_slot), np.asarray(gpu_of_slot)
        for name, given in (("expert_of_slot", plan), ("gpu_of_slot", gpus)):
            if given.dtype.kind not in "iu":
                raise TypeError(f"Choice: {name} must be whole numbers, got {given.dtype}")
            if given.size == 0 or given.min() < 0:
                raise ValueError(f"Choice: {name} must be 0 or more, and some, got {given.tolist()}")
        if plan.ndim not in (1, 2) or gpus.shape != plan.shape[-1:]:
            rule = "[S] beside expert_of_slot [S] or [L, S]"
            raise ValueError(f"Choice: gpu_of_slot must be {rule}, got shapes {gpus.shape} and {plan.shape}")
        experts, self._layers = int(plan.max()) + 1, plan.shape[:-1]
        self._expert = np.ascontiguousarray(plan.reshape(-1, plan.shape[-1]), np.int64)
        for layer, row in enumerate(self._expert):
            missing = np.setdiff1d(np.arange(experts), row)
            if missing.size:
                rule = f"hold each of {experts} experts"
                raise ValueError(f"Choice: expert_of_slot must {rule}, got none of {missing[0]} in layer {layer}")
        self._gpu = gpus.astype(np.int64)
        number = int(gpus.max()) + 1 if speed is None else len(np.atleast_1d(speed))
        if gpus.max() >= number:
            raise ValueError(f"Choice: gpu_of_slot must be below the {number} speeds, got {gpus.max()}")
        self._speed = checked_speed("Choice", speed, number)
        self._tables = (
            np.argsort(self._expert, axis=1, kind="stable"),
            np.stack([np.searchsorted(np.sort(row), np.arange(experts + 1)) for row in self._expert]),
            np.argsort(self._gpu, kind="stable"),
            np.searchsorted(np.sort(self._gpu), np.arange(number + 1)),
        )

    def rows(self, counts: ArrayLike) -> NDArray[np.int64]:
        """int64 [S] (or [L, S]): the rows of each slot, from counts [E] (or [L, E]), whole numbers.

        They add up to each expert's count, and the largest rows / speed of a GPU is the least that whole rows allow:
        with equal speeds, `least_time` rounded up. The same counts give the same rows.
        """
        rows, _ = self._solve(counts, True)
        return rows.astype(np.int64)

    def least_time(self, counts: ArrayLike) -> NDArray[np.float64]:
        """float64 [] (or [L]): t, the optimum of the linear program, where rows can be cut into fractions."""
        return self._solve(counts, False)[1]

    def _solve(self, counts: ArrayLike, whole: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        given, experts = np.asarray(counts), self._tables[1].shape[1] - 1
        if given.dtype.kind not in "iu":
            raise TypeError(f"Choice: counts must be whole numbers, got {given.dtype}")
        if given.shape != (*self._layers, experts):
            raise ValueError(f"Choice: counts must have shape {(*self._layers, experts)}, got {given.shape}")
        if given.min() < 0:
            raise ValueError(f"Choice: counts must not be negative, got {given.min()}")
        table = given.reshape(-1, experts).astype(np.float64)
        rows, time = _layers(self._expert, *self._tables, self._gpu, self._speed, table, whole)
        return rows.reshape(*self._layers, -1), time.reshape(self._layers)


@njit(cache=True)
def _layers(expert, slots, first, on_gpu, first_on, gpu, speed, counts, whole):
    """float64 rows [L, S] and the time [L] of every layer. `slots` [L, S]: those of expert e are first[e] .. first[e +
    1] - 1, `on_gpu` [S] and `first_on` the same by GPU."""
    rows, time = np.empty(expert.shape), np.empty(len(expert))
    for n in range(len(expert)):
        time[n] = _layer(expert[n], slots[n], first[n], on_gpu, first_on, gpu, speed, counts[n], whole, rows[n])
    return rows, time


@njit(cache=True)
def _layer(expert, slots, first, on_gpu, first_on, gpu, speed, counts, whole, rows):
    load = np.zeros(len(speed))
    for e in range(len(counts)):
        copies = first[e + 1] - first[e]
        for i in range(copies):
            slot = slots[first[e] + i]
            share = counts[e] / copies
            if whole:
                share = np.floor(share) + (i < counts[e] % copies)
            rows[slot] = share
            load[gpu[slot]] += share
    small = 1e-10 * counts.sum()  # rows in fractions only: less is rounding
    reached = np.ones(len(speed), np.bool_)
    by, into = np.empty(len(speed), np.int64), np.empty(len(speed), np.int64)
    while True:
        time = _enough(load, reached, speed, whole)
        limit = _limits(time, speed, whole)
        while True:
            end = _path(expert, slots, first, on_gpu, first_on, gpu, load, limit, rows, small, reached, by, into)
            if end < 0:
                break
            _move(gpu, load, limit, rows, by, into, end)
        if not reached.any():
            return time


@njit(cache=True)
def _limits(time, speed, whole):
    return np.floor(time * speed * (1 + 1e-12)) if whole else time * speed


@njit(cache=True)
def _enough(load, inside, speed, whole):
    """The least time in which the GPUs `inside` do what they have between them, which is a whole number of rows."""
    need = np.round((load * inside).sum())
    time = need / (speed * inside).sum()
    while whole:
        limit = _limits(time, speed, whole)
        if (limit * inside).sum() >= need:
            break
        time = np.where(inside, (limit + 1) / speed, np.inf).min()
    return time


@njit(cache=True)
def _path(expert, slots, first, on_gpu, first_on, gpu, load, limit, rows, small, reached, by, into):
    """The nearest GPU below its limit to which a GPU above its own can hand rows, over others if need be; or -1.

    Leaves `reached` bool [G], and for each GPU reached the slot `by` which rows leave the GPU before and the slot
    `into` which they come; -1 at the start of a path.
    """
    queue, head, tail = np.empty(len(load), np.int64), 0, 0
    reached[:] = False
    for g in range(len(load)):
        if load[g] > limit[g] + small:
            reached[g], by[g], into[g], queue[tail] = True, -1, -1, g
            tail += 1
    while head < tail:
        g = queue[head]
        head += 1
        for i in range(first_on[g], first_on[g + 1]):
            p = on_gpu[i]
            if rows[p] <= small:
                continue
            for j in range(first[expert[p]], first[expert[p] + 1]):
                h = gpu[slots[j]]
                if not reached[h]:
                    reached[h], by[h], into[h], queue[tail] = True, p, slots[j], h
                    tail += 1
                    if load[h] < limit[h] - small:
                        return h
    return -1


@njit(cache=True)
def _move(gpu, load, limit, rows, by, into, end):
    """Moves as many rows along the path to `end` as its two GPUs and every slot on it allow."""
    amount, g = limit[end] - load[end], end
    while by[g] >= 0:
        amount, g = min(amount, rows[by[g]]), gpu[by[g]]
    amount = min(amount, load[g] - limit[g])
    load[g] -= amount
    load[end] += amount
    g = end
    while by[g] >= 0:
        rows[by[g]] -= amount
        rows[into[g]] += amount
        g = gpu[by[g]]
