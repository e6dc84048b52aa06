"""The collectives that dispatchers use, and wait for. Every byte between ranks passes here.

They are the operators beneath torch's functional collectives, whose Python names change from release to release. Where
one fails, the dead ranks are named (rollcall.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .rollcall import named

_ops = torch.ops._c10d_functional
T = TypeVar("T")


@named
def all_to_all(x: Tensor, received: Sequence[int], sent: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """x [sum(sent), ...] in rank order -> [sum(received), ...] in rank order. The splits must fit: nobody checks."""
    return _ops.wait_tensor(_ops.all_to_all_single(x.contiguous(), list(received), list(sent), group.group_name))


@named
def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x [T, ...], as many rows on every rank -> [G * T, ...] in rank order."""
    return _ops.wait_tensor(_ops.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name))


@named
def reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x [G * T, ...] -> [T, ...]: the sum over ranks of their part for this rank, in x's dtype."""
    return _ops.wait_tensor(_ops.reduce_scatter_tensor(x.contiguous(), "sum", group.size(), group.group_name))


@named
def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x -> the sum over ranks, in x's dtype."""
    return _ops.wait_tensor(_ops.all_reduce(x.contiguous(), "sum", group.group_name))


@named
def all_gather_objects(thing: T, group: dist.ProcessGroup) -> list[T]:
    """What each rank has to say, in rank order: for rare and small things, as it is pickled."""
    everybody = [thing] * group.size()
    dist.all_gather_object(everybody, thing, group)
    return everybody


@named
def broadcast(x: Tensor, group: dist.ProcessGroup) -> None:
    """x, in place, becomes that of the group's first rank."""
    dist.broadcast(x, dist.get_process_group_ranks(group)[0], group=group)


@named
def barrier(group: dist.ProcessGroup) -> None:
    """Waits until every rank of the group is here."""
    dist.barrier(group)


@named
def start_average(x: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Begins to replace x, contiguous, by the mean over ranks; `finish` waits for it."""
    return dist.all_reduce(x, op=dist.ReduceOp.AVG, group=group, async_op=True)  # type: ignore[return-value]


@named
def finish(work: dist.Work, group: dist.ProcessGroup) -> None:
    work.wait()
