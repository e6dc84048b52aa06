"""Checks on many ranks: ranks that disagree, and what a dispatcher refuses. See ranks.py."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from dispatch_cases import AG, MANY, WIRED, D, F, cases, check, counted, make
from func_transforms import ONE
from torch.distributed.tensor.debug import CommDebugMode

from headgate.dispatch import AllToAll, SliceAllReduce
from headgate.kernels.routing import Routing
from headgate.moe import MoE


def disagreement(name):
    """The last rank differs in one thing: everybody hears of it, by rank and field, and can go on."""
    size, rank = dist.get_world_size(), dist.get_rank()
    odd = rank == size - 1

    def dispatch(
        experts=8, k=2, d=D, dtype=torch.float32, weights_dtype=torch.float32, grad=False, tokens=3, **options
    ):
        x = torch.randn(tokens, d, dtype=dtype, requires_grad=grad)
        ids = torch.arange(tokens * k).view(tokens, k) % experts
        options.setdefault("name", "same")
        make(name, **options).dispatch(x, Routing.from_topk(ids, torch.ones(tokens, k, dtype=weights_dtype), experts))

    trials = [
        ("num_experts", {"experts": 16}, "got 16 on rank {r} and 8 on rank"),
        ("top_k", {"k": 1}, "got 1 on rank {r} and 2 on rank"),
        ("hidden_size", {"d": 7}, "got 7 on rank {r} and 5 on rank"),
        ("dtype", {"dtype": torch.float64}, "got torch.float64 on rank {r} and torch.float32 on rank"),
        ("weights_dtype", {"weights_dtype": torch.bfloat16}, "got torch.bfloat16 on rank {r}"),
        ("name", {"name": "layer 2"}, "on rank {r}"),
        ("gradients", {"grad": True}, "got x on rank {r} and none on rank"),
    ]
    if name in WIRED:
        trials.append(("wire", {"wire": ("fp8", "bf16")}, "got (fp8, bf16) on rank {r} and (exact, exact) on rank"))
        trials.append(("backward_wire", {"backward_wire": "bf16"}, "on rank {r}"))
    else:
        trials.append(("tokens", {"tokens": 4}, "got 4 on rank {r} and 3 on rank 0"))
    for field, change, words in trials:
        with pytest.raises(ValueError, match=f": {field} must be the same on every rank") as caught:
            dispatch(**(change if odd else {}))
        assert words.format(r=size - 1) in str(caught.value), caught.value
    dispatch()


def transforms_are_refused(name):
    """By name, on every rank, before anything moves: the next call is as ever."""
    x, ids = torch.randn(3, D), torch.arange(6).view(3, 2)
    dispatcher = make(name)

    def moved(x, scale=1.0):
        rows, _, ticket = dispatcher.dispatch(x, Routing.from_topk(ids, torch.full((3, 2), scale), 8))
        return dispatcher.combine(rows, ticket)

    words = r"\w+: tensors must not be those of a transform .* take them on one rank"
    for transform in ("jvp", "grad", "forward_ad"):
        with pytest.raises(NotImplementedError, match=words):
            ONE[transform](moved, (x,))
    with pytest.raises(NotImplementedError, match=words):
        torch.func.vmap(moved)(x[None])
    assert moved(x).shape == x.shape


@check
def ranks_of_one_node_that_disagree_all_hear_of_it():
    """Ranks of one number agree with each other, across nodes; inside the nodes it comes out."""
    odd = dist.get_rank() % 2
    dispatcher = make("hierarchical")
    routing = Routing.from_topk(torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1), 16 if odd else 8)
    with pytest.raises(ValueError, match=r"num_experts must be .*, got 16 on rank [1357] and 8 on rank [0246]"):
        dispatcher.dispatch(torch.zeros(3, D), routing)


@check
def a_call_too_few_is_noticed():
    dispatcher = AllToAll()
    routing = Routing.from_topk(torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1), 8)
    dispatcher.dispatch(torch.zeros(1, 2), routing)
    if dist.get_rank() == 1:
        dispatcher.agreement.calls += 1  # as after a call that only this rank made
    with pytest.raises(ValueError, match="call must be the same on every rank, got 3 on rank 1 and 2 on rank 0"):
        dispatcher.dispatch(torch.zeros(1, 2), routing)


@check
def slice_all_reduce_can_check_the_first_call_only():
    dispatcher = SliceAllReduce(check="first")
    routing = Routing.from_topk(torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1), 8)
    for expected in ({AG: 1}, {}, {}):
        with CommDebugMode() as mode:
            dispatcher.dispatch(torch.zeros(1, 2), routing)
        assert counted(mode) == expected


@check
def a_number_of_experts_that_cannot_be_shared_is_refused():
    size = dist.get_world_size()
    for name in MANY:
        d = make(name)
        words = f"^{type(d).__name__}: num_experts must be a multiple of the group's {size} ranks, got {size + 1}$"
        with pytest.raises(ValueError, match=words):
            MoE(D, F, size + 1, 1, dispatcher=d)


@check
def rows_that_do_not_fit_the_dispatch_are_refused():
    case = cases("all_to_all")["even"]
    for name in MANY:
        d = make(name)
        rows, _, ticket = d.dispatch(case.mine(case.x), case.routing())
        for wrong in (torch.cat([rows, torch.zeros(1, D)]), rows[:, 1:], rows[None]):
            with pytest.raises(ValueError, match=r"rows must be \[R, D\] as this dispatch gave them, \(\d+, 5\), got"):
                d.combine(wrong, ticket)
