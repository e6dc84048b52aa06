"""The best of several placements, layer by layer.

To give the GPUs of a layer and of all later ones other names changes only the transitions into that layer. So for any
two placements, the least that it costs to go from a layer of one to the next layer of the other is an assignment of
G to G, and the best way through all layers, from placement to placement, is a shortest path: exact for what it may
choose from, and as a placement's parts far from each other hardly know of each other, far better than each of them.

GPUs may change names where they have equal slots and speed and nothing is pinned to them; with a price on nodes, whole
nodes change, and GPUs inside a node.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ..problem import Problem
from .loops import add_rows
from .state import Counts, times
from .transport import transport

FORBIDDEN = -1e9  # for shares, times weights


class Names:
    """Which GPUs may change names, and the best way to do it."""

    def __init__(self, problem: Problem) -> None:
        topology, gpus = problem.topology, problem.topology.gpus
        pinned = np.isin(np.arange(gpus), problem.pins)
        kind = np.stack([problem.slots_of_gpu, topology.speed_of_gpu, np.where(pinned, 1 + np.arange(gpus), 0)], 1)
        self.alike = (kind[:, None] == kind[None]).all(2)
        self.gpu, self.node = problem.objective.gpu, problem.objective.node
        self.by_node = topology.nodes > 1 and (self.node > 0 or problem.groups > 1)
        self.nodes = topology.nodes if self.by_node else 1

    def match(self, flow: NDArray[np.float64]) -> tuple[float, NDArray[np.int32]]:
        """Of flow [G, G], transitions from a GPU to a name: the most that can stay, times its price, and the GPU that
        each name [G] gets."""
        return _match(flow, self.alike, self.nodes, self.gpu, self.node if self.by_node else 0.0)


@njit(cache=True)
def _match(flow, alike, nodes, gpu, node):
    """As if there were one node where nodes have no price."""
    gpus = len(flow)
    each = gpus // nodes
    stays, inner = np.zeros((nodes, nodes)), np.zeros((nodes, nodes, each), np.int32)
    single, price = np.ones(gpus, np.int32), np.zeros(gpus)
    for n in range(nodes):
        for m in range(nodes):
            worth = np.empty((each, each))  # [name, GPU]
            for i in range(each):
                for j in range(each):
                    a, b = n * each + j, m * each + i
                    worth[i, j] = gpu * flow[a, b] if alike[a, b] else FORBIDDEN
                    stays[m, n] += node * flow[a, b]
            price[:] = 0
            inner[m, n] = transport(worth, single[:each], price[:each])
            for i in range(each):
                stays[m, n] += worth[i, inner[m, n, i]]
    node_of = transport(stays, single[:nodes], np.zeros(nodes))
    found, total = np.empty(gpus, np.int32), 0.0
    for m in range(nodes):
        total += stays[m, node_of[m]]
        for i in range(each):
            found[m * each + i] = node_of[m] * each + inner[m, node_of[m], i]
    return total, found


class Pool:
    """Placements [L, E] of one problem and what each of their layers costs beside each other's. `stop` is asked all
    the while: once it is true there is nothing to choose from, and `whole` is False."""

    def __init__(
        self,
        problem: Problem,
        counts: Counts,
        placements: list[NDArray[np.int32]],
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.placements, self.names = placements, Names(problem)
        self.peaks = np.stack([times(problem, at).max((0, 2)) for at in placements], 1)  # [L, P]
        self.used = max(int(problem.loads.any((0, 2)).sum()), 1)
        number, gpus = len(placements), problem.topology.gpus
        self.stays = np.zeros((problem.layers - 1, number, number))
        self.renamed = np.zeros((*self.stays.shape, gpus), np.intp)
        self.whole = False
        for layer in range(problem.layers - 1):
            matrix = counts.after[layer]
            for i, before in enumerate(placements):
                rows = np.zeros((gpus, problem.num_experts), matrix.dtype)
                add_rows(matrix, before[layer], rows)
                columns = np.ascontiguousarray(rows.T)
                for j, after in enumerate(placements):
                    if stop():
                        return
                    flow = np.zeros((gpus, gpus), matrix.dtype)
                    add_rows(columns, after[layer + 1], flow)
                    stays, self.renamed[layer, i, j] = self.names.match(flow.T / counts.total)
                    self.stays[layer, i, j] = stays
        self.whole = True

    def path(self, load: float) -> list[int]:
        """Which placement to take each layer from, at a price of `load` for the mean of the peaks."""
        prices = load * self.peaks / self.used
        cost, ways = prices[0], []
        for stays, price in zip(self.stays, prices[1:], strict=True):
            onward = cost[:, None] - stays
            ways.append(onward.argmin(0))
            cost = onward.min(0) + price
        path = [int(cost.argmin())]
        for way in reversed(ways):
            path.append(int(way[path[-1]]))
        return path[::-1]

    def path_within(self, load: float, limit: float, most: float) -> list[int]:
        """The path at the lowest price from `load` to `most`, found by halving, at which the mean of the peaks is at
        most `limit`; the one at `most` where it is never."""
        path = self.path(load)
        if self._load(path) <= limit:
            return path
        low, path = max(load, 1e-6 * most), self.path(most)
        high = most
        while high > 1.02 * low:
            middle = float(np.sqrt(low * high))
            found = self.path(middle)
            if self._load(found) <= limit:
                high, path = middle, found
            else:
                low = middle
        return path

    def _load(self, path: list[int]) -> float:
        return float(self.peaks[np.arange(len(path)), path].sum()) / self.used

    def placement(self, path: list[int]) -> NDArray[np.int32]:
        """[L, E]: layers from the placements of `path`, names changed so that most transitions stay."""
        found = np.empty_like(self.placements[0])
        found[0] = self.placements[path[0]][0]
        names = np.arange(self.renamed.shape[-1])  # the GPU that each name of the present placement stands for
        for layer, (i, j) in enumerate(pairwise(path)):
            names = names[self.renamed[layer, i, j]]
            found[layer + 1] = names[self.placements[j][layer + 1]]
        return found
