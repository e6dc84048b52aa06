"""Ranks agree on what they are about to exchange before they do: a disagreement is an error on every rank.

Backends do not check: where sizes differ, gloo returns stale memory or aborts the process. So the row counts that ranks
must tell each other anyway travel with a header of a few integers. That costs no collective of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.routing import Routing
from ..kernels.transforms import refuse_transforms
from . import collectives
from .rollcall import sign_in
from .wire import FORMATS, Wires

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_GRADIENTS = ("none", "x", "weights", "x and weights")
FIELDS = (
    *("dispatcher", "name", "call", "num_experts", "top_k", "hidden_size", "dtype", "weights_dtype"),
    *("wire", "backward_wire", "gradients", "tokens", "capacity"),
)
_FREE = -1  # a field that ranks need not agree on in this call

# (field + 1, the odd rank, its value, a rank that speaks for the others, their value); all zero: no complaint
Complaint = tuple[int, int, int, int, int]
_NONE: Complaint = (0, 0, 0, 0, 0)
Found = TypeVar("Found")


def disagreement(headers: Sequence[Sequence[int]], ranks: Sequence[int]) -> Complaint:
    """The first field that not all headers share, and the first rank that is not with the most.

    A pure function of what every rank sees, so that all come to the same words; a tie goes to the lowest rank.
    """
    for field, values in enumerate(zip(*headers, strict=True)):
        if any(v != values[0] for v in values):
            most = max(values, key=lambda v: (values.count(v), -values.index(v)))
            odd = next(i for i, v in enumerate(values) if v != most)
            return field + 1, ranks[odd], values[odd], ranks[values.index(most)], most
    return _NONE


class Agreement:
    """The group of a dispatcher, and what its ranks must have in common. `calls` counts the dispatches so far."""

    def __init__(self, who: str, group: dist.ProcessGroup | None, name: str, wires: Wires) -> None:
        if group is None and not dist.is_initialized():
            raise ValueError(f"{who}: group must be given, or torch.distributed be initialised, got None without it")
        self.group: dist.ProcessGroup = dist.group.WORLD if group is None else group  # type: ignore[assignment]
        if dist.get_rank(self.group) < 0:
            raise ValueError(f"{who}: group must contain this rank, got one without rank {dist.get_rank()}")
        self.who, self.name, self.wires, self.calls = who, name, wires, 0
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.ranks = dist.get_process_group_ranks(self.group)
        sign_in(self.group)

    def __deepcopy__(self, memo: object) -> Agreement:
        return Agreement(self.who, self.group, self.name, self.wires)  # a group cannot be copied, and need not be

    def header(self, x: Tensor, routing: Routing, tokens: int = _FREE, capacity: int = _FREE) -> list[int]:
        """This rank's values of FIELDS for its next call. `tokens`, `capacity`: where all ranks must have the same."""
        if x.dim() != 2 or x.shape[0] != routing.expert_ids.shape[0]:
            raise ValueError(
                f"{self.who}: x must be [T, D] with a row for each of the routing's "
                f"{routing.expert_ids.shape[0]} tokens, got {tuple(x.shape)}"
            )
        for what, t in (("x", x), ("routing.weights", routing.weights)):
            if t.dtype not in _DTYPES:
                raise TypeError(f"{self.who}: {what} must be one of {', '.join(map(str, _DTYPES))}, got {t.dtype}")
        refuse_transforms(self.who, "rows move between ranks: take them on one rank", x, routing.weights)
        wires, grad = self.wires, torch.is_grad_enabled()
        gradients = grad * (x.requires_grad + 2 * routing.weights.requires_grad)
        self.calls += 1
        return [
            *(_hash(self.who), _hash(self.name), self.calls),
            *(routing.num_experts, routing.expert_ids.shape[1], x.shape[1]),
            *(_DTYPES.index(x.dtype), _DTYPES.index(routing.weights.dtype)),
            _pair(wires.dispatch, wires.combine),
            _pair(wires.dispatch_backward, wires.combine_backward),
            *(gradients, tokens, capacity),
        ]

    def exchange(
        self, header: list[int], counts: Tensor, complaint: Complaint = _NONE
    ) -> tuple[list[int], list[int], Complaint]:
        """Rows for each rank of the group, rows from each rank, and what is wrong, if anything.

        `counts` int64 [G] on the device that the group works on. `complaint`: what another group found. One all-to-all
        of a few integers per pair of ranks, one wait for the device.
        """
        mine = torch.tensor([*complaint, *header], device=counts.device)
        table = torch.cat([counts[:, None], mine.expand(self.size, -1)], 1)
        received = collectives.all_to_all(table, [1] * self.size, [1] * self.size, self.group)
        both = torch.cat([counts[:, None], received], 1).tolist()
        return [row[0] for row in both], [row[1] for row in both], self._verdict([row[2:] for row in both])

    def gather(self, header: list[int], tokens: int, device: torch.device) -> tuple[list[int], Complaint]:
        """The tokens of each rank of the group, and what is wrong: one all-gather of a few integers."""
        rows, complaint = self.table(header, torch.tensor([tokens], device=device))
        return [row[0] for row in rows], complaint

    def table(self, header: list[int], counts: Tensor) -> tuple[list[list[int]], Complaint]:
        """`counts` int64 [C] of each rank of the group, as many on each, and what is wrong: one all-gather."""
        mine = torch.cat([torch.tensor([*_NONE, *header], device=counts.device), counts])
        rows = collectives.all_gather(mine[None], self.group).tolist()
        n = len(_NONE) + len(header)
        return [row[n:] for row in rows], self._verdict([row[:n] for row in rows])

    def _verdict(self, rows: list[list[int]]) -> Complaint:
        for row in rows:
            if row[0]:
                return (row[0], row[1], row[2], row[3], row[4])
        return disagreement([row[5:] for row in rows], self.ranks)

    def enforce(self, complaint: Complaint) -> None:
        """Raises ValueError where there is a complaint: on every rank, with the same words."""
        if complaint[0]:
            field, odd, value, other, common = FIELDS[complaint[0] - 1], *complaint[1:]
            got = f"{_show(field, value)} on rank {odd} and {_show(field, common)} on rank {other}"
            raise ValueError(f"{self.who}: {field} must be the same on every rank, got {got}")

    def __repr__(self) -> str:
        return f"ranks={self.size}" + (f", name={self.name!r}" if self.name else "")


