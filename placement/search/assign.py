"""Layer by layer, exactly: given the layers beside it, where a layer's experts belong is a linear assignment problem.

An expert on a GPU keeps there its transitions with the neighbours' experts that are on the same GPU (and, for their own
price, node); the sum over experts is all that a layer contributes, so the best of all placements of one layer is found
in polynomial time (Kuhn, 1955; here Jonker-Volgenant, transport.py). Layers are solved in turn until none gets better.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..problem import Problem
from .state import Counts, check_problem, check_start
from .transport import transport

FORBIDDEN = -1e9  # worth less than anything that is counted: shares, times weights


def assign(
    problem: Problem,
    start: NDArray[np.integer] | None = None,
    *,
    price: NDArray[np.float64] | None = None,
    sweeps: int = 100,
    counts: Counts | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> NDArray[np.int32]:
    """int32 [L, E]: the GPU of each expert, layers solved in turn, there and back, to a fixpoint or `sweeps` times.

    `start` [L, E]: a placement to better; None: each layer is first solved given the one before it. Once `stop` is true
    a layer is that before it, unless pins forbid, and the placement is handed over. Loads count only by
    `price` [L, G]: what a unit of load (an expert's share of its layer) costs on a GPU. With groups a layer is solved
    by nodes first and kept where that is no better. Exact otherwise; deterministic. `counts`: where they are at hand.

    Raises ValueError where the problem has spare slots, weights of copies, or pins and groups that cannot be kept.
    """
    check_problem(problem, "assign")
    layers, experts, gpus = problem.layers, problem.num_experts, problem.topology.gpus
    price = np.zeros((layers, gpus)) if price is None else price
    duals = np.zeros((layers, gpus))
    counts = counts or Counts(problem)
    if start is None:
        at = np.zeros((layers, experts), np.int32)
        for layer in range(layers):
            if layer and stop() and (problem.pins[layer] < 0).all():
                at[layer] = at[layer - 1]
                continue
            worth = _worth(problem, counts, at, layer, price, ahead=False)
            at[layer] = _solve(problem, worth, layer, duals[layer])
    else:
        at = check_start(problem, start, "assign")
    for sweep in range(sweeps):
        before = at.copy()
        for layer in range(layers)[:: 1 if sweep % 2 else -1]:
            if stop():
                return at
            worth = _worth(problem, counts, at, layer, price)
            found = _solve(problem, worth, layer, duals[layer])
            here = np.arange(experts)
            better = worth[here, found].sum() - worth[here, at[layer]].sum()
            if better > 1e-12 * np.abs(worth).sum():  # more than rounding
                at[layer] = found
        if (at == before).all():
            break
    return at


def _worth(problem, counts, at, layer: int, price, ahead: bool = True) -> NDArray[np.float64]:
    """[E, G]: what is saved by each expert of a layer on each GPU, given its neighbours: shares times weights."""
    weights, topology = problem.objective, problem.topology
    near = counts.near(at, layer, topology.gpus, ahead).T / counts.total
    on_node = near.reshape(-1, topology.nodes, topology.gpus_per_node).sum(2)
    worth = weights.gpu * near + weights.node * on_node[:, topology.node_of_gpu]
    return worth - problem.loads[0, layer][:, None] * price[layer]


def _solve(problem: Problem, worth: NDArray[np.float64], layer: int, duals: NDArray[np.float64]) -> NDArray[np.int32]:
    """int32 [E]: the placement of one layer that is worth most, within slots, pins and groups.

    duals [G]: see `transport`.
    """
    pins = problem.pins[layer]
    pinned = np.flatnonzero(pins >= 0)
    worth = worth.copy()
    worth[pinned] = FORBIDDEN
    worth[pinned, pins[pinned]] = 0
    if problem.groups == 1:
        return transport(worth, problem.slots_of_gpu, duals)
    node_of, nodes = problem.topology.node_of_gpu, problem.topology.nodes
    size = problem.num_experts // problem.groups
    best = np.stack([worth[:, node_of == n].max(1) for n in range(nodes)], 1)  # as if each GPU had room for all
    room = np.bincount(node_of, problem.slots_of_gpu).astype(int) // size
    at_node = np.repeat(transport(best.reshape(problem.groups, size, nodes).sum(1), room, np.zeros(nodes)), size)
    found = np.empty(len(worth), np.int32)
    for n in range(nodes):
        gpus, experts = np.flatnonzero(node_of == n), np.flatnonzero(at_node == n)
        found[experts] = gpus[transport(worth[np.ix_(experts, gpus)], problem.slots_of_gpu[gpus], duals[gpus])]
    return found
