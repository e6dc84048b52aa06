"""Checks on many ranks: two dispatchers, one inside the other. See ranks.py."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from dispatch_cases import A2A, AG, RS, cases, check, close, counted, summed
from torch.distributed.tensor.debug import CommDebugMode

from headgate.dispatch import AllGather, AllToAll, Compose, Fold, Hierarchical, SliceAllReduce


def compositions() -> dict[str, Compose]:
    """Two dispatchers, one inside the other: over half of the ranks, and between neighbours."""
    half = max(dist.get_world_size() // 2, 1)
    fold = Fold({"dp": dist.get_world_size()}, {"ep": half, "etp": dist.get_world_size() // half})
    ep, etp = fold.group("ep"), fold.group("etp")
    return {
        "all-to-all, gathered slices": Compose(AllToAll(ep), AllGather(etp, sliced=True)),
        "two levels, gathered slices": Compose(Hierarchical(ep, min(half, 2)), AllGather(etp, sliced=True)),
        "all-gather, all-to-all": Compose(AllGather(ep), AllToAll(etp)),
        "all-to-all twice": Compose(AllToAll(ep), AllToAll(etp)),
        "all-reduce, slices reduced": Compose(SliceAllReduce(ep), SliceAllReduce(etp, sliced=True)),
    }


@check
def a_composition_is_an_operator_and_its_adjoint():
    for name, dispatcher in compositions().items():
        replicated = isinstance(dispatcher.outer, SliceAllReduce)
        for what, case in cases("slice_all_reduce" if replicated else "all_to_all").items():
            x = case.mine(case.x).clone().requires_grad_()
            rows, local, ticket = dispatcher.dispatch(x, case.routing())
            assert local.num_experts == len(dispatcher.local_experts(case.experts)), (name, what)
            torch.manual_seed(dist.get_rank())
            r = torch.randn_like(rows).requires_grad_()
            y = dispatcher.combine(r, ticket)
            left, right = summed((rows * r).sum()), (x * y).sum().detach()
            size, right = summed((rows * r).abs().sum()).item(), right if replicated else summed(right)
            assert abs(left - right).item() <= 1e-12 * size, f"{name}, {what}: {left} and {right}"
            close(torch.autograd.grad((rows * r.detach()).sum(), x)[0], y.detach(), f"{name}, {what}")
            g = case.mine(case.g)
            close(
                torch.autograd.grad((y * g).sum(), r)[0], dispatcher.dispatch(g, case.routing())[0], f"{name}, {what}"
            )


@check
def a_composition_has_the_collectives_of_its_parts():
    dispatcher, case = compositions()["all-to-all, gathered slices"], cases("all_to_all")["uneven"]
    with CommDebugMode() as mode:
        rows, _, ticket = dispatcher.dispatch(case.mine(case.x), case.routing())
    assert counted(mode) == {A2A: 2, AG: 2}
    with CommDebugMode() as mode:
        dispatcher.combine(rows, ticket)
    assert counted(mode) == {RS: 1, A2A: 1}


@check
def a_composition_is_made_of_dispatchers():
    with pytest.raises(TypeError, match="Compose: inner must be a dispatcher such as AllToAll"):
        Compose(AllToAll(), AllGather)
