"""Auxiliary losses: pure functions of a Routing, and the way they ride on the backward pass of a layer's output."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..dispatch import collectives
from ..kernels.routing import Routing

_EPS = 1e-20


def load_balancing_loss(routing: Routing, *, sequences: int = 1, group: dist.ProcessGroup | None = None) -> Tensor:
    """E * sum_e f_e P_e: f_e = tokens that chose e / T, P_e = mean score of e. fp32 scalar; K where load is even.

    Source: Lepikhin et al., GShard (2020); Fedus et al., Switch Transformers (2021), equations 4-6. For softmax scores
    it equals transformers' `load_balancing_loss_func`. Scores that do not sum to one (sigmoid) are divided by their sum
    (DeepSeek-V3, equation 19). The gradient goes through P alone: counts have none.

    `sequences` S > 1: the tokens are S sequences of T / S; each has its own loss, and the mean is returned
    (DeepSeek-V3, equation 17). `group`: f is taken over the tokens of all ranks of the group, so that a batch is
    balanced as a whole and not rank by rank (Qiu et al., Demons in the Detail, 2025); P stays this rank's, and the
    average of the ranks' gradients is that of the whole batch where they have as many tokens each. One all-reduce of
    E + 1 numbers.

    Raises ValueError where routing has no scores, `sequences` does not divide T, or comes together with `group`.
    """
    if routing.scores is None:
        raise ValueError("load_balancing_loss: routing must have scores, got None")
    tokens, experts = routing.scores.shape
    if sequences < 1 or tokens % sequences:
        raise ValueError(f"load_balancing_loss: sequences must divide the tokens ({tokens}), got {sequences}")
    if group is not None and sequences > 1:
        raise ValueError(f"load_balancing_loss: group must come with sequences=1, got sequences={sequences}")
    share = routing.scores / (routing.scores.sum(1, keepdim=True) + _EPS)
    mean = share.unflatten(0, (sequences, tokens // sequences)).sum(1) / max(tokens // sequences, 1)  # [S, E]
    if sequences == 1 and routing.counts is not None:
        counts = routing.counts.to(mean.dtype)[None]
    else:
        counts = _count(routing.expert_ids, experts, sequences).to(mean.dtype)
    if group is None:
        return experts * (counts / max(tokens // sequences, 1) * mean).sum() / sequences
    total = collectives.all_reduce(torch.cat([counts[0], counts.new_full((1,), tokens)]), group)
    return experts * (total[:-1] / total[-1].clamp_min(1) * mean[0]).sum()


def z_loss(routing: Routing) -> Tensor:
    """mean over tokens of logsumexp(logits)^2: keeps the router's logits small. fp32 scalar.

    Source: Zoph et al., ST-MoE (2022), equation 5. Raises ValueError where routing has no logits.
    """
    if routing.logits is None:
        raise ValueError("z_loss: routing must have logits, got None")
    logits = routing.logits if routing.logits.dtype == torch.float64 else routing.logits.float()
    return logits.logsumexp(1).square().sum() / max(logits.shape[0], 1)


def attach_loss(y: Tensor, loss: Tensor) -> Tensor:
    """y, whose backward pass also runs `loss` (a scalar) backward with gradient 1, whatever the gradient of y.

    So an auxiliary loss trains its layer without a word in the training loop (as Megatron-LM's MoEAuxLossAutoScaler,
    but with the scale in the caller's hand: multiply `loss` by what the main loss is multiplied by).
    """
    return _Attach.apply(y, loss)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(y: Tensor, loss: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.dtype = inputs[1].dtype

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_ones((), dtype=ctx.dtype)


def _count(expert_ids: Tensor, experts: int, sequences: int) -> Tensor:
    """Tokens per expert in each sequence, int64 [S, E]; ids outside 0 .. E-1 are no expert."""
    ids = expert_ids.reshape(sequences, -1).long()
    ids = torch.where((ids < 0) | (ids >= experts), experts, ids)
    return ids.new_zeros(sequences, experts + 1).scatter_add(1, ids, torch.ones_like(ids))[:, :experts]
