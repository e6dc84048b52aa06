"""Counts the bytes that leave this rank, where every collective passes: at torch's dispatcher, whoever calls it.

An all-to-all is counted by its splits. The others are counted as the bytes that must leave a rank, a part for each
other one: an all-gather this rank's rows, a reduce-scatter the other's part, an all-reduce twice the G-th part (as many
as a ring moves). How gloo cuts and forwards them is its own business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

_NAMESPACES = ("_c10d_functional", "_c10d_functional_autograd", "c10d_functional", "c10d", "_dtensor")
_SILENT = ("wait_tensor", "_wrap_tensor_autograd", "barrier", "monitored_barrier_")  # they move nothing


def _by_splits(x: Tensor, splits: Sequence[int], size: int) -> list[int]:
    each = x.element_size() * (x.numel() // x.shape[0] if x.shape[0] else 0)
    return [n * each for n in (splits or [x.shape[0] // size] * size)]


def _to_each(x: Tensor, size: int) -> list[int]:
    return [x.nbytes] * size


def _part(x: Tensor, size: int) -> list[int]:
    return [x.nbytes // size] * size


def _part_twice(x: Tensor, size: int) -> list[int]:
    return [2 * x.nbytes // size] * size


Call = Callable[[Sequence[Any]], tuple[Any, Tensor, Callable[[int], list[int]]]]
# operator -> (name, its arguments -> the group, what is sent, bytes to each rank of a group of a size)
_COLLECTIVES: dict[str, tuple[str, Call]] = {
    "all_to_all_single": ("all_to_all", lambda a: (a[3], a[0], lambda g: _by_splits(a[0], a[2], g))),
    "alltoall_base_": ("all_to_all", lambda a: (a[2], a[1], lambda g: _by_splits(a[1], a[4], g))),
    "all_gather_into_tensor": ("all_gather", lambda a: (a[2], a[0], lambda g: _to_each(a[0], g))),
    "_allgather_base_": ("all_gather", lambda a: (a[2], a[1], lambda g: _to_each(a[1], g))),
    "reduce_scatter_tensor": ("reduce_scatter", lambda a: (a[3], a[0], lambda g: _part(a[0], g))),
    "_reduce_scatter_base_": ("reduce_scatter", lambda a: (a[2], a[1], lambda g: _part(a[1], g))),
    "all_reduce": ("all_reduce", lambda a: (a[2], a[0], lambda g: _part_twice(a[0], g))),
    "all_reduce_": ("all_reduce", lambda a: (a[2], a[0], lambda g: _part_twice(a[0], g))),
    "allreduce_": ("all_reduce", lambda a: (a[1], a[0][0], lambda g: _part_twice(a[0][0], g))),
}


class Traffic(TorchDispatchMode):
    """While it is on: `sent` int64 [G], bytes of rows to each rank; `counts` int64 [G], bytes of int64 messages, in
    which ranks tell each other how many rows will come; `by_op`, bytes of both by collective; `unknown`, the names of
    collectives that were not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        size = dist.get_world_size()
        self.sent, self.counts = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)
        self.by_op: dict[str, int] = {}
        self.unknown: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # DTensor first turns it into collectives, which come by here
        if func.namespace in _NAMESPACES:
            self._note(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, args: Sequence[Any]) -> None:
        if name not in _COLLECTIVES:
            self.unknown |= {name} - {*_SILENT}
            return
        kind, read = _COLLECTIVES[name]
        group, x, to = read(args)
        ranks = dist.get_process_group_ranks(_group(group))
        into = self.counts if x.dtype == torch.int64 else self.sent
        for rank, n in zip(ranks, to(len(ranks)), strict=True):
            if rank != dist.get_rank():
                into[rank] += n
                self.by_op[kind] = self.by_op.get(kind, 0) + n


def _group(named: Any) -> dist.ProcessGroup:
    """From a group, its name, or the box in which c10d's operators hand it on."""
    if not isinstance(named, str | dist.ProcessGroup):
        named = dist.ProcessGroup.unbox(named)
    return _resolve_process_group(named if isinstance(named, str) else named.group_name)  # type: ignore[arg-type]
