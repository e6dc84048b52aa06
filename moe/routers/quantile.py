"""Quantile balancing: the bias of an expert is the score that its fair share of the tokens exceeds."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.routing import Routing
from ...kernels.topk import check_choice, topk
from .given import Given
from .router import warn_of_constant_weights
from .steered import SteeredRouter

_BINS = 4096
_FINEST = 1e-7  # distance from the present bias, in scores, that is told apart
_STEP = 35.0 / _BINS  # of asinh(distance / _FINEST): up to distances of 2, which no score exceeds


class QuantileRouter(SteeredRouter):
    """The choice is made on score + `expert_bias`, and a step of the bias goes to where every expert would have T K / E
    tokens. Weights are the scores alone.

    With beta = -expert_bias: token t takes an expert where s_te - beta_e is above alpha_t, the (K+1)-th best of those.
    The new beta_e is the (T K / E + 1)-th largest of s_te - alpha_t over the tokens: what its share of them exceeds.
    The step goes `rate` of the way there (1: at once), and the bias is centred. What is kept between steps is a
    histogram for each expert, `load` [E, bins], fine near its present bias: it adds up exactly, so any split of a batch
    into ranks, micro-batches or recomputed parts gives the same bias.

    `score`: "sigmoid" or "softmax". `renormalize`: None divides the weights by their sum where K > 1. `scale`,
    `gate_bias`, `jitter`: see SigmoidRouter.

    Source: Kimi's quantile balancing, as in Megatron-Core 0.19, which averages quantiles over micro-batches and ranks.

    >>> router, x = QuantileRouter(hidden_size=16, num_experts=8, top_k=2), torch.randn(512, 16) + 1
    >>> for step in range(20): _ = router(x), router.update_bias()
    >>> router(x).counts.max() <= 512 * 2 / 8 + 2
    tensor(True)
    """

    steered = ("expert_bias",)
    expert_bias: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        score: str = "sigmoid",
        rate: float = 1.0,
        renormalize: bool | None = None,
        scale: float = 1.0,
        gate_bias: bool = False,
        jitter: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if score not in ("sigmoid", "softmax"):
            raise ValueError(f"QuantileRouter: score must be 'sigmoid' or 'softmax', got {score!r}")
        if not 0 < rate <= 1:
            raise ValueError(f"QuantileRouter: rate must be above 0 and at most 1, got {rate}")
        check_choice(num_experts, top_k, score, 1, 1, "max", scale, who="QuantileRouter")
        warn_of_constant_weights("QuantileRouter", top_k, "renormalize=True", bool(renormalize))
        super().__init__(
            hidden_size, num_experts, top_k, gate_bias=gate_bias, jitter=jitter, device=device, dtype=dtype
        )
        self.score, self.rate, self.scale = score, rate, scale
        self.renormalize = top_k > 1 if renormalize is None else renormalize
        self.register_buffer("expert_bias", torch.zeros(num_experts, device=device, dtype=torch.float32))

    @property
    def load_shape(self) -> tuple[int, ...]:
        return (self.num_experts, _BINS)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.expert_bias.zero_()
        self.load = None

    def choose(self, x: Tensor, given: Given) -> Routing:
        return topk(
            self.logits(x), self.top_k, score=self.score, bias=self.expert_bias, renormalize=self.renormalize,
            scale=self.scale,
        )  # fmt: skip

    @torch.no_grad()
    def saw(self, routing: Routing) -> None:
        if self.top_k == self.num_experts:
            return
        assert routing.scores is not None
        scores = routing.scores
        above = scores + self.expert_bias
        alpha = above.topk(self.top_k + 1, dim=1).values[:, -1:]
        place = torch.asinh((above - alpha).double() / _FINEST) / _STEP + _BINS / 2
        place = place.floor().long().clamp(0, _BINS - 1)
        one = torch.ones_like(place) if routing.mask is None else routing.mask[:, None].long().expand_as(place)
        load = place.new_zeros(_BINS, self.num_experts).scatter_add(0, place, one)
        self._add(load.T.contiguous())

    def _step(self, load: Tensor) -> None:
        """The place in each histogram that T K / E tokens are above; half a token less far, between two of them."""
        tokens = load.sum(1, keepdim=True)
        share = tokens * self.top_k / self.num_experts
        more = load.flip(1).cumsum(1).flip(1)  # tokens in this bin or above
        inside = (more >= share).sum(1, keepdim=True).clamp_min(1) - 1  # the last bin with enough in it and above
        above = more.gather(1, inside) - load.gather(1, inside)
        part = (share - above) / load.gather(1, inside).clamp_min(1)  # of this bin's tokens, the highest ones
        edge = (inside + 1 - part.clamp(0, 1) - _BINS / 2) * _STEP
        shift = (torch.sinh(edge) * _FINEST)[:, 0]
        bias = self.expert_bias.double() - self.rate * torch.where(tokens[:, 0] > 0, shift, 0.0)
        self.expert_bias.copy_(bias - bias.mean())
