"""What all ranks share: how they lie on nodes, one batch, and the truth of one process that every rank can compute."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...kernels.grouped_ffn import grouped_ffn_reference
from ..shapes import DTYPES, UNSCALED, Problem, Shape, make_parameters

_QWEN3 = UNSCALED["qwen3"].experts_class
# Small, so that ranks with one core each take milliseconds; all are Qwen3-MoE experts of these sizes.
SHAPES = {
    s.name: s
    for s in (
        Shape("fine", 512, 256, 64, 8, _QWEN3, "many small experts, as Qwen3-30B-A3B has them"),
        Shape("few", 512, 1024, 8, 2, _QWEN3, "few large experts, as Mixtral-8x7B has them"),
        Shape("thin", 1024, 64, 128, 8, _QWEN3, "wide rows and little work for each: mostly moving"),
    )
}


@dataclass(frozen=True)
class Layout:
    """`ranks` G, of which ranks n * ranks_per_node .. are node n."""

    ranks: int
    ranks_per_node: int

    @property
    def nodes(self) -> int:
        return self.ranks // self.ranks_per_node

    def off_rank(self) -> Tensor:
        """bool [G, G]: sender and receiver are two."""
        return ~torch.eye(self.ranks, dtype=torch.bool)

    def off_node(self) -> Tensor:
        """bool [G, G]: sender and receiver are on two nodes."""
        node = torch.arange(self.ranks) // self.ranks_per_node
        return node[:, None] != node


@dataclass
class Inputs:
    """What one contestant is given on one rank: x [T, D], ids int64 [T, K], weights [T, K], the cotangent [T, D]."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    grad: Tensor


@dataclass
class Truth:
    """One process that holds every expert, in fp32: y [G*T, D] and the gradients of everything."""

    y: Tensor
    x: Tensor
    weights: Tensor
    parameters: dict[str, Tensor]


@dataclass
class World:
    """One batch of G * T tokens over E experts, the same on every rank, and this rank's place in it."""

    layout: Layout
    rank: int
    shape: Shape
    tokens: int  # T, of each rank
    dtype: str
    skew: float
    problem: Problem = field(init=False, repr=False)
    truth: Truth = field(init=False, repr=False)

    def __post_init__(self) -> None:
        parameters = make_parameters(self.shape, DTYPES[self.dtype])
        self.problem = _batch(self.shape, self.layout.ranks * self.tokens, DTYPES[self.dtype], self.skew, parameters)
        self.truth = _truth(self.problem)

    @property
    def ids(self) -> Tensor:
        """int64 [G*T, K], of all ranks."""
        return self.problem.routings[0][0]

    @property
    def held(self) -> slice:
        """This rank's experts."""
        each = self.shape.experts // self.layout.ranks
        return slice(self.rank * each, (self.rank + 1) * each)

    def mine(self, shared: bool) -> slice:
        """The tokens that this rank is given: its own T, or all of them where ranks share one batch."""
        return slice(None) if shared else slice(self.rank * self.tokens, (self.rank + 1) * self.tokens)

    def inputs(self, shared: bool) -> Inputs:
        p, at = self.problem, self.mine(shared)
        ids, weights = p.routings[0]
        x, weights = (t.detach()[at].clone().requires_grad_() for t in (p.x, weights))
        return Inputs(x, ids[at].clone(), weights, p.grad[at].clone())


def _batch(shape: Shape, tokens: int, dtype: torch.dtype, skew: float, parameters) -> Problem:
    """Experts by Gumbel top-k under log-popularities of standard deviation `skew`; 0: an even router."""
    rng = torch.Generator().manual_seed(1)
    popularity = skew * torch.randn(shape.experts, generator=rng)
    gumbel = -torch.log(-torch.log(torch.rand(tokens, shape.experts, generator=rng).clamp_(1e-9, 1 - 1e-7)))
    ids = (popularity + gumbel).topk(shape.top_k, dim=1).indices
    weights = torch.rand(ids.shape, generator=rng) + 0.1
    weights = (weights / weights.sum(1, keepdim=True)).to(dtype).requires_grad_()
    x, grad = (torch.randn(tokens, shape.hidden, generator=rng).to(dtype) for _ in range(2))
    return Problem(shape, tokens, x.requires_grad_(), grad, [(ids, weights)], parameters)


def _truth(problem: Problem) -> Truth:
    ids, weights = problem.routings[0]
    wide = {name: p.detach().float().requires_grad_() for name, p in problem.parameters.items()}
    x, s = problem.x.detach().float().requires_grad_(), weights.detach().float().requires_grad_()
    y = grouped_ffn_reference(x, ids, s, wide["gate_up_proj"], wide["down_proj"], activation=problem.shape.form)
    y.backward(problem.grad.float())
    assert x.grad is not None
    assert s.grad is not None
    return Truth(y.detach(), x.grad, s.grad, {n: p.grad for n, p in wide.items() if p.grad is not None})
