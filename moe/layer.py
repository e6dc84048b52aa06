"""MoE: a router, its experts, and an optional shared expert, in place of a transformer's feed-forward block."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..dispatch.protocol import Dispatcher
from ..dispatch.schedule import Beside, Overlap
from ..kernels.activation import Activation
from ..kernels.routing import Routing
from ..kernels.transforms import under_transform
from .adapters import unwrapped
from .balance import Coef, balancing_losses, check_balancing
from .capacity import Capacity, Overflow, limit
from .experts import Experts
from .forced import FORCED, followed, forced
from .losses import TokenRanks, attach_loss, z_loss
from .routers import ROUTERS, Given, Router
from .shared import SharedExpert
from .sized import SizedExperts, budget_loss


class MoE(nn.Module):
    """Mixture of experts: x [..., D] -> y [..., D], each token through K = `top_k` of E = `num_experts` experts.

    `router`: a name in ROUTERS ("softmax", "sigmoid", "bilevel", ...), made with `router_options` (see SoftmaxRouter,
    SigmoidRouter, ...), or a module x [T, D] -> Routing. `activation`, `gated`, `bias`, `dispatcher`: see
    Experts. With `shared_intermediate_size` > 0 every token also passes a shared expert of that size, weighted by a
    sigmoid gate if `shared_gate`. With `latent_size` L > 0 the experts work on L numbers in place of D: a projection
    D -> L before rows are dispatched, one L -> D after they are combined; router and shared expert see D (Nemotron 3,
    Megatron-Core's moe_latent_size). `weights_on_input`: see Experts.

    `intermediate_size`: one size F, or one for each expert: an integer, 0 for a skip, a module that takes rows; or
    SizedExperts, which layers may share (see there). With `budget`, between 0 and 1, `budget_coef` times a loss keeps
    a token's mean cost at that share of the dearest expert's (see budget_loss; "budget" in `aux_losses`).

    `capacity`: how many pairs an expert takes, a Capacity or its factor; None: all. A token goes without the experts
    that dropped it. `last_overflow` says what was dropped in the last forward (see Overflow).

    While training, `load_balancing_coef` times the router's balancing loss and `z_loss_coef` times the z-loss run
    backward with y: the training loop does not change. They see the choice before `capacity` limits it. Each layer adds
    its own loss: losses of several layers are summed, not averaged. By default that is

        load_balancing_coef * E * sum_e f_e P_e,   f_e = tokens that chose e / T,   P_e = mean score of e

    so that an even load gives coef * K. A coefficient from elsewhere means the same only with the same convention:

    load_balancing_norm    "none": as above (Switch, transformers). "topk": divided by the choices counted for a token,
                           so that an even load gives coef (Megatron-Core, DeepSeek-V3)
    load_balancing_choice  what f counts. "routed": all K choices as they were made. "scores": the K best raw scores,
                           without the router's bias and groups (DeepSeek-V3's equation 18, Megatron-Core). "first": a
                           token's first choice only (GShard, Tutel, DeepSpeed)
    load_balancing_scope   whose tokens are one batch. "batch": all of a call, over many ranks those of all of them.
                           "rank": those of this rank, or of its cp x tp group (Megatron-Core's aux_loss); the value is
                           the mean over the groups. "sequence": x [B, S, D], each sequence for itself. "global": all
                           ranks of `load_balancing_group`, whose gradients are averaged, as by DDP

    Several losses at once: `load_balancing_coef` takes a coefficient for each scope, {"rank": 1e-2, "sequence": 1e-4}.
    A router with a `balancing_loss` of its own (bilevel) says itself what it counts and how it is normed.

    `token_ranks`, a TokenRanks, says whose tokens make the whole batch of losses and of `capacity`; the group and
    `parallelize` set it, and so may you. Where the main loss is multiplied (gradient accumulation by 1/n, a loss scale
    in fp16), set `aux_scale`, a number or a 0-d tensor, to the same. `aux_losses` holds the last training forward's
    losses, detached and before their coefficients, for reading: "load_balancing" always ("load_balancing_SCOPE" for
    each of several), "z_loss" where it has a coefficient.

    `layer(x, mask)` with mask bool [...], False for padding: such a token has no expert, moves to no rank, is in no
    count, loss or bias, and its y is 0; where it stands does not matter. A capacity C still goes by all T places.
    `layer(x, ids=...)` with token ids [...] is for a router that chooses by them (`needs_ids`). A layer whose router
    `carries_state` is called `layer(x, state=...)`, with the state that the layer before returned (None: the first),
    and returns y and its own state [..., n].

    `force_load_balancing`, for benchmarks: the chosen experts are replaced, while training or not, by "random" or by
    "round_robin" ones, so that the load is even; see `headgate.moe.forced`.

    `last_routing` is the Routing of the last forward as its experts had it, detached and without logits; None before
    the first.

    Compiles with fullgraph=True. A layer inside torch.utils.checkpoint inside torch.compile writes `last_routing` where
    Dynamo allows it only with torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True.

    Raises ValueError / TypeError naming argument, rule and value; on CPU also where the router's scores are not finite.

    >>> layer = MoE(hidden_size=64, intermediate_size=32, num_experts=8, top_k=2, load_balancing_coef=0.01)
    >>> y = layer(torch.randn(2, 10, 64))
    >>> y.shape, layer.last_routing.counts.sum(), sorted(layer.aux_losses)
    (torch.Size([2, 10, 64]), tensor(40), ['load_balancing'])
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int | Sequence[int | nn.Module] | SizedExperts,
        num_experts: int,
        top_k: int,
        *,
        router: str | nn.Module = "softmax",
        router_options: dict[str, Any] | None = None,
        activation: str | Activation = "silu",
        gated: bool = True,
        bias: bool = False,
        weights_on_input: bool = False,
        latent_size: int = 0,
        shared_intermediate_size: int = 0,
        shared_gate: bool = False,
        dispatcher: Dispatcher | None = None,
        overlap: Overlap | None = None,
        capacity: Capacity | float | None = None,
        load_balancing_coef: Coef = 0.0,
        load_balancing_scope: str = "batch",
        load_balancing_choice: str = "routed",
        load_balancing_norm: str = "none",
        load_balancing_group: dist.ProcessGroup | None = None,
        z_loss_coef: float = 0.0,
        budget: float | None = None,
        budget_coef: float = 1.0,
        force_load_balancing: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(num_experts, top_k, shared_intermediate_size, latent_size, shared_gate, z_loss_coef)
        if force_load_balancing not in (None, *FORCED):
            known = ", ".join(FORCED)
            raise ValueError(f"MoE: force_load_balancing must be one of {known} or None, got {force_load_balancing!r}")
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        form: dict[str, Any] = {"activation": activation, "gated": gated, "bias": bias, **where}
        self.router = _router(router, router_options, hidden_size, num_experts, top_k, **where)
        balancing = (load_balancing_coef, load_balancing_scope, load_balancing_choice, load_balancing_norm)
        check_balancing(self.router, *balancing, load_balancing_group)
        inner = latent_size or hidden_size
        self.latent_down = nn.Linear(hidden_size, inner, bias=bias, **where) if latent_size else None
        of_experts = {"weights_on_input": weights_on_input, "dispatcher": dispatcher, "overlap": overlap, **form}
        self.experts = _experts(num_experts, inner, intermediate_size, of_experts)
        self.budget, self.budget_coef = _budget(self.experts, self.router, budget, budget_coef), budget_coef
        self.latent_up = nn.Linear(inner, hidden_size, bias=bias, **where) if latent_size else None
        self.shared = (
            SharedExpert(hidden_size, shared_intermediate_size, gate=shared_gate, **form)
            if shared_intermediate_size
            else None
        )
        if capacity is not None and getattr(self.router, "slots", False):
            rule = f"None for a {type(self.router).__name__}, whose experts all have as many rows"
            raise ValueError(f"MoE: capacity must be {rule}, got {capacity}")
        self.capacity = capacity if capacity is None or isinstance(capacity, Capacity) else Capacity(capacity)
        self.load_balancing_coef, self.z_loss_coef = load_balancing_coef, z_loss_coef
        self.load_balancing_scope, group = load_balancing_scope, load_balancing_group
        self.load_balancing_choice, self.load_balancing_norm = load_balancing_choice, load_balancing_norm
        self.token_ranks = None if group is None else TokenRanks(group, average=group.size())
        self.force_load_balancing = force_load_balancing
        self.aux_scale: float | Tensor = 1.0
        self.aux_losses: dict[str, Tensor] = {}
        self.last_routing: Routing | None = None
        self.last_overflow: Overflow | None = None

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        state: Tensor | None = None,
        beside: Beside = (),
    ) -> Tensor | tuple[Tensor, Tensor]:
        tokens = self._tokens(x)
        given = self._given(x, mask, ids, state)
        if given.mask is not None:  # what stands at padding, NaN too, reaches no gradient
            tokens = tokens.masked_fill(~given.mask[:, None], 0)
        overflow = None
        rows, back = tokens, None
        if getattr(self.router, "slots", False):
            mixing: Any = self.router
            rows, routing, back = mixing.mix(tokens, given)
            routing = kept = followed(self, routing, tokens, given.sequences)
        else:
            routing = kept = self._route(tokens, given)
            if self.capacity is not None:
                kept, overflow = limit(routing, self.capacity, self.token_ranks, self.top_k)
        y = self._ffn(tokens, rows, kept, back, given.mask, beside)
        if given.mask is not None:
            y = y.masked_fill(~given.mask[:, None], 0)
        if self.training and routing.scores is not None:
            y = self._with_losses(y, routing, sequences=math.prod(x.shape[:-2]))
        if not under_transform():
            self.last_routing, self.last_overflow = replace(kept.detach(), logits=None, state=None), overflow
        y = y if x.dim() == 2 else y.reshape(x.shape)
        return y if routing.state is None else (y, routing.state.view(*x.shape[:-1], routing.state.shape[-1]))

    def _ffn(
        self,
        tokens: Tensor,
        rows: Tensor,
        routing: Routing,
        back: Callable[[Tensor], Tensor] | None,
        mask: Tensor | None,
        beside: Beside,
    ) -> Tensor:
        """The experts that were chosen, those without weights, and the shared one. `rows`: what the experts get, the
        tokens or a router's slots, which `back` makes tokens of."""
        more: list[Tensor] = []

        def there() -> None:
            for work in beside[:1]:
                work()
            free = getattr(self.router, "free", None)
            if free is not None:
                more.append(free(tokens, routing))
            if self.shared is not None:
                more.append(self.shared(tokens, mask))

        rows = rows if self.latent_down is None else self.latent_down(rows)
        if self.overlap is None:
            y = self.experts(rows, routing)
            there()
            for work in beside[1:]:
                work()
        else:
            y = self.experts(rows, routing, (there, *beside[1:]))
        y = y if self.latent_up is None else self.latent_up(y)
        y = y if back is None else back(y)
        for part in more:
            y = y + part
        return y

    @property
    def overlap(self) -> Overlap | None:
        experts: Any = unwrapped(self.experts)
        return getattr(experts, "overlap", None)

    def _tokens(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"MoE: x must be a tensor [..., {self.hidden_size}], got {type(x).__name__}")
        if x.dim() == 0 or x.shape[-1] != self.hidden_size:
            raise ValueError(f"MoE: x must be [..., {self.hidden_size}], got {tuple(x.shape)}")
        return x.reshape(-1, self.hidden_size)

    def _given(self, x: Tensor, mask: Tensor | None, ids: Tensor | None, state: Tensor | None) -> Given:
        """What came beside x, checked, as the router takes it: of T tokens."""
        shape, router = x.shape[:-1], type(self.router).__name__
        for name, t, asked in (("ids", ids, "needs_ids"), ("state", state, "carries_state")):
            declared = getattr(self.router, asked, False)
            if t is not None and not declared:
                raise ValueError(f"MoE: {name} must be None for a {router}, which does not use it, got a tensor")
            if t is None and declared and name == "ids":
                raise ValueError(f"MoE: ids must be the token ids {list(shape)} for a {router}, got None")
        for name, t, what in (("mask", mask, "bool"), ("ids", ids, "integers")):
            if t is None:
                continue
            if not isinstance(t, Tensor):
                raise TypeError(f"MoE: {name} must be a tensor, got {type(t).__name__}")
            if t.is_floating_point() or t.is_complex() or (t.dtype == torch.bool) != (name == "mask"):
                raise TypeError(f"MoE: {name} must be {what}, got {t.dtype}")
            if t.shape != shape:
                raise ValueError(f"MoE: {name} must be {list(shape)} as x is but for D, got {list(t.shape)}")
        if state is not None and not (isinstance(state, Tensor) and state.is_floating_point()):
            kind = state.dtype if isinstance(state, Tensor) else type(state).__name__
            raise TypeError(f"MoE: state must be a floating point tensor, got {kind}")
        if state is not None and state.shape[:-1] != shape:
            raise ValueError(f"MoE: state must be {list(shape)} and a width, got {list(state.shape)}")
        return Given(
            mask=None if mask is None else mask.reshape(-1),
            ids=None if ids is None else ids.reshape(-1),
            state=None if state is None else state.reshape(-1, state.shape[-1]),
            sequences=math.prod(x.shape[:-2]),
            ranks=self.token_ranks,
        )

    def _route(self, tokens: Tensor, given: Given) -> Routing:
        if isinstance(self.router, Router) and type(self.router).forward is Router.forward:
            routing = self.router(tokens, given)
        else:
            routing = self.router(tokens)
        if not isinstance(routing, Routing):
            raise TypeError(f"MoE: router must return a Routing, got {type(routing).__name__}")
        if given.mask is not None and routing.mask is None:
            routing = routing.masked(given.mask)
        routing = followed(self, routing, tokens, given.sequences)
        return routing if self.force_load_balancing is None else forced(routing, self.force_load_balancing)

    def _with_losses(self, y: Tensor, routing: Routing, sequences: int) -> Tensor:
        """y with this step's losses attached to its backward pass; notes their values in `aux_losses`."""
        losses: dict[str, Tensor] = {}
        total = y.new_zeros(())
        if getattr(self.router, "balances", True):
            losses, total = balancing_losses(
                self.router,
                routing,
                self.load_balancing_coef,
                self.load_balancing_scope,
                self.load_balancing_choice,
                self.load_balancing_norm,
                sequences,
                self.token_ranks,
            )
        if self.z_loss_coef and routing.logits is not None:
            losses["z_loss"] = z_loss(routing, ranks=self.token_ranks)
            total = total + self.z_loss_coef * losses["z_loss"]
        if self.budget is not None:
            sized: Any = self.experts
            losses["budget"] = budget_loss(routing, sized.costs, self.budget, ranks=self.token_ranks)
            total = total + self.budget_coef * losses["budget"]
        if under_transform():  # which does not show what asks for a gradient
            return attach_loss(y, total * self.aux_scale)
        self.aux_losses = {name: loss.detach() for name, loss in losses.items()}
        return attach_loss(y, total * self.aux_scale) if total.requires_grad else y

    def extra_repr(self) -> str:
        return f"load_balancing_coef={self.load_balancing_coef}, z_loss_coef={self.z_loss_coef}"


