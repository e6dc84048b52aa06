"""Experts of different sizes, a skip, and whole modules as experts, in one layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch.protocol import Dispatcher
from ..kernels.routing import Routing
from .experts import Experts
from .losses import TokenRanks, of_tokens, over_batch, scores_of, tokens_of


class SizedExperts(nn.Module):
    """E experts, D -> D: expert e is what `sizes[e]` says, (x [T, D], routing) -> y [T, D].

        F, an integer      a feed-forward network of intermediate size F (see Experts)
        0                  a skip: it answers 0, so that around a residual connection the token stays as it is
        an nn.Module       itself, rows [n, D] -> [n, D]: any network that looks at each row alone

    Experts of one size are one Experts module in `groups`, in order of their sizes and inside by their numbers: one
    grouped call for each size, whatever order `sizes` has. A skip costs nothing, and a module runs on its own rows
    alone. Several layers may share one of these (`MoE(D, pool, E, K)`): the same modules at every step of a token's
    path, of which a trace then holds the numbers. `form`, `dispatcher`: see Experts; whole modules stay on their rank,
    so with a dispatcher there must be none.

    `costs` [E]: FLOPs of a row, two for each number of an expert's matrices.

    Sources: Alizadeh et al., Duo-LLM (2024): big, small and skip; Cowsik et al., Towards Distributed Neural
    Architectures (2025): a walk through modules.

    Raises ValueError / TypeError for what is no size.

    >>> experts = SizedExperts(16, [8, 32, 0, 8])
    >>> [(group.num_experts, group.intermediate_size) for group in experts.groups], experts.costs
    ([(2, 8), (1, 32)], [768, 3072, 0, 768])
    """

    def __init__(
        self,
        hidden_size: int,
        sizes: Sequence[int | nn.Module],
        *,
        dispatcher: Dispatcher | None = None,
        **form: Any,
    ) -> None:
        super().__init__()
        for e, size in enumerate(sizes):
            if not isinstance(size, nn.Module) and (not hasattr(size, "__index__") or isinstance(size, bool)):
                raise TypeError(f"SizedExperts: sizes[{e}] must be an integer or a module, got {size!r}")
            if not isinstance(size, nn.Module) and size < 0:
                raise ValueError(f"SizedExperts: sizes[{e}] must not be negative, got {size}")
        if not len(sizes):
            raise ValueError("SizedExperts: sizes must name at least one expert, got none")
        widths = [None if isinstance(size, nn.Module) else int(size) for size in sizes]
        self.hidden_size, self.num_experts = hidden_size, len(sizes)
        self.members = [[e for e, w in enumerate(widths) if w == width] for width in sorted({w for w in widths if w})]
        form |= {"dispatcher": dispatcher}
        self.groups = nn.ModuleList(
            Experts(len(those), hidden_size, widths[those[0]] or 0, **form) for those in self.members
        )
        self.whole = nn.ModuleDict({str(e): size for e, size in enumerate(sizes) if isinstance(size, nn.Module)})
        if len(self.whole) and dispatcher is not None:
            raise ValueError("SizedExperts: sizes must hold no modules with a dispatcher, got some")

    @property
    def costs(self) -> list[int]:
        found = [0] * self.num_experts
        for those, group in zip(self.members, self.groups, strict=True):
            assert isinstance(group, Experts)
            matrices = 3 if group.activation.gated else 2
            for e in those:
                found[e] = 2 * matrices * self.hidden_size * group.intermediate_size
        for name, module in self.whole.items():
            found[int(name)] = 2 * sum(p.numel() for p in module.parameters() if p.dim() > 1)
        return found

    def reset_parameters(self) -> None:
        """Of the groups; modules keep what they have."""
        for group in self.groups:
            group.reset_parameters()  # type: ignore[operator]

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        y = torch.zeros(x.shape, dtype=wide, device=x.device)
        ids = routing.expert_ids.long()
        ids = torch.where((ids < 0) | (ids >= self.num_experts), self.num_experts, ids)
        for those, group in zip(self.members, self.groups, strict=True):
            place = torch.full((self.num_experts + 1,), -1, dtype=torch.int32)
            place[those] = torch.arange(len(those), dtype=torch.int32)
            own = place.to(x.device)[ids]
            weights = routing.weights.masked_fill(own < 0, 0)
            y = y + group(x, Routing(own, weights, len(those)))
        for e, module in self.whole.items():
            chosen = ids == int(e)
            rows = chosen.any(1).nonzero()[:, 0]
            if len(rows):
                weights = routing.weights.masked_fill(~chosen, 0).sum(1)[rows]
                y = y.index_add(0, rows, module(x[rows]).to(wide) * weights[:, None].to(wide))
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, hidden_size={self.hidden_size}"


def budget_loss(routing: Routing, costs: Sequence[float], budget: float, *, ranks: TokenRanks | None = None) -> Tensor:
    """(mean over tokens of sum_e p_e cost_e / the largest cost - `budget`)^2, p a token's scores over their sum: fp32
    scalar, 0 where a token costs `budget` of the dearest expert on average. Scores beyond the costs are of experts that
    cost nothing. Padding counts nowhere.

    Source: Alizadeh et al., Duo-LLM (2024), whose costs are 1 for the big expert and 0 for the others.

    Raises ValueError where `budget` is not between 0 and 1, no expert costs anything, or routing has no scores.

    >>> even = Routing.from_topk(torch.tensor([[0]]), torch.ones(1, 1), 2)
    >>> budget_loss(dataclasses.replace(even, scores=torch.tensor([[0.5, 0.5]])), [1.0, 0.0], 0.25)
    tensor(0.0625)
    """
    if not 0 <= budget <= 1:
        raise ValueError(f"budget_loss: budget must be between 0 and 1, got {budget}")
    if not costs or not max(costs) > 0:
        raise ValueError(f"budget_loss: costs must have one above 0, got {list(costs)}")
    scores = scores_of(routing, "budget_loss")
    if len(costs) > scores.shape[1]:
        raise ValueError(f"budget_loss: costs must be of at most {scores.shape[1]} experts, got {len(costs)}")
    dear = scores.new_tensor([*costs, *(0.0 for _ in range(scores.shape[1] - len(costs)))]) / max(costs)
    share = scores / scores.sum(1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    sums = of_tokens((share * dear).sum(1, keepdim=True), routing).sum().view(1, 1)
    tokens = tokens_of(routing, None, "budget_loss")
    mean = over_batch(sums, sums.new_zeros(1, 0), lambda c, t: c.new_ones(1, 1) / t, tokens, None, ranks)
    there = tokens if isinstance(tokens, int) else tokens.sum()
    return (mean - budget).square() * (there > 0 if ranks is None else 1)
