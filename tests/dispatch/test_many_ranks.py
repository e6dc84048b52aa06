"""The dispatchers' contract on 16, 32 and 64 ranks, nodes of 8, in this process: the library under LocalTensorMode.

torch's LocalTensor holds a tensor for each rank; an operation runs on each of them, a collective moves rows between
them, and an int that is not the same on every rank is a SymInt. So one run of the library's code is one of all ranks,
each with tokens, splits and shapes of its own. `many_ranks` says what that mode of torch 2.13 does not say itself.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node

from headgate.dispatch import DISPATCHERS, AllGather, AllToAll, Compose, Hierarchical, collectives
from headgate.dispatch.volume import distinct_parts
from headgate.kernels.routing import Routing
from headgate.moe import Experts

local_tensor = pytest.importorskip("torch.distributed._local_tensor", reason="this torch has no LocalTensorMode")

D, F, NODE, SLICES = 5, 6, 8, 2
KINDS = [*(name for name in DISPATCHERS if name != "local"), "compose"]
SIZES = [16, 32, 64]


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


@contextmanager
def many_ranks(size: int) -> Iterator[Callable[[Callable[[int], Tensor]], Tensor]]:
    """Inside, what runs is `size` ranks. Yields `each`: a function of the rank -> the LocalTensor of its results.

    The library's code asks for four things that LocalTensorMode leaves open: the number of a rank in a group; a tensor of
    numbers, a range and a maximum where these are not the same on every rank. And where it takes tensors apart by such
    numbers, in functions of tensors that know no other rank, these run rank by rank.
    """
    by_rank = local_tensor.maybe_run_for_local_tensor
    rank_by_rank = ("destinations", "tokens_of_places", "sum_at_places", "localised")

    def get_rank(group: dist.ProcessGroup | None = None) -> torch.SymInt:
        # A group here is rank 0's; it stands for those of all ranks, as a dimension of a mesh has them.
        ranks = dist.get_process_group_ranks(dist.group.WORLD if group is None else group)
        stride = ranks[1] - ranks[0] if len(ranks) > 1 else 1
        return torch.SymInt(local_tensor.LocalIntNode({r: r // stride % len(ranks) for r in range(size)}))

    dist.init_process_group("fake", rank=0, world_size=size)
    try:
        with pytest.MonkeyPatch.context() as patch, local_tensor.LocalTensorMode(size) as mode:
            patch.setattr(dist, "get_rank", get_rank)
            patch.setattr(torch, "tensor", by_rank(torch.tensor))
            for module in [m for name, m in sys.modules.items() if name.startswith("headgate.dispatch.")]:
                patch.setattr(module, "range", _range, raising=False)
                patch.setattr(module, "max", by_rank(builtins.max), raising=False)
                for name in rank_by_rank:
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


def make(kind: str, size: int):
    def groups(inner: int) -> list[dist.ProcessGroup]:
        mesh = dist.init_device_mesh("cpu", (size // inner, inner), mesh_dim_names=("outer", "inner"))
        return mesh, mesh.get_group(0), mesh.get_group(1)

    if kind == "hierarchical":
        return Hierarchical.of_mesh(groups(NODE)[0])
    if kind == "compose":
        _, ep, etp = groups(SLICES)
        return Compose(AllToAll(ep), AllGather(etp, sliced=True))
    return DISPATCHERS[kind]()


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


CASES = ["uneven", "all to one rank", "more choices than ranks", "holes", "no expert"]


def draw(what: str, size: int, kind: str) -> Case:
    """2 experts to a rank. Of uneven tokens every seventh rank has none, and nobody chooses expert 5."""
    uneven, even, experts = [r * 5 % 7 for r in range(size)], [2] * size, 2 * size

    def different(tokens: list[int], k: int, among: list[int]) -> Tensor:
        return torch.stack([torch.tensor(among)[torch.randperm(len(among))[:k]] for _ in range(sum(tokens))])

    holes = different(even, 2, list(range(experts)))
    holes[::3, 0], holes[1::5], holes[2:4] = -1, experts, -1
    ids, tokens = {
        "uneven": (different(uneven, 3, [e for e in range(experts) if e != 5]), uneven),
        "all to one rank": (different(even, 2, [experts - 6, experts - 5]), even),
        "more choices than ranks": (different(even, size + 4, list(range(experts))), even),
        "holes": (holes, even),
        "no expert": (torch.full_like(holes, -1), even),
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


@pytest.mark.parametrize("size", SIZES)
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
    for name, p in whole.named_parameters():

        def start(rank: int, name=name, p=p.detach()) -> Tensor:
            once = name != "b_down" or kind != "compose" or rank % SLICES == 0
            return held(name, p, rank, kind, size) * float(once)

        setattr(layer, name, nn.Parameter(each(start)))
    return layer


@pytest.mark.parametrize("size", SIZES)
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
        assert not w1.grad.numel() or not whole.w_down.grad[5].any(), "somebody chose expert 5"
