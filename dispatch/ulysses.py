"""Attention over sequences that are cut over ranks: heads and positions change places, and back (DeepSpeed-Ulysses)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.transforms import refuse_transforms
from . import collectives

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def ulysses(q: Tensor, k: Tensor, v: Tensor, attend: Attend, group: dist.ProcessGroup) -> Tensor:
    """Attention of q [B, H, S/G, d] over k and v [B, H', S/G, d]: the G ranks of `group` hold S positions in a row.

    One all-to-all gives every rank H/G of the heads and all S positions, `attend` (q [B, H/G, S, d], k and v
    [B, H'/G, S, d]) -> [B, H/G, S, d] is any attention there is, and a second brings its output home: [B, H, S/G, d].
    Differentiable: the backward pass of each all-to-all is the other. Every rank must pass the same shapes.

    Source: Jacobs et al., DeepSpeed Ulysses (2023). Raises ValueError where the shapes do not go together or G does not
    divide H and H'.

    >>> y = ulysses(q, k, v, partial(scaled_dot_product_attention, is_causal=True), fold.group("cp"))
    """
    size = group.size()
    _check(q, k, v, size)
    if size == 1:
        return attend(q, k, v)
    refuse_transforms("ulysses", "rows move between ranks: take them on one rank", q, k, v)
    heads = [t.shape[1] // size for t in (q, k, v)]
    parts = [t.unflatten(1, (size, -1)) for t in (q, k, v)]
    mine = _Exchange.apply(torch.cat(parts, 2).flatten(1, 2), 1, 2, group)
    return _Exchange.apply(attend(*mine.split(heads, 1)), 2, 1, group)


class _Exchange(torch.autograd.Function):
    """Cut into G parts along dimension `cut`, one for each rank; those received are joined along `join`."""

    @staticmethod
    def forward(ctx, x: Tensor, cut: int, join: int, group: dist.ProcessGroup) -> Tensor:
        ctx.cut, ctx.join, ctx.group = cut, join, group
        size = group.size()
        parts = x.unflatten(cut, (size, -1)).movedim(cut, 0)
        received = collectives.all_to_all(parts, [1] * size, [1] * size, group)
        return received.movedim(0, join).flatten(join, join + 1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _Exchange.apply(grad, ctx.join, ctx.cut, ctx.group), None, None, None


def _check(q: Tensor, k: Tensor, v: Tensor, size: int) -> None:
    if q.dim() != 4 or k.shape != v.shape or (k.shape[0], *k.shape[2:]) != (q.shape[0], *q.shape[2:]):
        raise ValueError(
            "ulysses: q, k and v must be [B, H, S/G, d], k and v alike and all but their heads as q's, "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    for name, heads in (("q", q.shape[1]), ("k and v", k.shape[1])):
        if heads % size:
            raise ValueError(f"ulysses: heads of {name} must be a multiple of the group's {size} ranks, got {heads}")
