"""Checks on many ranks: rows padded to a capacity. See ranks.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from dispatch_cases import A2A, AG, Case, D, F, bytes_between_ranks, cases, check, close, counted
from torch.distributed.tensor.debug import CommDebugMode

from headgate.dispatch import AllToAll
from headgate.kernels.routing import Routing
from headgate.moe import Experts


def limited(case: Case, capacity: int = 4) -> Routing:
    """The case's routing without an expert's pairs beyond the first `capacity` of this rank."""
    routing = case.routing()
    ids = routing.expert_ids.clone()
    for e in range(case.experts):
        at = (ids.flatten() == e).nonzero().flatten()[capacity:]
        ids.view(-1)[at] = -1
    return Routing(ids, routing.weights, routing.num_experts, capacity=capacity)


@check
def padded_to_capacity_the_shapes_do_not_depend_on_the_choice():
    """As many rows to every rank, and the numbers of the same routing without padding."""
    size, shapes = dist.get_world_size(), set()
    for what in ("even", "all to one rank", "holes", "no expert"):
        case = cases("all_to_all")[what]
        routing, results = limited(case), []
        for r in (routing, Routing(routing.expert_ids, routing.weights, routing.num_experts)):
            torch.manual_seed(3)
            experts = Experts(case.experts, D, F, bias=True, dispatcher=AllToAll(), dtype=torch.float64)
            x, w = case.mine(case.x).clone().requires_grad_(), r.weights.clone().requires_grad_()
            r = dataclasses.replace(r, weights=w)
            y = experts(x, r)
            (y * case.mine(case.g)).sum().backward()
            results.append([y.detach(), x.grad, w.grad, *(p.grad for p in experts.parameters())])
        for a, b in zip(*results, strict=True):
            close(a, b, what, 1e-12)
        with bytes_between_ranks() as seen:
            rows, _, ticket = AllToAll().dispatch(case.mine(case.x), routing)
            y = AllToAll().combine(rows, ticket)
        assert y.shape == (6, D)
        shapes.add((tuple(rows.shape), routing.expert_ids.shape[1], *(tuple(moved) for _, moved in seen)))
    assert len(shapes) == 1, shapes
    assert next(iter(shapes))[0] == (size * min(6, 4 * 4), D)


@check
def padded_to_capacity_later_calls_need_no_counts():
    case = cases("all_to_all")["even"]
    for when, expected in (("first", [{AG: 1, A2A: 1}, {A2A: 1}, {A2A: 1}]), ("always", [{AG: 1, A2A: 1}] * 2)):
        dispatcher = AllToAll(check=when)
        for wanted in expected:
            with CommDebugMode() as mode:
                dispatcher.dispatch(case.mine(case.x), limited(case))
            assert counted(mode) == wanted, when
    size, odd = dist.get_world_size(), dist.get_rank() == dist.get_world_size() - 1
    with pytest.raises(ValueError, match=f"capacity must be the same on every rank, got 5 on rank {size - 1} and 4 on"):
        AllToAll().dispatch(case.mine(case.x), limited(case, 5 if odd else 4))
