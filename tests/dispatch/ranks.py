"""One rank of the checks on many ranks: `python ranks.py RANK SIZE STORE OUT`, started by test_ranks.py.

Runs every check of CHECKS in order, on all ranks at once, and writes to OUT a line of JSON for each: its name and "" or
what went wrong. After a failure the ranks are out of step: it stops there.
"""

from __future__ import annotations

import copy
import json
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils.checkpoint import checkpoint

from headgate.dispatch import DISPATCHERS, AllGather, AllToAll, Auto, Hierarchical, Local, SliceAllReduce, collectives
from headgate.dispatch.volume import distinct_parts
from headgate.kernels.routing import Routing
from headgate.moe import Experts, MoE
from headgate.placement.links import Link, Links

CHECKS: dict[str, Callable[[], None]] = {}
D, F = 5, 6


def check(function):
    CHECKS[function.__name__] = function
    return function


def make(kind: str, **options):
    """A dispatcher over all ranks; nodes of two ranks where there are levels."""
    if kind == "hierarchical":
        return Hierarchical(ranks_per_node=2 if dist.get_world_size() > 2 else 1, **options)
    if kind == "auto":
        options = {"links": LINKS, "ranks_per_node": 2 if dist.get_world_size() > 2 else 1} | options
    return DISPATCHERS[kind](**options)


LINKS = Links(Link(10, 1), Link(20, 1))  # so that few bytes take the fewest rounds
MANY = [name for name in DISPATCHERS if name != "local"]
WIRED = [name for name in MANY if name != "slice_all_reduce"]


@dataclass
class Case:
    """Tokens of all ranks, known to each; `replicated`: every rank has them all, as SliceAllReduce wants."""

    ids: torch.Tensor
    experts: int
    tokens: list[int]
    replicated: bool
    dtype: torch.dtype = torch.float64

    def __post_init__(self):
        total = sum(self.tokens)
        self.x = torch.randn(total, D, dtype=torch.float64).to(self.dtype)
        self.g = torch.randn(total, D, dtype=torch.float64).to(self.dtype)
        self.weights = torch.rand(self.ids.shape, dtype=torch.float64).to(self.dtype)

    def mine(self, t: torch.Tensor) -> torch.Tensor:
        return t if self.replicated else t.split(self.tokens)[dist.get_rank()]

    def routing(self) -> Routing:
        return Routing.from_topk(self.mine(self.ids), self.mine(self.weights), self.experts)


def cases(name: str, dtype=torch.float64) -> dict[str, Case]:
    """Even and uneven tokens, all to one rank, more choices than ranks, nobody anywhere, ids of no expert."""
    torch.manual_seed(7)
    size, replicated = dist.get_world_size(), name == "slice_all_reduce"
    even, uneven = [6] * size, [5, 0, 9, 1, 0, 3, 6, 2][:size]
    experts = 4 * size

    def different(tokens, k, among):
        return torch.stack([torch.randperm(among)[:k] for _ in range(tokens)])

    holes = different(sum(even), 2, experts)
    holes[::3, 0], holes[1::4] = -1, experts
    drawn = {
        "even": (different(sum(even), 2, experts), even),
        "uneven": (different(sum(uneven), 2, experts), uneven),
        "all to one rank": (different(sum(even), 2, 4), even),
        "more choices than ranks": (different(sum(uneven), 3 * size, experts), uneven),
        "no expert": (torch.full((sum(even), 2), -1), even),
        "holes": (holes, even),
        "no tokens": (holes[:0], [0] * size),
    }
    return {what: Case(ids, experts, tokens, replicated, dtype) for what, (ids, tokens) in drawn.items()}


def summed(t: torch.Tensor) -> torch.Tensor:
    t = t.detach().clone()
    dist.all_reduce(t)
    return t


def close(actual, expected, what, tolerance=1e-12):
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel():
        error, size = (actual - expected).abs().max().item(), expected.abs().max().item()
        assert error <= tolerance * max(size, 1e-300), f"{what}: error {error:.3g} of {size:.3g}"


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


# --- what travels ------------------------------------------------------------------------------------------------

# (dispatch, combine, backward of combine, backward of dispatch), by short names of collectives
A2A, AG, RS, AR = "all_to_all", "all_gather", "reduce_scatter", "all_reduce"
EXPECTED = {
    "all_gather": ([AG, AG], [RS], [AG], [RS]),
    "all_to_all": ([A2A, A2A], [A2A], [A2A], [A2A]),
    "hierarchical": ([A2A] * 4, [A2A] * 2, [A2A] * 2, [A2A] * 2),
    "slice_all_reduce": ([AG], [AR], [], [AR]),
    "auto": ([AR, A2A, A2A], [A2A], [A2A], [A2A]),
}


