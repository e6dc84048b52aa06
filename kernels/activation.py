"""The activations between an expert's two projections, as data: what every backend must be able to say.

    gated    a = clampU(u) shifted by `up_shift`, times phi(clampG(g))
    ungated  a = phi(h)

with phi one of KINDS. `limit` clamps the gate from above and the up projection from both sides (gpt-oss, DeepSeek-V4);
`clamp_after` clamps phi(g) in place of g (Step-3). Exactly at a limit the slope of a clamp is a convention, which torch
changed in 2.14; ours is that of the torch installed, so that a swapped model learns as the original. Everything
is computed in fp32 (fp64 for fp64 input).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

KINDS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "identity")


def clamp_slope_at_limit() -> float:
    """The slope that the installed torch gives a clamp exactly at its limit: 1 up to torch 2.13, 0 from 2.14 on.

    It is the same on both sides and for clamps with one limit or two. Asks the clamp's node of the graph, without the
    autograd engine, whose threads must not start when a module is imported.
    """
    with _disable_current_modes(), torch.inference_mode(False), torch.enable_grad():
        one = torch.ones((), device="cpu")
        node: Any = one.detach().requires_grad_().clamp(max=1.0).grad_fn
        return float(node(one))


SLOPE_AT_LIMIT = clamp_slope_at_limit()


@dataclass(frozen=True)
class Activation:
    """phi and its surroundings. `alpha` is the sigmoid's slope in silu: g * sigmoid(alpha * g); 1.702 in gpt-oss.

    `slope_at_limit`: 1.0 where the gradient passes a clamp whose input is exactly at the limit, 0.0 where not; it is
    for the gradients of the operators. A plain call of the object is differentiated by torch, always as torch does.
    """

    kind: str = "silu"
    gated: bool = True
    alpha: float = 1.0
    limit: float = math.inf
    up_shift: float = 0.0
    clamp_after: bool = False
    slope_at_limit: float = SLOPE_AT_LIMIT

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"activation: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        for name, number in (("alpha", self.alpha), ("up_shift", self.up_shift)):
            if not math.isfinite(number):
                raise ValueError(f"activation: {name} must be finite, got {number}")
        if not self.limit > 0:
            raise ValueError(f"activation: limit must be positive, got {self.limit}")
        if self.slope_at_limit not in (0.0, 1.0):
            raise ValueError(f"activation: slope_at_limit must be 0 or 1, got {self.slope_at_limit}")
        if not self.gated and (self.limit != math.inf or self.up_shift != 0.0):
            raise ValueError("activation: limit and up_shift belong to gated experts, got them with gated=False")

    @property
    def params(self) -> list[float]:
        """What travels through an operator's schema: [alpha, limit, up_shift, clamp_after, slope_at_limit].

        No limit is 0: a graph in a file is JSON, which has no infinity.
        """
        limit = 0.0 if self.limit == math.inf else self.limit
        return [self.alpha, limit, self.up_shift, float(self.clamp_after), self.slope_at_limit]

    @classmethod
    def from_params(cls, kind: str, gated: bool, params: list[float]) -> Activation:
        return cls(kind, gated, params[0], params[1] or math.inf, params[2], bool(params[3]), params[4])

    def phi(self, g: Tensor) -> Tensor:
        """phi(g), elementwise, differentiable."""
        if self.kind == "silu":
            return g * torch.sigmoid(self.alpha * g)
        if self.kind == "gelu":
            return F.gelu(g)
        if self.kind == "gelu_tanh":
            return F.gelu(g, approximate="tanh")
        if self.kind == "relu":
            return F.relu(g)
        if self.kind == "relu2":
            return F.relu(g).square()
        return g

    def phi_slope(self, g: Tensor) -> Tensor:
        """phi'(g), elementwise."""
        if self.kind == "silu":
            s = torch.sigmoid(self.alpha * g)
            return s * (1 + self.alpha * g * (1 - s))
        if self.kind in ("gelu", "gelu_tanh"):
            approximate = "tanh" if self.kind == "gelu_tanh" else "none"
            return torch.ops.aten.gelu_backward(torch.ones_like(g), g, approximate=approximate)
        if self.kind == "relu":
            return (g > 0).to(g.dtype)
        if self.kind == "relu2":
            return 2 * F.relu(g)
        return torch.ones_like(g)

    def _passes(self, size: Tensor) -> Tensor:
        """Where the gradient passes a clamp from above."""
        return size <= self.limit if self.slope_at_limit else size < self.limit

    def backward(self, grad: Tensor, gate: Tensor, up: Tensor | None = None) -> tuple[Tensor, ...]:
        """The gradients of gate (and up) for `grad`, that of the result; all [..., F]. What autograd would say."""
        if not self.gated:
            return (grad * self.phi_slope(gate),)
        assert up is not None
        if self.limit == math.inf:
            return grad * (up + self.up_shift) * self.phi_slope(gate), grad * self.phi(gate)
        inside, up = self._passes(up.abs()), up.clamp(-self.limit, self.limit) + self.up_shift
        if self.clamp_after:
            a = self.phi(gate)
            return grad * up * self.phi_slope(gate) * self._passes(a), grad * a.clamp(max=self.limit) * inside
        held = gate.clamp(max=self.limit)
        return grad * up * self.phi_slope(held) * self._passes(gate), grad * self.phi(held) * inside

    def __call__(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """gate [..., F] and up [..., F] (None when ungated) -> [..., F], in the dtype given; plain torch, the truth."""
        if not self.gated:
            return self.phi(gate)
        assert up is not None
        if self.limit != math.inf:
            up = up.clamp(-self.limit, self.limit)
            if not self.clamp_after:
                gate = gate.clamp(max=self.limit)
        a = self.phi(gate)
        if self.limit != math.inf and self.clamp_after:
            a = a.clamp(max=self.limit)
        return a * (up + self.up_shift if self.up_shift else up)


# gpt-oss: clamp at 7, slope 1.702, and (up + 1)
GPT_OSS = Activation("silu", alpha=1.702, limit=7.0, up_shift=1.0)

_NAMES = {
    "silu": Activation("silu"),
    "swish": Activation("silu"),
    "gelu": Activation("gelu"),
    "gelu_tanh": Activation("gelu_tanh"),
    "gelu_pytorch_tanh": Activation("gelu_tanh"),
    "quick_gelu": Activation("silu", alpha=1.702),
    "relu": Activation("relu"),
    "relu2": Activation("relu2"),
    "gpt_oss": GPT_OSS,
}


def as_activation(activation: str | Activation, gated: bool = True) -> Activation:
    """An Activation from its name, or the object itself. Raises ValueError with the names there are."""
    if isinstance(activation, Activation):
        return activation
    if activation not in _NAMES:
        raise ValueError(f"activation must be one of {', '.join(_NAMES)} or an Activation, got {activation!r}")
    found = _NAMES[activation]
    if gated:
        return found
    if found is GPT_OSS:
        raise ValueError("activation: 'gpt_oss' is gated, got gated=False")
    return Activation(found.kind, gated=False, alpha=found.alpha)