def _router(router, options, hidden_size: int, num_experts: int, top_k: int, device, dtype) -> nn.Module:
    if isinstance(router, str):
        if router not in ROUTERS:
            raise ValueError(f"MoE: router must be one of {', '.join(ROUTERS)} or a module, got {router!r}")
        made: Any = ROUTERS[router]
        return made(hidden_size, num_experts, top_k, device=device, dtype=dtype, **(options or {}))
    if not isinstance(router, nn.Module):
        raise TypeError(f"MoE: router must be a name or a module, got {type(router).__name__}")
    if options:
        raise ValueError(f"MoE: router_options must come with a router's name, got them with a {type(router).__name__}")
    for name, here in (("num_experts", num_experts), ("top_k", top_k)):
        there = getattr(router, name, here)
        if there != here:
            raise ValueError(f"MoE: router's {name} must be the layer's ({here}), got {there}")
    return router


def _experts(
    num_experts: int, hidden_size: int, sizes: int | Sequence[int | nn.Module] | SizedExperts, form: dict[str, Any]
) -> Experts | SizedExperts:
    if not isinstance(sizes, Sequence | SizedExperts):
        return Experts(num_experts, hidden_size, sizes, **form)
    made = sizes if isinstance(sizes, SizedExperts) else SizedExperts(hidden_size, sizes, **form)
    for name, here in (("num_experts", num_experts), ("hidden_size", hidden_size)):
        if getattr(made, name) != here:
            rule = f"sizes or SizedExperts of {name} {here}"
            raise ValueError(f"MoE: intermediate_size must be {rule}, got {getattr(made, name)}")
    return made


