"""How good a placement can be at all: certified lower bounds on what crosses between GPUs and nodes, and on load.

Crossings between GPUs, and between nodes, are partition problems, with as many experts of a layer in a part as the
part has slots. Each is bounded for itself, and the two are added, by the best of three methods, cheap to dear:

| method | what it knows |
|---|---|
| spectral | singular values of each pair of layers |
| matching | how many partners an expert can have in its part |
| sdp | the semidefinite relaxation of the whole chain, with triangle inequalities: better until the time is up |

Any point at which a method stops proves its bound: dual.py says why, and takes the margins of all roundings off.

| file | holds |
|---|---|
| simple.py | matching and singular values, pair by pair |
| chain.py, triangles.py | multipliers of the whole chain, by ADMM; its cuts |
| dual.py | what multipliers prove: the only file that may say it |
| load.py, copies.py | bounds on load; on rows copied |
| _checks.py, _pace.py | what goes in, checked; what still fits before a deadline |
| certify.py | the bound and the gap of an answer, for `place` |
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..lookup import files_of
from ._checks import positive_whole, real
from ._pace import Pace
from .load import load_bound

__all__ = ["METHODS", "Bound", "Level", "crossing_bound", "load_bound"]

METHODS = ("spectral", "matching", "sdp")
WIDEST_SDP = 1.5  # padded experts per expert, above which equal parts say too little of unequal ones


@dataclass(frozen=True, eq=False)
class Level:
    """One partition of the experts: no placement's weight across its parts is below `crossing`.

    name      "gpu" or "node"
    crossing  the bound, rounded up where all weights are whole
    total     the weight of all transitions: crossing / total is the share that must cross
    method    whose bound it is; "none" where it is 0
    pairs     float64 [L - 1], by layer pair; with "sdp" only the sum is a bound, as its pairs help one another
    """

    name: str
    crossing: float
    total: float
    method: str
    pairs: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Bound:
    """`value` <= the cost of every placement: over `levels`, the sum of weight * crossing; whole where both are.

    seconds  by the clock given
    """

    value: float
    levels: tuple[Level, ...]
    seconds: float

    @property
    def method(self) -> str:
        """Whose bound it is, level by level."""
        return ", ".join(f"{level.name}: {level.method}" for level in self.levels)

    def gap(self, cost: float) -> float:
        """How far, relative to it, `cost` may be from the best: (cost - value) / cost; 0 where both are 0."""
        return (cost - self.value) / cost if cost else 0.0


def crossing_bound(
    transitions: Sequence[ArrayLike],
    slots_of_gpu: ArrayLike,
    node_of_gpu: ArrayLike | None = None,
    *,
    gpu_weight: float = 1.0,
    node_weight: float = 0.0,
    methods: Sequence[str] = METHODS,
    time_limit: float = 30.0,
    iterations: int = 2000,
    progress: Callable[[Bound], object] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Bound:
    """A lower bound on sum_l sum_ef W_l[e, f] * (gpu_weight * [GPUs differ] + node_weight * [nodes differ]).

    transitions: L - 1 matrices W_l [E, E], dense or scipy.sparse, not negative, from layer l to l + 1. slots_of_gpu
    [G]: experts of each layer on each GPU. node_of_gpu [G]: whole numbers, all one node unless given. Where slots sum
    to more than E an expert may have replicas, on distinct GPUs, and a transition counts as local where any GPU (node)
    has both experts: the bound is then "matching" alone.

    `time_limit` in seconds of `clock` (time.process_time where the machine is not one's own): a piece of work that
    would not end in time, by the pieces before it, is not begun. Within it, and up to `iterations` of "sdp" for each
    level, the same input gives the same bound. `progress` is called with each better Bound and ends the search where
    it returns something true.

    Raises ValueError / TypeError where shapes do not fit, slots are fewer than experts, or a number is out of range.

    >>> swap = [[0, 5], [5, 0]]
    >>> crossing_bound([swap, swap], [1, 1]).value      # each expert can follow its only successor
    0.0
    >>> crossing_bound([[[3, 2], [2, 3]]], [1, 1]).value
    4.0
    """
    start = clock()
    weights = _weights(transitions)
    slots = positive_whole("crossing_bound", "slots_of_gpu", slots_of_gpu)
    nodes = _nodes(node_of_gpu, len(slots))
    prices = _prices(gpu_weight, node_weight)
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise ValueError(f"crossing_bound: methods must be some of {', '.join(METHODS)}, got {list(methods)}")
    if not time_limit >= 0:
        raise ValueError(f"crossing_bound: time_limit must be at least 0 s, got {time_limit}")
    if iterations < 0:
        raise ValueError(f"crossing_bound: iterations must be at least 0, got {iterations}")
    if len(weights) and slots.sum() < weights.shape[1]:
        raise ValueError(f"crossing_bound: slots_of_gpu must sum to at least E={weights.shape[1]}, got {slots.sum()}")
    parts = {"gpu": slots, "node": np.bincount(nodes, weights=slots).astype(np.int64)}
    search = _Search(weights, {name: parts[name] for name in prices}, prices, start, progress, clock)
    search.run(methods, Pace(start + time_limit, clock), iterations)
    return search.best()


class _Search:
    """The best bound of each level so far."""

    def __init__(
        self,
        weights: NDArray[np.float64],
        parts: dict[str, NDArray[np.int64]],
        prices: dict[str, float],
        start: float,
        progress: Callable[[Bound], object] | None,
        clock: Callable[[], float],
    ) -> None:
        self.weights, self.parts, self.prices = weights, parts, prices
        self.start, self.progress, self.clock = start, progress, clock
        self.whole = bool((weights == np.floor(weights)).all()) and float(weights.sum()) < 2**53
        self.levels = {name: self._level(name, "none", np.zeros(len(weights))) for name in parts}

    def _level(self, name: str, method: str, pairs: NDArray[np.float64]) -> Level:
        crossing = max(float(pairs.sum()) * (1 - 1e-14), 0.0)
        if self.whole:
            crossing = float(np.ceil(crossing))
        return Level(name, crossing, float(self.weights.sum()), method, pairs)

    def best(self) -> Bound:
        levels = tuple(self.levels.values())
        value = sum(self.prices[level.name] * level.crossing for level in levels)
        if not (self.whole and all(price.is_integer() for price in self.prices.values())):
            value *= 1 - 1e-15
        return Bound(value, levels, self.clock() - self.start)

    def offer(self, name: str, method: str, pairs: NDArray[np.float64]) -> bool:
        """Takes a bound, if it is better; True where the caller of all this has seen enough."""
        level = self._level(name, method, pairs)
        if level.crossing <= self.levels[name].crossing:
            return False
        self.levels[name] = level
        return self.progress is not None and bool(self.progress(self.best()))

    def run(self, methods: Sequence[str], pace: Pace, iterations: int) -> None:
        if not len(self.weights) or not self.weights.any():
            return
        open_levels = [name for name, slots in self.parts.items() if len(slots) > 1]
        for name in open_levels:
            if self._pair_by_pair(name, methods, pace):
                return
        if "sdp" in methods:
            for left, name in zip(range(len(open_levels), 0, -1), open_levels, strict=True):
                if self._chain(name, pace.share(left), iterations):
                    return

    def _pair_by_pair(self, name: str, methods: Sequence[str], pace: Pace) -> bool:
        """The cheap methods, the better of them for each pair. Pairs go in bunches, so that time and memory hold."""
        from . import simple

        slots, found = self.parts[name], np.zeros((len(self.weights), 2))
        experts = self.weights.shape[1]
        bunch = max(1, 2**20 // experts**2)
        wanted = [
            ("matching", simple.matching, "partners", experts**2),
            ("spectral", simple.spectral, "singular values", experts**3),
        ]
        replicas = slots.sum() > experts
        for column, (method, bound, kind, each) in enumerate(wanted):
            if method in methods and not (replicas and method == "spectral"):
                for first in range(0, len(self.weights), bunch):
                    here = self.weights[first : first + bunch]
                    if not pace.fits(kind, each * len(here)):
                        break
                    with pace.timed(kind, each * len(here)):
                        found[first : first + bunch, column] = bound(here, slots)
        names = [method for method, values in zip(METHODS[1::-1], found.T, strict=True) if values.any()]
        return self.offer(name, " and ".join(names), found.max(1))

    def _chain(self, name: str, pace: Pace, iterations: int) -> bool:
        """The SDP, on equal parts: narrower ones are filled up with experts that nothing goes to or comes from, whose
        parts are known."""
        slots, experts = self.parts[name], self.weights.shape[1]
        width = int(slots.max())
        padded = width * len(slots)
        if slots.sum() > experts or padded > WIDEST_SDP * experts:
            return False
        from . import chain

        fixed = np.repeat(np.arange(len(slots)), width - slots)
        weights = np.pad(self.weights, ((0, 0), (0, len(fixed)), (0, len(fixed))))
        return any(
            self.offer(name, "sdp", found)
            for found in chain.bounds(weights, width, len(slots), fixed, pace, iterations)
        )


def _weights(transitions: Sequence[ArrayLike]) -> NDArray[np.float64]:
    """float64 [L - 1, E, E]."""
    dense = [w.toarray() if hasattr(w, "toarray") else w for w in transitions]
    weights = [real("crossing_bound", f"transitions[{i}]", w, 2, 0.0) for i, w in enumerate(dense)]
    for i, w in enumerate(weights):
        if w.shape != (len(weights[0]), len(weights[0])) or not w.size:
            raise ValueError(
                f"crossing_bound: transitions[{i}] must be [E, E] with the E of all, E={len(weights[0])}, got {w.shape}"
            )
    return np.stack(weights) if weights else np.zeros((0, 0, 0))


def _nodes(node_of_gpu: ArrayLike | None, gpus: int) -> NDArray[np.int64]:
    """int64 [G], 0 .. N - 1."""
    if node_of_gpu is None:
        return np.zeros(gpus, np.int64)
    nodes = np.asarray(node_of_gpu)
    if nodes.dtype.kind not in "ui":
        raise TypeError(f"crossing_bound: node_of_gpu must be whole numbers, got {nodes.dtype}")
    if nodes.shape != (gpus,):
        raise ValueError(f"crossing_bound: node_of_gpu must be [G={gpus}] as slots_of_gpu, got {nodes.shape}")
    return np.unique(nodes, return_inverse=True)[1].astype(np.int64)


def _prices(gpu_weight: float, node_weight: float) -> dict[str, float]:
    """Of the levels that cost anything."""
    prices = {"gpu": float(gpu_weight), "node": float(node_weight)}
    for name, price in prices.items():
        if not (np.isfinite(price) and price >= 0):
            raise ValueError(f"crossing_bound: {name}_weight must be finite and not negative, got {price}")
    return {name: price for name, price in prices.items() if price}


__getattr__ = files_of(__name__)
