"""RMoE's router: a GRU carries what routers saw from layer to layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...kernels.router_logits import router_logits
from ...kernels.routing import Routing
from ...kernels.topk import check_choice, topk
from .given import Given, check_state
from .router import GatedRouter


class RecurrentRouter(GatedRouter):
    """h_i = GRU(P_i x, h_(i-1)), logits G_i h_i, softmax, the K best: each token for itself, from layer to layer.

    `projection` P_i [H, D] and `weight` G_i [E, H] are the layer's own; the GRU is one for all layers: make an
    `nn.GRUCell(H, H)` and hand it to each as `cell` (None: one of its own, of `state_size` H, by default D / 4).
    The state h [T, H] goes on: `y, state = layer(x, state=state)`; the first layer has zeros. All in fp32 (fp64).
    `renormalize`, `scale`: see SoftmaxRouter.

    Source: Qiu et al., Layerwise Recurrent Router for Mixture-of-Experts (2024).

    >>> cell = torch.nn.GRUCell(8, 8)
    >>> layers = [headgate.MoE(16, 32, 8, 2, router="recurrent", router_options={"cell": cell}) for _ in range(3)]
    >>> x, state = torch.randn(5, 16), None
    >>> for layer in layers: x, state = layer(x, state=state)
    """

    carries_state = True

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        cell: nn.GRUCell | None = None,
        state_size: int | None = None,
        renormalize: bool = False,
        scale: float = 1.0,
        gate_bias: bool = False,
        jitter: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_choice(num_experts, top_k, "softmax", 1, 1, "max", scale, who="RecurrentRouter")
        if cell is not None and (
            not isinstance(cell, nn.GRUCell) or cell.input_size != cell.hidden_size or not cell.bias
        ):
            raise ValueError(f"RecurrentRouter: cell must be an nn.GRUCell(H, H) with biases, got {cell!r}")
        if cell is not None and state_size not in (None, cell.hidden_size):
            raise ValueError(f"RecurrentRouter: state_size must be cell's {cell.hidden_size} or None, got {state_size}")
        if state_size is not None and (not hasattr(state_size, "__index__") or state_size < 1):
            raise ValueError(f"RecurrentRouter: state_size must be a positive integer, got {state_size!r}")
        self_made = cell is None
        if cell is None:
            size = max(1, hidden_size // 4) if state_size is None else state_size
            cell = nn.GRUCell(size, size, device=device, dtype=dtype)
        super().__init__(
            hidden_size, num_experts, top_k, gate_bias=gate_bias, jitter=jitter, gate_size=cell.hidden_size,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.cell, self.state_size, self.self_made = cell, cell.hidden_size, self_made
        self.renormalize, self.scale = renormalize, scale
        self.projection = nn.Parameter(torch.empty(self.state_size, hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As nn.Linear and nn.GRUCell; a cell that was handed over stays as it is."""
        super().reset_parameters()
        nn.init.uniform_(self.projection, -(self.hidden_size**-0.5), self.hidden_size**-0.5)
        if self.self_made:
            self.cell.reset_parameters()

    def choose(self, x: Tensor, given: Given) -> Routing:
        seen = router_logits(self.jittered(x), self.projection)
        if given.state is None:
            before = seen.new_zeros(len(x), self.state_size)
        else:
            before = check_state(given.state, self.state_size, "RecurrentRouter").to(seen.dtype)
        state = self._next(seen, before)
        routing = topk(
            router_logits(state, self.weight, self.gate_bias),
            self.top_k,
            renormalize=self.renormalize,
            scale=self.scale,
        )
        return Routing(
            routing.expert_ids, routing.weights, self.num_experts, routing.counts, routing.scores, routing.logits,
            state=state,
        )  # fmt: skip

    def _next(self, seen: Tensor, before: Tensor) -> Tensor:
        """nn.GRUCell's formula in fp32, whatever its parameters' dtype, and untouched by autocast."""
        cell = self.cell
        r, z, n = router_logits(seen, cell.weight_ih, cell.bias_ih).chunk(3, 1)
        hr, hz, hn = router_logits(before, cell.weight_hh, cell.bias_hh).chunk(3, 1)
        r, z = (r + hr).sigmoid(), (z + hz).sigmoid()
        n = (n + r * hn).tanh()
        return n + z * (before - n)
