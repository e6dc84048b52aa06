"""Two dispatchers, one inside the other: a composition of two linear operators is one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..kernels.routing import Routing
from .protocol import Dispatcher


class Compose:
    """S = S_inner S_outer, S^T = S_outer^T S_inner^T.

    `outer` brings rows to the ranks that share an expert, `inner` distributes them among those, and is given the
    experts that `outer` left to this rank. Expert tensor parallelism is AllToAll(ep) outside and AllGather(etp,
    sliced=True) inside: rows go to the group that holds their expert, each rank of it computes its slice of F for all
    of them, and the partial sums are added on their way back (reduce-scatter).

    >>> dispatcher = Compose(AllToAll(fold.group("ep")), AllGather(fold.group("etp"), sliced=True))
    """

    def __init__(self, outer: Dispatcher, inner: Dispatcher) -> None:
        for name, part in (("outer", outer), ("inner", inner)):
            if isinstance(part, type) or not isinstance(part, Dispatcher):
                raise TypeError(f"Compose: {name} must be a dispatcher such as AllToAll(group), got {part!r}")
        self.outer, self.inner = outer, inner

    def local_experts(self, num_experts: int) -> range:
        held = self.outer.local_experts(num_experts)
        part = self.inner.local_experts(len(held))
        return range(held.start + part.start, held.start + part.stop)

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, Routing, Any]:
        x, routing, outside = self.outer.dispatch(x, routing)
        x, routing, inside = self.inner.dispatch(x, routing)
        return x, routing, (outside, inside)

    def combine(self, rows: Tensor, ticket: Any) -> Tensor:
        outside, inside = ticket
        return self.outer.combine(self.inner.combine(rows, inside), outside)

    def __repr__(self) -> str:
        return f"Compose({self.outer}, {self.inner})"
