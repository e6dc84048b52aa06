"""The cosine router of X-MoE and Tutel: angles in a low dimension, with a learned temperature."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...kernels.router_logits import router_logits
from ...kernels.routing import Routing
from ...kernels.topk import check_choice, topk
from .given import Given
from .router import GatedRouter, warn_of_constant_weights

_EPS = 1e-12  # under the root of a squared length: a row of zeros has the angle 0 with all
_MOST = math.log(100.0)  # of the temperature's logarithm, as in CLIP, X-MoE and Tutel


class CosineRouter(GatedRouter):
    """l_e = cos(P x, w_e) * exp(min(t, log 100)), softmax over E, the K best: the length of x does not matter.

    `projection` P [d, D] takes x to `dim` d numbers (None: half of D, 256 at most), `weight` [E, d] holds a direction
    for each expert, and `temperature` t is learned, from log(1 / `tau`) on. tau 0.5 is Tutel's, X-MoE has 0.07.
    `renormalize`, `scale`, `jitter`: see SoftmaxRouter.

    Source: Chi et al., On the Representation Collapse of Sparse MoE (2022), equations 4-5; Hwang et al., Tutel (2023).

    >>> router, x = CosineRouter(hidden_size=16, num_experts=8, top_k=2), torch.randn(5, 16)
    >>> (router(x).expert_ids == router(100 * x).expert_ids).all()
    tensor(True)
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        dim: int | None = None,
        tau: float = 0.5,
        renormalize: bool = False,
        scale: float = 1.0,
        jitter: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dim = max(1, min(hidden_size // 2, 256)) if dim is None else dim
        if not hasattr(dim, "__index__") or dim < 1:
            raise ValueError(f"CosineRouter: dim must be a positive integer, got {dim!r}")
        if not 0.01 <= tau < math.inf:
            raise ValueError(f"CosineRouter: tau must be at least 0.01 and finite, got {tau}")
        check_choice(num_experts, top_k, "softmax", 1, 1, "max", scale, who="CosineRouter")
        warn_of_constant_weights("CosineRouter", top_k, "renormalize=True", renormalize)
        super().__init__(hidden_size, num_experts, top_k, jitter=jitter, gate_size=dim, device=device, dtype=dtype)
        self.tau, self.renormalize, self.scale = tau, renormalize, scale
        self.projection = nn.Parameter(torch.empty(dim, hidden_size, device=device, dtype=dtype))
        self.temperature = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.uniform_(self.projection, -(self.hidden_size**-0.5), self.hidden_size**-0.5)
        nn.init.constant_(self.temperature, -math.log(self.tau))

    def logits(self, x: Tensor) -> Tensor:
        """fp32 [T, E] (fp64 for fp64 x): cosines times the temperature."""
        low = _unit(router_logits(self.jittered(x), self.projection))
        cosines = router_logits(low, _unit(self.weight.to(low.dtype)))
        return cosines * self.temperature.to(low.dtype).clamp_max(_MOST).exp()

    def choose(self, x: Tensor, given: Given) -> Routing:
        return topk(self.logits(x), self.top_k, renormalize=self.renormalize, scale=self.scale)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dim={self.weight.shape[1]}"


def _unit(t: Tensor) -> Tensor:
    return t * (t.square().sum(1, keepdim=True) + _EPS).rsqrt()
