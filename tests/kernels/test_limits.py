"""Gradients where a clamped activation's input is exactly at its limit: as the installed torch's clamp says, and the
other convention, on every form of the operation."""

from __future__ import annotations

import math
import types
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from headgate.kernels import GPT_OSS, Activation
from headgate.kernels.activation import SLOPE_AT_LIMIT
from headgate.kernels.chip import A100
from headgate.kernels.grouped_ffn import grouped_ffn, on_cpu
from headgate.kernels.routing import Routing

LIMITED = {
    "gpt-oss": GPT_OSS,
    "before": Activation("relu", limit=0.3),  # no float is 0.3: what counts is the number as fp32
    "after": Activation("identity", limit=2.0, clamp_after=True),
}
SIZES = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)  # of limits


def at_limits(act: Activation, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Gate and up, each pair of SIZES times the limit."""
    points = torch.tensor([f * act.limit for f in SIZES], dtype=torch.float32).to(dtype)
    return points.repeat_interleave(len(SIZES)), points.repeat(len(SIZES))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("limits", [{"max": 7.0}, {"min": -7.0}, {"min": -7.0, "max": 7.0}], ids=str)
@pytest.mark.parametrize("more", [1, 50])
def test_the_slope_is_that_of_the_installed_torch(limits, dtype, more):
    x = torch.tensor(more * [-8.0, -7.0, 0.0, 7.0, 8.0], dtype=dtype, requires_grad=True)
    (slope,) = torch.autograd.grad(x.clamp(**limits).sum(), x)
    free = (x > limits.get("min", -math.inf)) & (x < limits.get("max", math.inf))
    at = (x == limits.get("min")) | (x == limits.get("max"))
    assert torch.equal(slope, free.to(dtype) + SLOPE_AT_LIMIT * at.to(dtype))


@pytest.mark.parametrize("act", LIMITED.values(), ids=LIMITED)
def test_backward_at_the_limit_is_what_autograd_says(act, assert_close):
    inputs = [t.requires_grad_() for t in at_limits(act)]
    grad = torch.randn(len(inputs[0]))
    wanted = torch.autograd.grad(act(*inputs), inputs, grad)
    for got, want in zip(act.backward(grad, *(t.detach() for t in inputs)), wanted, strict=True):
        assert_close(got, want)


def slopes_by_hand(act: Activation, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """d a / d gate and d a / d up in fp64, cases written out."""
    limit = float(torch.tensor(act.limit, dtype=torch.float32))
    out = []
    for g, u in zip(gate.tolist(), up.tolist(), strict=True):

        def passes(size: float) -> float:
            return 1.0 if size < limit else act.slope_at_limit if size == limit else 0.0

        point = torch.tensor(g if act.clamp_after else min(g, limit), dtype=torch.float64)
        phi, slope = act.phi(point).item(), act.phi_slope(point).item()
        held = max(-limit, min(u, limit)) + act.up_shift
        through = passes(phi) if act.clamp_after else passes(g)
        out.append((held * slope * through, (min(phi, limit) if act.clamp_after else phi) * passes(abs(u))))
    dg, du = zip(*out, strict=True)
    return torch.tensor(dg), torch.tensor(du)


def run(act: Activation, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up [P, 1] of one expert, whose pre-activations are exactly the points of `at_limits`."""
    gate, up = at_limits(act, dtype)
    rows = torch.eye(len(gate), dtype=dtype)
    first = torch.stack([gate, up])[None].requires_grad_()  # [1, 2, P]: row t of `rows` picks column t
    one = torch.ones(len(gate), 1)
    routing = Routing.from_topk(torch.zeros(len(gate), 1, dtype=torch.int32), one, 1)
    down = torch.ones(1, 1, 1, dtype=dtype)
    grouped_ffn(rows, routing, first, down, activation=act).sum().backward()
    assert first.grad is not None
    return first.grad[0, 0], first.grad[0, 1]


@pytest.mark.parametrize("slope", [0.0, 1.0])
@pytest.mark.parametrize("act", LIMITED.values(), ids=LIMITED)
class TestEveryForm:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_on_cpu(self, act, slope, dtype, cpu_form, assert_close):
        if dtype == torch.bfloat16 and act.limit == 0.3:
            pytest.skip("a limit that bf16 does not reach")
        self.compare(replace(act, slope_at_limit=slope), dtype, assert_close)

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_on_triton(self, act, slope, monkeypatch, assert_close):
        triton = pytest.importorskip("triton")
        if not triton.knobs.runtime.interpret:
            pytest.skip("Triton's interpreter is off")
        from headgate.kernels.grouped_ffn import on_triton

        chip = replace(A100, processors=3)
        calls = []

        def backward(*args):
            calls.append(1)
            return on_triton.backward(*args, chip=chip)

        form = types.SimpleNamespace(forward=partial(on_triton.forward, chip=chip), backward=backward)
        monkeypatch.setenv("HEADGATE_CPU", "plain")
        monkeypatch.setattr(on_cpu, "plain", form)
        self.compare(replace(act, slope_at_limit=slope), torch.float32, assert_close)
        assert calls

    def compare(self, act, dtype, assert_close):
        for got, want in zip(run(act, dtype), slopes_by_hand(act, *at_limits(act, dtype)), strict=True):
            assert_close(got, want, dtype=dtype)
            assert torch.equal(got == 0, want == 0)


def test_a_slope_between_is_refused():
    with pytest.raises(ValueError, match=r"activation: slope_at_limit must be 0 or 1, got 0\.5"):
        Activation(limit=7.0, slope_at_limit=0.5)


def test_no_limit_has_no_edge(cpu_form):
    """Infinite pre-activations without a clamp keep their slope under both conventions."""
    for slope in (0.0, 1.0):
        first = torch.tensor([[[math.inf], [1.0]]], requires_grad=True)
        routing = Routing.from_topk(torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1), 1)
        act = Activation("identity", slope_at_limit=slope)
        grouped_ffn(torch.ones(1, 1), routing, first, torch.ones(1, 1, 1), activation=act).sum().backward()
        assert first.grad is not None
        assert first.grad[0, 0, 0] == 1
