"""What a router says: which experts each token goes to, and with what weight.

The legend of letters, used everywhere in the library:

    T tokens            K experts per token      E experts          D hidden size
    F expert intermediate size                   R rows on this rank
    N (row, k) pairs    S slots                  L layers
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


def narrow_ids(expert_ids: Tensor, num_experts: int) -> Tensor:
    """Integer ids as int32: what does not fit 32 bits must not come back as somebody's expert."""
    if expert_ids.dtype == torch.int32:
        return expert_ids
    return expert_ids.long().clamp(-2, num_experts).to(torch.int32)


@dataclass(frozen=True)
class Routing:
    """The choice of a router for T tokens, K experts each, out of `num_experts`.

    `expert_ids` int32 [T, K]: -1 means no expert; an id >= num_experts (the sentinel of expert-parallel transformers)
    counts as no expert too. `weights` [T, K] floating point, differentiable. `counts` int32 [E] or None: tokens per
    expert. `scores` fp32 [T, E] or None: what the router computed before the choice, differentiable, for the losses;
    `logits` [T, E] or None: what it computed them from. `capacity`: no expert has more than this many of these pairs;
    None: nobody has limited them. It is a number known without a look at the device. `mask` bool [T] or None: False for
    a token that is padding, which has no expert and which no loss counts. `state` [T, n] or None: what the next layer's
    router is to know of each token, differentiable.
    """

    expert_ids: Tensor
    weights: Tensor
    num_experts: int
    counts: Tensor | None = None
    scores: Tensor | None = None
    logits: Tensor | None = None
    capacity: int | None = None
    mask: Tensor | None = None
    state: Tensor | None = None

    @classmethod
    def from_topk(cls, expert_ids: Tensor, weights: Tensor, num_experts: int) -> Routing:
        """A Routing from any router's top-k: ids [T, K] of any integer type and weights [T, K].

        Raises ValueError where the shapes differ or are not [T, K], the devices differ, or `num_experts` is not
        positive; TypeError where the ids are not integer or the weights not floating point tensors.
        """
        if not (isinstance(expert_ids, Tensor) and isinstance(weights, Tensor)):
            raise TypeError(
                "Routing: expert_ids and weights must both be tensors, got "
                f"{type(expert_ids).__name__} and {type(weights).__name__}"
            )
        if expert_ids.dim() != 2 or expert_ids.shape != weights.shape:
            raise ValueError(
                "Routing: expert_ids and weights must both be [T, K], got "
                f"{tuple(expert_ids.shape)} and {tuple(weights.shape)}"
            )
        if expert_ids.dtype.is_floating_point or expert_ids.dtype.is_complex or expert_ids.dtype == torch.bool:
            raise TypeError(f"Routing: expert_ids must be integers, got {expert_ids.dtype}")
        if not weights.dtype.is_floating_point:
            raise TypeError(f"Routing: weights must be floating point, got {weights.dtype}")
        if expert_ids.device != weights.device:
            raise ValueError(
                f"Routing: expert_ids and weights must be on one device, got {expert_ids.device} and {weights.device}"
            )
        if num_experts < 1:
            raise ValueError(f"Routing: num_experts must be at least 1, got {num_experts}")
        return cls(narrow_ids(expert_ids, num_experts), weights, num_experts)

    def detach(self) -> Routing:
        """The same choice without its graph: for traces, plots and losses that must not hold the step's memory."""
        names = ("expert_ids", "weights", "counts", "scores", "logits", "mask", "state")
        held = {name: getattr(self, name) for name in names}
        return replace(self, **{name: t.detach() for name, t in held.items() if t is not None})

    def masked(self, mask: Tensor) -> Routing:
        """The same choice, with no expert, no weight and no count for the tokens where `mask` bool [T] is False."""
        gone = ~mask[:, None]
        ids = self.expert_ids.masked_fill(gone, -1)
        weights = self.weights.masked_fill(gone, 0)
        counts = None if self.counts is None else pairs_of_experts(ids, self.num_experts).int()
        return replace(self, expert_ids=ids, weights=weights, counts=counts, mask=mask)


def pairs_of_experts(ids: Tensor, experts: int) -> Tensor:
    """Pairs of each expert, int64 [E]; ids outside 0 .. E-1 are no expert."""
    ids = torch.where((ids < 0) | (ids >= experts), experts, ids).flatten().long()
    return ids.new_zeros(experts + 1).scatter_add(0, ids, torch.ones_like(ids))[:experts]
