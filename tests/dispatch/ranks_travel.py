"""Checks on many ranks: which collectives a dispatcher calls, and how many rows and bytes it sends. See ranks.py."""

from __future__ import annotations

import torch
import torch.distributed as dist
from dispatch_cases import A2A, AG, AR, RS, D, bytes_between_ranks, cases, check, counted, make
from torch.distributed.tensor.debug import CommDebugMode

from headgate.dispatch import AllToAll
from headgate.kernels.routing import Routing
from headgate.placement.cluster.volume import distinct_parts

# (dispatch, combine, backward of combine, backward of dispatch), by short names of collectives
EXPECTED = {
    "all_gather": ([AG, AG], [RS], [AG], [RS]),
    "all_to_all": ([A2A, A2A], [A2A], [A2A], [A2A]),
    "hierarchical": ([A2A] * 4, [A2A] * 2, [A2A] * 2, [A2A] * 2),
    "slice_all_reduce": ([AG], [AR], [], [AR]),
    "symmetric": ([AG], [], [], []),
    "auto": ([AR, A2A, A2A], [A2A], [A2A], [A2A]),
}


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
    if name == "symmetric":  # its first call opens a window, once
        dispatcher.dispatch(x, routing)
    (rows, local, ticket), first = seen(lambda: dispatcher.dispatch(x, routing))
    r = (rows.detach() * local.weights.sum(1, keepdim=True).detach()).requires_grad_()
    y, second = seen(lambda: dispatcher.combine(r, ticket))
    _, third = seen(lambda: y.sum().backward())
    _, fourth = seen(lambda: (rows.sum() + local.weights.sum()).backward())
    for found, expected in zip((first, second, third, fourth), EXPECTED[name], strict=True):
        assert found == {c: expected.count(c) for c in expected}, f"{found}, expected {expected}"
    assert x.grad is not None
    assert weights.grad is not None


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
