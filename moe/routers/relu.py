"""ReMoE's router: ReLU in place of the choice, and a controller that makes it sparse."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.routing import Routing, pairs_of_experts
from ...kernels.topk import topk
from ..losses import TokenRanks, counts_of, of_tokens, over_batch, per_sequence, scores_of, tokens_of
from .given import Given
from .steered import SteeredRouter


class ReLURouter(SteeredRouter):
    """Weights relu(l): a token goes to every expert whose logit is positive, `top_k` of them on average in the end.

    Everything is differentiable; no loss is needed to learn, one is needed to be sparse. Its coefficient `strength`, a
    buffer, is multiplied or divided by `step` after each optimizer step (`update_bias`, `headgate.update_biases`), as
    the share of zeros is below or above 1 - K / E. So give the layer `load_balancing_coef=1.0`. The first steps are
    dense: a token has up to `most` experts (None: all E), the largest weights first; the others' places have id -1.
    `gate_bias`, `jitter`: see GatedRouter.

    Source: Wang et al., ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing (2024), equations 5-9;
    `strength` 1e-8 and `step` 1.2 are theirs.

    >>> router = ReLURouter(hidden_size=16, num_experts=8, top_k=2)
    >>> routing = router(torch.randn(5, 16)); (routing.weights >= 0).all(), routing.expert_ids.shape
    (tensor(True), torch.Size([5, 8]))
    """

    fixed_k = False
    steered = ("strength",)
    strength: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        strength: float = 1e-8,
        step: float = 1.2,
        most: int | None = None,
        gate_bias: bool = False,
        jitter: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            hidden_size, num_experts, top_k, gate_bias=gate_bias, jitter=jitter, device=device, dtype=dtype
        )
        if not 0 < strength < float("inf"):
            raise ValueError(f"ReLURouter: strength must be positive and finite, got {strength}")
        if not 1 < step < float("inf"):
            raise ValueError(f"ReLURouter: step must be above 1 and finite, got {step}")
        most = num_experts if most is None else most
        if not hasattr(most, "__index__") or not top_k <= most <= num_experts:
            raise ValueError(f"ReLURouter: most must be an integer from top_k ({top_k}) to {num_experts}, got {most!r}")
        self.initial_strength, self.step, self.most = strength, step, most
        self.register_buffer("strength", torch.full((), strength, device=device, dtype=torch.float32))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.strength.fill_(self.initial_strength)
        self.load = None

    def choose(self, x: Tensor, given: Given) -> Routing:
        logits = self.logits(x)
        scores = logits.relu()
        ids = topk(scores.detach(), self.most, score="topk_softmax").expert_ids
        weights = scores.gather(1, ids.long())
        ids = ids.masked_fill(weights.detach() == 0, -1)
        counts = pairs_of_experts(ids, self.num_experts).int()
        return Routing(ids, weights, self.num_experts, counts, scores, logits)

    def balancing_loss(
        self, routing: Routing, *, sequences: int | None = None, ranks: TokenRanks | None = None
    ) -> Tensor:
        """strength * mean over tokens of sum_e f_e relu(l_e), f_e = E / (K T) times the tokens with expert e: more is
        taken from those that have much. Arguments as in `load_balancing_loss`."""
        who = "ReLURouter.balancing_loss"
        sums = per_sequence(of_tokens(scores_of(routing, who), routing), sequences, who).sum(1)
        share = self.num_experts / self.top_k

        def weigh(counts: Tensor, tokens: int | Tensor) -> Tensor:
            return share * counts / tokens / tokens

        tokens = tokens_of(routing, sequences, who)
        loss = over_batch(sums, counts_of(routing, sequences), weigh, tokens, sequences, ranks)
        return self.strength.to(loss.dtype) * loss

    @property
    def load_shape(self) -> tuple[int, ...]:
        return (2,)

    def saw(self, routing: Routing) -> None:
        assert routing.counts is not None
        tokens = routing.expert_ids.shape[0] if routing.mask is None else routing.mask.sum()
        active = routing.counts.sum(dtype=torch.int64)
        self._add(torch.stack([active, torch.zeros_like(active) + tokens]))

    def _step(self, load: Tensor) -> None:
        """Up where a token had more than K experts on average, down where less: `load` is (pairs, tokens)."""
        pairs, tokens = load.unbind()
        self.strength *= self.step ** (pairs - self.top_k * tokens).sign()
        known = torch.finfo(torch.float32)
        self.strength.clamp_(known.tiny, known.max)  # at 0 or infinity it would stay

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, most={self.most}"
