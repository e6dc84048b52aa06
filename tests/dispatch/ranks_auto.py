"""Checks on many ranks: Auto and what it goes by. See ranks.py."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from dispatch_cases import AR, LINKS, Case, D, F, cases, check, close, counted, make
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils.checkpoint import checkpoint

from headgate.dispatch import DISPATCHERS, AllToAll
from headgate.kernels.routing import Routing
from headgate.moe import Experts
from headgate.placement.cluster.links import Link, Links

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
    # a busy machine may leave nothing of a latency or of a bandwidth, but not of both
    assert links.across != Link(0, float("inf")), "a link between nodes takes time"
    again = copy.deepcopy(auto)
    again.dispatch(case.mine(case.x), case.routing())
    assert (again.choice, again.found.rows) == (auto.choice, auto.found.rows)
