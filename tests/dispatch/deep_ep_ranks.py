"""The checks of DeepEP on many ranks, as ranks.py has those of the others: on its kernels where the ranks have GPUs, on
a model of their interface (tests/support/elastic.py) elsewhere. Most rows are small integers, whose sums are exact."""

from __future__ import annotations

import copy

import dispatch_cases as ranks
import elastic
import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import headgate
from headgate.dispatch import AllToAll, DeepEP, Local
from headgate.kernels.routing import Routing
from headgate.moe import Experts

CHECKS = {}
D, F, T, K = 256, 6, 64, 16


def check(function):
    CHECKS[function.__name__] = function
    return function


def make(**options) -> DeepEP:
    sizes = {"max_tokens": T, "hidden_size": D, "top_k": K}
    if torch.get_default_device().type == "cpu":
        options["buffer"] = elastic.ElasticBuffer(dist.group.WORLD, T, D, K)
    return DeepEP(**sizes, **options)


def cases() -> dict[str, ranks.Case]:
    drawn = ranks.cases("deep_ep", torch.bfloat16)
    for case in drawn.values():
        case.x, case.g = (torch.randint(-3, 4, (sum(case.tokens), D)).bfloat16() for _ in range(2))
        case.weights = torch.randint(1, 9, case.ids.shape).float()
    return drawn


@check
def rows_and_gradients_are_those_of_all_to_all():
    dispatcher = make()
    for what, case in cases().items():
        results = []
        for d in (dispatcher, AllToAll()):
            x, weights = (case.mine(t).clone().requires_grad_() for t in (case.x, case.weights))
            rows, local, ticket = d.dispatch(x, Routing.from_topk(case.mine(case.ids), weights, case.experts))
            assert local.num_experts == case.experts // dist.get_world_size(), what
            own = local.weights.masked_fill(local.expert_ids < 0, 0)  # AllToAll carries the others along
            y = d.combine(rows * own.sum(1, keepdim=True).bfloat16(), ticket)
            (y * case.mine(case.g)).sum().backward()
            results.append([rows.detach(), local.expert_ids, own.detach(), y.detach(), x.grad, weights.grad])
        names = ("rows", "ids", "weights", "y", "dx", "router weights")
        for name, a, b in zip(names, *results, strict=True):
            assert a.dtype == b.dtype, f"{what}: {name}"
            # products of up to K weights, summed in two orders of rounding
            ranks.close(a.double(), b.double(), f"{what}: {name}", 2e-2 if name in ("y", "dx", "router weights") else 0)


@check
def combine_is_the_adjoint_of_dispatch():
    dispatcher = make()
    for what, case in cases().items():
        x = case.mine(case.x).clone().requires_grad_()
        weights = case.mine(case.weights).clone().requires_grad_()
        rows, local, ticket = dispatcher.dispatch(x, Routing.from_topk(case.mine(case.ids), weights, case.experts))
        torch.manual_seed(dist.get_rank())
        r, v = torch.randint(-3, 4, rows.shape).bfloat16(), torch.randint(-3, 4, local.weights.shape).float()
        y = dispatcher.combine(r, ticket)
        left, right = ranks.summed((rows.double() * r).sum()), ranks.summed((x.double() * y).sum())
        assert left == right, what
        dx, dw = torch.autograd.grad([rows, local.weights], [x, weights], [r, v])
        assert torch.equal(dx, y), what
        left, right = ranks.summed((local.weights * v).sum()), ranks.summed((weights * dw).sum())
        assert left == right, f"{what}: router weights"
        g = case.mine(case.g)
        r.requires_grad_()
        (dr,) = torch.autograd.grad(dispatcher.combine(r, ticket), r, g)
        assert torch.equal(dr, dispatcher.dispatch(g, case.routing())[0]), what


@check
def experts_equal_one_rank():
    dispatcher = make()
    for what in ("uneven", "holes"):
        case = cases()[what]
        case.x, case.g = (torch.randn(t.shape).bfloat16() for t in (case.x, case.g))
        results = []
        for d in (dispatcher, Local()):
            torch.manual_seed(3)
            experts = Experts(case.experts, D, F, dispatcher=d, dtype=torch.bfloat16)
            part = case.mine if d is dispatcher else lambda t: t
            x, weights = (part(t).clone().requires_grad_() for t in (case.x, case.weights))
            routing = Routing.from_topk(part(case.ids), weights, case.experts)
            y = checkpoint(experts, x, routing, use_reentrant=False)
            (y * part(case.g)).sum().backward()
            results.append([y.detach(), x.grad, weights.grad])
        for name, a, b in zip(("y", "dx", "router weights"), *results, strict=True):
            ranks.close(a.float(), case.mine(b).float(), f"{what}: {name}", 4e-2)


