"""MoE: a router, its experts, and an optional shared expert, in place of a transformer's feed-forward block."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..dispatch.protocol import Dispatcher
from ..kernels.activation import Activation
from ..kernels.routing import Routing
from ..kernels.transforms import under_transform
from .capacity import Capacity, Overflow, limit
from .experts import Experts
from .losses import TokenRanks, attach_loss, load_balancing_loss, z_loss
from .routers import ROUTERS
from .shared import SharedExpert

SCOPES = ("batch", "sequence", "global")


class MoE(nn.Module):
    """Mixture of experts: x [..., D] -> y [..., D], each token through K = `top_k` of E = `num_experts` experts.

    `router`: a name in ROUTERS ("softmax", "sigmoid", "bilevel"), made with `router_options` (see SoftmaxRouter,
    SigmoidRouter, BilevelRouter), or a module x [T, D] -> Routing. `activation`, `gated`, `bias`, `dispatcher`: see
    Experts. With `shared_intermediate_size` > 0 every token also passes a shared expert of that size, weighted by a
    sigmoid gate if `shared_gate`.

    `capacity`: how many pairs an expert takes, a Capacity or its factor; None: all. A token goes without the experts
    that dropped it. `last_overflow` says what was dropped in the last forward (see Overflow).

    While training, `load_balancing_coef` times the router's balancing loss (see `load_balancing_loss`) and
    `z_loss_coef` times the z-loss run backward with y: the training loop does not change. They see the choice before
    `capacity` limits it. `load_balancing_scope`: "batch" (all tokens of a call), "sequence" (x [B, S, D]: each sequence
    for itself) or "global" (all ranks of `load_balancing_group`, whose gradients are averaged, as by DDP). The group
    becomes `token_ranks`, which can be set to a TokenRanks for any scope: the batch of losses and of `capacity` is then
    that of all these ranks. Where the main loss is multiplied (gradient accumulation by 1/n, a loss scale in fp16), set
    `aux_scale`, a number or a 0-d tensor, to the same. `aux_losses` holds the last training forward's losses, detached
    and before their coefficients, for reading: "load_balancing" always, "z_loss" where it has a coefficient.

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
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        router: str | nn.Module = "softmax",
        router_options: dict[str, Any] | None = None,
        activation: str | Activation = "silu",
        gated: bool = True,
        bias: bool = False,
        shared_intermediate_size: int = 0,
        shared_gate: bool = False,
        dispatcher: Dispatcher | None = None,
        capacity: Capacity | float | None = None,
        load_balancing_coef: float = 0.0,
        load_balancing_scope: str = "batch",
        load_balancing_group: dist.ProcessGroup | None = None,
        z_loss_coef: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(num_experts, top_k, shared_intermediate_size, shared_gate, load_balancing_coef, z_loss_coef)
        _check_scope(load_balancing_scope, load_balancing_group)
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        form: dict[str, Any] = {"activation": activation, "gated": gated, "bias": bias, **where}
        self.router = _router(router, router_options, hidden_size, num_experts, top_k, **where)
        self.experts = Experts(num_experts, hidden_size, intermediate_size, dispatcher=dispatcher, **form)
        self.shared = (
            SharedExpert(hidden_size, shared_intermediate_size, gate=shared_gate, **form)
            if shared_intermediate_size
            else None
        )
        self.capacity = capacity if capacity is None or isinstance(capacity, Capacity) else Capacity(capacity)
        self.load_balancing_coef, self.z_loss_coef = load_balancing_coef, z_loss_coef
        self.load_balancing_scope, group = load_balancing_scope, load_balancing_group
        self.token_ranks = None if group is None else TokenRanks(group, average=group.size())
        self.aux_scale: float | Tensor = 1.0
        self.aux_losses: dict[str, Tensor] = {}
        self.last_routing: Routing | None = None
        self.last_overflow: Overflow | None = None

    def forward(self, x: Tensor) -> Tensor:
        tokens = self._tokens(x)
        routing = kept = self._route(tokens)
        overflow = None
        if self.capacity is not None:
            kept, overflow = limit(routing, self.capacity, self.token_ranks)
        y = self.experts(tokens, kept)
        if self.shared is not None:
            y = y + self.shared(tokens)
        if self.training and routing.scores is not None:
            y = self._with_losses(y, routing, sequences=math.prod(x.shape[:-2]))
        if not under_transform():
            self.last_routing, self.last_overflow = replace(kept.detach(), logits=None), overflow
        return y if x.dim() == 2 else y.reshape(x.shape)

    def _tokens(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"MoE: x must be a tensor [..., {self.hidden_size}], got {type(x).__name__}")
        if x.dim() == 0 or x.shape[-1] != self.hidden_size:
            raise ValueError(f"MoE: x must be [..., {self.hidden_size}], got {tuple(x.shape)}")
        return x.reshape(-1, self.hidden_size)

    def _route(self, tokens: Tensor) -> Routing:
        routing = self.router(tokens)
        if not isinstance(routing, Routing):
            raise TypeError(f"MoE: router must return a Routing, got {type(routing).__name__}")
        return routing

    def _with_losses(self, y: Tensor, routing: Routing, sequences: int) -> Tensor:
        """y with this step's losses attached to its backward pass; notes their values in `aux_losses`."""
        balancing_loss = getattr(self.router, "balancing_loss", load_balancing_loss)
        balance = balancing_loss(
            routing if self.load_balancing_coef else routing.detach(),
            sequences=sequences if self.load_balancing_scope == "sequence" else None,
            ranks=self.token_ranks,
        )
        losses, total = {"load_balancing": balance}, self.load_balancing_coef * balance
        if self.z_loss_coef:
            losses["z_loss"] = z_loss(routing, ranks=self.token_ranks)
            total = total + self.z_loss_coef * losses["z_loss"]
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
        return ROUTERS[router](hidden_size, num_experts, top_k, device=device, dtype=dtype, **(options or {}))
    if not isinstance(router, nn.Module):
        raise TypeError(f"MoE: router must be a name or a module, got {type(router).__name__}")
    if options:
        raise ValueError(f"MoE: router_options must come with a router's name, got them with a {type(router).__name__}")
    for name, here in (("num_experts", num_experts), ("top_k", top_k)):
        there = getattr(router, name, here)
        if there != here:
            raise ValueError(f"MoE: router's {name} must be the layer's ({here}), got {there}")
    return router


