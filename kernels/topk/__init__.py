"""topk: the choice of a router, from its logits to expert ids, weights and counts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..chip import say_once, why_not
from ..routing import Routing
from ..transforms import implement, register_composite, run
from . import on_cpu
from .reference import EPS, best_of, topk_reference

__all__ = ["SCORES", "topk", "topk_reference"]

SCORES = ("softmax", "topk_softmax", "sigmoid", "sqrtsoftplus")


def _topk_on_cuda(logits, k, bias, score, groups, topk_groups, group_score, renormalize, scale):
    form = (logits, k, bias, score, groups, topk_groups, group_score, renormalize, scale)
    why = why_not(logits.device.index)
    if why is None:
        from .on_triton import topk_on_triton, why_not_served

        why = why_not_served(logits, k, bias)
        if why is None:
            return topk_on_triton(*form)
    say_once("topk", why, "several operations of torch")
    return topk_reference(*form)


# (weights, scores, expert_ids, counts)
torch.library.define(
    "headgate::topk",
    "(Tensor logits, int k, Tensor? bias, str score, int groups, int topk_groups, int group_score, bool renormalize, "
    "float scale) -> (Tensor, Tensor, Tensor, Tensor)",
)
implement("topk", "cpu", on_cpu.forward)
implement("topk", "cuda", _topk_on_cuda)
implement("topk", "CompositeExplicitAutograd", topk_reference)
register_composite("topk", topk_reference)


@torch.library.register_fake("headgate::topk")
def _(logits, k, bias, score, groups, topk_groups, group_score, renormalize, scale):
    tokens, experts = logits.shape
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return (
        logits.new_empty(tokens, k, dtype=wide),
        logits.new_empty(tokens, experts, dtype=wide),
        logits.new_empty(tokens, k, dtype=torch.int32),
        logits.new_empty(experts, dtype=torch.int32),
    )


def _setup_context(ctx, inputs, output):
    logits, _k, _bias, ctx.score, *_groups, ctx.renormalize, ctx.scale = inputs
    weights, scores, ids, _counts = output
    ctx.dtype = logits.dtype
    ctx.save_for_backward(ids, weights, scores)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_weights, grad_scores, _ids, _counts):
    ids, weights, scores = ctx.saved_tensors
    grad = None  # of the logits
    if grad_weights is not None:
        ids, grad_weights = ids.long(), grad_weights * ctx.scale
        if ctx.score == "topk_softmax":
            w = weights / ctx.scale
            grad_chosen = w * (grad_weights - (grad_weights * w).sum(1, keepdim=True))
            grad = torch.zeros_like(scores).scatter(1, ids, grad_chosen)
        else:
            grad_chosen = grad_weights
            if ctx.renormalize:
                chosen = scores.gather(1, ids)
                total = chosen.sum(1, keepdim=True) + EPS
                grad_chosen = (grad_weights - (grad_weights * chosen).sum(1, keepdim=True) / total) / total
            spread = torch.zeros_like(scores).scatter(1, ids, grad_chosen)
            grad_scores = spread if grad_scores is None else grad_scores + spread
    if grad_scores is not None:
        through = _score_backward(grad_scores, scores, ctx.score)
        grad = through if grad is None else grad + through
    return (None if grad is None else grad.to(ctx.dtype), *(None,) * 8)


def _score_backward(grad: Tensor, scores: Tensor, score: str) -> Tensor:
    if score == "sigmoid":
        return grad * scores * (1 - scores)
    if score == "sqrtsoftplus":  # sigmoid(x) / (2 s), and sigmoid(x) = 1 - exp(-s^2)
        return grad * -torch.expm1(-scores.square()) / (2 * scores).clamp_min(torch.finfo(scores.dtype).tiny)
    return scores * (grad - (grad * scores).sum(1, keepdim=True))


torch.library.register_autograd("headgate::topk", _backward, setup_context=_setup_context)


def topk(
    logits: Tensor,
    k: int,
    *,
    score: str = "softmax",
    bias: Tensor | None = None,
    groups: int = 1,
    topk_groups: int = 1,
    group_score: str | int = "top2",
    renormalize: bool = False,
    scale: float = 1.0,
) -> Routing:
    """The k best experts of each token, and their weights.

    `logits` [T, E] floating point, any strides. The arithmetic is fp32 (fp64 for fp64 logits). `score` says what is
    chosen by and what becomes a weight:

        "softmax"       s = softmax over E; chosen by s; weight s                        (Switch, Mixtral, Qwen, OLMoE)
        "topk_softmax"  chosen by the logits; weight = softmax over the K chosen logits  (gpt-oss, GraniteMoE)
        "sigmoid"       s = sigmoid; chosen by s; weight s                               (DeepSeek-V3)
        "sqrtsoftplus"  s = sqrt(softplus); chosen by s; weight s                        (DeepSeek-V4)

    `bias` [E] is added for the choice alone: no weight and no gradient sees it (Wang et al., auxiliary-loss-free load
    balancing, 2024). With `groups` > `topk_groups` the choice is limited to the best `topk_groups` of `groups` equal
    groups of neighbouring experts; a group is as good as the sum of its n best experts, `group_score` n: 2 or "top2"
    (DeepSeek-V3), 1 or "max" (DeepSeek-V2), any other number (Megatron-Core takes k // topk_groups). `renormalize`
    divides a token's weights by their sum; `scale` multiplies them at the end.

    Returns a Routing: `expert_ids` int32 [T, K], best first, the lowest id first among equals; `weights` fp32 [T, K];
    `counts` int32 [E]; `scores` fp32 [T, E] (softmax over E for "topk_softmax"); `logits` as given. Gradients flow
    from weights and scores to the logits; what they need is scores, ids and weights, and double backward works.

    Raises ValueError / TypeError naming argument, rule and value. NaN or infinite logits (or bias) raise ValueError on
    CPU; other devices do not look, because to look is to wait for the device.

    >>> r = topk(torch.tensor([[0.0, 2.0, 1.0]]), 2, renormalize=True)
    >>> r.expert_ids.tolist(), [round(w, 3) for w in r.weights[0].tolist()], r.counts.tolist()
    ([[1, 2]], [0.731, 0.269], [0, 1, 1])
    """
    _check(logits, k, score, bias, groups, topk_groups, group_score, scale)
    bias = None if bias is None else bias.detach()
    weights, scores, ids, counts = run(
        torch.ops.headgate.topk, topk_reference,
        logits, k, bias, score, groups, topk_groups, best_of(group_score), renormalize, scale,
    )  # fmt: skip
    return Routing(ids, weights, logits.shape[1], counts, scores, logits)


def _check(logits, k, score, bias, groups, topk_groups, group_score, scale) -> None:
    if logits.dim() != 2:
        raise ValueError(f"topk: logits must be [T, E], got {tuple(logits.shape)}")
    if not logits.dtype.is_floating_point:
        raise TypeError(f"topk: logits must be floating point, got {logits.dtype}")
    experts = logits.shape[1]
    if bias is not None:
        if tuple(bias.shape) != (experts,):
            raise ValueError(f"topk: bias must be [E] = ({experts},), got {tuple(bias.shape)}")
        if not bias.dtype.is_floating_point:
            raise TypeError(f"topk: bias must be floating point, got {bias.dtype}")
        if bias.device != logits.device:
            raise ValueError(f"topk: bias must be on the device of logits, got {bias.device} and {logits.device}")
    check_choice(experts, k, score, groups, topk_groups, group_score, scale, who="topk")


def check_choice(
    experts: int, k: int, score: str, groups: int, topk_groups: int, group_score: str | int, scale: float, who: str
) -> None:
    """Raises ValueError, in the name of `who`, for numbers that no choice of k out of `experts` can be made with."""
    for name, number in (("top_k", k), ("groups", groups), ("topk_groups", topk_groups)):
        if not hasattr(number, "__index__"):
            raise TypeError(f"{who}: {name} must be an integer, got {number!r}")
    if not 1 <= k <= experts:
        raise ValueError(f"{who}: top_k must be between 1 and the number of experts ({experts}), got {k}")
    if score not in SCORES:
        raise ValueError(f"{who}: score must be one of {', '.join(SCORES)}, got {score!r}")
    if groups < 1 or experts % groups:
        raise ValueError(f"{who}: groups must divide the number of experts ({experts}), got {groups}")
    if not 1 <= topk_groups <= groups:
        raise ValueError(f"{who}: topk_groups must be between 1 and groups ({groups}), got {topk_groups}")
    if topk_groups * (experts // groups) < k:
        raise ValueError(
            f"{who}: topk_groups must leave at least top_k = {k} experts, "
            f"got {topk_groups} groups of {experts // groups}"
        )
    best = best_of(group_score)
    if not isinstance(best, int) or isinstance(best, bool) or best < 1:
        raise ValueError(f"{who}: group_score must be 'max', 'top2' or a positive integer, got {group_score!r}")
    if topk_groups < groups and experts // groups < best:
        raise ValueError(
            f"{who}: group_score {group_score!r} must have groups of at least {best} experts, "
            f"got groups of {experts // groups}"
        )
    if not 0 < scale < math.inf:
        raise ValueError(f"{who}: scale must be positive and finite, got {scale}")
