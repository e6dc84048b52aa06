"""The two movements of a dispatcher as differentiable functions, each the backward pass of the other.

A Route is one call's linear operator S with its adjoint: plain tensors, no graph. `send` and `back` put it into the
graph. They keep the route (row numbers and splits) for the backward pass and no row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Route(Protocol):
    """Where the rows of a call go. Both ways move `rows` in the format `wire`, and what is beside them exact."""

    def send(self, rows: Tensor | None, beside: Sequence[Tensor], wire: str) -> tuple[Tensor | None, list[Tensor]]:
        """S: [T, c] -> [R, c] each."""
        ...

    def back(self, rows: Tensor | None, beside: Sequence[Tensor], wire: str) -> tuple[Tensor | None, list[Tensor]]:
        """S^T: [R, c] -> [T, c] each, summed in fp32 or better, in the dtypes that came in."""
        ...


def send(x: Tensor, ids: Tensor, weights: Tensor, route: Route, wires: tuple[str, str]) -> tuple[Tensor, ...]:
    """(rows, ids, weights) [R, ...] of S; differentiable in x and weights. wires: forward, backward."""
    return _Send.apply(x, weights, ids, route, wires)


def back(rows: Tensor, route: Route, wires: tuple[str, str]) -> Tensor:
    """y [T, D] = S^T rows, differentiable."""
    return _Back.apply(rows, None, route, wires)[0]


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor | None, weights: Tensor | None, ids: Tensor | None, route: Route, wires):
        ctx.route, ctx.wires = route, wires
        beside = [t for t in (ids, weights) if t is not None]
        rows, moved = route.send(x, beside, wires[0])
        new_weights = None if weights is None else moved.pop()
        new_ids = None if ids is None else moved.pop()
        if new_ids is not None:
            ctx.mark_non_differentiable(new_ids)
        return rows, new_ids, new_weights

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        # Whether a gradient is wanted was part of the agreement, so the ranks leave out the same ones.
        rows = grads[0] if ctx.needs_input_grad[0] else None
        weights = grads[2] if ctx.needs_input_grad[1] else None
        return (*_Back.apply(rows, weights, ctx.route, ctx.wires[::-1]), None, None, None)


class _Back(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor | None, weights: Tensor | None, route: Route, wires):
        ctx.route, ctx.wires = route, wires
        y, moved = route.back(rows, [] if weights is None else [weights], wires[0])
        return y, (moved[0] if moved else None)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        rows = grads[0] if ctx.needs_input_grad[0] else None
        weights = grads[1] if ctx.needs_input_grad[1] else None
        rows, _, weights = _Send.apply(rows, weights, None, ctx.route, ctx.wires[::-1])
        return rows, weights, None, None
