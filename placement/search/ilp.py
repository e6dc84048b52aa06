"""The exact model of a placement without replicas, solved by HiGHS: for cases of up to about a hundred binaries.

x[l, e, g] = 1: expert e of layer l is on GPU g. For experts e and f of consecutive layers y[l, e, f, g] <= x[l, e, g],
x[l+1, f, g] says that both are there, whatever the number of tokens, and sum over f of y[l, e, f, g] = slots[g] *
x[l, e, g] (and the same over e) makes the relaxation much tighter (Sherali and Adams, 1990); nodes in the same way.
A layer's peak is at least each GPU's time. GPUs that are alike are told apart by the first expert on them, so that no
answer stands G! times.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from ..problem import Problem
from .recombine import Names
from .search import search
from .state import Counts, check_problem, score, to_slots

WRITING, SEARCH = 0.3, 0.2  # of the time, at most, for writing the model down, and for the search after HiGHS
EXCESS = 1000.0  # price of load above max_load: more than all else together


class Exact(NamedTuple):
    """expert_of_slot int32 [L, S]; `bound`: no placement that keeps max_load, pins and groups scores less;
    `proved`: this one is the best; `source`: "ilp", or "search" where HiGHS had none as good within its time."""

    expert_of_slot: NDArray[np.int32]
    bound: float
    proved: bool
    source: str


def ilp(
    problem: Problem, time_limit: float = 60.0, *, seed: int = 0, stop: Callable[[], bool] = lambda: False
) -> Exact:
    """The best placement by `problem.objective` and a proof of it, or what `time_limit` seconds gave.

    Where HiGHS ends without a proof, or the model is too large to be written down in that time, `search` tries too, 1
    million proposals by `seed` in the last fifth of it, and the better one is given. `stop` ends all but HiGHS.
    Raises ValueError where the problem has spare slots, weights of copies, or pins and groups that cannot be kept.
    """
    check_problem(problem, "ilp")
    if not time_limit > 0:
        raise ValueError(f"ilp: time_limit must be above 0 seconds, got {time_limit}")
    began = time.perf_counter()
    late = began + (1 - SEARCH) * time_limit
    try:
        model = _Model(problem, lambda: stop() or time.perf_counter() > began + WRITING * time_limit)
    except _TooLarge:
        return Exact(
            to_slots(_searched(problem, seed, began + time_limit, stop)), problem.objective.load, False, "search"
        )
    found = milp(
        model.cost,
        integrality=model.whole,
        bounds=Bounds(model.low, model.high),
        constraints=model.constraint(),
        options={"time_limit": max(late - time.perf_counter(), 1e-3), "mip_rel_gap": 0.0},
    )
    bound = problem.objective.load  # whatever else: a mean is no more than the largest
    if found.get("mip_dual_bound") is not None:  # None: not even the relaxation was solved
        bound = max(bound, model.constant + found.mip_dual_bound)
    at = None if found.x is None else model.read(found.x)
    if found.status == 0 and at is not None:
        return Exact(to_slots(at), min(bound, score(problem, at).total), True, "ilp")
    other = _searched(problem, seed, began + time_limit, stop)
    if at is None or score(problem, other).order < score(problem, at).order:
        return Exact(to_slots(other), bound, False, "search")
    return Exact(to_slots(at), bound, False, "ilp")


def _searched(problem: Problem, seed: int, end: float, stop: Callable[[], bool]) -> NDArray[np.int32]:
    """What `search` finds until the clock shows `end`."""
    return search(problem, proposals=1_000_000, seed=seed, stop=lambda: stop() or time.perf_counter() > end)


class _TooLarge(Exception):
    """A model that is not written down in time."""


class _Model:
    """min cost . v, with rows of coefficients between two limits, columns added as they are needed. Raises _TooLarge
    once `stop` is true."""

    def __init__(self, problem: Problem, stop: Callable[[], bool]) -> None:
        self.problem, self.counts, self.stop = problem, Counts(problem), stop
        layers, experts, gpus = problem.layers, problem.num_experts, problem.topology.gpus
        self._columns: list[tuple[float, float, float, int]] = []  # cost, low, high, whole
        self._rows: list[tuple[float, float]] = []
        self._entries: list[tuple[int, int, float]] = []
        self.constant = 0.0
        self.x = np.array([self._column(whole=1) for _ in range(layers * experts * gpus)]).reshape(
            layers, experts, gpus
        )
        self._placements()
        self._transitions()
        self._loads()
        self.cost, self.low, self.high, self.whole = (np.array(column) for column in zip(*self._columns, strict=True))

    def constraint(self) -> LinearConstraint:
        rows, columns, values = zip(*self._entries, strict=True)
        matrix = coo_array((values, (rows, columns)), (len(self._rows), len(self._columns))).tocsr()
        return LinearConstraint(matrix, *np.array(self._rows).T)

    def read(self, values: NDArray[np.float64]) -> NDArray[np.int32]:
        """int32 [L, E]."""
        return values[self.x].argmax(2).astype(np.int32)

    def _column(self, cost: float = 0.0, low: float = 0.0, high: float = 1.0, whole: int = 0) -> int:
        if self.stop():
            raise _TooLarge
        self._columns.append((cost, low, high, whole))
        return len(self._columns) - 1

    def _row(self, low: float, high: float, *terms: tuple[float, NDArray[np.integer] | int]) -> None:
        if self.stop():
            raise _TooLarge
        for value, columns in terms:
            self._entries += [(len(self._rows), int(column), value) for column in np.ravel(columns)]
        self._rows.append((low, high))

    def _placements(self) -> None:
        problem, x = self.problem, self.x
        node_of, names = problem.topology.node_of_gpu, Names(problem)
        for layer in range(problem.layers):
            for e in range(problem.num_experts):
                self._row(1, 1, (1, x[layer, e]))
            for g, slots in enumerate(problem.slots_of_gpu):
                self._row(slots, slots, (1, x[layer, :, g]))
        for layer, e in zip(*np.nonzero(problem.pins >= 0), strict=True):
            self._row(1, 1, (1, x[layer, e, problem.pins[layer, e]]))
        size = problem.num_experts // problem.groups
        for layer, e in np.ndindex(problem.pins.shape):
            if problem.groups > 1 and e % size:
                for n in range(problem.topology.nodes):
                    self._row(0, 0, (1, x[layer, e, node_of == n]), (-1, x[layer, e - 1, node_of == n]))
        alike = names.alike & (node_of[:, None] == node_of if names.by_node else True)
        before = np.tril(alike, -1).sum(1)  # so many GPUs like g have an expert before g's first
        for g, e in zip(*np.nonzero(before[:, None] > np.arange(problem.num_experts)), strict=True):
            self._row(0, 0, (1, x[0, e, g]))

    def _transitions(self) -> None:
        problem, x = self.problem, self.x
        weights, topology, slots = problem.objective, problem.topology, problem.slots_of_gpu
        self._stays(x, slots, weights.gpu)
        if weights.node:
            on_node = x.reshape(*x.shape[:2], topology.nodes, topology.gpus_per_node)
            self._stays(on_node, np.bincount(topology.node_of_gpu, slots), weights.node)

    def _stays(self, x: NDArray[np.intp], room: NDArray, price: float) -> None:
        """Transitions that stay on a part: x [L, E, parts] or [L, E, parts, GPUs of it], `room` [parts]."""
        if not price:
            return
        counts, experts = self.counts, x.shape[1]
        self.constant += price * float(counts.after.sum()) / counts.total
        for layer in range(len(counts.after)):
            worth = price * counts.after[layer] / counts.total
            for part, slots in enumerate(room):
                y = np.array([self._column(-w) for w in worth.ravel()]).reshape(experts, experts)
                for e in range(experts):
                    for f in range(experts):
                        self._row(-np.inf, 0, (1, y[e, f]), (-1, x[layer, e, part]))
                        self._row(-np.inf, 0, (1, y[e, f]), (-1, x[layer + 1, f, part]))
                    self._row(0, 0, (1, y[e]), (-float(slots), x[layer, e, part]))
                    self._row(0, 0, (1, y[:, e]), (-float(slots), x[layer + 1, e, part]))

    def _loads(self) -> None:
        problem, weights = self.problem, self.problem.objective
        if not (weights.load or weights.max_load):
            return
        gpus, used = problem.topology.gpus, problem.loads.any((0, 2))
        if not used.any():
            self.constant += weights.load
            return
        peaks = []
        for layer in np.flatnonzero(used):
            peaks.append(self._column(weights.load / used.sum(), 1, np.inf))
            for loads in problem.loads[:, layer]:
                for g, speed in enumerate(problem.topology.speed_of_gpu):
                    terms = [(gpus / speed * load, self.x[layer, e, g]) for e, load in enumerate(loads)]
                    self._row(-np.inf, 0, (-1, peaks[-1]), *terms)
        if weights.max_load is not None:
            excess = self._column(EXCESS, 0, np.inf)
            self._row(-np.inf, weights.max_load * used.sum(), (1, np.array(peaks)), (-float(used.sum()), excess))