@check
def gradients_of_the_router_weights_alone_and_of_gradients():
    case, dispatcher = cases()["holes"], make()
    weights = case.mine(case.weights).clone().requires_grad_()
    ids = case.mine(case.ids)
    _, local, _ = dispatcher.dispatch(case.mine(case.x), Routing.from_topk(ids, weights, case.experts))
    (dw,) = torch.autograd.grad(local.weights.square().sum(), weights, create_graph=True, retain_graph=True)
    held = ((ids >= 0) & (ids < case.experts)).float()
    assert torch.equal(dw, 2 * weights * held)
    (ddw,) = torch.autograd.grad((dw * 3).sum(), weights)
    assert torch.equal(ddw, 6 * held)
    # S^T v in the weights, and so S u where u is: zero where another rank holds the expert
    v = torch.ones_like(local.weights).requires_grad_()
    u = case.mine(case.weights)
    (dw,) = torch.autograd.grad(local.weights, weights, v, create_graph=True)
    (dv,) = torch.autograd.grad((dw * u).sum(), v)
    assert torch.equal(dv, dispatcher.dispatch(case.mine(case.x), case.routing())[1].weights)


@check
def what_the_kernels_do_not_take_is_an_error_on_every_rank():
    dispatcher, last = make(), dist.get_world_size() - 1
    odd = dist.get_rank() == last

    def dispatch(tokens=2, d=D, k=2, dtype=torch.bfloat16):
        routing = Routing.from_topk(torch.arange(k).expand(tokens, k), torch.ones(tokens, k), 8 * dist.get_world_size())
        return dispatcher.dispatch(torch.ones(tokens, d, dtype=dtype), routing)

    with pytest.raises(TypeError, match=r"DeepEP: x must be torch\.bfloat16, got torch\.float32"):
        dispatch(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"DeepEP: x must be \[T, 256\], got \(2, 512\)"):
        dispatch(d=512)
    with pytest.raises(ValueError, match="DeepEP: top_k must be at most 16, got 17"):
        dispatch(k=17)
    with pytest.raises(ValueError, match=rf"DeepEP: x must have at most 64 rows, got 65 on rank {last}"):
        dispatch(tokens=65 if odd else 2)
    with pytest.raises(ValueError, match=rf"DeepEP: top_k must be the same on every rank, got 3 on rank {last}"):
        dispatch(k=3 if odd else 2)
    rows, _, ticket = dispatch()
    with pytest.raises(ValueError, match=r"DeepEP: rows must be \[R, D\] as this dispatch gave them"):
        dispatcher.combine(rows[:, 1:], ticket)
    assert dispatcher.combine(rows, ticket).shape == (2, D)


@check
def a_copy_shares_the_buffer():
    dispatcher = make(name="layer")
    twin = copy.deepcopy(dispatcher)
    assert twin.buffer is dispatcher.buffer
    assert repr(twin) == repr(dispatcher)


@check
def parallelize_takes_it_by_name_with_one_buffer_for_layers_alike():
    world, cpu = dist.get_world_size(), torch.get_default_device().type == "cpu"
    fold = headgate.Fold({"dp": world}, {"ep": world})

    def model():
        torch.manual_seed(3)
        return torch.nn.Sequential(*(headgate.MoE(D, F, 2 * world, 2, dtype=torch.bfloat16) for _ in range(2)))

    with pytest.MonkeyPatch.context() as patch:
        if cpu:
            with pytest.raises(ValueError, match="dispatcher='deep_ep' cannot run here: device must be a CUDA GPU"):
                headgate.parallelize(model(), fold, dispatcher="deep_ep", max_tokens=T)
            patch.setattr(DeepEP, "why_not", staticmethod(lambda: None))
            new = lambda self: elastic.ElasticBuffer(self.agreement.group, T, D, self.top_k)  # noqa: E731
            patch.setattr(DeepEP, "_new_buffer", new)
        for how, words in (
            ({}, "max_tokens must be given with dispatcher='deep_ep', .* got None"),
            ({"max_tokens": T, "wire": "bf16"}, "wire must be 'exact' with dispatcher='deep_ep', got 'bf16'"),
            ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ):
            with pytest.raises(ValueError, match=words):
                headgate.parallelize(model(), fold, dispatcher="deep_ep", **how)
        with pytest.raises(ValueError, match="max_tokens must come with dispatcher='deep_ep' only, got 8"):
            headgate.parallelize(model(), fold, max_tokens=8)
        with pytest.raises(ValueError, match="hidden_size must be a multiple of 256, got 128"):
            headgate.parallelize(headgate.MoE(128, F, world, 1), fold, dispatcher="deep_ep", max_tokens=8)
        mine = headgate.parallelize(model(), fold, dispatcher="deep_ep", max_tokens=T)
    first, second = (layer.experts.dispatcher.dispatcher for layer in mine)
    assert isinstance(first, DeepEP)
    assert first.buffer is second.buffer
    other = headgate.parallelize(model(), fold, dispatcher="all_to_all")
    torch.manual_seed(dist.get_rank())
    x, results = torch.randn(9, D).bfloat16(), []
    for m in (mine, other):
        y = m(x)
        y.float().square().sum().backward()
        results.append([y.detach(), *(p.grad for p in m.parameters())])
    for a, b in zip(*results, strict=True):
        ranks.close(a.double(), b.double(), "deep_ep by name", 3e-2)
