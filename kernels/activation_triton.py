"""The activations of activation.py for Triton kernels: functions of fp32 tiles.

KIND, ALPHA, SHIFT, AFTER are the fields of Activation; LIMIT is 0 for none. `constants` makes them. Comparisons are
written so that a NaN stays one, as torch's clamp and relu do.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from .activation import Activation

_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_SQRT_2_OVER_PI = tl.constexpr(math.sqrt(2 / math.pi))
_SQRT_1_OVER_2PI = tl.constexpr(math.sqrt(0.5 / math.pi))


def constants(act: Activation) -> dict[str, Any]:
    """The compile-time arguments by which a kernel knows the activation."""
    limit = 0.0 if act.limit == math.inf else act.limit
    return {
        "KIND": act.kind,
        "GATED": act.gated,
        "ALPHA": act.alpha,
        "LIMIT": limit,
        "SHIFT": act.up_shift,
        "AFTER": act.clamp_after,
    }


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def phi(g, KIND: tl.constexpr, ALPHA: tl.constexpr):
    if KIND == "silu":
        return g * tl.sigmoid(ALPHA * g)
    elif KIND == "gelu":
        return 0.5 * g * (1 + tl.erf(g * _SQRT_HALF))
    elif KIND == "gelu_tanh":
        return 0.5 * g * (1 + _tanh(_SQRT_2_OVER_PI * (g + 0.044715 * g * g * g)))
    elif KIND == "relu":
        return tl.where(g <= 0, 0.0, g)
    elif KIND == "relu2":
        r = tl.where(g <= 0, 0.0, g)
        return r * r
    else:
        return g


@triton.jit
def phi_slope(g, KIND: tl.constexpr, ALPHA: tl.constexpr):
    if KIND == "silu":
        s = tl.sigmoid(ALPHA * g)
        return s * (1 + ALPHA * g * (1 - s))
    elif KIND == "gelu":
        return 0.5 * (1 + tl.erf(g * _SQRT_HALF)) + g * _SQRT_1_OVER_2PI * tl.exp(-0.5 * g * g)
    elif KIND == "gelu_tanh":
        t = _tanh(_SQRT_2_OVER_PI * (g + 0.044715 * g * g * g))
        return 0.5 * (1 + t) + 0.5 * g * (1 - t * t) * _SQRT_2_OVER_PI * (1 + 3 * 0.044715 * g * g)
    elif KIND == "relu":
        return tl.where(g > 0, 1.0, 0.0)
    elif KIND == "relu2":
        return 2 * tl.where(g <= 0, 0.0, g)
    else:
        return tl.zeros_like(g) + 1.0


@triton.jit
def _below(x, LIMIT: tl.constexpr):
    return tl.where(x > LIMIT, LIMIT, x)


@triton.jit
def activate(
    g,
    u,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    AFTER: tl.constexpr,
):
    """a of gate g and up projection u; u is ignored where the expert is not gated."""
    if GATED:
        if LIMIT != 0:
            u = tl.where(u < -LIMIT, -LIMIT, _below(u, LIMIT))
            if not AFTER:
                g = _below(g, LIMIT)
        a = phi(g, KIND, ALPHA)
        if LIMIT != 0 and AFTER:
            a = _below(a, LIMIT)
        return a * (u + SHIFT)
    else:
        return phi(g, KIND, ALPHA)


@triton.jit
def activate_backward(
    grad,
    g,
    u,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    AFTER: tl.constexpr,
):
    """(gradient of g, gradient of u) for `grad`, that of a; the second is meaningless where not gated."""
    if GATED:
        if LIMIT != 0:
            inside = (u >= -LIMIT) & (u <= LIMIT)
            up = tl.where(u < -LIMIT, -LIMIT, _below(u, LIMIT)) + SHIFT
            if AFTER:
                a = phi(g, KIND, ALPHA)
                dg = grad * up * phi_slope(g, KIND, ALPHA) * tl.where(a <= LIMIT, 1.0, 0.0)
                return dg, grad * _below(a, LIMIT) * tl.where(inside, 1.0, 0.0)
            else:
                held = _below(g, LIMIT)
                dg = grad * up * phi_slope(held, KIND, ALPHA) * tl.where(g <= LIMIT, 1.0, 0.0)
                return dg, grad * phi(held, KIND, ALPHA) * tl.where(inside, 1.0, 0.0)
        else:
            return grad * (u + SHIFT) * phi_slope(g, KIND, ALPHA), grad * phi(g, KIND, ALPHA)
    else:
        return grad * phi_slope(g, KIND, ALPHA), grad
