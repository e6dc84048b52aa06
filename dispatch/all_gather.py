"""All-gather of rows and sparse routing, reduce-scatter back: where most rows go to most ranks anyway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..kernels.routing import Routing
from ..kernels.uncompiled import uncompiled
from . import collectives
from .agreement import Agreement, held_experts, localised
from .all_to_all import checked
from .linear import back, send
from .wire import Wires, message, sum_dtype


@dataclass(frozen=True)
class Everyone:
    """A Route: every rank's T rows, as many on each, to all G ranks; back the sum over ranks."""

    group: dist.ProcessGroup = field(repr=False)
    size: int

    def send(self, rows: Tensor | None, beside: Sequence[Tensor], wire: str) -> tuple[Tensor | None, list[Tensor]]:
        outgoing, inverse = message(rows, beside, wire)
        return inverse(collectives.all_gather(outgoing, self.group), None)

    def back(self, rows: Tensor | None, beside: Sequence[Tensor], wire: str) -> tuple[Tensor | None, list[Tensor]]:
        columns = [t for t in (rows, *beside) if t is not None]
        if wire == "exact" and len({t.dtype for t in columns}) == 1 and columns[0].dtype == sum_dtype(columns[0].dtype):
            both = collectives.reduce_scatter(torch.cat(columns, 1), self.group)
            parts = list(both.split([t.shape[1] for t in columns], 1))
        else:  # a reduce-scatter adds up in the format it carries: as many bytes by all-to-all, summed here in fp32
            parts = self._by_all_to_all(rows, beside, wire)
        return (parts.pop(0) if rows is not None else None), parts

    def _by_all_to_all(self, rows: Tensor | None, beside: Sequence[Tensor], wire: str) -> list[Tensor]:
        outgoing, inverse = message(rows, beside, wire)
        splits = [outgoing.shape[0] // self.size] * self.size
        received = collectives.all_to_all(outgoing, splits, splits, self.group)
        home, moved = inverse(received, None if rows is None else sum_dtype(rows.dtype))
        wanted = [t.dtype for t in (rows, *beside) if t is not None]
        parts = [t for t in (home, *moved) if t is not None]
        return [self._sum(t, dtype) for t, dtype in zip(parts, wanted, strict=True)]

    def _sum(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        total = rows.new_zeros(rows.shape[0] // self.size, rows.shape[1], dtype=sum_dtype(dtype))
        for part in rows.unflatten(0, (self.size, -1) if rows.shape[0] else (self.size, 0)):
            total += part
        return total.to(dtype)


@dataclass(frozen=True)
class Ticket:
    """What combine needs of a dispatch: the route, the tokens of this rank, and what came and left."""

    route: Everyone
    tokens: int
    shape: torch.Size
    dtype: torch.dtype


class AllGather:
    """Experts E/G to a rank, in rank order; every rank sees every row and computes those that chose its experts.

    With `sliced` each rank holds a slice (of F) of every expert instead and computes its part of the sum for every
    row: expert tensor parallelism, usually inside a Compose. Other arguments as for AllToAll. A rank with fewer tokens
    than another adds rows of zeros, which choose no expert and cost no product, so R = G * max T.

    A dispatch is two all-gathers: the token counts and the agreement (one wait for the device), and one message per row
    with its ids and weights, so that (G - 1) * max T messages of D * b + K * (4 + w) bytes leave a rank, in a ring.
    Combine is one reduce-scatter of as many rows; where they travel in less than the fp32 they are summed in, it is an
    all-to-all of as many bytes, summed on arrival. These are never fewer rows than AllToAll's, and hardly more where K
    is larger than G; in exchange no row is sorted or copied on its way.

    Raises ValueError, on every rank and before rows move, where the ranks disagree: the error names rank and field.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        sliced: bool = False,
        wire: str | tuple[str, str] = "exact",
        backward_wire: str | tuple[str, str] = "exact",
        name: str = "",
    ) -> None:
        self.sliced = sliced
        self.wires = Wires.of("AllGather", wire, backward_wire)
        self.agreement = Agreement("AllGather", group, name, self.wires)

    def local_experts(self, num_experts: int) -> range:
        if self.sliced:
            return range(num_experts)
        return held_experts("AllGather", num_experts, self.agreement.rank, self.agreement.size)

    @uncompiled
    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, Routing, Ticket]:
        tokens = x.shape[0]
        header = self.agreement.header(x, routing)
        all_tokens, complaint = self.agreement.gather(header, tokens, x.device)
        self.agreement.enforce(complaint)
        held = self.local_experts(routing.num_experts)
        ids, weights, missing = routing.expert_ids, routing.weights, max(all_tokens) - tokens
        if missing:
            x, weights = F.pad(x, (0, 0, 0, missing)), F.pad(weights, (0, 0, 0, missing))
            ids = F.pad(ids, (0, 0, 0, missing), value=-1)
        route = Everyone(self.agreement.group, self.agreement.size)
        rows, ids, weights = send(x, ids, weights, route, (self.wires.dispatch, self.wires.dispatch_backward))
        ticket = Ticket(route, tokens, rows.shape, x.dtype)
        return rows, Routing(localised(ids, held), weights, len(held)), ticket

    @uncompiled
    def combine(self, rows: Tensor, ticket: Ticket) -> Tensor:
        rows = checked("AllGather", rows, ticket.shape, ticket.dtype)
        y = back(rows, ticket.route, (self.wires.combine, self.wires.combine_backward))
        return y[: ticket.tokens]

    def __repr__(self) -> str:
        return f"AllGather({self.agreement}{', sliced' if self.sliced else ''})"
