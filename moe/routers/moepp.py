"""The router of MoE++: experts that cost nothing among the others, and logits that remember the layer before."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...kernels.router_logits import router_logits
from ...kernels.routing import Routing, pairs_of_experts
from ...kernels.topk import topk
from ...kernels.topk.reference import EPS
from ..capacity import Capacity
from ..free import FreeExperts
from ..losses import TokenRanks, of_tokens, over_batch, per_sequence, scores_of, tokens_of
from .given import Given, check_state
from .router import GatedRouter


class MoEPPRouter(GatedRouter):
    """Chooses K of E FFN experts and of Z = `zero` + `copy` + `constant` free ones (see FreeExperts): a token that
    needs little work gets little.

    l = W x + W_g l', where l' [T, E + Z] are the layer before's logits: the state that layers hand on (`y, state =
    layer(x, state=state)`). `memory` W_g [E + Z, E + Z] is not used in the first layer. Then a softmax over all E + Z,
    the K best, the zero experts' weights set to 0, and what is left divided by its sum: a token whose choices are all
    zero experts gets nothing. The `expert_ids` E .. E + Z - 1 are the free experts'; `counts` [E] are the others'.

    `tau`: see `balancing_loss` and `capacity`. `gate_bias` (E + Z numbers), `jitter`: see GatedRouter.

    Source: Jin et al., MoE++: Accelerating MoE Methods with Zero-Computation Experts (2024), equations 2-10.

    >>> router = MoEPPRouter(hidden_size=16, num_experts=8, top_k=2)
    >>> routing = router(torch.randn(5, 16)); routing.scores.shape, routing.state.shape, routing.counts.shape
    (torch.Size([5, 12]), torch.Size([5, 12]), torch.Size([8]))
    """

    fixed_k = False
    carries_state = True

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        zero: int = 1,
        copy: int = 1,
        constant: int = 2,
        tau: float = 0.75,
        gate_bias: bool = False,
        jitter: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not 0 < tau <= 1:
            raise ValueError(f"MoEPPRouter: tau must be above 0 and at most 1, got {tau}")
        free = FreeExperts(hidden_size, zero=zero, copy=copy, constant=constant, device=device, dtype=dtype)
        super().__init__(
            hidden_size, num_experts, top_k, gate_bias=gate_bias, jitter=jitter, rows=num_experts + free.number,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.tau, self.free = tau, free
        self.memory = nn.Parameter(torch.empty(2 * (num_experts + free.number,), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.free.reset_parameters()
        nn.init.uniform_(self.memory, -(self.memory.shape[0] ** -0.5), self.memory.shape[0] ** -0.5)

    def choose(self, x: Tensor, given: Given) -> Routing:
        logits = self.logits(x)
        if given.state is not None:
            logits = logits + router_logits(check_state(given.state, logits.shape[1], "MoEPPRouter"), self.memory)
        every = topk(logits, self.top_k)
        ids = every.expert_ids
        nothing = (ids >= self.num_experts) & (ids < self.num_experts + self.free.zero)
        weights = every.weights.masked_fill(nothing, 0)
        weights = weights / (weights.sum(1, keepdim=True) + EPS)
        counts = pairs_of_experts(ids, self.num_experts).int()
        return Routing(ids, weights, self.num_experts, counts, every.scores, logits, state=logits)

    def weights_at(self, routing: Routing, ids: Tensor, none: Tensor) -> Tensor:
        assert routing.scores is not None
        none = none | ((ids >= self.num_experts) & (ids < self.num_experts + self.free.zero))
        weights = routing.scores.gather(1, ids).masked_fill(none, 0)
        return weights / (weights.sum(1, keepdim=True) + EPS)

    def balancing_loss(
        self, routing: Routing, *, sequences: int | None = None, ranks: TokenRanks | None = None
    ) -> Tensor:
        """(E + Z) sum_e eta_e f_e P_e over all E + Z, eta 1 for the FFN experts and `tau` for the free ones: at tau = 1
        the loss of Switch; below it, free experts may have more. Arguments as in `load_balancing_loss`."""
        who = "MoEPPRouter.balancing_loss"
        scores = scores_of(routing, who)
        every = scores.shape[1]
        eta = torch.where(torch.arange(every, device=scores.device) < self.num_experts, 1.0, self.tau)
        ids = per_sequence(routing.expert_ids, sequences, who).flatten(1).long()
        counts = ids.new_zeros(len(ids), every + 1).scatter_add(1, ids % (every + 1), torch.ones_like(ids))[:, :every]
        sums = per_sequence(of_tokens(scores, routing), sequences, who).sum(1)

        def weigh(counts: Tensor, tokens: int | Tensor) -> Tensor:
            return every * eta * counts / tokens / tokens

        return over_batch(sums, counts, weigh, tokens_of(routing, sequences, who), sequences, ranks)

    def capacity(self, gamma: float = 1.1) -> Capacity:
        """What an FFN expert takes at most: gamma tau T K / (tau E + Z) pairs, as the paper has it (equation 10). The
        free experts, which cost nothing, take all."""
        return Capacity(gamma * self.tau * self.num_experts / (self.tau * self.num_experts + self.free.number))
