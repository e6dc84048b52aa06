"""The dispatchers' contract on 16, 32 and 64 ranks, nodes of 8, in this process: the library under LocalTensorMode.

torch's LocalTensor holds a tensor for each rank; an operation runs on each of them, a collective moves rows between
them, and an int that is not the same on every rank is a SymInt. So one run of the library's code is one of all ranks,
each with tokens, splits and shapes of its own. `many_ranks` says what that mode does not say itself.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import register_pytree_node

from headgate.dispatch import (
    DISPATCHERS,
    AllGather,
    AllToAll,
    Compose,
    Dispatcher,
    Hierarchical,
    SliceAllReduce,
    collectives,
)
from headgate.kernels.routing import Routing
from headgate.moe import Experts
from headgate.placement.cluster.volume import distinct_parts

local_tensor = pytest.importorskip("torch.distributed._local_tensor", reason="this torch has no LocalTensorMode")

D, F, NODE, SLICES = 5, 6, 8, 2
# One rank; memory that processes share; one of the others, once it has counted (tests/dispatch/test_auto.py).
ELSEWHERE = ("local", "symmetric", "auto")
PLAIN = [name for name in DISPATCHERS if name not in ELSEWHERE]
KINDS = [*PLAIN, "compose"]
SIZES = [16, 32, 64]
MOST_SLOW = [*SIZES[:-1], pytest.param(SIZES[-1], marks=pytest.mark.slow)]  # of tests with many cases


# --- all ranks at once ----------------------------------------------------------------------------------------------


@dataclass
class Span:
    """A range of experts that is another one on each rank."""

    start: torch.SymInt
    stop: torch.SymInt

    def __len__(self) -> int:
        return local_tensor._map_to_rank_local_val(self.stop - self.start, 0)  # as many on each


# what runs on one rank's tensors gets that rank's range
register_pytree_node(Span, lambda span: ([span.start, span.stop], None), lambda ends, _: range(*ends))


def _range(*ends):
    return range(*ends) if all(isinstance(end, int) for end in ends) else Span(*ends)


def by_rank(function: Callable) -> Callable:
    """`function` for one rank after the other, on what is that rank's; its results put together again."""

    def of_one_rank(*args, **kwargs):
        with _disable_current_modes():  # the mode stands aside anyway, but looks at each operation: that takes time
            return function(*args, **kwargs)

    return local_tensor.maybe_run_for_local_tensor(of_one_rank)


