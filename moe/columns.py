"""Lookups in a table whose columns are cut over ranks: choices go to everybody, columns come home. No sum travels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..dispatch import collectives


@dataclass(frozen=True)
class Everybody:
    """How many tokens each rank of `group` has: who sends what to whom."""

    counts: list[int]
    group: dist.ProcessGroup

    @classmethod
    def of(cls, tokens: int, group: dist.ProcessGroup, device: torch.device) -> Everybody:
        return cls(collectives.all_gather(torch.tensor([tokens], device=device), group).tolist(), group)

    def spread(self, t: Tensor) -> Tensor:
        """t [T, .] of each rank -> [sum T, .] on every rank, ranks rising."""
        ranks = self.group.size()
        return collectives.all_to_all(t.repeat(ranks, *[1] * (t.dim() - 1)), self.counts, [len(t)] * ranks, self.group)

    def home(self, t: Tensor, tokens: int) -> Tensor:
        """t [sum T, .] -> [G, T, .]: what each rank has for this one's tokens."""
        ranks = self.group.size()
        moved = collectives.all_to_all(t, [tokens] * ranks, self.counts, self.group)
        return moved.unflatten(0, (ranks, tokens))


class _Spread(torch.autograd.Function):
    """Weights [T, K] -> [sum T, K]; backward: the sum over ranks, each of which looked at columns of its own."""

    @staticmethod
    def forward(ctx, weights: Tensor, all: Everybody) -> Tensor:
        ctx.all, ctx.tokens = all, len(weights)
        return all.spread(weights)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.all.home(grad, ctx.tokens).sum(0), None


class _Home(torch.autograd.Function):
    """Columns [sum T, d] -> rows [T, G * d]; backward: the gradient of each rank's columns back to it."""

    @staticmethod
    def forward(ctx, columns: Tensor, tokens: int, all: Everybody) -> Tensor:
        ctx.all = all
        return all.home(columns, tokens).movedim(0, 1).flatten(1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        ranks = ctx.all.group.size()
        parts = grad.unflatten(1, (ranks, -1)).movedim(1, 0).flatten(0, 1)
        return collectives.all_to_all(parts, ctx.all.counts, [len(grad)] * ranks, ctx.all.group), None, None


def by_columns(
    ids: Tensor, weights: Tensor, group: dist.ProcessGroup, lookup: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """`lookup(ids, weights)` [., d] in this rank's columns, for the tokens of all ranks; [T, G * d] of this rank's.

    A token sends its choices to G - 1 ranks and gets its row back once, whatever it chose: 8 K (G - 1) bytes and a row.
    """
    all = Everybody.of(len(ids), group, ids.device)
    return _Home.apply(lookup(all.spread(ids), _Spread.apply(weights, all)), len(ids), all)
