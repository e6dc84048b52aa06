"""Matrices that ranks hold in slices change places: each rank gets some of them whole, and sends the results back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from ...dispatch import collectives


@dataclass(frozen=True)
class Slices:
    """This rank's slices of a stack: `units` [e, blocks, m, n], cut along `dim`, 2 or 3, of which rank r has
    `sizes[r]`. The ranks' slices of a unit, side by side in each block, are the whole."""

    units: Tensor
    dim: int
    sizes: Sequence[int]

    def shape(self, size: int) -> list[int]:
        """[blocks, m, n] of a unit of which the cut dimension has `size`."""
        shape = list(self.units.shape[1:])
        shape[self.dim - 1] = size
        return shape


def share_out(costs: Sequence[float], ranks: int) -> list[range]:
    """For each rank the places of its units: neighbours, of about the same cost together. The same on every rank.

    >>> share_out([4.0, 1.0, 1.0, 2.0], 2)
    [range(0, 1), range(1, 4)]
    """
    total, before, owner = sum(costs), 0.0, []
    for cost in costs:
        owner.append(min(ranks - 1, int((before + cost / 2) / total * ranks)) if total else 0)
        before += cost
    firsts = [next((i for i, o in enumerate(owner) if o >= rank), len(owner)) for rank in range(ranks + 1)]
    return [range(first, end) for first, end in pairwise(firsts)]


def on_whole_units(
    stacks: Sequence[Slices], group: dist.ProcessGroup, compute: Callable[[Tensor, int], Tensor]
) -> list[Tensor]:
    """`compute` of the whole units of each stack, as this rank's slices again: each unit is computed on one rank.

    `compute`: ([u, blocks, m, n] of a stack, u from 0 on; the stack's place in `stacks`) -> the same shape, in a dtype
    that goes by that of the stacks. Two all-to-alls, in which a
    rank sends and gets its slices once. Every rank of the group must come by with the same stacks, of one dtype.
    """
    ranks, me = group.size(), group.rank()
    costs: list[float] = []
    for stack in stacks:
        blocks, m, n = stack.shape(sum(stack.sizes))
        costs += [float(blocks * m * n * min(m, n))] * len(stack.units)
    shares = share_out(costs, ranks)
    mine, first = list[list[range]](), 0  # for each stack, for each rank, the places of its units in the stack
    for stack in stacks:
        end = first + len(stack.units)
        mine.append([range(max(s.start, first) - first, max(min(s.stop, end), s.start, first) - first) for s in shares])
        first = end
    parts = [[s.units[of[r].start : of[r].stop] for s, of in zip(stacks, mine, strict=True)] for r in range(ranks)]
    shapes = [[(len(of[me]), *s.shape(s.sizes[r])) for s, of in zip(stacks, mine, strict=True)] for r in range(ranks)]
    arrived = _exchange(parts, shapes, group)
    whole = [torch.cat([arrived[r][i] for r in range(ranks)], s.dim) for i, s in enumerate(stacks)]
    back = [compute(t, i).split(list(s.sizes), s.dim) for i, (t, s) in enumerate(zip(whole, stacks, strict=True))]
    to = [[of[r] for of in back] for r in range(ranks)]
    own = [[tuple(part.shape) for part in of_rank] for of_rank in parts]
    returned = _exchange(to, own, group)
    return [torch.cat([returned[r][i] for r in range(ranks)]) for i in range(len(stacks))]


def _exchange(
    to: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[Sequence[int]]], group: dist.ProcessGroup
) -> list[list[Tensor]]:
    """`to[r]`: what rank r is to have; `shapes[r]`: of what comes from it. One all-to-all."""
    sent = [sum(t.numel() for t in tensors) for tensors in to]
    lengths = [[math.prod(shape) for shape in of] for of in shapes]
    received = [sum(of) for of in lengths]
    arrived = collectives.all_to_all(torch.cat([t.reshape(-1) for of in to for t in of]), received, sent, group)
    return [
        [t.view(list(shape)) for t, shape in zip(part.split(n), of, strict=True)]
        for part, n, of in zip(arrived.split(received), lengths, shapes, strict=True)
    ]
