"""Two levels: each row once to each node that needs it, then to the ranks inside; reduced inside before it returns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from ..kernels.routing import Routing
from ..kernels.uncompiled import uncompiled
from .agreement import Agreement, held_experts, localised
from .all_to_all import Ticket, checked, exchange
from .linear import back, send
from .rollcall import time_out
from .wire import Wires

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Hierarchical:
    """Experts E/G to a rank, in rank order, where ranks n * ranks_per_node .. are node n.

    A row crosses to another node at most once, to the rank with its own number there, and goes on inside that node to
    the ranks of its experts; the node sums what comes back and sends one row home. So between nodes travel
    d_N (N - 1) / N rows per token with d_N = N (1 - C(E - E/N, K) / C(E, K)) instead of d_G (N - 1) / N
    (placement/cluster/volume.py; Tutel's 2DH and DeepEP's internode kernels cut the same way).

    `group`: the ranks that share the experts, None: all; its size must be a multiple of `ranks_per_node`. The groups of
    a node and of the ranks of one number are made here: every rank of `group` must come by, in the same order of
    dispatchers. Or `Hierarchical.of_mesh(mesh)` with a DeviceMesh (node, local), which has them. `wire`,
    `backward_wire`, `name`: see AllToAll; a wire format holds for both levels, so a row is rounded twice.

    A dispatch is four collectives (counts and rows, at each level; two waits for the device), combine two, and as many
    in the backward pass of each. The sum inside a node is rounded to the rows' dtype once before it goes on.

    Raises ValueError, on every rank, where the ranks disagree: the error names rank and field (ranks of one number are
    compared first; of two that differ the higher is named). Rows move only between ranks that agree.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        ranks_per_node: int = 1,
        *,
        wire: str | tuple[str, str] = "exact",
        backward_wire: str | tuple[str, str] = "exact",
        name: str = "",
    ) -> None:
        self.wires = Wires.of("Hierarchical", wire, backward_wire)
        whole = Agreement("Hierarchical", group, name, self.wires)
        if ranks_per_node < 1 or whole.size % ranks_per_node:
            raise ValueError(
                f"Hierarchical: ranks_per_node must divide the group's {whole.size} ranks, got {ranks_per_node}"
            )
        node, local = divmod(whole.rank, ranks_per_node)
        inside = whole.ranks[node * ranks_per_node : (node + 1) * ranks_per_node]
        across = _new_group(whole.ranks[local::ranks_per_node], whole.group)
        self._join(across, _new_group(inside, whole.group), name)

    @classmethod
    def of_mesh(
        cls,
        mesh: DeviceMesh,
        *,
        wire: str | tuple[str, str] = "exact",
        backward_wire: str | tuple[str, str] = "exact",
        name: str = "",
    ) -> Hierarchical:
        """On the groups of a two-dimensional DeviceMesh (node, local)."""
        if mesh.ndim != 2:
            raise ValueError(f"Hierarchical: mesh must have two dimensions (node, local), got {mesh.ndim}")
        new = cls.__new__(cls)
        new.wires = Wires.of("Hierarchical", wire, backward_wire)
        new._join(mesh.get_group(0), mesh.get_group(1), name)
        return new

    def _join(self, across: dist.ProcessGroup, inside: dist.ProcessGroup, name: str) -> None:
        self.across = Agreement("Hierarchical", across, name, self.wires)
        self.inside = Agreement("Hierarchical", inside, name, self.wires)
        self.rank = self.across.rank * self.inside.size + self.inside.rank
        self.size = self.across.size * self.inside.size

    def local_experts(self, num_experts: int) -> range:
        return held_experts("Hierarchical", num_experts, self.rank, self.size)

    @uncompiled
    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, Routing, Ticket]:
        header = self.across.header(x, routing)
        everything = range(routing.num_experts)
        first, complaint = exchange(self.across, header, routing.expert_ids, everything, (0, 0, 0, 0, 0))
        wires = (self.wires.dispatch, self.wires.dispatch_backward)
        if first is None:  # the node must hear of it before anybody raises
            none = routing.expert_ids[:0]
            _, complaint = exchange(self.inside, header, none, everything, complaint)
            self.across.enforce(complaint)
        assert first is not None
        rows, ids, weights = send(x, routing.expert_ids, routing.weights, first, wires)
        per_node = max(routing.num_experts // self.across.size, 1)
        node = range(self.across.rank * per_node, (self.across.rank + 1) * per_node)
        second, complaint = exchange(self.inside, header, ids, node, complaint)
        self.inside.enforce(complaint)
        held = self.local_experts(routing.num_experts)
        assert second is not None
        rows, ids, weights = send(rows, ids, weights, second, wires)
        ticket = Ticket((first, second), x.shape[0], rows.shape, x.dtype)
        return rows, Routing(localised(ids, held), weights, len(held)), ticket

    @uncompiled
    def combine(self, rows: Tensor, ticket: Ticket) -> Tensor:
        wires = (self.wires.combine, self.wires.combine_backward)
        y = checked("Hierarchical", rows, ticket.shape, ticket.dtype)
        for route in reversed(ticket.routes):
            y = back(y, route, wires)
        return y

    def __repr__(self) -> str:
        named = f", name={self.across.name!r}" if self.across.name else ""
        return f"Hierarchical(nodes={self.across.size}, ranks_per_node={self.inside.size}{named})"


def _new_group(ranks: list[int], like: dist.ProcessGroup) -> dist.ProcessGroup:
    return dist.new_group(ranks, timeout=time_out(like), use_local_synchronization=True)
