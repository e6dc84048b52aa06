"""Union of Experts: the experts are the parts of one dense feed-forward network, and a token takes K of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.routing import Routing
from ...kernels.topk import topk
from .given import Given
from .router import GatedRouter


class PartsRouter(GatedRouter):
    """The K best parts by softmax, each with the weight 1: a dense network is the sum of its parts, so that with all of
    them (K = E) the layer is that network. `parts_of` cuts one.

    The weight is a constant, and its gradient is that of the score (straight through): a part whose output would have
    lowered the loss more with a larger weight gets a larger score. `gate_bias`, `jitter`: see GatedRouter.

    Source: Yang et al., Union of Experts: Adapting Hierarchical Routing to Equivalently Decomposed Transformer (2025),
    expert selection, here for each token: the paper's one choice for a whole sequence is not causal. Its other form,
    parts that choose tokens, is ExpertChoiceRouter on the same experts.

    >>> PartsRouter(hidden_size=16, num_experts=8, top_k=2)(torch.randn(5, 16)).weights.unique()
    tensor([1.], grad_fn=<Unique2Backward0>)
    """

    straight_through = True

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        gate_bias: bool = False,
        jitter: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            hidden_size, num_experts, top_k, gate_bias=gate_bias, jitter=jitter, device=device, dtype=dtype
        )

    def choose(self, x: Tensor, given: Given) -> Routing:
        routing = topk(self.logits(x), self.top_k)
        return Routing(
            routing.expert_ids, _one(routing.weights), self.num_experts, routing.counts, routing.scores, routing.logits
        )

    def weights_at(self, routing: Routing, ids: Tensor, none: Tensor) -> Tensor:
        return _one(super().weights_at(routing, ids, none))


def _one(scores: Tensor) -> Tensor:
    """1, with the gradient of `scores`."""
    return 1 + (scores - scores.detach())


def parts_of(w_gate_up: Tensor, w_down: Tensor, num_experts: int, *, gated: bool = True) -> tuple[Tensor, Tensor]:
    """A dense network's weights, [2F, D] (gate rows first; [F, D] where not gated) and [D, F], as those of E =
    `num_experts` experts with F / E of its neurons each, in their order: [E, 2F / E, D] and [E, D, F / E].

    Raises ValueError where the shapes do not belong together or E does not divide F.

    >>> [tuple(w.shape) for w in parts_of(torch.randn(24, 16), torch.randn(16, 12), num_experts=4)]
    [(4, 6, 16), (4, 16, 3)]
    """
    blocks = 2 if gated else 1
    if w_gate_up.dim() != 2 or w_down.dim() != 2 or w_gate_up.shape != (blocks * w_down.shape[1], w_down.shape[0]):
        raise ValueError(
            f"parts_of: w_gate_up and w_down must be [{'2F' if gated else 'F'}, D] and [D, F], got "
            f"{list(w_gate_up.shape)} and {list(w_down.shape)}"
        )
    if num_experts < 1 or w_down.shape[1] % num_experts:
        raise ValueError(f"parts_of: num_experts must divide F ({w_down.shape[1]}), got {num_experts}")
    up = w_gate_up.unflatten(0, (blocks, num_experts, -1)).transpose(0, 1).flatten(1, 2)
    return up.contiguous(), w_down.unflatten(1, (num_experts, -1)).transpose(0, 1).contiguous()
