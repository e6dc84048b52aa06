"""MoM: mixture of memories. Each token writes to and reads from K of M states of linear attention, and a shared one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.autocast import no_autocast
from ..kernels.grouped_linear import grouped_linear
from ..kernels.linear_memory import linear_memory
from ..kernels.plan import plan
from ..kernels.routing import Routing
from .balance import balancing_losses
from .layer import _router
from .losses import TokenRanks, attach_loss
from .routers import Given, Router

RULES = ("linear", "gated", "gated_delta")


class MoM(nn.Module):
    """Mixture of memories, in place of attention: x [B, T, D] -> (y [B, T, D], state).

    A router chooses K = `top_k` of M = `num_memories` for each token. Each (sequence, memory) has a state S [H, dk, dv]
    of its own, which sees the tokens that chose it, in their order, and no other:

        k, v, a, beta = projections of x, each memory's own;   q = one projection
        S <- a S + k (beta (v - a S^T k))^T                                  rule "gated_delta" (Gated DeltaNet)
        S <- a S + k v^T, "gated";   S <- S + k v^T, "linear"
        y = W_o (norm(sum over the K memories of weight * S^T q) * silu(W_g x))

    With `shared` one more memory takes every token, with weight 1. a = exp(-A softplus(w x + b)) per head, beta =
    sigmoid; for "gated_delta" q and k have length 1 in each head; q is divided by sqrt(dk). States and gates are fp32
    (fp64 for fp64).

    `layer(x, state=...)`, with the state [B, M (+ 1), H, dk, dv] that the same layer returned for what came before
    (None: the beginning), goes on from there: a sequence in one call, in pieces or token by token gives one result.
    States are the caller's: the layer keeps none. `layer(x, mask=...)`, mask bool [B, T], False for padding: such a
    token is written nowhere, left or right, and its y is 0. `chunk`: rows computed together; it changes rounding only.

    router, router_options  as MoE's; by default softmax, for K > 1 with weights that sum to 1. One that needs token
                            ids, carries a state or looks at later tokens is refused. There is no capacity
    load_balancing_coef     times the router's balancing loss, while training, as MoE's; `aux_losses` for reading
    num_heads, key_size, value_size  H, dk and dv of each head
    gated_output            the factor silu(W_g x)

    There is no short convolution. Raises ValueError / TypeError naming argument, rule and value. Source: Du et al.,
    MoM: Linear Sequence Modeling with Mixture-of-Memories (2025).

    >>> layer = MoM(hidden_size=16, num_memories=4, top_k=2, num_heads=2)
    >>> y, state = layer(torch.randn(3, 10, 16))
    >>> y.shape, state.shape
    (torch.Size([3, 10, 16]), torch.Size([3, 5, 2, 8, 8]))
    >>> more, state = layer(torch.randn(3, 1, 16), state=state)  # the next token
    """

    def __init__(
        self,
        hidden_size: int,
        num_memories: int,
        top_k: int,
        *,
        num_heads: int = 4,
        key_size: int | None = None,
        value_size: int | None = None,
        rule: str = "gated_delta",
        shared: bool = True,
        gated_output: bool = True,
        router: str | nn.Module = "softmax",
        router_options: dict[str, Any] | None = None,
        load_balancing_coef: float = 0.0,
        chunk: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dk, dv = (max(1, hidden_size // num_heads) if n is None else n for n in (key_size, value_size))
        sizes = {"hidden_size": hidden_size, "num_memories": num_memories, "top_k": top_k, "num_heads": num_heads}
        for name, size in {**sizes, "key_size": dk, "value_size": dv, "chunk": chunk}.items():
            if not hasattr(size, "__index__") or isinstance(size, bool):
                raise TypeError(f"MoM: {name} must be an integer, got {size!r}")
            if size < 1:
                raise ValueError(f"MoM: {name} must be at least 1, got {size}")
        if top_k > num_memories:
            raise ValueError(f"MoM: top_k must be at most num_memories ({num_memories}), got {top_k}")
        if rule not in RULES:
            raise ValueError(f"MoM: rule must be one of {', '.join(RULES)}, got {rule!r}")
        self.hidden_size, self.num_memories, self.top_k, self.num_heads = sizes.values()
        self.key_size, self.value_size, self.rule, self.shared, self.chunk = dk, dv, rule, shared, chunk
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        options = {"renormalize": True} if router == "softmax" and top_k > 1 else {}
        options |= router_options or {}
        self.router = _router(router, options, hidden_size, num_memories, top_k, **where)
        for asked in ("needs_ids", "carries_state"):
            if getattr(self.router, asked, False):
                raise ValueError(f"MoM: router must choose by x alone, got a {type(self.router).__name__} that {asked}")
        if not getattr(self.router, "causal", True):
            raise ValueError(f"MoM: router must not look at later tokens, got a {type(self.router).__name__}")
        self.load_balancing_coef = load_balancing_coef
        states = num_memories + shared
        self.query = nn.Linear(hidden_size, num_heads * dk, bias=False, **where)
        gates = {"linear": 0, "gated": 1, "gated_delta": 2}[rule]
        self.w_memories = nn.Parameter(torch.empty(states, num_heads * (dk + dv + gates), hidden_size, **where))
        self.decay_rate = nn.Parameter(torch.empty(states, num_heads, **where)) if gates else None
        self.decay_bias = nn.Parameter(torch.empty(states, num_heads, **where)) if gates else None
        self.norm = nn.RMSNorm(dv, eps=1e-5, **where)
        self.gate = nn.Linear(hidden_size, num_heads * dv, bias=False, **where) if gated_output else None
        self.out = nn.Linear(num_heads * dv, hidden_size, bias=False, **where)
        self.token_ranks: TokenRanks | None = None
        self.aux_scale: float | Tensor = 1.0
        self.aux_losses: dict[str, Tensor] = {}
        self.last_routing: Routing | None = None
        self.reset_parameters()

    @property
    def num_states(self) -> int:
        """M, and the shared one."""
        return self.num_memories + self.shared

    def reset_parameters(self) -> None:
        """Projections uniform within 1 / sqrt(D); decay rates 1 to 16, steps 0.001 to 0.1, as Gated DeltaNet."""
        nn.init.uniform_(self.w_memories, -(self.hidden_size**-0.5), self.hidden_size**-0.5)
        if self.decay_rate is not None and self.decay_bias is not None:
            with torch.no_grad():
                self.decay_rate.uniform_(1, 16).log_()
                step = torch.empty_like(self.decay_bias).uniform_(-6.9, -2.3).exp()
                self.decay_bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus of it is the step

    def forward(self, x: Tensor, mask: Tensor | None = None, *, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(x, mask, state)
        batch, length = x.shape[:2]
        tokens, flat = x.reshape(-1, self.hidden_size), None if mask is None else mask.reshape(-1)
        if flat is not None:
            tokens = tokens.masked_fill(~flat[:, None], 0)
        routing = self._route(tokens, flat, batch)
        self.last_routing = replace(routing.detach(), logits=None, state=None)
        wide = torch.promote_types(x.dtype, torch.float32)
        if state is None:
            sizes = (self.num_states, self.num_heads, self.key_size, self.value_size)
            state = torch.zeros(batch, *sizes, dtype=wide, device=x.device)
        mixed, state = self._remember(tokens, self._with_shared(routing, flat), batch, state.to(wide))
        y = self.norm(mixed.to(x.dtype)).flatten(1)
        if self.gate is not None:
            y = y * F.silu(self.gate(tokens))
        y = self.out(y)
        if flat is not None:
            y = y.masked_fill(~flat[:, None], 0)
        if self.training and self.load_balancing_coef and routing.scores is not None:
            y = self._balanced(y, routing, batch)
        return y.view(batch, length, self.hidden_size), state

    def _route(self, tokens: Tensor, mask: Tensor | None, batch: int) -> Routing:
        if isinstance(self.router, Router) and type(self.router).forward is Router.forward:
            routing = self.router(tokens, Given(mask=mask, sequences=batch, ranks=self.token_ranks))
        else:
            routing = self.router(tokens)
        return routing.masked(mask) if mask is not None and routing.mask is None else routing

    def _with_shared(self, routing: Routing, mask: Tensor | None) -> Routing:
        """The shared memory as one more choice of every token, memory M with weight 1."""
        if not self.shared:
            return routing
        ids, weights = routing.expert_ids, routing.weights
        own = ids.new_full((len(ids), 1), self.num_memories)
        own = own if mask is None else own.masked_fill(~mask[:, None], -1)
        both = torch.cat([ids.masked_fill(ids >= self.num_memories, -1), own], 1)
        return Routing.from_topk(both, torch.cat([weights, torch.ones_like(weights[:, :1])], 1), self.num_states)

    def _remember(self, tokens: Tensor, routing: Routing, batch: int, state: Tensor) -> tuple[Tensor, Tensor]:
        """(sum over memories of weight * S^T q [B * T, H, dv], the states afterwards)."""
        wide, heads, dk, dv = state.dtype, self.num_heads, self.key_size, self.value_size
        ids, choices = routing.expert_ids, routing.expert_ids.shape[1]
        by_memory = plan(ids, self.num_states)
        projected = grouped_linear(
            tokens.index_select(0, by_memory.pair_of_row.long() // choices), by_memory.offsets, self.w_memories
        )
        sequence = torch.arange(batch, device=ids.device).repeat_interleave(len(ids) // batch if batch else 0)[:, None]
        pairs = torch.where((ids < 0) | (ids >= self.num_states), -1, sequence * self.num_states + ids)
        order = plan(pairs, max(1, batch * self.num_states))
        rows = order.pair_of_row.long()
        here = by_memory.row_of_pair.long().index_select(0, rows)
        with no_autocast(tokens.device):
            parts = projected.index_select(0, here).to(wide).unflatten(1, (heads, -1))
            k, v, gates = parts.split([dk, dv, parts.shape[2] - dk - dv], 2)
            memory = ids.flatten().index_select(0, rows).long().clamp(0, self.num_states - 1)
            decay, beta = self._gates(gates, memory)
            q = self.query(tokens).to(wide).unflatten(1, (heads, dk))
            if beta is not None:
                q, k = F.normalize(q, dim=2, eps=1e-6), F.normalize(k, dim=2, eps=1e-6)
            q = (q * dk**-0.5).index_select(0, rows // choices)
            offsets = order.offsets[: batch * self.num_states + 1]
            o, after = linear_memory(q, k, v, decay, beta, offsets, state.flatten(0, 1), chunk=self.chunk)
            weights = routing.weights.to(wide).flatten().index_select(0, rows)[:, None, None]
            mixed = o.new_zeros(len(tokens), heads, dv).index_add(0, rows // choices, o * weights)
        return mixed, after.unflatten(0, (batch, self.num_states))

    def _gates(self, gates: Tensor, memory: Tensor) -> tuple[Tensor, Tensor | None]:
        """(log a, beta or None) [N, H] of gates [N, H, 0, 1 or 2] and the memory of each row."""
        if self.decay_rate is None or self.decay_bias is None:
            return gates.new_zeros(gates.shape[:2]), None
        rate = self.decay_rate.to(gates.dtype).exp().index_select(0, memory)
        bias = self.decay_bias.to(gates.dtype).index_select(0, memory)
        decay = -rate * F.softplus(gates[..., 0] + bias)
        return decay, gates[..., 1].sigmoid() if self.rule == "gated_delta" else None

    def _balanced(self, y: Tensor, routing: Routing, batch: int) -> Tensor:
        how = (self.load_balancing_coef, "batch", "routed", "none", batch, self.token_ranks)
        losses, total = balancing_losses(self.router, routing, *how)
        self.aux_losses = {name: loss.detach() for name, loss in losses.items()}
        return attach_loss(y, total * self.aux_scale) if total.requires_grad else y

    def _check(self, x: Tensor, mask: Tensor | None, state: Tensor | None) -> None:
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[2] != self.hidden_size:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"MoM: x must be [B, T, {self.hidden_size}], got {got}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
            raise ValueError(f"MoM: mask must be bool {list(x.shape[:2])}, got {mask.dtype} {list(mask.shape)}")
        shape = [len(x), self.num_states, self.num_heads, self.key_size, self.value_size]
        if state is not None and (not state.is_floating_point() or list(state.shape) != shape):
            raise ValueError(f"MoM: state must be {shape} as the layer returned it, got {list(state.shape)}")

    def extra_repr(self) -> str:
        shared = ", shared" if self.shared else ""
        return (
            f"num_memories={self.num_memories}, top_k={self.top_k}, rule={self.rule!r}, heads={self.num_heads}{shared}"
        )
