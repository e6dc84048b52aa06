"""The activations as data: values against torch's own, slopes against autograd, and what may not be combined."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F

from headgate.kernels import GPT_OSS, Activation
from headgate.kernels.activation import KINDS, as_activation

# spread over both tails, zero itself, and the limits used below to the bit
POINTS = torch.cat([torch.linspace(-40, 40, 161), torch.tensor([0.0, -0.0, 7.0, -7.0, 1e-6, -1e-6])]).double()

BY_HAND = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_values(assert_close, name):
    up = torch.randn_like(POINTS)
    assert_close(as_activation(name, gated=False)(POINTS), BY_HAND[name](POINTS))
    assert_close(as_activation(name)(POINTS, up), BY_HAND[name](POINTS) * up)


def test_gpt_oss_is_the_published_formula(assert_close):
    gate, up = POINTS, POINTS.flip(0)
    held, both = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    assert_close(GPT_OSS(gate, up), (both + 1) * (held * torch.sigmoid(held * 1.702)))


def test_the_limit_before_and_after(assert_close):
    gate, up = POINTS, POINTS.flip(0)
    both = up.clamp(-2, 2)
    assert_close(Activation(limit=2.0)(gate, up), F.silu(gate.clamp(max=2)) * both)
    assert_close(Activation(limit=2.0, clamp_after=True)(gate, up), F.silu(gate).clamp(max=2) * both)


EVERY = [Activation(kind, gated) for kind in KINDS for gated in (True, False)]
EVERY += [GPT_OSS, Activation("silu", alpha=0.7), Activation("gelu", up_shift=-0.5)]
EVERY += [Activation(kind, limit=7.0, clamp_after=after) for kind in ("silu", "relu2") for after in (True, False)]


@pytest.mark.parametrize("act", EVERY, ids=str)
def test_backward_is_what_autograd_says(assert_close, act):
    inputs = [POINTS.clone().requires_grad_()]
    if act.gated:
        inputs.append(POINTS.flip(0).clone().requires_grad_())
    grad = torch.randn_like(POINTS)
    wanted = torch.autograd.grad(act(*inputs), inputs, grad)
    with torch.no_grad():
        for got, want in zip(act.backward(grad, *inputs), wanted, strict=True):
            assert_close(got, want)


@pytest.mark.parametrize("act", EVERY, ids=str)
def test_travels_through_an_operators_schema(act):
    assert Activation.from_params(act.kind, act.gated, act.params) == act
    assert json.loads(json.dumps(act.params, allow_nan=False)) == act.params


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: Activation("mish"), r"kind must be one of silu, .*got 'mish'"),
        (lambda: Activation(limit=0.0), r"limit must be positive, got 0.0"),
        (lambda: Activation(limit=-1.0), r"limit must be positive, got -1.0"),
        (lambda: Activation(limit=math.nan), r"limit must be positive, got nan"),
        (lambda: Activation(alpha=math.inf), r"alpha must be finite, got inf"),
        (lambda: Activation(up_shift=math.nan), r"up_shift must be finite, got nan"),
        (lambda: Activation(gated=False, limit=7.0), r"belong to gated experts"),
        (lambda: Activation(gated=False, up_shift=1.0), r"belong to gated experts"),
        (lambda: as_activation("gpt_oss", gated=False), r"'gpt_oss' is gated"),
        (lambda: as_activation("no such"), r"activation must be one of silu, .*got 'no such'"),
    ],
)
def test_bad_input_is_named(made, message):
    with pytest.raises(ValueError, match=message):
        made()
