"""Auxiliary losses: pure functions of a Routing, and the way they ride on the backward pass of a layer's output.

On many ranks a loss of a whole batch has, on every rank, the value that one process would find for all tokens. Its
gradient goes through this rank's own scores only: `average` times this rank's part of the gradient of that one process,
so that gradients summed over the ranks and divided by `average`, as those of the router are, are that process's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..dispatch import collectives
from ..kernels.routing import Routing
from ..kernels.transforms import refuse_transforms

_EPS = 1e-20

Weigh = Callable[[Tensor, "int | Tensor"], Tensor]


@dataclass(frozen=True)
class TokenRanks:
    """The ranks whose tokens together make one batch, and what becomes of their gradients.

    `group`: every rank that holds tokens of the batch, each its own. `average`: the router's gradients are summed over
    `group` and then divided by this (the group's size under DDP). `sequence`: the ranks of `group` that hold parts of
    the same sequences, all of the same ones in the same order; None: every sequence is whole on its rank. It matters
    for losses of each sequence or rank only. Every rank of `group` must take part in every call, with no tokens too.

    Raises ValueError where `average` is not positive or this rank is not in a group.
    """

    group: dist.ProcessGroup
    average: int
    sequence: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if self.average < 1:
            raise ValueError(f"TokenRanks: average must be at least 1, got {self.average}")
        for name, group in (("group", self.group), ("sequence", self.sequence)):
            if group is not None and dist.get_rank(group) < 0:
                raise ValueError(f"TokenRanks: {name} must contain this rank, got one without rank {dist.get_rank()}")

    def __deepcopy__(self, memo: object) -> TokenRanks:
        return self  # groups cannot be copied, and need not be


def load_balancing_loss(routing: Routing, *, sequences: int | None = None, ranks: TokenRanks | None = None) -> Tensor:
    """E * sum_e f_e P_e: f_e = tokens that chose e / T, P_e = mean score of e. fp32 scalar; K where load is even.

    Source: Lepikhin et al., GShard (2020); Fedus et al., Switch Transformers (2021), equations 4-6. For softmax scores
    it equals transformers' `load_balancing_loss_func`. Scores that do not sum to one (sigmoid) are divided by their sum
    (DeepSeek-V3, equation 19). The gradient goes through P alone: counts have none. Megatron-Core's value is this over
    K; GShard's and Tutel's is that of first choices alone. See MoE's `load_balancing_norm`, `load_balancing_choice`.

    `sequences` S: the tokens are S sequences of T / S; each has its own loss, and the mean is returned (DeepSeek-V3,
    equation 17). `ranks`: the batch is that of all these ranks (Qiu et al., Demons in the Detail, 2025), whatever share
    of it each has. One all-reduce of 2 E + 1 numbers; of each sequence, where `ranks.sequence` cuts them, another.
    Tokens that `routing.mask` leaves out count nowhere; a sequence of such tokens alone is none.

    Raises ValueError where routing has no scores, or `sequences` does not divide T.
    """
    who = "load_balancing_loss"
    scores = scores_of(routing, who)
    experts = scores.shape[1]
    share = scores / (scores.sum(1, keepdim=True) + _EPS)
    sums = per_sequence(of_tokens(share, routing), sequences, who).sum(1)

    def weigh(counts: Tensor, tokens: int | Tensor) -> Tensor:
        return experts * counts / tokens / tokens

    tokens = tokens_of(routing, sequences, who)
    return over_batch(sums, counts_of(routing, sequences), weigh, tokens, sequences, ranks)


def z_loss(routing: Routing, *, ranks: TokenRanks | None = None) -> Tensor:
    """mean over tokens of logsumexp(logits)^2: keeps the router's logits small. fp32 scalar.

    Source: Zoph et al., ST-MoE (2022), equation 5. `ranks`: the tokens are those of all these ranks; one all-reduce of
    two numbers. Raises ValueError where routing has no logits.
    """
    if routing.logits is None:
        raise ValueError("z_loss: routing must have logits, got None")
    logits = routing.logits if routing.logits.dtype == torch.float64 else routing.logits.float()
    sums = of_tokens(logits.logsumexp(1, keepdim=True).square(), routing).sum().view(1, 1)
    tokens = tokens_of(routing, None, "z_loss")
    return over_batch(
        sums, sums.new_zeros(1, 0), lambda counts, tokens: counts.new_ones(1, 1) / tokens, tokens, None, ranks
    )


def over_batch(
    sums: Tensor, counts: Tensor, weigh: Weigh, tokens: int | Tensor, sequences: int | None, ranks: TokenRanks | None
) -> Tensor:
    """mean over sequences s of sum_n weigh(counts, tokens of one)[s, n] * sums[s, n]: what every loss here is.

    `sums` [S, n], differentiable, and `counts` [S, m] add up over this rank's tokens, in `sequences` S parts (None: S
    is 1, the whole batch) of `tokens` each: one number, or [S]. `weigh` is called with [S, m] and tokens that broadcast
    against it; it must give [S, n], or what broadcasts to it, and have no gradient. A sequence without tokens on any
    rank is none.
    """
    parts = 1 if sequences is None else sequences
    if ranks is None:
        if isinstance(tokens, int):
            return (weigh(counts.to(sums.dtype), max(tokens, 1)) * sums).sum() / max(parts, 1)
        weights = weigh(counts.to(sums.dtype), tokens.clamp_min(1)[:, None])
        return (weights * sums).sum() / (tokens > 0).sum().clamp_min(1)
    refuse_transforms("TokenRanks", "numbers move between ranks: take them on one rank", sums)
    group = ranks.group if sequences is None else ranks.sequence
    each = sums.new_zeros(parts, dtype=torch.float64) + tokens
    whole = torch.cat([counts.flatten().double(), sums.detach().flatten().double(), each])
    if group is not None:
        whole = collectives.all_reduce(whole, group)
    all_counts, all_sums, all_each = whole.split([counts.numel(), sums.numel(), parts])
    weights = weigh(all_counts.view_as(counts), all_each.clamp_min(1)[:, None]).expand_as(sums)
    value, local = (weights * all_sums.view_as(sums)).sum(), (weights.to(sums.dtype) * sums).sum()
    if sequences is not None:  # ranks that share sequences know the same of them: one of them speaks
        speaks = ranks.sequence is None or dist.get_rank(ranks.sequence) == 0
        said = torch.stack([value, (all_each > 0).sum().double()]) * speaks
        total, number = collectives.all_reduce(said, ranks.group).unbind()
        value, local = total / number.clamp_min(1), local / number.clamp_min(1)
    local = ranks.average * local
    return (local - local.detach() + value).to(sums.dtype)


def scores_of(routing: Routing, who: str) -> Tensor:
    """The scores [T, E] of a routing; ValueError in the name of `who` where there are none."""
    if routing.scores is None:
        raise ValueError(f"{who}: routing must have scores, got None")
    return routing.scores


def xlogx(p: Tensor) -> Tensor:
    """p log p of probabilities, 0 at p = 0, where the gradient, too, is finite: softmax rounds small ones to 0."""
    return p * p.clamp_min(torch.finfo(p.dtype).tiny).log()


def of_tokens(t: Tensor, routing: Routing) -> Tensor:
    """t [T, n] with zeros, and no gradient, for the tokens that are padding."""
    return t if routing.mask is None else t.masked_fill(~routing.mask[:, None], 0)


def tokens_of(routing: Routing, sequences: int | None, who: str) -> int | Tensor:
    """Tokens in each of S sequences that are no padding: a number where all have as many, else int64 [S]."""
    parts = 1 if sequences is None else sequences
    if routing.mask is None:
        return routing.expert_ids.shape[0] // max(parts, 1)
    return per_sequence(routing.mask[:, None], sequences, who).sum((1, 2))


def per_sequence(t: Tensor, sequences: int | None, who: str) -> Tensor:
    """t [T, n] as [S, T / S, n]; ValueError in the name of `who` where S does not divide T."""
    tokens, width = t.shape
    parts = 1 if sequences is None else sequences
    if parts < 0 or (tokens % parts if parts else tokens):
        raise ValueError(f"{who}: sequences must divide the tokens ({tokens}), got {sequences}")
    return t.reshape(parts, tokens // max(parts, 1), width)


def counts_of(routing: Routing, sequences: int | None) -> Tensor:
    """Tokens per expert in each sequence, integers [S, E]; ids outside 0 .. E-1 are no expert."""
    if sequences in (None, 1) and routing.counts is not None:
        return routing.counts[None]
    experts = routing.num_experts
    ids = per_sequence(routing.expert_ids, sequences, "counts_of").flatten(1).long()
    ids = torch.where((ids < 0) | (ids >= experts), experts, ids)
    return ids.new_zeros(ids.shape[0], experts + 1).scatter_add(1, ids, torch.ones_like(ids))[:, :experts]


def attach_loss(y: Tensor, loss: Tensor) -> Tensor:
    """y, whose backward pass also runs `loss` (a scalar) backward with gradient 1, whatever the gradient of y.

    So an auxiliary loss trains its layer without a word in the training loop (as Megatron-LM's MoEAuxLossAutoScaler,
    but with the scale in the caller's hand: multiply `loss` by what the main loss is multiplied by).
    """
    attach = _Attach if torch.compiler.is_compiling() else _AttachAnywhere
    return attach.apply(y, loss)


class _Attach(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, loss: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.dtype = inputs[1].dtype

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_ones((), dtype=ctx.dtype)


class _AttachAnywhere(_Attach):
    """The same for forward-mode AD, too, which torch.compile does not take."""

    @staticmethod
    def jvp(ctx, y: Tensor, loss: Tensor) -> Tensor:
        return y.view_as(y)
