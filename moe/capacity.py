"""Capacity: an upper bound on the pairs of each expert, set after the router's choice. What is too much is dropped."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from fractions import Fraction

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import collectives
from ..dispatch.wire import pack, unpack
from ..kernels.plan import plan
from ..kernels.routing import Routing, pairs_of_experts
from ..kernels.transforms import refuse_transforms
from .losses import TokenRanks

DROPS, SCOPES = ("weight", "position", "choice"), ("rank", "batch")


@dataclass(frozen=True)
class Capacity:
    """An expert takes at most C = ceil(factor * T * K / E) pairs: `factor` times its share of an even load.

    `drop` says which pairs stay: "weight" the C largest weights, the first ones among equals; "position" the first C
    in the order of the tokens; "choice" the first C in the order of the choices: all tokens' first choices before any
    second one, each in the order of the tokens. (Megatron-LM's moe_token_drop_policy "probs" and "position"; GShard's
    and Tutel's order is "choice".) `scope` "rank": T is this
    rank's, and each rank chooses for itself; "batch": T is the whole batch's, and the choice is that of one process
    with all tokens in rank order. `pad` promises whoever moves the pairs that no expert has more than C of them
    (`Routing.capacity`), so that its shapes can depend on T alone; it must come with scope "rank", where C is the same
    for every rank with as many tokens.

    `factor` counts as it is written: 1.1 is 11/10 and not the binary number next to it.

    Source: Lepikhin et al., GShard (2020), section 3.1; Fedus et al., Switch Transformers (2021), equation 3.

    >>> Capacity(1.25).of(tokens=64, top_k=2, num_experts=8)
    20
    """

    factor: float = 1.25
    drop: str = "weight"
    scope: str = "rank"
    pad: bool = False
    ratio: tuple[int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.factor, bool) or not isinstance(self.factor, int | float):
            raise TypeError(f"Capacity: factor must be a number, got {self.factor!r}")
        if not 0 < self.factor < math.inf:
            raise ValueError(f"Capacity: factor must be positive and finite, got {self.factor}")
        for name, value, known in (("drop", self.drop, DROPS), ("scope", self.scope, SCOPES)):
            if value not in known:
                raise ValueError(f"Capacity: {name} must be one of {', '.join(known)}, got {value!r}")
        if self.pad and self.scope != "rank":
            raise ValueError(f"Capacity: pad must come with scope 'rank', got {self.scope!r}")
        object.__setattr__(self, "ratio", Fraction(str(self.factor)).as_integer_ratio())

    def of(self, tokens: int, top_k: int, num_experts: int) -> int:
        """C of T tokens with K choices each, out of E."""
        up, down = self.ratio
        return -(-up * tokens * top_k // (down * num_experts))


@dataclass(frozen=True)
class Overflow:
    """What a limit took away. `capacity` C. `dropped` int64 0-d: this rank's pairs that went, exactly; `dropped_total`:
    those of all ranks (the same tensor where there are no others). `overflowed` bool 0-d: whether any rank's went.
    Tensors are on the routing's device."""

    capacity: int
    dropped: Tensor
    dropped_total: Tensor
    overflowed: Tensor


def limit(
    routing: Routing, capacity: Capacity, ranks: TokenRanks | None = None, top_k: int | None = None
) -> tuple[Routing, Overflow]:
    """The routing with no more pairs for an expert than `capacity` allows, and what that took.

    A dropped pair has id -1 and weight 0, and no gradient. All other weights stay as they are, gradients too: nothing
    is renormalised. `counts` are counted again; `scores` and `logits` stay. Losses that balance want the choice before
    it was limited. `ranks`: the ranks of scope "batch" and of `dropped_total`; None: this one is alone. `top_k`: the K
    that C goes by, where the routing has more places for a token than it fills (see ReLURouter); None: its places.

    Cost: scope "rank" does not wait for the device; with `ranks` it is one all-reduce of one number. Scope "batch" is
    one all-gather of E + 1 numbers for "position", of K E + 1 for "choice"; for "weight" one of a number, and one of
    every rank's ids and weights, K for each of max T tokens. It waits for the device once, since C depends on all
    ranks' tokens.
    """
    k = routing.expert_ids.shape[1] if top_k is None else top_k
    if ranks is not None:
        refuse_transforms("TokenRanks", "numbers move between ranks: take them on one rank", routing.weights)
    if ranks is None or capacity.scope == "rank":
        bound = capacity.of(len(routing.expert_ids), k, routing.num_experts)
        place = _places(routing.expert_ids, routing.weights, routing.num_experts, capacity.drop)
        gone = place >= bound
        dropped = gone.sum()
        total = dropped if ranks is None else collectives.all_reduce(dropped, ranks.group)
    else:
        among = _by_weight if capacity.drop == "weight" else _in_turn
        place, bound, total = among(routing, capacity, ranks, k)
        gone = place >= bound
        dropped = gone.sum()
    ids = routing.expert_ids.masked_fill(gone, -1)
    limited = replace(
        routing,
        expert_ids=ids,
        weights=routing.weights.masked_fill(gone, 0),
        counts=pairs_of_experts(ids, routing.num_experts).int(),
        capacity=bound if capacity.pad else None,
    )
    return limited, Overflow(bound, dropped, total, total > 0)


def _places(ids: Tensor, weights: Tensor, experts: int, drop: str) -> Tensor:
    """The place of each pair in its expert's queue, int32 [T, K]: 0 is first; -1 for pairs without an expert."""
    valid = (ids >= 0) & (ids < experts)
    if drop == "weight":  # stable twice: by weight, then by expert
        order = weights.detach().flatten().sort(descending=True, stable=True).indices
        queue = plan(ids.flatten()[order][:, None], experts)
        row = torch.empty_like(queue.row_of_pair).scatter(0, order, queue.row_of_pair)
    elif drop == "choice":
        queue = plan(ids.T.reshape(-1, 1), experts)
        row = queue.row_of_pair.view(ids.T.shape).T
    else:
        queue = plan(ids, experts)
        row = queue.row_of_pair
    first = queue.offsets[ids.long().clamp(0, experts - 1)]
    return torch.where(valid, row.reshape(ids.shape) - first, -1)


def _in_turn(routing: Routing, capacity: Capacity, ranks: TokenRanks, top_k: int) -> tuple[Tensor, int, Tensor]:
    """(places in the queues of the whole batch, C, pairs that go on all ranks): tokens of lower ranks come first, in
    one round over all pairs for "position", in one for each k for "choice"."""
    ids, experts, (tokens, k) = routing.expert_ids, routing.num_experts, routing.expert_ids.shape
    rounds = ids.T if capacity.drop == "choice" else ids.reshape(1, -1)
    mine = torch.stack([pairs_of_experts(round_, experts) for round_ in rounds])  # [rounds, E]
    table = collectives.all_gather(F.pad(mine.flatten(), (0, 1), value=tokens)[None], ranks.group)
    counts = table[:, :-1].unflatten(1, mine.shape)  # [G, rounds, E]
    bound = capacity.of(int(table[:, -1].sum()), top_k, experts)
    total = counts.sum(0)
    earlier = (total - mine).cumsum(0) - (total - mine)  # others' pairs of earlier rounds
    before = earlier + counts[: dist.get_rank(ranks.group)].sum(0)
    place = _places(ids, routing.weights, experts, capacity.drop)
    expert = ids.long().clamp(0, experts - 1)
    ahead = before.expand(k, experts).T[expert, torch.arange(k, device=ids.device)]
    return torch.where(place >= 0, place + ahead, -1), bound, (total.sum(0) - bound).clamp_min(0).sum()


def _by_weight(routing: Routing, capacity: Capacity, ranks: TokenRanks, top_k: int) -> tuple[Tensor, int, Tensor]:
    """The same by weight: every rank sees all pairs, and finds the places of its own."""
    ids, weights, group = routing.expert_ids, routing.weights.detach(), ranks.group
    tokens = collectives.all_gather(torch.tensor([ids.shape[0]], device=ids.device), group).tolist()
    bound, most = capacity.of(sum(tokens), top_k, routing.num_experts), max(tokens)
    missing = (0, 0, 0, most - ids.shape[0])
    padded = [F.pad(ids, missing, value=-1), F.pad(weights, missing)]
    all_ids, all_weights = unpack(collectives.all_gather(pack(padded), group), padded)
    place = _places(all_ids, all_weights, routing.num_experts, "weight")
    start = dist.get_rank(group) * most
    return place[start : start + ids.shape[0]], bound, (place >= bound).sum()
