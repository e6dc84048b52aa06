"""What every router is; and what every learned one has: a gate, whose logits are fp32 whatever the model's dtype."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...kernels.router_logits import router_logits
from ...kernels.routing import Routing, pairs_of_experts
from ...kernels.topk.reference import EPS
from ...kernels.transforms import under_transform
from ..losses import TokenRanks, load_balancing_loss
from .given import NOTHING, Given


class Router(nn.Module):
    """Abstract: x [T, D] -> Routing of T tokens, K = `top_k` of E = `num_experts` experts each.

    A router of your own need not inherit from this: any nn.Module that takes x [T, D] and returns a Routing serves. If
    it has a method `balancing_loss`, with the arguments of the one here, its layer balances by that. One that inherits
    writes `choose`, and `saw` where it keeps count of what it chose. `hidden_size` is D.

    A router that chooses among more than the E experts has a module `free` (see FreeExperts): what ids from E on name.

    What a router declares of itself, as attributes:

        causal         no token's choice depends on the tokens after it: what was generated stays as it was
        per_token      a token's choice depends on no other token, in no batch (then it is causal too)
        draws          while training, it draws at random
        joint          while training, choices depend on each other, whatever the two above say, which is for evaluation
        fixed_k        every token that is no padding has K experts
        needs_ids      it chooses by token ids, `Given.ids`
        carries_state  it takes `Given.state` from the layer before and says `Routing.state` for the next one
        trains_gate    a gradient of the output reaches the router
        balances       a balancing loss makes sense; else a coefficient for it is refused
        slots          experts work on mixtures of tokens, and the Routing is one of those: see SoftRouter
        straight_through  the gradient of its weights is not their own but that of its scores: see PartsRouter
    """

    causal: bool = True
    per_token: bool = True
    draws: bool = False
    joint: bool = False
    fixed_k: bool = True
    needs_ids: bool = False
    carries_state: bool = False
    trains_gate: bool = True
    balances: bool = True
    slots: bool = False
    straight_through: bool = False

    def __init__(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        for name, size in (("hidden_size", hidden_size), ("num_experts", num_experts), ("top_k", top_k)):
            if not hasattr(size, "__index__"):
                raise TypeError(f"{type(self).__name__}: {name} must be an integer, got {size!r}")
        if hidden_size < 1:
            raise ValueError(f"{type(self).__name__}: hidden_size must be at least 1, got {hidden_size}")
        if not 1 <= top_k <= num_experts:
            raise ValueError(
                f"{type(self).__name__}: top_k must be between 1 and the number of experts ({num_experts}), got {top_k}"
            )
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k

    def balancing_loss(
        self, routing: Routing, *, sequences: int | None = None, ranks: TokenRanks | None = None
    ) -> Tensor:
        """What levels the load of this router when minimised: a scalar, differentiable in `routing.scores`.

        The choice must be the router's own, before any limit. `sequences`, `ranks`: see `load_balancing_loss`.
        """
        return load_balancing_loss(routing, sequences=sequences, ranks=ranks)

    def choose(self, x: Tensor, given: Given) -> Routing:
        """The Routing of x [T, D], for all tokens alike: padding is taken out afterwards. A router whose choices depend
        on each other looks at `given.mask` itself."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: give it a choose(x, given) -> Routing")

    def at(self, routing: Routing, ids: Tensor) -> Routing:
        """The Routing in which `ids` int [T, K] were chosen, with the weights that this router gives them from the live
        scores of `routing`. -1: no expert; -2: the token's own choice stays."""
        own = routing.expert_ids
        live = (ids == -2).all(1, keepdim=True)
        width = max(own.shape[1], ids.shape[1])  # a live token may have more experts than any that was recorded
        own, ids = (torch.nn.functional.pad(t, (0, width - t.shape[1]), value=-1) for t in (own, ids))
        ids = torch.where(live, own, ids).int()
        none = ids < 0
        weights = self.weights_at(routing, ids.long().clamp_min(0), none).masked_fill(none, 0)
        new = replace(routing, expert_ids=ids, weights=weights, counts=pairs_of_experts(ids, self.num_experts).int())
        return new if routing.mask is None else new.masked(routing.mask)

    def weights_at(self, routing: Routing, ids: Tensor, none: Tensor) -> Tensor:
        """The weights [T, K] of the experts `ids` int64 [T, K]; where `none` bool [T, K], nobody is there."""
        assert routing.scores is not None
        weights = routing.scores.gather(1, ids).masked_fill(none, 0)
        if getattr(self, "renormalize", False):
            weights = weights / (weights.sum(1, keepdim=True) + EPS)
        return weights * getattr(self, "scale", 1.0)

    def saw(self, routing: Routing) -> None:
        """Called with each choice of a training forward, once: not when activation checkpointing runs it again."""

    def forward(self, x: Tensor, given: Given = NOTHING) -> Routing:
        if given.mask is not None:
            gone = ~given.mask[:, None]
            x, state = x.masked_fill(gone, 0), given.state
            given = replace(given, state=None if state is None else state.masked_fill(gone, 0))
        routing = self.choose(x, given)
        if given.mask is not None and not self.slots:
            routing = routing.masked(given.mask)
        if self.training and not under_transform() and not _runs_again():
            self.saw(routing)
        return routing

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}"


class GatedRouter(Router):
    """Abstract: a Router with a linear gate.

    `weight` [E, D] and the optional `gate_bias` [E] give the logits; `weight` is [E, `gate_size`] where the gate sees
    something else than x, and has `rows` rows where it chooses among more than the E experts. `jitter` j multiplies the
    router's input (not the experts') by uniform noise from [1 - j, 1 + j] while training (Fedus et al., Switch
    Transformers, 2021).
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        gate_bias: bool = False,
        jitter: float = 0.0,
        gate_size: int | None = None,
        rows: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k)
        if not 0.0 <= jitter < 1.0:
            raise ValueError(f"{type(self).__name__}: jitter must be in [0, 1), got {jitter}")
        self.jitter = jitter
        width = hidden_size if gate_size is None else gate_size
        rows = num_experts if rows is None else rows
        self.weight = nn.Parameter(torch.empty(rows, width, device=device, dtype=dtype))
        self.gate_bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype)) if gate_bias else None
        GatedRouter.reset_parameters(self)

    def reset_parameters(self) -> None:
        """Uniform weights within 1 / sqrt(inputs), as nn.Linear; bias zero."""
        nn.init.uniform_(self.weight, -(self.weight.shape[1] ** -0.5), self.weight.shape[1] ** -0.5)
        if self.gate_bias is not None:
            nn.init.zeros_(self.gate_bias)

    def logits(self, x: Tensor) -> Tensor:
        """fp32 [T, E] (fp64 for fp64 x) of x [T, D]: cast up before the product, so that half types keep their ties
        apart, and untouched by autocast."""
        return router_logits(self.jittered(x), self.weight, self.gate_bias)

    def jittered(self, x: Tensor) -> Tensor:
        """x [T, D], while training with the noise of `jitter`."""
        if not (self.jitter and self.training):
            return x
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return x * torch.empty_like(x, dtype=wide).uniform_(1 - self.jitter, 1 + self.jitter)


def warn_of_constant_weights(who: str, top_k: int, how: str, asked: bool) -> None:
    """Says, where it was asked for, that one weight normalised by itself is constant."""
    if asked and top_k == 1:
        warnings.warn(
            f"{who}: top_k=1 with {how} makes every weight the same: the router learns from its losses alone, "
            "never from the output",
            stacklevel=3,
        )


def _runs_again() -> bool:
    """Whether this forward is part of a backward pass: activation checkpointing runs it a second time."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