def together(work: Callable[[], Found], group: dist.ProcessGroup | None) -> Found:
    """work() on every rank of a group, all of which must come by: where it raises ValueError, TypeError or OSError on
    one, all ranks raise, with the words of the first that did. Without a group (None) it is work() alone."""
    found, wrong = None, None
    try:
        found = work()
    except (ValueError, TypeError, OSError) as error:
        wrong = error
    said = None if wrong is None else (isinstance(wrong, OSError), str(wrong))
    heard = [said] if group is None else collectives.all_gather_objects(said, group)
    if wrong is not None:
        raise wrong
    for rank, words in enumerate(heard):
        if words is not None and group is not None:
            kind = OSError if words[0] else ValueError
            raise kind(f"{words[1]} (on rank {dist.get_global_rank(group, rank)})")
    return cast(Found, found)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _pair(dispatch: str, combine: str) -> int:
    return FORMATS.index(dispatch) * len(FORMATS) + FORMATS.index(combine)


def _show(field: str, value: int) -> str:
    if field in ("name", "dispatcher"):
        return f"one with the hash {value:x}"
    if field in ("dtype", "weights_dtype"):
        return str(_DTYPES[value])
    if field in ("wire", "backward_wire"):
        return f"({', '.join(FORMATS[i] for i in divmod(value, len(FORMATS)))})"
    return _GRADIENTS[value] if field == "gradients" else str(value)


def held_experts(who: str, num_experts: int, rank: int, size: int) -> range:
    """The experts of this rank: E / G in a row, in rank order. Raises ValueError where G does not divide E."""
    if num_experts % size:
        raise ValueError(f"{who}: num_experts must be a multiple of the group's {size} ranks, got {num_experts}")
    each = num_experts // size
    return range(rank * each, (rank + 1) * each)


def localised(ids: Tensor, held: range) -> Tensor:
    """Expert ids as this rank numbers its own; -1 where another rank holds the expert, or nobody."""
    return torch.where((ids >= held.start) & (ids < held.stop), ids - held.start, -1).to(torch.int32)
