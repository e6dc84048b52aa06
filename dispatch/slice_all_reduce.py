"""Slice and all-reduce, for activations that every rank of a group already has: no all-to-all at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.routing import Routing
from ..kernels.uncompiled import uncompiled
from . import collectives
from .agreement import Agreement, held_experts, localised
from .all_to_all import checked
from .linear import back, send
from .wire import Wires


@dataclass(frozen=True)
class Replicated:
    """A Route for rows that all ranks have: S is the identity on each, S^T the sum over ranks, on each."""

    group: dist.ProcessGroup = field(repr=False)

    def send(self, rows: Tensor | None, beside: Sequence[Tensor], wire: str) -> tuple[Tensor | None, list[Tensor]]:
        return None if rows is None else rows.view_as(rows), [t.view_as(t) for t in beside]

    def back(self, rows: Tensor | None, beside: Sequence[Tensor], wire: str) -> tuple[Tensor | None, list[Tensor]]:
        columns = [t for t in (rows, *beside) if t is not None]
        wide = torch.float64 if any(t.dtype == torch.float64 for t in columns) else torch.float32
        total = collectives.all_reduce(torch.cat([t.to(wide) for t in columns], 1), self.group)
        split = total.split([t.shape[1] for t in columns], 1)
        parts = [s.to(t.dtype) for s, t in zip(split, columns, strict=True)]
        return (parts.pop(0) if rows is not None else None), parts


@dataclass(frozen=True)
class Ticket:
    """What combine needs of a dispatch: the route, and what came and left."""

    route: Replicated
    shape: torch.Size
    dtype: torch.dtype


class SliceAllReduce:
    """Experts E/G to a rank, in rank order; x and the routing are the same on every rank (a tensor-parallel group).

    Each rank computes for all T rows what its own experts add, and one all-reduce sums it (PPMoE: Chen et al., Pipeline
    MoE, 2023). The slice is one of the routing, not of the rows: experts of other ranks become "no expert", so nothing
    is copied and R = T. The all-reduce is in fp32 (fp64 for fp64): 2 (G - 1) / G * T * D * 4 bytes leave a rank, in a
    ring. In the backward pass the gradient of y must be the same on every rank too; one all-reduce makes the gradients
    of x and of the router weights whole again, and the same on every rank.

    The adjoint identity counts x once, not once per rank: sum over ranks <S x, r> = <x, S^T r>.

    With `sliced` each rank holds a slice (of F) of every expert instead of E/G whole ones.

    `check`: "always" compares E, K, D, T, dtypes and names with the other ranks in every call by an all-gather of a few
    integers, which waits for the device; "first" only in the first. `name`: see AllToAll.

    Raises ValueError on every rank where the ranks disagree: the error names rank and field.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, *, sliced: bool = False, check: str = "always", name: str = ""
    ) -> None:
        if check not in ("always", "first"):
            raise ValueError(f"SliceAllReduce: check must be 'always' or 'first', got {check!r}")
        self.sliced, self.check, self._checked = sliced, check, False
        self.agreement = Agreement("SliceAllReduce", group, name, Wires())

    def local_experts(self, num_experts: int) -> range:
        if self.sliced:
            return range(num_experts)
        return held_experts("SliceAllReduce", num_experts, self.agreement.rank, self.agreement.size)

    @uncompiled
    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, Routing, Ticket]:
        header = self.agreement.header(x, routing, tokens=x.shape[0])
        if self.check == "always" or not self._checked:
            self.agreement.enforce(self.agreement.gather(header, x.shape[0], x.device)[1])
            self._checked = True
        held = self.local_experts(routing.num_experts)
        route = Replicated(self.agreement.group)
        rows, ids, weights = send(x, routing.expert_ids, routing.weights, route, ("exact", "exact"))
        ticket = Ticket(route, rows.shape, x.dtype)
        return rows, Routing(localised(ids, held), weights, len(held)), ticket

    @uncompiled
    def combine(self, rows: Tensor, ticket: Ticket) -> Tensor:
        rows = checked("SliceAllReduce", rows, ticket.shape, ticket.dtype)
        return back(rows, ticket.route, ("exact", "exact"))

    def __repr__(self) -> str:
        return f"SliceAllReduce({self.agreement}{', sliced' if self.sliced else ''})"