@contextmanager
def many_ranks(size: int) -> Iterator[Callable[[Callable[[int], Tensor]], Tensor]]:
    """Inside, what runs is `size` ranks. Yields `each`: a function of the rank -> the LocalTensor of its results.

    The library asks for four things that LocalTensorMode leaves open: the number of a rank in a group; and a tensor of
    numbers, a range and a maximum where these differ between ranks. It indexes with such numbers in functions of one
    rank's tensors, which the mode would run operation by operation and not always can: they run rank by rank.
    """
    one_ranks = ("destinations", "tokens_of_places", "sum_at_places", "localised", "pack", "unpack")

    def get_rank(group: dist.ProcessGroup | None = None) -> torch.SymInt:
        # A group here is rank 0's; it stands for those of all ranks, as a dimension of a mesh has them.
        ranks = dist.get_process_group_ranks(dist.group.WORLD if group is None else group)
        stride = ranks[1] - ranks[0] if len(ranks) > 1 else 1
        return torch.SymInt(local_tensor.LocalIntNode({r: r // stride % len(ranks) for r in range(size)}))

    with torch.device("cpu"):  # torch keeps the constructors that it finds at first use: not our torch.tensor below
        torch.empty(0)
    dist.init_process_group("fake", rank=0, world_size=size)
    try:
        # The mode goes first and ours is undone first: since torch 2.14 it too sets dist.get_rank, and puts it back.
        with local_tensor.LocalTensorMode(size) as mode, pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "get_rank", get_rank)
            patch.setattr(torch, "tensor", by_rank(torch.tensor))
            for module in [m for name, m in sys.modules.items() if name.startswith("headgate.dispatch.")]:
                patch.setattr(module, "range", _range, raising=False)
                patch.setattr(module, "max", by_rank(builtins.max), raising=False)
                for name in one_ranks:
                    if hasattr(module, name):
                        patch.setattr(module, name, by_rank(getattr(module, name)))
            yield mode.rank_map
    finally:
        dist.destroy_process_group()


def parts(t: Tensor) -> list[Tensor]:
    """Each rank's tensor."""
    return [t._local_tensors[r] for r in sorted(t._local_tensors)]


def ints(values: list[int | torch.SymInt], size: int) -> list[list[int]]:
    """Each rank's values."""
    return [[local_tensor._map_to_rank_local_val(v, r) for v in values] for r in range(size)]


def make(kind: str, size: int) -> Dispatcher:
    if kind not in ("hierarchical", "compose"):
        return DISPATCHERS[kind]()
    inner = NODE if kind == "hierarchical" else SLICES
    with _disable_current_modes():  # quicker
        mesh = dist.init_device_mesh("cpu", (size // inner, inner))
    if kind == "hierarchical":
        return Hierarchical.of_mesh(mesh)
    return Compose(AllToAll(mesh.get_group(0)), AllGather(mesh.get_group(1), sliced=True))


# --- tokens ---------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """Tokens of all ranks, `tokens` of each; or, `replicated`, the same ones on each, as SliceAllReduce wants."""

    ids: Tensor
    tokens: list[int]
    experts: int
    replicated: bool = False

    def __post_init__(self) -> None:
        total = sum(self.tokens)
        self.x, self.g = torch.randn(2, total, D, dtype=torch.float64)
        self.weights = torch.rand(self.ids.shape, dtype=torch.float64)

    def of_rank(self, t: Tensor) -> Callable[[int], Tensor]:
        """`t`, rows of all tokens -> those of a rank."""
        return lambda r: t.clone() if self.replicated else t.split(self.tokens)[r].clone()


CASES = ["uneven", "all to one rank", "more choices than ranks"]


def draw(what: str, size: int, kind: str) -> Case:
    """2 experts to a rank. Uneven: every seventh rank has no token, rank 1 and a few tokens elsewhere choose no expert
    or fewer, and expert 5 is chosen by nobody."""
    uneven, even, experts = [r * 5 % 7 for r in range(size)], [2] * size, 2 * size

    def different(tokens: list[int], k: int, among: list[int]) -> Tensor:
        return torch.stack([torch.tensor(among)[torch.randperm(len(among))[:k]] for _ in range(sum(tokens))])

    holes = different(uneven, 3, [e for e in range(experts) if e != 5])
    holes[::3, 0], holes[1::5, 1:], holes[: uneven[1]] = -1, experts, -1
    ids, tokens = {
        "uneven": (holes, uneven),
        "all to one rank": (different(even, 2, [experts - 6, experts - 5]), even),
        "more choices than ranks": (different(even, size + 4, list(range(experts))), even),
    }[what]
    return Case(ids, tokens, experts, replicated=kind == "slice_all_reduce")


def close(actual: Tensor, expected: Tensor, what: str, tolerance: float) -> None:
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel():
        error, largest = (actual - expected).abs().max().item(), expected.abs().max().item()
        assert error <= tolerance * max(largest, 1e-300), f"{what}: error {error:.3g} of {largest:.3g}"


def dispatched(case: Case, kind: str, size: int, each):
    """(dispatcher, rows, local routing, ticket) of the case on every rank."""
    dispatcher = make(kind, size)
    x, ids, weights = (each(case.of_rank(t)) for t in (case.x, case.ids, case.weights))
    return dispatcher, *dispatcher.dispatch(x, Routing.from_topk(ids, weights, case.experts))


# --- the contract ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", MOST_SLOW)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", CASES)
def test_combine_is_the_adjoint_of_dispatch(kind, size, what):
    case = draw(what, size, kind)
    with many_ranks(size) as each:
        dispatcher, rows, local, ticket = dispatched(case, kind, size, each)
        r = each(lambda rank: torch.randn(parts(rows)[rank].shape, dtype=torch.float64))
        y = dispatcher.combine(r, ticket)
    copies = SLICES if kind == "compose" else 1
    pairs = ((case.ids >= 0) & (case.ids < case.experts)).sum().item()
    assert sum((ids >= 0).sum().item() for ids in parts(local.expert_ids)) == copies * pairs
    products = [a * b for a, b in zip(parts(rows), parts(r), strict=True)]
    left, largest = sum(p.sum() for p in products), sum(p.abs().sum() for p in products)
    right = (case.x * parts(y)[0]).sum() if case.replicated else (case.x * torch.cat(parts(y))).sum()
    assert abs(left - right) <= 1e-12 * largest, f"{left} and {right}"


def held(name: str, p: Tensor, rank: int, kind: str, size: int) -> Tensor:
    """The part of a parameter of all E experts that a rank holds: its experts, and of those a slice of F."""
    if kind != "compose":
        return p.chunk(size)[rank]
    p, at = p.chunk(size // SLICES)[rank // SLICES], rank % SLICES
    if name == "b_down":
        return p
    if name == "w_down":
        return p.chunk(SLICES, 2)[at]
    return torch.cat([half.chunk(SLICES, 1)[at] for half in p.chunk(2, 1)], 1)  # gate rows, then up rows


def spread(whole: Experts, kind: str, size: int, each) -> Experts:
    """The layer of every rank, with the weights of `whole`; what is added to a sum of slices is added once."""
    experts, f = (whole.num_experts * SLICES, F // SLICES) if kind == "compose" else (whole.num_experts, F)
    layer = Experts(experts // size, D, f, bias=True, dtype=torch.float64, dispatcher=None)
    layer.dispatcher = make(kind, size)

    def start(name: str, p: Tensor, rank: int) -> Tensor:
        once = name != "b_down" or kind != "compose" or rank % SLICES == 0
        return held(name, p, rank, kind, size) * float(once)

    for name, p in whole.named_parameters():
        setattr(layer, name, nn.Parameter(each(partial(start, name, p.detach()))))
    return layer


@pytest.mark.parametrize("size", MOST_SLOW)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", CASES)
def test_the_layer_is_that_of_one_rank(kind, size, what):
    case = draw(what, size, kind)
    whole = Experts(case.experts, D, F, bias=True, dtype=torch.float64)
    for p in whole.parameters():
        nn.init.normal_(p)
    x1, w1 = case.x.clone().requires_grad_(), case.weights.clone().requires_grad_()
    y1 = whole(x1, Routing.from_topk(case.ids, w1, case.experts))
    (y1 * case.g).sum().backward()
    with many_ranks(size) as each:
        layer = spread(whole, kind, size, each)
        x, weights = (each(case.of_rank(t)).requires_grad_() for t in (case.x, case.weights))
        y = layer(x, Routing.from_topk(each(case.of_rank(case.ids)), weights, case.experts))
        (y * each(case.of_rank(case.g))).sum().backward()
    for name, t, t1 in (("y", y.detach(), y1.detach()), ("dx", x.grad, x1.grad), ("weights", weights.grad, w1.grad)):
        found = torch.stack(parts(t)) if case.replicated else torch.cat(parts(t))
        close(found, t1.expand_as(found) if case.replicated else t1, name, 1e-11)
    for (name, p), p1 in zip(layer.named_parameters(), whole.parameters(), strict=True):
        expected = [held(name, p1.grad, r, kind, size) for r in range(size)]
        close(torch.stack(parts(p.grad)), torch.stack(expected), name, 1e-11)
    if what == "uneven":
        assert not whole.w_down.grad[5].any(), "somebody chose expert 5"


# --- what travels ---------------------------------------------------------------------------------------------------


@contextmanager
def recorded(size: int) -> Iterator[list[tuple[str, int, list[list[int]]]]]:
    """Collects of each collective its name, the bytes of a row, and the rows of each rank: to whom, or how many."""
    seen: list[tuple[str, int, list[list[int]]]] = []

    def recording(name: str, original: Callable) -> Callable:
        def collective(x: Tensor, *rest):
            rows = rest[1] if name == "all_to_all" else [x.shape[0]]
            seen.append((name, x.shape[1] * x.element_size(), ints(rows, size)))
            y = original(x, *rest)
            if name == "all_to_all":  # LocalTensorMode goes by what is sent alone
                assert [len(t) for t in parts(y)] == [sum(received) for received in ints(rest[0], size)]
            return y

        return collective

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_to_all", "all_gather", "reduce_scatter", "all_reduce"):
            patch.setattr(collectives, name, recording(name, getattr(collectives, name)))
        yield seen


def distinct(ids: Tensor, each: int, numbers: Iterable[int], experts: int) -> list[int]:
    """For each number n the tokens that have an expert in the n-th `each` of them."""
    chosen = [{e // each for e in row if 0 <= e < experts} for row in ids.tolist()]
    return [sum(n in row for row in chosen) for n in numbers]


def expected_rows(kind: str, case: Case, size: int) -> list[tuple[str, list[list[int]]]]:
    """The collectives of a dispatch and a combine and their rows, by what the dispatchers promise."""
    ranks, mine = range(size), [case.of_rank(case.ids)(r) for r in range(size)]
    longest = max(map(len, mine))

    def of(n: int) -> list[list[int]]:
        return [[n]] * size

    if kind == "all_gather":
        return [("all_gather", of(1)), ("all_gather", of(longest)), ("reduce_scatter", of(size * longest))]
    if kind == "slice_all_reduce":
        return [("all_gather", of(1)), ("all_reduce", of(longest))]
    if kind == "all_to_all":
        there = [distinct(ids, 2, ranks, case.experts) for ids in mine]
        back = [list(column) for column in zip(*there, strict=True)]
        return [("all_to_all", rows) for rows in ([[1] * size] * size, there, back)]
    nodes = [range(first, first + NODE) for first in range(0, size, NODE)]
    there = [distinct(ids, 2 * NODE, range(len(nodes)), case.experts) for ids in mine]
    peers = [range(r % NODE, size, NODE) for r in ranks]
    passed = [torch.cat([mine[p] for p in peers[r]]) for r in ranks]  # each rank passes on what its number's ranks have
    inside = [distinct(ids, 2, nodes[r // NODE], case.experts) for r, ids in zip(ranks, passed, strict=True)]
    back_inside = [[inside[p][r % NODE] for p in nodes[r // NODE]] for r in ranks]
    back = [[there[p][r // NODE] for p in peers[r]] for r in ranks]
    first, second = [[1] * len(nodes)] * size, [[1] * NODE] * size
    return [("all_to_all", rows) for rows in (first, there, second, inside, back_inside, back)]


@pytest.mark.parametrize("size", MOST_SLOW)
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("what", CASES)
def test_a_row_travels_once_to_each_rank_or_node_that_needs_it(kind, size, what):
    case = draw(what, size, kind)
    with many_ranks(size) as each, recorded(size) as seen:
        dispatcher, rows, _, ticket = dispatched(case, kind, size, each)
        there = len(seen)
        dispatcher.combine(rows, ticket)
    assert [(name, rows) for name, _, rows in seen] == expected_rows(kind, case, size)
    widths = [width for _, width, _ in seen]
    if kind != "slice_all_reduce":  # of two collectives the second moves rows, with ids and weights beside them
        assert set(widths[1:there:2]) == {D * 8 + case.ids.shape[1] * (4 + 8)}
    assert set(widths[there:]) == {D * 8}


@pytest.mark.parametrize("size", SIZES)
def test_an_even_router_sends_what_the_volume_formula_says(size):
    tokens, experts, k, nodes = 40, 4 * size, 20, size // NODE
    ids = torch.rand(tokens * size, experts).topk(k).indices
    case = Case(ids, [tokens] * size, experts)
    per_rank, per_node = (distinct_parts(experts, k, n) for n in (size, nodes))
    with many_ranks(size) as each:
        routes = [r for kind in ("all_to_all", "hierarchical") for r in dispatched(case, kind, size, each)[3].routes]
        direct, across, inside = (torch.tensor(ints(route.sent, size)) for route in routes)
    rank = torch.arange(size)[:, None]
    elsewhere = rank != rank.T, rank // NODE != rank.T // NODE

    def per_token(sent: Tensor, counts: Tensor) -> float:
        return sent[counts].sum().item() / len(ids)

    assert per_token(direct, elsewhere[0]) == pytest.approx(per_rank * (size - 1) / size, rel=0.02)
    assert per_token(direct, elsewhere[1]) == pytest.approx(per_rank * (nodes - 1) / nodes, rel=0.02)
    other_node, other_rank = torch.arange(nodes) != rank // NODE, torch.arange(NODE) != rank % NODE
    assert per_token(across, other_node) == pytest.approx(per_node * (nodes - 1) / nodes, rel=0.02)
    assert per_token(inside, other_rank) == pytest.approx(per_rank * (NODE - 1) / NODE, rel=0.02)


# --- one rank by itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_each_rank_finds_its_groups_and_its_experts(size):
    """Each rank's own constructors, one after the other, in a world that does not answer."""
    torch.manual_seed(3)
    whole = Experts(2 * size, 2, 1)
    for rank in range(size):
        dist.init_process_group("fake", rank=rank, world_size=size)
        try:
            two = Hierarchical(ranks_per_node=NODE)
            assert two.across.ranks == list(range(rank % NODE, size, NODE))
            assert two.inside.ranks == list(range(rank // NODE * NODE, (rank // NODE + 1) * NODE))
            for dispatcher in (two, AllToAll(), AllGather(), SliceAllReduce()):
                assert dispatcher.local_experts(2 * size) == range(2 * rank, 2 * rank + 2)
            torch.manual_seed(3)
            layer = Experts(2 * size, 2, 1, dispatcher=two)
            assert torch.equal(layer.w_down, whole.w_down[2 * rank : 2 * rank + 2])
        finally:
            dist.destroy_process_group()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["all_to_all", "all_gather", "slice_all_reduce"])
def test_the_rank_that_is_a_call_ahead_is_named(kind, size):
    odd, case = size - 3, draw("uneven", size, "slice_all_reduce")
    with many_ranks(size) as each:
        dispatcher = make(kind, size)
        ids, weights = each(case.of_rank(case.ids)), each(case.of_rank(case.weights))
        dispatcher.agreement.calls = torch.SymInt(local_tensor.LocalIntNode({r: int(r == odd) for r in range(size)}))
        words = f"call must be the same on every rank, got 2 on rank {odd} and 1 on rank 0$"
        with pytest.raises(ValueError, match=words):
            dispatcher.dispatch(each(case.of_rank(case.x)), Routing.from_topk(ids, weights, case.experts))
