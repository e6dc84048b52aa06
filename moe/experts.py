"""The experts of a layer: their weights, and the last three steps of a token's path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..dispatch.local import Local
from ..dispatch.protocol import Dispatcher
from ..dispatch.schedule import Beside, Overlap
from ..kernels.activation import Activation, as_activation
from ..kernels.routing import Routing
from .elsewhere import elsewhere_of
from .lora.attached import Gathered, changes_of, expert_ffn
from .lora.tuned import with_tuned
from .shards import Cut, Shards, cut_experts, shards_of, weight_of

WEIGHTS = ("w_gate_up", "w_down", "b_gate_up", "b_down")


class Experts(nn.Module):
    """E feed-forward networks, D -> F -> D, each for the tokens routed to it: (x [T, D], routing) -> y [T, D].

        y[t] = sum_k weights[t, k] * W_down_e act(W_gate_up_e x[t]),    e = expert_ids[t, k]

    Weights, as transformers stores them: `w_gate_up` [E, 2F, D] (gate rows first; [E, F, D] when not gated) and
    `w_down` [E, D, F]; with `bias` also `b_gate_up` [E, 2F] or [E, F] and `b_down` [E, D]. `activation` is a name, or
    an Activation, which says itself whether it is gated. `dispatcher` brings each row to the rank of its experts and
    back; None: this rank holds them all. `overlap`: an Overlap; None: nothing is computed while rows travel. With
    `weights_on_input` a weight multiplies its expert's input, not its output (Llama 4; Megatron-Core's
    moe_apply_probs_on_input, which takes K = 1 only):

        y[t] = sum_k W_down_e act(W_gate_up_e (weights[t, k] * x[t]))

    The rows of all R * K pairs are then made before the experts run.

    With a dispatcher over several ranks the weights are [E/G, ...], those of `local_experts` (a range of expert
    numbers); routing still counts over all E. A rank draws the initial values of all E experts and keeps its own: with
    the same seed the ranks together hold the layer of one rank (on the CPU to the bit), and their random states stay
    equal. An expert's gradient is that of the sum of all ranks' losses, since its tokens come from all of them (with
    SliceAllReduce, where all ranks have the same tokens, that of the one loss). Where other gradients are averaged over
    ranks, as DDP does to the router's, divide it by the number of ranks.

    >>> experts = Experts(num_experts=4, hidden_size=16, intermediate_size=32)
    >>> routing = Routing.from_topk(torch.tensor([[0, 3], [1, -1]]), torch.tensor([[0.7, 0.3], [1.0, 0.0]]), 4)
    >>> experts(torch.randn(2, 16), routing).shape
    torch.Size([2, 16])
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str | Activation = "silu",
        gated: bool = True,
        bias: bool = False,
        weights_on_input: bool = False,
        dispatcher: Dispatcher | None = None,
        overlap: Overlap | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"num_experts": num_experts, "hidden_size": hidden_size, "intermediate_size": intermediate_size}
        for name, size in sizes.items():
            if not hasattr(size, "__index__"):
                raise TypeError(f"Experts: {name} must be an integer, got {size!r}")
            if size < 1:
                raise ValueError(f"Experts: {name} must be at least 1, got {size}")
        if dispatcher is not None and (isinstance(dispatcher, type) or not isinstance(dispatcher, Dispatcher)):
            raise TypeError(f"Experts: dispatcher must be an object such as AllToAll(group), got {dispatcher!r}")
        if not isinstance(overlap, Overlap | None):
            raise TypeError(f"Experts: overlap must be a headgate.Overlap or None, got {overlap!r}")
        self.num_experts, self.hidden_size, self.intermediate_size = num_experts, hidden_size, intermediate_size
        self.activation, self.weights_on_input = as_activation(activation, gated), weights_on_input
        self.dispatcher, self.overlap = Local() if dispatcher is None else dispatcher, overlap
        self.local_experts: Sequence[int] = self.dispatcher.local_experts(num_experts)

        def new(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(len(self.local_experts), *shape, device=device, dtype=dtype))

        width = 2 * intermediate_size if self.activation.gated else intermediate_size
        self.w_gate_up, self.w_down = new(width, hidden_size), new(hidden_size, intermediate_size)
        self.b_gate_up = new(width) if bias else None
        self.b_down = new(hidden_size) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform weights within 1 / sqrt(inputs), as nn.Linear; biases zero. Before experts are cut, not after."""
        if shards_of(self) is not None:
            raise ValueError("reset_parameters: experts must be whole, got some that parallelize has cut")
        for w in (self.w_gate_up, self.w_down):
            bound = w.shape[2] ** -0.5
            if len(self.local_experts) == self.num_experts:
                nn.init.uniform_(w, -bound, bound)
                continue
            others = torch.empty_like(w[0])  # drawn and forgotten: experts must differ from rank to rank
            for e in range(self.num_experts):
                held = e in self.local_experts
                nn.init.uniform_(w[e - self.local_experts[0]] if held else others, -bound, bound)
        for b in (self.b_gate_up, self.b_down):
            if b is not None:
                nn.init.zeros_(b)

    def forward(self, x: Tensor, routing: Routing, beside: Beside = ()) -> Tensor:
        """`beside`: what to do while rows go to their experts, and while they come home; see Overlap."""
        if self.overlap is not None:
            return self._overlapped(self.overlap, x, routing, beside)
        rows, local, ticket = self.dispatcher.dispatch(x, routing)
        y = by_pairs(rows, local, self._compute) if self.weights_on_input else self._compute(rows, local)
        return self.dispatcher.combine(y, ticket)

    def _overlapped(self, overlap: Overlap, x: Tensor, routing: Routing, beside: Beside) -> Tensor:
        gathered = None  # once for all chunks: a rank whose experts fail in one of them calls no others any more
        if elsewhere_of(self) is None:
            gathered = [weight_of(self, name) for name in WEIGHTS], changes_of(self)

        def compute(rows: Tensor, local: Routing) -> Tensor:
            return self._compute(rows, local, gathered)

        def by_weighted_pairs(rows: Tensor, local: Routing) -> Tensor:
            return by_pairs(rows, local, compute)

        experts = by_weighted_pairs if self.weights_on_input else compute
        return overlap.run(self.dispatcher, x, routing, experts, beside)

    def _compute(self, rows: Tensor, routing: Routing, gathered: Gathered | None = None) -> Tensor:
        """The weighted sums [R, D] of the experts that are here. `gathered`: weights, and what changes them."""
        return with_tuned(self, rows, routing, partial(self._stacked, gathered=gathered))

    def _stacked(self, rows: Tensor, routing: Routing, gathered: Gathered | None = None) -> Tensor:
        elsewhere = elsewhere_of(self)
        if elsewhere is not None:  # headgate.offload
            return elsewhere(rows, routing)
        weights, changes = gathered or ([weight_of(self, name) for name in WEIGHTS], None)
        w_gate_up, w_down, b_gate_up, b_down = weights
        assert w_gate_up is not None
        assert w_down is not None
        act = self.activation
        biases = {"b_gate_up": b_gate_up, "b_down": b_down}
        return expert_ffn(self, rows, routing, w_gate_up, w_down, changes, **biases, activation=act)

    def cuts(self) -> dict[str, Cut]:
        """How each parameter is cut where the experts are spread over ranks: E over ep, F over etp."""
        blocks = 2 if self.activation.gated else 1  # gate rows and up rows, each for themselves
        cuts = {"w_gate_up": Cut(1, blocks), "w_down": Cut(2)}
        return cuts if self.b_down is None else cuts | {"b_gate_up": Cut(1, blocks), "b_down": Cut(1, whole=True)}

    def spread(self, shards: Shards) -> None:
        """Keeps this rank's part of the experts; from now on `shards` is the dispatcher. See parallelize."""
        cut_experts(self, shards)
        self.dispatcher, self.local_experts, self.overlap = shards, shards.held, shards.overlap

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, activation={self.activation.kind!r}, "
            f"gated={self.activation.gated}, bias={self.b_down is not None}, dispatcher={self.dispatcher}"
            + (", weights_on_input=True" if self.weights_on_input else "")
            + ("" if self.overlap is None else f", overlap={self.overlap}")
            + ("" if len(self.local_experts) == self.num_experts else f", local_experts={self.local_experts}")
        )


def by_pairs(rows: Tensor, routing: Routing, compute: Callable[[Tensor, Routing], Tensor]) -> Tensor:
    """sum_k compute(weights[r, k] * rows[r]) [R, D]: each pair is a row of its own, with weight 1."""
    shape, weights = routing.expert_ids.shape, routing.weights
    pairs = (rows[:, None] * weights[:, :, None]).flatten(0, 1).to(rows.dtype)
    one = Routing(routing.expert_ids.reshape(-1, 1), torch.ones_like(weights).view(-1, 1), routing.num_experts)
    y = compute(pairs, one).unflatten(0, shape)
    return y.sum(1, dtype=torch.float64 if y.dtype == torch.float64 else torch.float32).to(y.dtype)
