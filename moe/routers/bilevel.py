"""The bilevel router of SMILE: first the nodes of a token, then experts inside them."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...kernels.router_logits import router_logits
from ...kernels.routing import Routing
from ...kernels.topk import check_choice, topk
from ..losses import TokenRanks, counts_of, of_tokens, over_batch, per_sequence, scores_of, tokens_of
from .given import Given
from .router import GatedRouter, warn_of_constant_weights

_EPS = 1e-20


class BilevelRouter(GatedRouter):
    """A softmax over N `nodes`, and one over the g = E / N experts of each: p_i and q_ij for expert j of node i.

    A token goes to its `topk_nodes` best nodes by p, and to the `top_k` / `topk_nodes` best experts by q of each, so
    that its row crosses to that many nodes at most, whatever the router has learned (dispatch by `Hierarchical`). Node
    i owns the experts i g .. (i + 1) g - 1. The weight is p_i q_ij, divided by the token's sum of them if
    `renormalize`, times `scale`.

    Source: He et al., SMILE (2022), where topk_nodes = top_k = 1.

    `weight` [E, D] and `gate_bias` [E] are the gates inside the nodes, `node_weight` [N, D] and `node_bias` [N] the one
    over them. Of the Routing, `scores` [T, E] are all p_i q_ij, which sum to one, and `logits` [T, N + E] those of the
    nodes and then those of the experts, so that the z-loss holds both levels down. `expert_ids` come node by node, the
    best first in both. `node_coef`, `local_coef`: see `balancing_loss`. `jitter`: see GatedRouter.

    >>> router = BilevelRouter(hidden_size=16, num_experts=8, top_k=4, nodes=4, topk_nodes=2)
    >>> (router(torch.randn(5, 16)).expert_ids // 2).unique(dim=1).shape  # 2 experts of each of 2 nodes
    torch.Size([5, 2])
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        nodes: int,
        topk_nodes: int = 1,
        renormalize: bool = False,
        scale: float = 1.0,
        node_coef: float = 1.0,
        local_coef: float = 1.0,
        gate_bias: bool = False,
        jitter: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_choice(num_experts, top_k, "softmax", 1, 1, "max", scale, who="BilevelRouter")
        _check(num_experts, top_k, nodes, topk_nodes, {"node_coef": node_coef, "local_coef": local_coef})
        warn_of_constant_weights("BilevelRouter", top_k, "renormalize=True", renormalize)
        super().__init__(
            hidden_size, num_experts, top_k, gate_bias=gate_bias, jitter=jitter, device=device, dtype=dtype
        )
        self.nodes, self.topk_nodes, self.renormalize, self.scale = nodes, topk_nodes, renormalize, scale
        self.node_coef, self.local_coef = node_coef, local_coef
        self.node_weight = nn.Parameter(torch.empty(nodes, hidden_size, device=device, dtype=dtype))
        self.node_bias = nn.Parameter(torch.empty(nodes, device=device, dtype=dtype)) if gate_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.uniform_(self.node_weight, -(self.hidden_size**-0.5), self.hidden_size**-0.5)
        if self.node_bias is not None:
            nn.init.zeros_(self.node_bias)

    def logits(self, x: Tensor) -> Tensor:
        """fp32 [T, N + E] (fp64 for fp64 x) of x [T, D]: of the nodes, then of the experts. One product."""
        bias = None if self.node_bias is None or self.gate_bias is None else torch.cat([self.node_bias, self.gate_bias])
        return router_logits(self.jittered(x), torch.cat([self.node_weight, self.weight]), bias)

    def choose(self, x: Tensor, given: Given) -> Routing:
        logits = self.logits(x)
        each = self.num_experts // self.nodes
        of_nodes, of_experts = logits.split([self.nodes, self.num_experts], 1)
        of_experts = of_experts.unflatten(1, (self.nodes, each))  # [T, N, g]
        scores = (of_nodes.softmax(1)[:, :, None] * of_experts.softmax(2)).flatten(1)

        best = topk(of_nodes.detach(), self.topk_nodes).expert_ids.long()  # [T, M]
        own = of_experts.detach().gather(1, best[:, :, None].expand(-1, -1, each)).flatten(0, 1)
        local = topk(own, self.top_k // self.topk_nodes).expert_ids.unflatten(0, best.shape)
        ids = (best[:, :, None] * each + local).flatten(1)

        weights = scores.gather(1, ids)
        if self.renormalize:
            weights = weights / (weights.sum(1, keepdim=True) + _EPS)
        routing = Routing(ids.int(), weights * self.scale, self.num_experts, scores=scores, logits=logits)
        return replace(routing, counts=counts_of(routing, None)[0].int())

    def balancing_loss(
        self, routing: Routing, *, sequences: int | None = None, ranks: TokenRanks | None = None
    ) -> Tensor:
        """node_coef * N sum_i f_i P_i + local_coef * sum_i t_i g sum_j f'_ij Q_ij: fp32 scalar.

        Over the nodes: f_i = tokens that chose node i / T, P_i = mean p_i. Inside node i, over its own tokens: f'_ij =
        those that chose expert j / those of the node, Q_ij = their mean q_ij, and t_i = the node's tokens / T. Where
        load is even the terms are node_coef * topk_nodes and local_coef * top_k. The gradient goes through P and Q
        alone. Source: SMILE's alpha N sum f_i P_i + beta g sum f'_j Q_j, the second term for the tokens of each node.

        `sequences`, `ranks` and errors: see `load_balancing_loss`; one all-reduce of N + 2 E + 1 numbers.
        """
        who = "BilevelRouter.balancing_loss"
        nodes, each, k = self.nodes, self.num_experts // self.nodes, self.top_k // self.topk_nodes
        joint = scores_of(routing, who).unflatten(1, (nodes, each))
        p = joint.sum(2)
        q = joint / p.clamp_min(torch.finfo(p.dtype).tiny)[:, :, None]
        ids = routing.expert_ids.long()
        node = torch.where((ids >= 0) & (ids < self.num_experts), ids // each, nodes)
        here = p.new_zeros(p.shape[0], nodes + 1).scatter(1, node, 1.0)[:, :nodes]
        own = (q * here[:, :, None]).flatten(1)
        sums = per_sequence(of_tokens(torch.cat([p, own], 1), routing), sequences, who).sum(1)  # [S, N + E]

        def weigh(counts: Tensor, tokens: int | Tensor) -> Tensor:
            counts = counts.unflatten(1, (nodes, each))
            came = counts.sum(2) / k  # tokens of each node
            of_node = self.node_coef * nodes * came / tokens / tokens
            of_expert = self.local_coef * each * counts / came.clamp_min(1)[:, :, None]
            return torch.cat([of_node, of_expert.flatten(1) / tokens], 1)

        tokens = tokens_of(routing, sequences, who)
        return over_batch(sums, counts_of(routing, sequences), weigh, tokens, sequences, ranks)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, nodes={self.nodes}, topk_nodes={self.topk_nodes}"


def _check(experts: int, top_k: int, nodes: int, topk_nodes: int, coefs: dict[str, float]) -> None:
    for name, number in (("nodes", nodes), ("topk_nodes", topk_nodes)):
        if not hasattr(number, "__index__"):
            raise TypeError(f"BilevelRouter: {name} must be an integer, got {number!r}")
    if nodes < 1 or experts % nodes:
        raise ValueError(f"BilevelRouter: nodes must divide the number of experts ({experts}), got {nodes}")
    if not 1 <= topk_nodes <= nodes:
        raise ValueError(f"BilevelRouter: topk_nodes must be between 1 and nodes ({nodes}), got {topk_nodes}")
    if top_k % topk_nodes or top_k // topk_nodes > experts // nodes:
        raise ValueError(
            f"BilevelRouter: topk_nodes must divide top_k ({top_k}) into at most the {experts // nodes} experts of a "
            f"node, got {topk_nodes}"
        )
    for name, coef in coefs.items():
        if not 0 <= coef < math.inf:
            raise ValueError(f"BilevelRouter: {name} must be finite and not negative, got {coef}")
