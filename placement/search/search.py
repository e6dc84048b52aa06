"""The swap search: placements without replicas, annealed, put together from one another, and annealed again.

    first      a few placements are annealed from hot to cold, each with random numbers of its own
    a round    the best that can be put together from what there is (see recombine.py); copies of it are warmed up and
               annealed again, and are with it what the next round puts together
    last       what the last round gives, descended until no swap makes it better

The load that is wished for at most (`Objective.max_load`) becomes a price on load, moved up or down after each
annealing by what came of it, and what is put together is the cheapest that keeps it. The price is the same in all
layers, so that load is spent where it saves most.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..problem import Problem
from .assign import assign
from .loops import Price, State, anneal, anneal_groups, descend, relieve
from .recombine import Pool
from .state import Counts, check_problem, check_start, score, times

MEMBERS, ROUNDS, COPIES = (4, 16), 8, 4  # more members where each still gets 2500 sweeps
# Temperatures, over what a swap changes on average (`_Run._usual`). HOT is doubled from member to member, up to eight
# times: small cases need it.
HOT, WARM, COLD = 0.1, 0.05, 0.005
STEPS = 50  # temperatures of one annealing
STEEP = 30.0  # of the smooth peak: a GPU this share below the busiest counts 1/e of it
PRICE = 0.2  # of load where max_load is given, before it is known better: over the weights of gpu and node
MOST = 1000.0  # the same, at most


def search(
    problem: Problem,
    start: NDArray[np.integer] | None = None,
    *,
    proposals: int = 30_000_000,
    seed: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> NDArray[np.int32]:
    """int32 [L, E]: the GPU of each expert, by the score of `problem.objective`, never worse than `start` [L, E].

    Better is first what has less load above max_load, where one is given, then what scores less. `proposals`: about how
    many swaps are tried; with `seed` it decides the answer. `stop` is asked again and again; once
    it is true, the best so far comes back. start=None: `assign`.

    Raises ValueError / TypeError where the problem has spare slots, weights of copies, or pins and groups that cannot
    be kept, where start is no placement that the problem allows, or proposals are not a whole number of at least 0.
    """
    check_problem(problem, "search")
    if not hasattr(proposals, "__index__") or proposals < 0:
        raise ValueError(f"search: proposals must be a whole number of at least 0, got {proposals!r}")
    run = _Run(problem, seed, stop)
    run.offer(assign(problem, counts=run.counts, stop=stop) if start is None else check_start(problem, start, "search"))
    if problem.topology.gpus > 1 and proposals and not stop():
        run.go(int(proposals))
    return run.best


class _Run:
    """One search: the best so far, and the price that it puts on load."""

    def __init__(self, problem: Problem, seed: int, stop: Callable[[], bool]) -> None:
        self.problem, self.stop, self.random = problem, stop, np.random.default_rng(seed)
        self.counts = Counts(problem)
        weights, gpus, speed = problem.objective, problem.topology.gpus, problem.topology.speed_of_gpu
        self.used = max(int(problem.loads.any((0, 2)).sum()), 1)
        self.unit = weights.gpu + weights.node or 1.0
        self.load = weights.load if weights.max_load is None else max(weights.load, PRICE * self.unit)
        # no layer's peak can be below its heaviest expert on the fastest GPU
        self.steep = STEEP / np.maximum(1.0, problem.loads.max((0, 2)) * gpus / speed.max())
        self.best: NDArray[np.int32] = np.empty(0, np.int32)
        self.order = (np.inf, np.inf)

    def offer(self, at: NDArray[np.int32]) -> float:
        """Keeps `at` if it is the best so far. Gives its load."""
        found = score(self.problem, at, self.counts)
        if found.order < self.order:
            self.best, self.order = at.copy(), found.order
        return found.load

    def go(self, proposals: int) -> None:
        usual = self._usual()
        if not usual:  # nothing that a swap changes is worth anything
            return
        members = int(np.clip(proposals // (5000 * self.best.size), *MEMBERS))
        first, again = proposals // (2 * members), proposals // (2 * ROUNDS * COPIES)
        found = [self.best]
        found += [self._anneal(self.best, usual * HOT * 2 ** (i % 4), usual * COLD, first) for i in range(members)]
        for _ in range(ROUNDS):
            at = self._put_together(found)
            found = [at] + [self._anneal(at, usual * WARM, usual * COLD, again) for _ in range(COPIES)]
        self._finish(self._put_together(found))

    def _put_together(self, found: list[NDArray[np.int32]]) -> NDArray[np.int32]:
        if self.stop():
            return self.best
        pool, weights = Pool(self.problem, self.counts, found, self.stop), self.problem.objective
        if not pool.whole:
            return self.best
        if weights.max_load is None:
            path = pool.path(weights.load)
        else:
            path = pool.path_within(weights.load, weights.max_load, max(weights.load, MOST * self.unit))
        at = pool.placement(path)
        self.offer(at)
        return at

    def _anneal(self, at: NDArray[np.int32], hot: float, cold: float, proposals: int) -> NDArray[np.int32]:
        if self.stop():
            return at
        state, price = self._state(at), self._price(self.load)
        steps = min(STEPS, max(1, proposals // at.size))
        sweeps = max(1, proposals // (at.size * steps))
        for temperature in np.geomspace(hot, cold, steps):
            if self.stop():
                break
            anneal(state, price, temperature, sweeps)
            if state.group > 1:
                anneal_groups(state, price, temperature, sweeps)
        load, weights = self.offer(state.at), self.problem.objective
        if weights.max_load is not None:
            off = (load - 1) / max(weights.max_load - 1, 1e-3)
            self.load *= float(np.clip(off, 0.25, 4.0)) ** 0.6
            self.load = min(max(self.load, weights.load), MOST * self.unit)
        return state.at

    def _finish(self, at: NDArray[np.int32]) -> None:
        if self.stop():
            return
        state, weights = self._state(at), self.problem.objective
        budget = np.inf if weights.max_load is None else weights.max_load * self.used * (1 - 1e-12)
        while not self.stop() and relieve(state, self._price(weights.load), budget, 100) == 100:
            pass
        while not self.stop() and descend(state, self._price(weights.load), budget, 1):
            pass
        self.offer(state.at)

    def _price(self, load: float) -> Price:
        weights, total = self.problem.objective, self.counts.total
        return Price(weights.gpu / total, weights.node / total, load / self.used)

    def _state(self, at: NDArray[np.int32]) -> State:
        problem, counts, topology = self.problem, self.counts, self.problem.topology
        near = np.stack([counts.near(at, layer, topology.gpus) for layer in range(problem.layers)])
        parts = near.reshape(problem.layers, topology.nodes, topology.gpus_per_node, -1)
        time = times(problem, at)
        heat = np.exp(np.minimum(self.steep[:, None] * (time - 1), 600.0))
        return State(
            at=at.copy(),
            near=near,
            near_node=parts.sum(2, dtype=near.dtype),
            after=counts.after,
            before=counts.before,
            node=topology.node_of_gpu,
            pace=1 / topology.speed_of_gpu,
            held=problem.pins >= 0,
            load=problem.loads * topology.gpus,
            time=time,
            peak=time.max((0, 2)),
            steep=self.steep,
            heat=heat,
            sum=heat.sum((0, 2)),
            random=self.random.integers(1, 2**63, 1).astype(np.uint64),
            group=problem.num_experts // problem.groups if problem.groups > 1 else 1,
        )

    def _usual(self) -> float:
        """What the crossings that a swap changes are worth on average; where they are worth nothing, some load."""
        state, price, random = self._state(self.best), self._price(self.load), np.random.default_rng(0)
        layers, experts = self.best.shape
        layer, e, f = random.integers([[layers], [experts], [experts]], size=(3, 4096))
        worth = np.zeros(4096)
        for near, part, each in (
            (state.near, self.best, price.gpu),
            (state.near_node, state.node[self.best], price.node),
        ):
            a, b = part[layer, e], part[layer, f]
            saved = near[layer, b, e] - near[layer, a, e] + near[layer, a, f] - near[layer, b, f]
            worth += each * saved
        return float(np.abs(worth).mean()) or 0.1 * price.load