def _budget(experts: nn.Module, router: nn.Module, budget: float | None, coef: float) -> float | None:
    if budget is None:
        return None
    if not isinstance(experts, SizedExperts):
        raise ValueError(f"MoE: budget must come with experts of different sizes, got {budget} for experts of one")
    if getattr(router, "slots", False) or not getattr(router, "trains_gate", True):
        raise ValueError(
            f"MoE: budget must be None for a {type(router).__name__}, which learns no choice, got {budget}"
        )
    if not 0 <= budget <= 1:
        raise ValueError(f"MoE: budget must be between 0 and 1, got {budget}")
    if not (coef >= 0 and math.isfinite(coef)):
        raise ValueError(f"MoE: budget_coef must be finite and not negative, got {coef}")
    if not any(experts.costs):
        raise ValueError("MoE: budget must come with an expert that costs something, got skips alone")
    return budget


def _check(num_experts, top_k, shared_intermediate_size, latent_size, shared_gate, z_loss_coef) -> None:
    optional = {"shared_intermediate_size": shared_intermediate_size, "latent_size": latent_size}
    for name, size in {"num_experts": num_experts, "top_k": top_k, **optional}.items():
        if not hasattr(size, "__index__"):
            raise TypeError(f"MoE: {name} must be an integer, got {size!r}")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"MoE: top_k must be between 1 and num_experts ({num_experts}), got {top_k}")
    for name, size in optional.items():
        if size < 0:
            raise ValueError(f"MoE: {name} must not be negative, got {size}")
    if shared_gate and not shared_intermediate_size:
        raise ValueError("MoE: shared_gate must come with shared_intermediate_size > 0, got 0")
    if not (z_loss_coef >= 0 and math.isfinite(z_loss_coef)):
        raise ValueError(f"MoE: z_loss_coef must be finite and not negative, got {z_loss_coef}")
