"""Read-ME's pre-gate: one router ahead of the layers says the experts of all of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.routing import Routing
from ...kernels.topk import check_choice, topk
from .given import Given, check_state
from .router import GatedRouter


class PregateRouter(GatedRouter):
    """The first layer's gate chooses for every layer: its logits [T, E] are the state that is handed on, so that the
    whole schedule is known before the first expert runs, to a prefetcher or to who makes batches.

    `y, state = layer(x, state=state)`. A layer without a state uses its own gate; one with a state uses that, and its
    own gate not at all. Softmax, the K best; `renormalize`, `scale`, `gate_bias`, `jitter`: see SoftmaxRouter.
    `distillation_loss` trains it to say what a finished model's experts were good for.

    Source: Cai et al., Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts (2024).

    >>> layers = [headgate.MoE(16, 32, 8, 2, router="pregate") for _ in range(2)]
    >>> x, state = layers[0](torch.randn(5, 16)); y, state = layers[1](x, state=state)
    >>> torch.equal(layers[0].last_routing.expert_ids, layers[1].last_routing.expert_ids)
    True
    """

    carries_state = True

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        renormalize: bool = False,
        scale: float = 1.0,
        gate_bias: bool = False,
        jitter: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_choice(num_experts, top_k, "softmax", 1, 1, "max", scale, who="PregateRouter")
        super().__init__(
            hidden_size, num_experts, top_k, gate_bias=gate_bias, jitter=jitter, device=device, dtype=dtype
        )
        self.renormalize, self.scale = renormalize, scale

    def choose(self, x: Tensor, given: Given) -> Routing:
        if given.state is None:
            logits = self.logits(x)
        else:
            logits = check_state(given.state, self.num_experts, "PregateRouter")
        r = topk(logits, self.top_k, renormalize=self.renormalize, scale=self.scale)
        return Routing(r.expert_ids, r.weights, self.num_experts, r.counts, r.scores, logits, state=logits)


def distillation_loss(
    logits: Tensor, target: Tensor, *, temperature: float = 1.0, hard: float = 0.5, smoothing: float = 0.5
) -> Tensor:
    """How far a pre-gate's logits [T, E] are from `target` [T, E], how well each expert would serve each token:
    (1 - hard) * KL(softmax(target / temperature) || softmax(logits / temperature)) * temperature^2
    + hard * cross entropy with the best expert, with label smoothing. Mean over tokens, fp32 scalar.

    Source: Read-ME (2024), section 4, with its own smoothing of 0.5. Raises ValueError naming argument, rule and value.
    """
    if logits.shape != target.shape or logits.dim() != 2:
        raise ValueError(
            f"distillation_loss: target must be [T, E] as logits {list(logits.shape)}, got {list(target.shape)}"
        )
    for name, value, low, high in (("hard", hard, 0, 1), ("smoothing", smoothing, 0, 1)):
        if not low <= value <= high:
            raise ValueError(f"distillation_loss: {name} must be between 0 and 1, got {value}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"distillation_loss: temperature must be positive and finite, got {temperature}")
    ours, theirs = (t.float() / temperature for t in (logits, target.detach()))
    soft = F.kl_div(ours.log_softmax(1), theirs.log_softmax(1), reduction="batchmean", log_target=True)
    sure = F.cross_entropy(logits.float(), target.detach().argmax(1), label_smoothing=smoothing)
    return (1 - hard) * soft * temperature**2 + hard * sure
