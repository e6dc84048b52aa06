"""The standard shapes of the GPU benchmarks: models as they are, and the set of the SonicMoE paper."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..shapes import UNSCALED, Problem, Shape, make_parameters

# T, from one token to a training batch
TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096, 16384, 65536)

MODELS: Mapping[str, Shape] = UNSCALED | {
    "qwen3-next": replace(
        UNSCALED["qwen3"],
        name="qwen3-next",
        intermediate=512,
        experts=512,
        top_k=10,
        scaling="Qwen3-Next-80B-A3B as it is",
    ),
    # a width that is a multiple of 8 and not of 16
    "gpt-oss-tp8": replace(
        UNSCALED["gpt-oss"], name="gpt-oss-tp8", intermediate=360, scaling="gpt-oss-20b's experts cut over 8 ranks"
    ),
}
# T, D, F, E, K of the kernel benchmarks in Guo et al., SonicMoE, 2025 (figures 13 and 14)
_SONIC = (
    (40960, 768, 256, 128, 8),
    (40960, 768, 1024, 32, 2),
    (24576, 1536, 256, 128, 8),
    (24576, 1536, 512, 64, 4),
    (24576, 1536, 1024, 32, 2),
    (32768, 4096, 256, 256, 16),
    (32768, 4096, 512, 128, 8),
    (32768, 4096, 1024, 64, 4),
    (32768, 4096, 512, 256, 16),
    (32768, 4096, 1024, 128, 8),
    (32768, 4096, 2048, 64, 4),
)


def _sonic(d: int, f: int, e: int, k: int) -> Shape:
    name = f"sonic-{d}-{f}-{e}-{k}"
    return replace(
        UNSCALED["qwen3"], name=name, hidden=d, intermediate=f, experts=e, top_k=k, scaling=f"SonicMoE's {name[6:]}"
    )


SONIC: Mapping[str, Shape] = {s.name: s for s in (_sonic(*row[1:]) for row in _SONIC)}
SONIC_TOKENS: Mapping[str, int] = {s.name: row[0] for s, row in zip(SONIC.values(), _SONIC, strict=True)}
STANDARD: Mapping[str, Shape] = {**MODELS, **SONIC}


def tokens_of(shape: Shape) -> tuple[int, ...]:
    """The T that a standard shape is looked at with."""
    return (SONIC_TOKENS[shape.name],) if shape.name in SONIC_TOKENS else TOKENS


@dataclass(frozen=True)
class Choice:
    """How a model's router chooses: the options of kernels.topk, and whether it has a bias of the choice."""

    bias: bool = False
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


_RENORMALIZED = Choice(options=MappingProxyType({"renormalize": True}))
_CHOICES = {
    "mixtral": _RENORMALIZED,
    "qwen3": _RENORMALIZED,
    "qwen3-next": _RENORMALIZED,
    "olmoe": Choice(),
    "gpt-oss": Choice(options=MappingProxyType({"score": "topk_softmax"})),
    "gpt-oss-tp8": Choice(options=MappingProxyType({"score": "topk_softmax"})),
    "deepseek": Choice(
        True,
        MappingProxyType({"score": "sigmoid", "groups": 8, "topk_groups": 4, "renormalize": True, "scale": 2.5}),
    ),
}


def choice_of(shape: Shape) -> Choice:
    return _CHOICES.get(shape.name, _RENORMALIZED)


def experts_hit(shape: Shape, tokens: int) -> float:
    """Experts that T tokens are expected to reach when each takes K of E at random."""
    return shape.experts * -math.expm1(tokens * math.log1p(-min(shape.top_k / shape.experts, 1 - 1e-12)))


def problem_on(
    device: str,
    shape: Shape,
    tokens: int,
    parameters: dict[str, nn.Parameter] | None = None,
    *,
    calls: int = 1,
    skew: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Problem:
    """Fresh random tensors of one case, drawn on `device` itself; a call has its own routing.

    `skew`: standard deviation of the experts' log-popularity. Where E allows, neighbouring calls of few tokens take
    other experts, as neighbouring layers have other weights.
    """
    rng = torch.Generator(device=device).manual_seed(seed + 1)
    if parameters is None:
        parameters = make_parameters(shape, dtype, device, seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng, device=device, dtype=torch.float32).to(dtype)

    popularity = skew * torch.randn(shape.experts, generator=rng, device=device)
    tired = torch.zeros(shape.experts, device=device)  # experts that the calls before have taken
    routings = []
    for _ in range(calls):
        uniform = torch.rand(tokens, shape.experts, generator=rng, device=device).clamp_(1e-7, 1 - 1e-7)
        order = popularity - tired - torch.log(-torch.log(uniform))
        ids = order.topk(shape.top_k, dim=1).indices
        del uniform, order
        if calls > 1 and tokens * shape.top_k <= shape.experts // 2:
            tired = (tired / 2).index_fill(0, ids.flatten(), 100.0)
        w = torch.rand(ids.shape, generator=rng, device=device) + 0.1
        routings.append((ids, (w / w.sum(1, keepdim=True)).to(dtype).requires_grad_()))
    x, grad = normal(tokens, shape.hidden).requires_grad_(), normal(tokens, shape.hidden)
    return Problem(shape, tokens, x, grad, routings, parameters)
