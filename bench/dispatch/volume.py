"""How many bytes each contestant must move: exactly, from the routing at hand, and for an even router by formula.

A contestant's volume is one or more movements of rows: there, and back the other way. Four ways to say which rows:

| way | a row of x goes |
|---|---|
| pairs | once for each of its experts, to the expert's rank |
| ranks | once to each rank that holds one of its experts |
| levels | once to each node, to the rank of the same number there, and on to the ranks inside |
| everyone | to every rank; back is a reduce-scatter, both together an all-reduce |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...placement.cluster.volume import distinct_parts
from ..shapes import Shape
from .world import Layout

WAYS = ("pairs", "ranks", "levels", "everyone")


@dataclass(frozen=True)
class Movement:
    """`way`, one of WAYS; bytes of a message `there` and `back`, each in the forward pass and in the backward pass."""

    way: str
    there: tuple[int, int]
    back: tuple[int, int]

    def bytes(self, train: bool) -> tuple[int, int]:
        """(there, back) of a whole pass."""
        return (sum(self.there), sum(self.back)) if train else (self.there[0], self.back[0])


def rows(way: str, ids: Tensor, experts: int, layout: Layout) -> Tensor:
    """int64 [G, G]: rows from each rank to each other on the way there; ids [G*T, K], T rows a rank in rank order."""
    size, inside = layout.ranks, layout.ranks_per_node
    tokens = ids.shape[0] // size
    owner = ids // (experts // size)
    if way == "everyone":
        moved = torch.full((size, size), tokens)
    elif way == "pairs":
        source = torch.arange(size).repeat_interleave(tokens)[:, None]
        moved = torch.bincount((source * size + owner).flatten(), minlength=size * size).view(size, size)
    else:
        hit = torch.zeros(ids.shape[0], size, dtype=torch.bool).scatter_(1, owner, True)
        moved = hit.view(size, tokens, size).sum(1)
        if way == "levels":
            nodes = hit.view(size, tokens, layout.nodes, inside).any(3).sum(1)  # [G, N]
            direct, moved = moved, torch.zeros_like(moved)
            for s in range(size):
                for n in range(layout.nodes):
                    gate = n * inside + s % inside  # where the rows of rank s enter node n
                    moved[s, gate] += nodes[s, n]
                    moved[gate, n * inside : (n + 1) * inside] += direct[s, n * inside : (n + 1) * inside]
    return moved.masked_fill(~layout.off_rank(), 0)


def exact(movements: list[Movement], ids: Tensor, experts: int, layout: Layout, train: bool) -> Tensor:
    """int64 [G, G]: bytes from each rank to each other with this very routing."""
    total = torch.zeros(layout.ranks, layout.ranks, dtype=torch.int64)
    for m in movements:
        there, back = m.bytes(train)
        moved = rows(m.way, ids, experts, layout)
        total += moved * there + moved.T * back
    return total


def even(movements: list[Movement], shape: Shape, layout: Layout, train: bool) -> tuple[float, float]:
    """(bytes that leave the rank, bytes that leave the node) per token, expected of a router that chooses evenly."""
    found = [0.0, 0.0]
    for m in movements:
        for i, each in enumerate(_even_rows(m.way, shape.experts, shape.top_k, layout)):
            found[i] += each * sum(m.bytes(train))
    return found[0], found[1]


def _even_rows(way: str, experts: int, top_k: int, layout: Layout) -> tuple[float, float]:
    """The table of placement/cluster/volume.py: rows of one token, one direction, that leave (the rank, the node)."""
    g, n, inside = layout.ranks, layout.nodes, layout.ranks_per_node
    if way == "everyone":
        return g - 1, g - inside
    if way == "pairs":
        return top_k * (g - 1) / g, top_k * (n - 1) / n
    ranks = distinct_parts(experts, top_k, g)
    if way == "ranks":
        return ranks * (g - 1) / g, ranks * (n - 1) / n
    far = distinct_parts(experts, top_k, n) * (n - 1) / n
    return far + ranks * (inside - 1) / inside, far
