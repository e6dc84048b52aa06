"""Good multipliers for dual.crossing: the semidefinite relaxation of the whole chain, by ADMM, with triangle cuts.

Each pair of layers has its own matrix Q_p of the set in dual.py, and all share the entries z: the blocks inside the
layers tie the pairs together. An iteration projects, pair by pair, on Q (one eigendecomposition [2E, 2E]), then on
what is asked of the entries; the multipliers S_p are the prices of Q_p = z. Cost of an iteration: L E^3; memory: two
matrices [2E, 2E] of float64 a pair.

Source: ADMM with over-relaxation after Boyd et al. (2011), sections 3.4 and 4.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy.linalg import eigh

from . import dual
from ._pace import Pace
from .triangles import Cuts, violated

RELAX = 1.6
JUDGE_EVERY = 10  # iterations between two evaluations of the bound, which cost half an iteration
CUT_FIRST, CUT_EVERY, CUT_PASSES = 30, 15, 2
CUT_THRESHOLD, CUTS_PER_PAIR = 0.03, 3000
PATIENCE, GAIN = 6, 2e-5  # evaluations without so much relative gain, before it stops


def bounds(
    weights: NDArray[np.float64],
    capacity: int,
    parts: int,
    fixed: NDArray[np.int64],
    pace: Pace,
    iterations: int,
) -> Iterator[NDArray[np.float64]]:
    """Better and better bounds, float64 [P] that sum up to one, on the crossing weight of weights [P, E, E], E =
    capacity * parts, until no iteration fits any more, `iterations` are done or nothing is gained any more. fixed [A]:
    the parts of the last A experts of each layer."""
    deadline, clock = pace.deadline, pace.clock
    work = 1.5 * len(weights) * (2 * weights.shape[1]) ** 3  # an iteration, and an evaluation after it
    if not pace.fits("sdp", work):
        return
    chain = Chain(weights, capacity, parts, fixed)
    best, stalled = -np.inf, 0
    for done in range(1, iterations + 1):
        start = clock()
        if not chain.step(deadline, clock):
            return
        now = clock()
        last = done == iterations or now + 2 * (now - start) > deadline
        if last or done % JUDGE_EVERY == 0:
            found = chain.bound()
            gain = found.sum() - best
            stalled = 0 if gain > GAIN * abs(found.sum()) else stalled + 1
            if gain > 0:
                best = found.sum()
                yield found
            if last or (stalled >= PATIENCE and done > CUT_FIRST):
                return
        if done >= CUT_FIRST and done % CUT_EVERY == 0:
            chain.cut(deadline, clock)


class Chain:
    """The state of the iteration. weights [P, E, E].

    rho, the weight of Q_p = z, makes steps of multipliers and entries alike in size: the spread of the weights, in the
    norm of what a part contributes; found best, within a factor of 2, at 16 to 256 experts in 2 to 64 parts.
    """

    def __init__(
        self,
        weights: NDArray[np.float64],
        capacity: int,
        parts: int,
        fixed: NDArray[np.int64] = dual.NOTHING_FIXED,
    ) -> None:
        self.weights, self.capacity, self.parts, self.fixed = weights, capacity, parts, fixed
        self.rho = float(weights.std()) * parts**0.5 / 2 or float(weights.mean())
        pairs, experts, _ = weights.shape
        self.multipliers = np.zeros((pairs, 2 * experts, 2 * experts))
        self.projected = np.empty_like(self.multipliers)
        self.cuts = Cuts.none()
        self.flat = np.full((2 * pairs + 1) * experts * experts, 1 / parts)
        self.inside, self.between = self._blocks(self.flat)
        self.copies = np.full(pairs + 1, 2.0)  # of a layer's block, one in each pair that it belongs to
        self.copies[[0, -1]] = 1
        self._set_known()
        # entries count twice in the norm, once on each side of the diagonal
        self.scale = np.empty_like(self.flat)
        of_layers, of_pairs = self._blocks(self.scale)
        of_layers[:] = 1 / (2 * self.rho * self.copies[:, None, None])
        of_pairs[:] = 1 / (2 * self.rho)

    def _blocks(self, flat: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(inside [L, E, E], between [P, E, E]) as views of `flat`."""
        pairs, experts, _ = self.weights.shape
        blocks = flat.reshape(-1, experts, experts)
        return blocks[: pairs + 1], blocks[pairs + 1 :]

    def _set_known(self) -> None:
        experts = self.weights.shape[1]
        diagonal, known = np.arange(experts), experts - len(self.fixed)
        self.inside[:, diagonal, diagonal] = 1
        for blocks in (self.inside, self.between):
            blocks[:, known:, known:] = self.fixed[:, None] == self.fixed

    def step(self, deadline: float, clock: Callable[[], float]) -> bool:
        """One iteration; False, and nothing of use, where the time is up before its end."""
        experts = self.weights.shape[1]
        target = np.zeros_like(self.flat)
        inside, between = self._blocks(target)
        for p, multiplier in enumerate(self.multipliers):
            if clock() > deadline:
                return False
            z = self.piece(p)
            q = self._projection(multiplier / self.rho + z)
            q *= RELAX
            q += (1 - RELAX) * z
            self.projected[p] = q
            q = q - multiplier / self.rho
            inside[p] += q[:experts, :experts]
            inside[p + 1] += q[experts:, experts:]
            between[p] = q[:experts, experts:]
        inside /= self.copies[:, None, None]
        between += self.weights / (2 * self.rho)
        if len(self.cuts):
            self.cuts.subtract(target, self.scale)
            self.cuts.project(target, self.scale, CUT_PASSES)
        np.clip(target, 0, 1, out=self.flat)
        for block in self.inside:  # cuts move the upper triangle alone
            upper = np.triu(block, 1)
            np.add(upper, upper.T, out=block)
        self._set_known()
        for p, multiplier in enumerate(self.multipliers):
            multiplier += self.rho * (self.piece(p) - self.projected[p])
        return True

    def piece(self, p: int) -> NDArray[np.float64]:
        """z [2E, 2E] of layers p and p + 1."""
        between = self.between[p]
        return np.block([[self.inside[p], between], [between.T, self.inside[p + 1]]])

    def _projection(self, a: NDArray[np.float64]) -> NDArray[np.float64]:
        """The nearest matrix of the set Q, in float32: twice as fast, and no bound depends on how near it is."""
        centred = dual.centre(a)[0].astype(np.float32)
        values, vectors = eigh(centred, overwrite_a=True, check_finite=False, driver="evd")
        most = 2.0 * self.capacity
        values = np.clip(values - _level(values, most, most * (self.parts - 1)), 0, most)
        positive = vectors[:, values > 0]
        return (positive * values[values > 0]) @ positive.T + 1 / self.parts

    def cut(self, deadline: float, clock: Callable[[], float]) -> None:
        """Adds the triangle inequalities that are violated, and drops those that cost nothing."""
        self.cuts = self.cuts.priced()
        for p in range(len(self.weights)):
            if clock() > deadline:
                return
            found = violated(self.piece(p), p, len(self.weights), self.parts, CUT_THRESHOLD, CUTS_PER_PAIR)
            self.cuts = self.cuts.joined(*found)

    def bound(self) -> NDArray[np.float64]:
        """float64 [P], certified: see dual.crossing."""
        return dual.crossing(self.weights, self.capacity, self.parts, self.multipliers, self.cuts, self.fixed)


@njit(cache=True)
def _level(values, most, total):
    """The m with sum(clip(values - m, 0, most)) = total, for values that rise and 0 <= total <= most * len(values)."""
    low, high = values[0] - most, values[-1]
    for _ in range(100):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        reached = 0.0
        for value in values[::-1]:
            if value <= middle:
                break
            reached += min(value - middle, most)
        if reached > total:
            low = middle
        else:
            high = middle
    return (low + high) / 2
