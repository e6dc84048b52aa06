"""What the checks of dispatchers on many ranks share: routings, comparisons, and what is seen of the collectives."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

from headgate.dispatch import DISPATCHERS, Hierarchical, collectives
from headgate.kernels.routing import Routing
from headgate.placement.cluster.links import Link, Links

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


A2A, AG, RS, AR = "all_to_all", "all_gather", "reduce_scatter", "all_reduce"


def counted(mode: CommDebugMode) -> dict[str, int]:
    found: dict[str, int] = {}
    for op, n in mode.get_comm_counts().items():
        name = re.sub(r"_(into_tensor|single|tensor|base)", "", str(op).split(".")[-1])
        found[name] = found.get(name, 0) + n
    return found


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