def counted(mode: CommDebugMode) -> dict[str, int]:
    found: dict[str, int] = {}
    for op, n in mode.get_comm_counts().items():
        name = re.sub(r"_(into_tensor|single|tensor|base)", "", str(op).split(".")[-1])
        found[name] = found.get(name, 0) + n
    return found


def the_expected_collectives_and_no_others(name):
    case = cases(name)["uneven"]
    dispatcher = make(name)
    routing = case.routing()
    weights = routing.weights.clone().requires_grad_()
    x = case.mine(case.x).clone().requires_grad_()

    def seen(step):
        with CommDebugMode() as mode:
            result = step()
        return result, counted(mode)

    routing = Routing(routing.expert_ids, weights, routing.num_experts)
    (rows, local, ticket), first = seen(lambda: dispatcher.dispatch(x, routing))
    r = (rows.detach() * local.weights.sum(1, keepdim=True).detach()).requires_grad_()
    y, second = seen(lambda: dispatcher.combine(r, ticket))
    _, third = seen(lambda: y.sum().backward())
    _, fourth = seen(lambda: (rows.sum() + local.weights.sum()).backward())
    for found, expected in zip((first, second, third, fourth), EXPECTED[name], strict=True):
        assert found == {c: expected.count(c) for c in expected}, f"{found}, expected {expected}"
    assert x.grad is not None
    assert weights.grad is not None


@contextmanager
def bytes_between_ranks():
    """Collects (group's ranks, bytes to each of them) of every all-to-all."""
    seen, original = [], collectives.all_to_all

    def all_to_all(x, received, sent, group):
        each = x[:1].numel() * x.element_size() if len(x) else 0
        seen.append((dist.get_process_group_ranks(group), [n * each for n in sent]))
        return original(x, received, sent, group)

    collectives.all_to_all = all_to_all
    try:
        yield seen
    finally:
        collectives.all_to_all = original


