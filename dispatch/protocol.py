"""What every dispatcher is: a linear operator S on token rows, and its adjoint.

`dispatch` applies S: it copies each row of x [T, D] to the ranks that hold the experts it goes to, at most once each,
and gives back the R rows that this rank must compute. `combine` applies S^T: it sends one row back for each row
received, already reduced over this rank's experts, and sums what comes home: y [T, D].

Because both are linear and adjoint, the backward pass of each is the other: the gradient of `dispatch` is `combine` of
the gradient, and the other way round. All-gather with reduce-scatter, slice with all-reduce, all-to-all there and back,
two levels of them, lossy wire formats: each is such an operator, and a composition of two is one.

Two properties test every dispatcher, and a new one is tested the moment it is listed in DISPATCHERS:

    <S x, r> = <x, S^T r>                         summed over all ranks, for any x [T, D] and r [R, D]
    the layer's output and all its gradients      are those of one rank that holds every expert
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ..kernels.routing import Routing


@runtime_checkable
class Dispatcher(Protocol):
    """Moves token rows to the experts' ranks and back. It knows process groups and no nn.Module."""

    def local_experts(self, num_experts: int) -> range:
        """Which of E experts this rank holds. Raises ValueError where they cannot be shared out."""
        ...

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, Routing, Any]:
        """(rows [R, D], their local routing, ticket) of x [T, D] and its routing over all experts.

        The local routing has R rows, `num_experts` = the experts that this rank holds, -1 where a row's k-th expert is
        not one of them, and weights that are differentiable where routing's are. The ticket is what `combine` needs to
        know of this call, and nobody else's business.
        """
        ...

    def combine(self, rows: Tensor, ticket: Any) -> Tensor:
        """y [T, D]: for each token the sum, over the ranks it was sent to, of its row in `rows` [R, D]."""
        ...