def _check(num_experts, top_k, shared_intermediate_size, shared_gate, load_balancing_coef, z_loss_coef) -> None:
    sizes = {"num_experts": num_experts, "top_k": top_k, "shared_intermediate_size": shared_intermediate_size}
    for name, size in sizes.items():
        if not hasattr(size, "__index__"):
            raise TypeError(f"MoE: {name} must be an integer, got {size!r}")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"MoE: top_k must be between 1 and num_experts ({num_experts}), got {top_k}")
    if shared_intermediate_size < 0:
        raise ValueError(f"MoE: shared_intermediate_size must not be negative, got {shared_intermediate_size}")
    if shared_gate and not shared_intermediate_size:
        raise ValueError("MoE: shared_gate must come with shared_intermediate_size > 0, got 0")
    for name, coef in (("load_balancing_coef", load_balancing_coef), ("z_loss_coef", z_loss_coef)):
        if not (coef >= 0 and math.isfinite(coef)):
            raise ValueError(f"MoE: {name} must be finite and not negative, got {coef}")


def _check_scope(scope: str, group: dist.ProcessGroup | None) -> None:
    if scope not in SCOPES:
        raise ValueError(f"MoE: load_balancing_scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    if (scope == "global") != (group is not None):
        raise ValueError(
            "MoE: load_balancing_group must be given with load_balancing_scope='global' and only then, "
            f"got scope {scope!r} and group {group}"
        )
