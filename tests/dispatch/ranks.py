"""The checks of dispatchers on many ranks: what each rank runs (tests/support/ranks_runner.py), for test_ranks.py."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from dispatch_cases import (
    CHECKS,
    MANY,
    WIRED,
    Case,
    D,
    F,
    cases,
    check,
    close,
    make,
    summed,
)
from torch.utils.checkpoint import checkpoint

from headgate.dispatch import AllGather, AllToAll, Auto, Hierarchical, Local, SliceAllReduce, Symmetric
from headgate.kernels.routing import Routing
from headgate.moe import Experts, MoE

sys.path.append(str(Path(__file__).parent))
import ranks_auto  # noqa: F401  # these add checks of their own
import ranks_compose  # noqa: F401
import ranks_padded  # noqa: F401
import ranks_window  # noqa: F401
from ranks_amiss import disagreement, transforms_are_refused
from ranks_travel import the_expected_collectives_and_no_others
from ranks_wire import wires_keep_their_bounds, wires_of_the_backward_pass


def adjoint(name):
    dispatcher = make(name)
    for what, case in cases(name).items():
        x = case.mine(case.x)
        rows, local, ticket = dispatcher.dispatch(x, case.routing())
        assert local.expert_ids.shape[0] == local.weights.shape[0] == rows.shape[0], what
        assert local.num_experts == len(dispatcher.local_experts(case.experts)), what
        pairs = ((case.ids >= 0) & (case.ids < case.experts)).sum()
        assert summed((local.expert_ids >= 0).sum()) == pairs, f"{what}: each pair is one rank's to compute"
        torch.manual_seed(dist.get_rank())
        r = torch.randn_like(rows)
        left, right = summed((rows * r).sum()), (x * dispatcher.combine(r, ticket)).sum()
        size = summed((rows * r).abs().sum()).item()
        right = right if case.replicated else summed(right)
        assert abs(left - right).item() <= 1e-12 * size, f"{what}: {left} and {right}"


def backward_is_the_other(name):
    dispatcher = make(name)
    for what, case in cases(name).items():
        x = case.mine(case.x).clone().requires_grad_()
        rows, _, ticket = dispatcher.dispatch(x, case.routing())
        torch.manual_seed(dist.get_rank())
        r = torch.randn_like(rows).requires_grad_()
        y = dispatcher.combine(r, ticket)
        (dx,) = torch.autograd.grad((rows * r.detach()).sum(), x)
        close(dx, y.detach(), what)
        g = case.mine(case.g)
        (dr,) = torch.autograd.grad((y * g).sum(), r)
        close(dr, dispatcher.dispatch(g, case.routing())[0], what)


def experts_equal_one_rank(name):
    dispatcher, one = make(name), Local()
    for what, case in cases(name).items():
        results = []
        for d in (dispatcher, one):
            torch.manual_seed(3)
            experts = Experts(case.experts, D, F, bias=True, dispatcher=d, dtype=torch.float64)
            part = case.mine if d is dispatcher else lambda t: t
            x, weights = (part(t).clone().requires_grad_() for t in (case.x, case.weights))
            y = experts(x, Routing.from_topk(part(case.ids), weights, case.experts))
            (y * part(case.g)).sum().backward()
            results.append((experts, y.detach(), x.grad, weights.grad))
        (mine, y, dx, dw), (whole, y1, dx1, dw1) = results
        close(y, case.mine(y1), f"{what}: y", 1e-11)
        close(dx, case.mine(dx1), f"{what}: dx", 1e-11)
        close(dw, case.mine(dw1), f"{what}: router weights", 1e-11)
        held = slice(mine.local_experts.start, mine.local_experts.stop)
        for (key, p), q in zip(mine.named_parameters(), whole.parameters(), strict=True):
            assert torch.equal(p, q[held]), f"{what}: {key} at the start"
            close(p.grad, q.grad[held], f"{what}: {key}", 1e-11)


def layer_equals_one_rank(name):
    size, experts = dist.get_world_size(), 4 * dist.get_world_size()
    case = Case(torch.zeros(0, 3), experts, [4, 0, 7, 2, 1, 0, 5, 3][:size], name == "slice_all_reduce")
    results = []
    for d in (make(name), None):
        torch.manual_seed(3)
        layer = MoE(D, F, experts, 3, shared_intermediate_size=4, dispatcher=d, dtype=torch.float64)
        torch.manual_seed(4)
        x = torch.randn(sum(case.tokens), D, dtype=torch.float64)
        g = torch.randn(sum(case.tokens), D, dtype=torch.float64)
        x, g = (t if d is None else case.mine(t) for t in (x, g))
        x = x.clone().requires_grad_()
        y = layer(x)
        (y * g).sum().backward()
        results.append((layer, y.detach(), x.grad))
    (layer, y, dx), (whole, y1, dx1) = results
    close(y, case.mine(y1), "y", 1e-11)
    close(dx, case.mine(dx1), "dx", 1e-11)
    held = slice(layer.experts.local_experts.start, layer.experts.local_experts.stop)
    for (key, p), q in zip(layer.named_parameters(), whole.parameters(), strict=True):
        if key.startswith("experts."):
            assert torch.equal(p, q[held]), f"{key} at the start"
            close(p.grad, q.grad[held], key, 1e-11)
        else:
            assert torch.equal(p, q), f"{key} at the start"
            close(p.grad if case.replicated else summed(p.grad), q.grad, key, 1e-11)


def half_precision(name):
    """bf16 rows: two roundings at most beside those of one rank."""
    dispatcher = make(name)
    case = cases(name, torch.bfloat16)["uneven"]
    results = []
    for d in (dispatcher, Local()):
        torch.manual_seed(3)
        experts = Experts(case.experts, D, F, dispatcher=d, dtype=torch.bfloat16)
        part = case.mine if d is dispatcher else lambda t: t
        x = part(case.x).clone().requires_grad_()
        y = experts(x, Routing.from_topk(part(case.ids), part(case.weights).float(), case.experts))
        (y * part(case.g)).sum().backward()
        results.append((y.detach(), x.grad))
    (y, dx), (y1, dx1) = results
    assert y.dtype == dx.dtype == torch.bfloat16
    close(y.float(), case.mine(y1).float(), "y", 4e-2)
    close(dx.float(), case.mine(dx1).float(), "dx", 4e-2)


def sums_of_half_precision_rows_are_taken_in_fp32(name):
    """256 + 1 + 1 + 1 is 256 in bf16, where each step is rounded, and 260 where only the sum is."""
    size, rank = dist.get_world_size(), dist.get_rank()
    dispatcher = make(name)
    routing = Routing.from_topk(torch.arange(size)[None], torch.ones(1, size), size)
    rows, _, ticket = dispatcher.dispatch(torch.ones(1, size, dtype=torch.bfloat16), routing)
    r = torch.ones_like(rows)
    r[:, rank] = 256  # each column has its 256 from another rank, whatever the order of the sum
    y = dispatcher.combine(r, ticket)
    # two levels: 256 + 1, rounded, from one node and 2 from each other
    expected = {2: (256, 256), 4: (260, 258), 8: (264, 262)}[size][name == "hierarchical"]
    assert (y == expected).all(), y


def only_the_gradients_that_are_wanted(name):
    case, dispatcher = cases(name)["uneven"], make(name)
    whole = []
    for wants_x, wants_weights in ((True, True), (True, False), (False, True)):
        torch.manual_seed(3)
        experts = Experts(case.experts, D, F, dispatcher=dispatcher, dtype=torch.float64)
        x = case.mine(case.x).clone().requires_grad_(wants_x)
        weights = case.mine(case.weights).clone().requires_grad_(wants_weights)
        y = experts(x, Routing.from_topk(case.mine(case.ids), weights, case.experts))
        (y * case.mine(case.g)).sum().backward()
        whole = whole or [x.grad, weights.grad, experts.w_down.grad]
        for found, expected, wanted in zip((x.grad, weights.grad), whole, (wants_x, wants_weights), strict=False):
            assert (found is not None) == wanted
            assert found is None or torch.equal(found, expected)
        assert torch.equal(experts.w_down.grad, whole[2])
        with torch.no_grad():
            assert torch.equal(experts(x, Routing.from_topk(case.mine(case.ids), weights, case.experts)), y)


def recomputed_in_the_backward_pass(name):
    case, dispatcher = cases(name)["uneven"], make(name)
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(3)
        layer = MoE(D, F, case.experts, 2, dispatcher=dispatcher, dtype=torch.float64)
        x = case.mine(case.x).clone().requires_grad_()
        y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        (y * case.mine(case.g)).sum().backward()
        gradients.append([x.grad, *(p.grad for p in layer.parameters())])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def same_bits(name):
    case = cases(name)["more choices than ranks"]
    dispatcher = make(name)

    def once():
        rows, _, ticket = dispatcher.dispatch(case.mine(case.x), case.routing())
        return dispatcher.combine(rows * 1.3, ticket)

    assert torch.equal(once(), once())


def second_derivative(name):
    case = cases(name)["uneven"]
    dispatcher = make(name)
    x = case.mine(case.x).clone().requires_grad_()
    rows, _, ticket = dispatcher.dispatch(x, case.routing())
    y = dispatcher.combine(rows.square(), ticket)  # y = S^T (S x)^2, so d<1, dy>/dx twice is 2 S^T S 1 on the diagonal
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sum(), x)
    rows, _, ticket = dispatcher.dispatch(torch.ones_like(x), case.routing())
    close(ddx, 2 * dispatcher.combine(rows, ticket).detach(), "second derivative")


def a_nan_stays_with_its_token(name):
    case = cases(name)["even"]
    case.x[3] = float("nan")
    y = Experts(case.experts, D, F, dispatcher=make(name), dtype=torch.float64)(case.mine(case.x), case.routing())
    broken = torch.zeros(len(case.x), dtype=torch.bool)
    broken[3] = True
    assert torch.equal(y.isnan().any(1), case.mine(broken))


# --- use ----------------------------------------------------------------------------------------------------------


@check
def a_layer_with_a_dispatcher_can_be_copied():
    for name in MANY:
        layer = MoE(D, F, 8, 2, dispatcher=make(name))
        x = torch.randn(3, D)
        assert torch.equal(copy.deepcopy(layer)(x), layer(x)), name


@check
def a_part_of_the_ranks_can_be_the_group():
    """Each half of the ranks a layer of its own; a DeviceMesh for two levels."""
    size = dist.get_world_size()
    mesh = dist.init_device_mesh(torch.get_default_device().type, (2, size // 2), mesh_dim_names=("half", "rank"))
    group = mesh.get_group("rank")
    routing = Routing.from_topk(torch.tensor([[0, 3], [2, 1]]), torch.ones(2, 2), 8)
    dispatchers = [
        AllGather(group),
        AllToAll(group),
        SliceAllReduce(group),
        Hierarchical(group, 1),
        Auto(group),
        Symmetric(group),
    ]
    for d in [*dispatchers, Hierarchical.of_mesh(mesh)]:
        over = size if isinstance(d, Hierarchical) and d.size == size else size // 2
        assert len(d.local_experts(8)) == 8 // over
        rows, _, ticket = d.dispatch(torch.ones(2, D), routing)
        assert d.combine(rows, ticket).shape == (2, D)


for each_name in MANY:
    for each_check in (
        *(adjoint, backward_is_the_other, experts_equal_one_rank, layer_equals_one_rank, half_precision, same_bits),
        *(sums_of_half_precision_rows_are_taken_in_fp32, only_the_gradients_that_are_wanted),
        *(recomputed_in_the_backward_pass,),
        *(second_derivative, a_nan_stays_with_its_token, the_expected_collectives_and_no_others),
        *(disagreement, transforms_are_refused),
        *((wires_keep_their_bounds, wires_of_the_backward_pass) if each_name in WIRED else ()),
    ):
        CHECKS[f"{each_name}: {each_check.__name__}"] = lambda f=each_check, n=each_name: f(n)
