"""The activations of activation.py for Triton kernels: functions of fp32 tiles.

FORM is an Activation as a compile-time tuple, (kind, gated, alpha, limit or 0 for none, up_shift, clamp_after, edge);
`form_of` makes it. A gradient passes a clamp up to `edge`: the limit, or the number below it. Comparisons are
written so that a NaN stays one, as torch's clamp and relu do.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import triton
import triton.language as tl

from .activation import Activation

# places in FORM
KIND, GATED, SLOPE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LIMIT, SHIFT, AFTER, EDGE = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)

_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_SQRT_2_OVER_PI = tl.constexpr(math.sqrt(2 / math.pi))
_SQRT_1_OVER_2PI = tl.constexpr(math.sqrt(0.5 / math.pi))


def form_of(act: Activation) -> tuple[Any, ...]:
    """The compile-time argument by which a kernel knows the activation."""
    limit = 0.0 if act.limit == math.inf else act.limit
    edge = limit if act.slope_at_limit else float(np.nextafter(np.float32(limit), np.float32(0)))
    return act.kind, act.gated, act.alpha, limit, act.up_shift, act.clamp_after, edge


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def phi(g, FORM: tl.constexpr):
    if FORM[KIND] == "silu":
        return g * tl.sigmoid(FORM[SLOPE] * g)
    elif FORM[KIND] == "gelu":
        return 0.5 * g * (1 + tl.erf(g * _SQRT_HALF))
    elif FORM[KIND] == "gelu_tanh":
        return 0.5 * g * (1 + _tanh((g + 0.044715 * g * g * g) * _SQRT_2_OVER_PI))
    elif FORM[KIND] == "relu":
        return tl.where(g <= 0, 0.0, g)
    elif FORM[KIND] == "relu2":
        r = tl.where(g <= 0, 0.0, g)
        return r * r
    else:
        return g


@triton.jit
def phi_slope(g, FORM: tl.constexpr):
    if FORM[KIND] == "silu":
        s = tl.sigmoid(FORM[SLOPE] * g)
        return s * (1 + FORM[SLOPE] * g * (1 - s))
    elif FORM[KIND] == "gelu":
        return 0.5 * (1 + tl.erf(g * _SQRT_HALF)) + g * _SQRT_1_OVER_2PI * tl.exp(-0.5 * g * g)
    elif FORM[KIND] == "gelu_tanh":
        t = _tanh((g + 0.044715 * g * g * g) * _SQRT_2_OVER_PI)
        return 0.5 * (1 + t) + 0.5 * g * (1 - t * t) * _SQRT_2_OVER_PI * (1 + 3 * 0.044715 * g * g)
    elif FORM[KIND] == "relu":
        return tl.where(g > 0, 1.0, 0.0)
    elif FORM[KIND] == "relu2":
        return 2 * tl.where(g <= 0, 0.0, g)
    else:
        return tl.zeros_like(g) + 1.0


@triton.jit
def _below(x, TOP: tl.constexpr):
    return tl.where(x > TOP, TOP, x)


@triton.jit
def activate(g, u, FORM: tl.constexpr):
    """a of gate g and up projection u; u is ignored where the expert is not gated."""
    if FORM[GATED]:
        if FORM[LIMIT] != 0:
            u = tl.where(u < -FORM[LIMIT], -FORM[LIMIT], _below(u, FORM[LIMIT]))
            if not FORM[AFTER]:
                g = _below(g, FORM[LIMIT])
        a = phi(g, FORM)
        if FORM[LIMIT] != 0 and FORM[AFTER]:
            a = _below(a, FORM[LIMIT])
        return a * (u + FORM[SHIFT])
    else:
        return phi(g, FORM)


@triton.jit
def activate_backward(grad, g, u, FORM: tl.constexpr):
    """(gradient of g, gradient of u) for `grad`, that of a; the second is meaningless where not gated."""
    if FORM[GATED]:
        if FORM[LIMIT] != 0:
            inside = (u >= -FORM[EDGE]) & (u <= FORM[EDGE])
            up = tl.where(u < -FORM[LIMIT], -FORM[LIMIT], _below(u, FORM[LIMIT])) + FORM[SHIFT]
            if FORM[AFTER]:
                a = phi(g, FORM)
                dg = grad * up * phi_slope(g, FORM) * tl.where(a <= FORM[EDGE], 1.0, 0.0)
                return dg, grad * _below(a, FORM[LIMIT]) * tl.where(inside, 1.0, 0.0)
            else:
                held = _below(g, FORM[LIMIT])
                dg = grad * up * phi_slope(held, FORM) * tl.where(g <= FORM[EDGE], 1.0, 0.0)
                return dg, grad * phi(held, FORM) * tl.where(inside, 1.0, 0.0)
        else:
            return grad * (u + FORM[SHIFT]) * phi_slope(g, FORM), grad * phi(g, FORM)
    else:
        return grad * phi_slope(g, FORM), grad
