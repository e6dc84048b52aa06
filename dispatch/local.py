"""The dispatcher of one rank that holds every expert: the identity, which is its own adjoint."""

from __future__ import annotations

from torch import Tensor

from ..kernels.routing import Routing


class Local:
    """S = I: every row stays where it is, so that one rank and a thousand run the same expert operation."""

    def local_experts(self, num_experts: int) -> range:
        return range(num_experts)

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, Routing, None]:
        return x, routing, None

    def combine(self, rows: Tensor, ticket: None) -> Tensor:
        return rows

    def __repr__(self) -> str:
        return "Local()"
