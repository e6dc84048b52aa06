"""Auto and the measuring of links, as far as one process can say; ranks.py has the rest."""

import re
from math import inf

import pytest
import torch
import torch.distributed as dist

from headgate.dispatch import Auto, Hierarchical, measure
from headgate.dispatch.auto import CANDIDATES, traffic, weigh
from headgate.kernels.routing import Routing
from headgate.placement.cluster.links import Case, Link, Links

EXPERTS, TOKENS = 32, 50
FAST = Links(Link(5, 100), Link(5, 100))
SLOW_ACROSS = Links(Link(5, 100), Link(5, 1))


@pytest.fixture(scope="module")
def group():
    """A group of this process alone."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    assert not dist.is_initialized()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def routings(size: int, k: int, tokens: int = TOKENS) -> list[torch.Tensor]:
    """Expert ids of each of `size` ranks; one in ten is no expert."""
    drawn = [torch.rand(tokens + rank, EXPERTS).topk(k, dim=1).indices for rank in range(size)]
    return [ids.masked_fill(torch.rand(ids.shape) < 0.1, -1) for ids in drawn]


def summed(ids: list[torch.Tensor], per_node: int) -> list[list[float]]:
    """What the all-reduce brings, and nothing else of a group."""
    return sum(traffic(t, EXPERTS, rank, len(ids), per_node) for rank, t in enumerate(ids)).tolist()


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize(("size", "per_node"), [(1, 1), (4, 1), (4, 4), (8, 4), (8, 2)])
def test_traffic_is_what_moving_each_token_by_hand_moves(size, per_node, k):
    ids = routings(size, k)
    expected = [[0] * size for _ in range(8)]

    def move(kind: int, source: int, target: int) -> None:
        if source != target:
            line = kind + (0 if source // per_node == target // per_node else 2)
            expected[line][target] += 1
            expected[line + 1][source] += 1

    for rank, rows in enumerate(ids):
        for row in rows.tolist():
            ranks = {e // (EXPERTS // size) for e in row if e >= 0}
            for target in ranks:
                move(0, rank, target)
            entry = {node: node * per_node + rank % per_node for node in {r // per_node for r in ranks}}
            for first in entry.values():
                move(4, rank, first)
            for target in ranks:
                move(4, entry[target // per_node], target)
    assert summed(ids, per_node) == expected


def choice(k: int, links: Links, tokens: int = 2000, per_node: int = 4, candidates=CANDIDATES) -> str:
    ids = routings(8, k, tokens)
    case = Case(8, per_node, tokens + 7, EXPERTS, k, 1000, 1000)
    return weigh(1, summed(ids, per_node), case, links, candidates).choice


def test_k_much_larger_than_the_ranks_is_for_all_gather():
    assert choice(32, SLOW_ACROSS) == "all_gather"
    assert choice(32, SLOW_ACROSS, candidates=("all_to_all", "hierarchical")) == "hierarchical"


def test_a_slow_link_between_nodes_is_for_two_levels():
    assert choice(4, SLOW_ACROSS) == "hierarchical"


def test_otherwise_it_is_all_to_all():
    assert choice(4, FAST) == "all_to_all"
    assert choice(1, SLOW_ACROSS) == "all_to_all", "one expert, one copy: a second level saves nothing"
    assert choice(4, SLOW_ACROSS, tokens=0) == "all_to_all", "few bytes: the fewest rounds"


def test_the_reasons_are_printed():
    ids = routings(8, 4, 2000)
    case = Case(8, 4, 2007, EXPERTS, 4, 1000, 1000)
    said = weigh(7, summed(ids, 4), case, SLOW_ACROSS, CANDIDATES).table()
    assert said.startswith("Auto: hierarchical, chosen in call 7 for 2007 tokens a rank at most\n")
    assert "links: inside a node 5.0 us + 100 GB/s, between nodes 5.0 us + 1 GB/s" in said
    rows = dict(re.findall(r"^(\w+) .*?(?=\d)([\d.]+ +[\d.]+) ", said, re.MULTILINE))
    assert rows["all_gather"].split() == ["6.00", "1.00"]
    assert 0.8 < float(rows["hierarchical"].split()[1]) < 1
    assert next(line for line in said.splitlines() if line.endswith("chosen")).startswith("hierarchical")
    assert all(f"\n{c}: " in said for c in CANDIDATES)


def test_on_one_rank(group):
    auto = Auto()
    assert auto.why() == "Auto: no call yet, nothing chosen"
    assert auto.choice is None
    routing = Routing.from_topk(torch.tensor([[0, 3]]), torch.ones(1, 2), 4)
    rows, _, ticket = auto.dispatch(torch.ones(1, 3), routing)
    assert torch.equal(auto.combine(rows, ticket), torch.ones(1, 3))
    assert auto.links == Links(Link(0, inf), Link(0, inf))
    assert "inside a node free, between nodes free" in auto.why()
    assert repr(auto) == "Auto(ranks=1, candidates=['all_gather', 'all_to_all'], choice='all_gather')"
    assert Auto(candidates=["all_to_all"]).dispatch(torch.ones(1, 3), routing)[2].choice == "all_to_all"


def test_bad_arguments(group):
    for options, words in [
        ({"ranks_per_node": 2}, "Auto: ranks_per_node must divide the group's 1 ranks, got 2"),
        ({"ranks_per_node": 0}, "Auto: ranks_per_node must divide the group's 1 ranks, got 0"),
        ({"every": 0}, "Auto: every must be at least 1, got 0"),
        ({"candidates": ()}, "Auto: candidates must be some of all_gather, all_to_all, hierarchical, got"),
        ({"candidates": ("rings",)}, "Auto: candidates must be some of"),
        ({"candidates": ("hierarchical",)}, "Auto: candidates must have one besides hierarchical"),
        ({"wire": "fp4"}, "Auto: wire must be one of"),
    ]:
        with pytest.raises(ValueError, match=words):
            Auto(**options)
    with pytest.raises(ValueError, match=r"Auto: x must be \[T, D\]"):
        Auto().dispatch(torch.zeros(2, 3), Routing.from_topk(torch.tensor([[0]]), torch.ones(1, 1), 4))


def test_measuring_needs_two_sizes(group):
    levels = Hierarchical(None, 1)
    assert measure(levels) == Links(Link(0, inf), Link(0, inf)), "one rank has no links"
    for options, words in [({"sizes": (5, 5)}, "sizes must be two different"), ({"repeats": 0}, "repeats must be at")]:
        with pytest.raises(ValueError, match=f"measure: {words}"):
            measure(levels, **options)
