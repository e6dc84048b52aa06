"""The swap search: placements without replicas, annealed, put together from one another, and annealed again.

    round 0    several placements are annealed from hot to cold, each by random numbers of its own
    a round    the best that can be put together from all of them (see recombine.py); copies of it are warmed up, annealed
               again, and are the next round's placements, it among them
    the end    the best so far, descended until no swap makes it better

A load that is wished for at most (`Objective.max_load`) is a price on the load, found anew in each round: the lowest at
which the best that can be put together keeps it. The price is the same in all layers, so that load is spent where it saves most.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .assign import assign
from .loops import Price, State, anneal, anneal_groups, crossings_saved, descend, relieve
from .problem import Problem
from .recombine import Pool
from .state import Counts, check_problem, check_start, score, times

MEMBERS = 8  # placements of round 0
ROUNDS, COPIES = 4, 4
HOT, WARM, COLD = 1.0, 0.5, 0.05  # temperatures, in units of `_Run.scale`
STEPS = 50  # temperatures of one annealing


def search(
    problem: Problem,
    start: NDArray[np.integer] | None = None,
    *,
    proposals: int = 30_000_000,
    seed: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> NDArray[np.int32]:
    """int32 [L, E]: the GPU of each expert, by the score of `problem.objective`, never worse than `start` [L, E].

    `proposals`: about how many swaps are tried, which with `seed` decides the answer; about 15 million a second.
    `stop` is asked again and again; once it is true the best so far comes back. start=None: `assign`.

    Raises ValueError / TypeError where the problem has spare slots, weights of copies, or pins and groups that cannot be
    kept, where start is no such placement, or proposals are negative.
    """
    check_problem(problem, "search")
    if not hasattr(proposals, "__index__") or proposals < 0:
        raise ValueError(f"search: proposals must be a whole number of at least 0, got {proposals!r}")
    run = _Run(problem, seed, stop)
    run.offer(assign(problem, stop=stop) if start is None else check_start(problem, start, "search"))
    if problem.topology.gpus > 1 and proposals > 0:
        run.go(int(proposals))
    return run.best


class _Run:
    """One search: the best so far, and the price that it puts on the load."""

    def __init__(self, problem: Problem, seed: int, stop: Callable[[], bool]) -> None:
        self.problem, self.stop = problem, stop
        self.counts = Counts(problem)
        self.random = np.random.default_rng(seed)
        self.used = max(int(problem.loads.any((0, 2)).sum()), 1)
        self.load = problem.objective.load
        self.best: NDArray[np.int32] = np.empty(0, np.int32)
        self.order = (np.inf, np.inf)

    def offer(self, at: NDArray[np.int32]) -> None:
        order = score(self.problem, at).order
        if order < self.order:
            self.best, self.order = at.copy(), order

    def go(self, proposals: int) -> None:
        weights = self.problem.objective
        self.scale = self._scale()
        if weights.max_load is not None:
            self.load = max(self.load, 0.2 * (weights.gpu + weights.node))
        share = proposals // 2
        found = [self.best]
        for _ in range(MEMBERS):
            found.append(self.anneal(self.best, HOT, share // MEMBERS))
        for _ in range(ROUNDS):
            if self.stop():
                return
            at = self.put_together(found)
            found = [at] + [self.anneal(at, WARM, share // (ROUNDS * COPIES)) for _ in range(COPIES)]
        at = self.put_together(found)
        self.finish(at)

    def put_together(self, found):
        pool = Pool(self.problem, self.counts, found)
        limit = self.problem.objective.max_load
        if limit is None:
            at = pool.best(self.load)
            self.offer(at)
            return at
        low, high = self.problem.objective.load, 100 * self.load
        for _ in range(12):
            middle = np.sqrt(max(low, 1e-6 * high) * high)
            at = pool.best(middle)
            if score(self.problem, at).excess > 0: low = middle
            else: high = middle
        self.load = high
        at = pool.best(high)
        self.offer(at)
        print('   load price', round(high,4), score(self.problem, at))
        return at

    def state(self, at):
        problem, counts = self.problem, self.counts
        topology, layers = problem.topology, problem.layers
        gpus = topology.gpus
        near = np.stack([counts.near(at, layer, gpus) for layer in range(layers)])
        near_node = near.reshape(layers, topology.nodes, topology.gpus_per_node, -1).sum(2, dtype=near.dtype)
        time = times(problem, at)
        return State(at.copy(), near, near_node, counts.after, counts.before, topology.node_of_gpu,
            1 / topology.speed_of_gpu, problem.pins >= 0, problem.loads * gpus, time, time.max((0, 2)),
            self.random.integers(1, 2**63, 1).astype(np.uint64), problem.num_experts // problem.groups if problem.groups > 1 else 1)

    def price(self, load):
        weights = self.problem.objective
        return Price(weights.gpu / self.counts.total, weights.node / self.counts.total, load / self.used)

    def anneal(self, at, hot, proposals):
        state, price = self.state(at), self.price(self.load)
        steps = min(STEPS, max(1, proposals // at.size))
        sweeps = max(1, proposals // (at.size * steps))
        for k in range(steps):
            if self.stop():
                break
            temperature = self.scale * hot * (COLD / hot) ** (k / max(steps - 1, 1))
            anneal(state, price, temperature, sweeps)
            if state.group > 1:
                anneal_groups(state, price, temperature, sweeps)
        self.offer(state.at)
        return state.at

    def finish(self, at):
        state = self.state(at)
        limit = self.problem.objective.max_load
        budget = np.inf if limit is None else limit * self.used
        price = self.price(self.load)
        relieve(state, price, budget, 1000)
        descend(state, self.price(self.problem.objective.load), budget, 10)
        self.offer(state.at)

    def _scale(self):
        state = self.state(self.best)
        price = self.price(0)
        r = np.random.default_rng(0)
        L, E = self.best.shape
        d = []
        for _ in range(4096):
            l, e, f = r.integers(L), r.integers(E), r.integers(E)
            if state.at[l, e] != state.at[l, f]:
                g, n = crossings_saved(state, l, e, f)
                d.append(abs(price.gpu * g + price.node * n))
        return float(np.mean(d)) * SC
SC=.1