@check
def bytes_of_all_to_all_follow_the_formula():
    size, rank = dist.get_world_size(), dist.get_rank()
    for what, case in cases("all_to_all").items():
        dispatcher, ids = AllToAll(), case.mine(case.ids)
        each = case.experts // size
        wanted = [
            sum(any(0 <= e < case.experts and e // each == to for e in row) for row in ids.tolist())
            for to in range(size)
        ]
        k = ids.shape[1]
        with bytes_between_ranks() as seen:
            rows, _, ticket = dispatcher.dispatch(case.mine(case.x), case.routing())
            dispatcher.combine(rows, ticket)
        _, message, home = (moved for _, moved in seen)
        assert message == [n * (D * 8 + k * (4 + 8)) for n in wanted], what
        assert home == [n * D * 8 for n in ticket.routes[0].received], what
        assert ticket.routes[0].sent == wanted, what
        everybody = [torch.zeros(size, dtype=torch.int64) for _ in range(size)]
        dist.all_gather(everybody, torch.tensor(wanted))
        assert ticket.routes[0].received == [int(n[rank]) for n in everybody], what


@check
def bytes_of_two_levels_follow_the_formula():
    size, rank = dist.get_world_size(), dist.get_rank()
    per_node = 2 if size > 2 else 1
    for what, case in cases("hierarchical").items():
        dispatcher = make("hierarchical")
        each, nodes = case.experts // size, size // per_node

        def distinct(ids, experts_each, numbers, experts=case.experts):
            return [sum(any(0 <= e < experts and e // experts_each == n for e in row) for row in ids) for n in numbers]

        to_nodes = distinct(case.mine(case.ids).tolist(), each * per_node, range(nodes))
        # what this rank passes on: the tokens of the ranks with its own number, for the ranks of its node
        peers = [r for r in range(size) if r % per_node == rank % per_node]
        passed = torch.cat([case.ids.split(case.tokens)[r] for r in peers]).tolist()
        node = rank // per_node
        to_ranks = distinct(passed, each, range(node * per_node, (node + 1) * per_node))
        _, _, ticket = dispatcher.dispatch(case.mine(case.x), case.routing())
        assert ticket.routes[0].sent == to_nodes, what
        assert ticket.routes[1].sent == to_ranks, what


@check
def an_even_router_sends_what_the_volume_formula_says():
    size = dist.get_world_size()
    torch.manual_seed(dist.get_rank())
    tokens, experts, k = 4000, 16, 3
    ids = torch.rand(tokens, experts).topk(k).indices
    routing = Routing.from_topk(ids, torch.ones(tokens, k), experts)
    _, _, ticket = AllToAll().dispatch(torch.zeros(tokens, 1), routing)
    copies = sum(ticket.routes[0].sent) / tokens
    assert abs(copies - distinct_parts(experts, k, size)) < 0.05, copies


# --- disagreement ------------------------------------------------------------------------------------------------


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


# --- wire formats -------------------------------------------------------------------------------------------------


def bound(t: torch.Tensor, wire: str) -> torch.Tensor:
    """The stated largest error of each element (dispatch/wire.py), and 2^-22 of the row's largest for arithmetic."""
    if wire == "exact" or not t.numel():
        return torch.zeros_like(t)
    m = t.abs().amax(1, keepdim=True)
    if wire == "bf16":
        return t.abs() * 2**-8 + 2**-134
    s = (m / (448 if wire == "fp8" else 127)).clamp_min(2**-126)
    error = torch.maximum(t.abs() * 2**-4, s * 2**-10) if wire == "fp8" else (s / 2).expand_as(t)
    return error + 2**-22 * m


def grown(t: torch.Tensor, error: torch.Tensor, wire: str) -> torch.Tensor:
    """The bound after another rounding of numbers that are already off by `error`."""
    return error + bound(t.abs() + error, wire)


def wires_keep_their_bounds(name):
    for wire in ("bf16", "fp8", "int8"):
        exact, lossy = make(name), make(name, wire=wire)
        levels = 2 if name == "hierarchical" else 1
        case = cases(name)["uneven"]
        x = case.mine(case.x)
        rows, local, ticket = exact.dispatch(x, case.routing())
        coarse, same, coarse_ticket = lossy.dispatch(x, case.routing())
        assert torch.equal(local.expert_ids, same.expert_ids), wire
        assert torch.equal(local.weights, same.weights), wire
        allowed = torch.zeros_like(rows)
        for _ in range(levels):
            allowed = grown(rows, allowed, wire)
        assert ((rows - coarse).abs() <= allowed).all(), f"{wire}: dispatch"
        assert not len(rows) or not torch.equal(rows, coarse), f"{wire}: dispatch is not lossy at all"
        y, coarse_y = exact.combine(rows, ticket), lossy.combine(rows, coarse_ticket)
        value, allowed = rows, torch.zeros_like(rows)
        ticket = getattr(ticket, "ticket", ticket)  # that of the dispatcher chosen
        routes = ticket.routes if hasattr(ticket, "routes") else (ticket.route,)
        for route in reversed(routes):
            error = grown(value, allowed, wire)
            value, _ = route.back(value, [], "exact")
            allowed, _ = route.back(error, [], "exact")
        allowed = allowed[: len(y)] + 1e-9
        assert ((y - coarse_y).abs() <= allowed).all(), f"{wire}: combine"


def wires_of_the_backward_pass(name):
    case = cases(name)["even"]
    for wire in ("bf16", "fp8", "int8"):
        gradients, outputs = [], []
        for formats in ("exact", wire, (wire, "exact"), ("exact", wire)):
            d = make(name, backward_wire=formats)
            x = case.mine(case.x).clone().requires_grad_()
            rows, _, ticket = d.dispatch(x, case.routing())
            y = d.combine(rows, ticket)
            (y * case.mine(case.g)).sum().backward()
            gradients.append(x.grad)
            outputs.append(y.detach())
        assert torch.equal(outputs[0], outputs[1]), f"{wire}: forward"
        differs = [not torch.equal(gradients[0], g) for g in gradients[1:]]
        assert all(differs), f"{wire}: backward is exact"
        close(gradients[1], gradients[0], wire, {"bf16": 2e-2, "fp8": 0.3, "int8": 5e-2}[wire])


@check
def narrow_rows_are_fewer_bytes():
    size = {"exact": 8 * D, "bf16": 2 * D, "fp8": D + 4, "int8": D + 4}
    case = cases("all_to_all")["even"]
    for wire, each in size.items():
        d = AllToAll(wire=("exact", wire))
        with bytes_between_ranks() as seen:
            rows, _, ticket = d.dispatch(case.mine(case.x), case.routing())
            d.combine(rows, ticket)
        assert seen[-1][1] == [n * each for n in ticket.routes[0].received], wire


@check
def a_row_with_an_overflow_arrives_as_nan():
    case = cases("all_to_all")["even"]
    case.x[3, 1] = float("inf")
    for wire in ("fp8", "int8"):
        rows, _, ticket = AllToAll(wire=(wire, "exact")).dispatch(case.mine(case.x), case.routing())
        y = AllToAll().combine(rows, ticket)
        broken = torch.zeros(len(case.x), D, dtype=torch.bool)
        broken[3] = True
        assert torch.equal(y.isnan(), case.mine(broken)), wire


# --- use ----------------------------------------------------------------------------------------------------------


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
    mesh = dist.init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("half", "rank"))
    group = mesh.get_group("rank")
    routing = Routing.from_topk(torch.tensor([[0, 3], [2, 1]]), torch.ones(2, 2), 8)
    dispatchers = [AllGather(group), AllToAll(group), SliceAllReduce(group), Hierarchical(group, 1), Auto(group)]
    for d in [*dispatchers, Hierarchical.of_mesh(mesh)]:
        over = size if isinstance(d, Hierarchical) and d.size == size else size // 2
        assert len(d.local_experts(8)) == 8 // over
        rows, _, ticket = d.dispatch(torch.ones(2, D), routing)
        assert d.combine(rows, ticket).shape == (2, D)


# --- the choice ---------------------------------------------------------------------------------------------------

FAR = Links(Link(1, 1), Link(1, 1e-3))


def everywhere(t) -> list:
    """The object of every rank."""
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, t)
    return found


def to_both_ranks_of_a_node() -> Case:
    """Token t goes to all ranks of node t mod N: half as many rows across, by node, as by rank."""
    size = dist.get_world_size()
    per_node = 2 if size > 2 else 1
    first = torch.arange(6 * size) % (size // per_node) * per_node * 4
    return Case(torch.stack([first, first + 4 * (per_node - 1) + 1], 1), 4 * size, [6] * size, False)


@check
def auto_is_the_dispatcher_that_it_chose():
    """Row for row; and it has chosen: every token to every rank, few bytes, a slow link between nodes."""
    two = to_both_ranks_of_a_node()
    for links, case, expected in [
        (FAR, cases("auto")["more choices than ranks"], "all_gather"),
        (LINKS, two, "all_to_all"),
        (FAR, two, "hierarchical" if dist.get_world_size() > 2 else "all_to_all"),
    ]:
        chosen, auto = make(expected), make("auto", links=links)
        rows, local, ticket = auto.dispatch(case.mine(case.x), case.routing())
        assert auto.choice == expected, auto.why()
        same, same_local, same_ticket = chosen.dispatch(case.mine(case.x), case.routing())
        assert torch.equal(rows, same), expected
        assert torch.equal(local.expert_ids, same_local.expert_ids), expected
        assert torch.equal(auto.combine(rows, ticket), chosen.combine(same, same_ticket)), expected


@check
def auto_counts_the_rows_that_the_dispatchers_move():
    size, rank = dist.get_world_size(), dist.get_rank()
    per_node = 2 if size > 2 else 1
    for what, case in cases("auto").items():
        auto = make("auto")
        auto.dispatch(case.mine(case.x), case.routing())
        _, _, one = AllToAll().dispatch(case.mine(case.x), case.routing())
        _, _, two = make("hierarchical").dispatch(case.mine(case.x), case.routing())
        node = range(rank // per_node * per_node, (rank // per_node + 1) * per_node)
        moved = []
        for way in ("sent", "received"):
            direct = getattr(one.routes[0], way)
            across, inside = (getattr(route, way) for route in two.routes)
            near = sum(n for r, n in enumerate(direct) if r in node and r != rank)
            far = sum(n for r, n in enumerate(direct) if r not in node)
            passed = sum(n for r, n in enumerate(inside) if r != rank % per_node)
            over = sum(n for r, n in enumerate(across) if r != rank // per_node)
            moved.append((near, far, passed, over))
        most = [max(n) for n in zip(*(flow for flows in everywhere(moved) for flow in flows), strict=True)]
        found = auto.found.rows
        assert [found["all_to_all"].inside, found["all_to_all"].across] == most[:2], what
        assert [found["hierarchical"].inside, found["hierarchical"].across] == most[2:], what
        every = max(case.tokens)
        nodes = size // per_node
        assert (found["all_gather"].inside, found["all_gather"].across) == (every * (size - nodes), every * (nodes - 1))


@check
def ranks_with_different_routings_and_links_choose_alike():
    """Alone each would choose something else: the first rank keeps its tokens, the others send them everywhere."""
    size, rank = dist.get_world_size(), dist.get_rank()
    k = 3 * size
    ids = torch.arange(k).repeat(4 * rank + 1, 1) if rank else torch.arange(2).repeat(5, 1)
    ids = torch.nn.functional.pad(ids, (0, k - ids.shape[1]), value=-1)
    routing = Routing.from_topk(ids, torch.ones(ids.shape), 4 * size)
    auto = make("auto", links=Links(Link(1 + rank, 1), Link(1 + 5 * rank, 1 if rank else 1e-3)))
    rows, _, ticket = auto.dispatch(torch.ones(len(ids), D), routing)
    assert len(set(everywhere((auto.choice, auto.why())))) == 1
    assert auto.found.links == Links(Link(1, 1), Link(1, 1e-3)), "those of the first rank"
    assert auto.found.tokens == 4 * size - 3
    assert auto.combine(rows, ticket).shape == (len(ids), D)


@check
def auto_counts_in_one_of_every_calls_and_chooses_anew():
    few, many = cases("auto")["no expert"], to_both_ranks_of_a_node()
    auto = make("auto", links=FAR, every=3)
    choices = []
    for case in (few, many, many, many, few, many):
        with CommDebugMode() as mode:
            auto.dispatch(case.mine(case.x), case.routing())
        choices.append((auto.choice, counted(mode).get(AR, 0)))
    # with no row to send only latency counts: one round beats two
    after = "hierarchical" if dist.get_world_size() > 2 else "all_to_all"
    expected = [("all_to_all", 1), ("all_to_all", 0), ("all_to_all", 0), (after, 1), (after, 0), (after, 0)]
    assert choices == expected, choices


@check
def the_choice_waits_for_backward_passes_to_come():
    """Recomputation gets the rows of its forward pass, though a count in between would choose another dispatcher."""
    few, many = cases("auto")["no expert"], to_both_ranks_of_a_node()
    gradients, auto = [], make("auto", links=FAR, every=1)
    for d in (auto, AllToAll()):
        torch.manual_seed(3)
        experts = Experts(many.experts, D, F, dispatcher=d, dtype=torch.float64)
        x, idle = (c.mine(c.x).clone().requires_grad_() for c in (many, few))
        nothing = checkpoint(experts, idle, few.routing(), use_reentrant=False)
        y = checkpoint(experts, x, many.routing(), use_reentrant=False)
        for part in ((y * many.mine(many.g)).sum(), nothing.sum()):
            assert auto.choice == "all_to_all", "a graph still waits"
            part.backward()
        gradients.append([x.grad, *(p.grad for p in experts.parameters())])
    for a, b in zip(*gradients, strict=True):
        close(a, b, "gradients")
    auto.dispatch(many.mine(many.x), many.routing())
    assert auto.choice == ("hierarchical" if dist.get_world_size() > 2 else "all_to_all"), auto.why()


@check
def links_are_measured_and_the_same_on_every_rank():
    size = dist.get_world_size()
    auto = DISPATCHERS["auto"](ranks_per_node=2 if size > 2 else 1)
    case = cases("auto")["even"]
    auto.dispatch(case.mine(case.x), case.routing())
    links = auto.links
    assert len(set(everywhere(links))) == 1
    assert links == auto.found.links
    assert (links.inside == Link(0, float("inf"))) == (size == 2), "a node of one rank has no link inside"
    assert links.across.latency_us > 0
    again = copy.deepcopy(auto)
    again.dispatch(case.mine(case.x), case.routing())
    assert (again.choice, again.found.rows) == (auto.choice, auto.found.rows)


for each_name in MANY:
    for each_check in (
        *(adjoint, backward_is_the_other, experts_equal_one_rank, layer_equals_one_rank, half_precision, same_bits),
        *(sums_of_half_precision_rows_are_taken_in_fp32, only_the_gradients_that_are_wanted),
        *(recomputed_in_the_backward_pass,),
        *(second_derivative, a_nan_stays_with_its_token, the_expected_collectives_and_no_others, disagreement),
        *((wires_keep_their_bounds, wires_of_the_backward_pass) if each_name in WIRED else ()),
    ):
        CHECKS[f"{each_name}: {each_check.__name__}"] = lambda f=each_check, n=each_name: f(n)


def main(rank: int, size: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    files = dist.FileStore(store, size)
    dist.init_process_group("gloo", store=files, rank=rank, world_size=size, timeout=timedelta(seconds=30))
    with open(out, "w") as lines:
        for name, function in CHECKS.items():
            torch.manual_seed(0)
            try:
                function()
                wrong = ""
            except Exception:
                wrong = traceback.format_exc()
            print(json.dumps([name, wrong]), file=lines, flush=True)
            if wrong:
                return
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
