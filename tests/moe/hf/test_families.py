"""Every family of the installed transformers, swapped: outputs, router outputs, losses and gradients stay."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

import headgate


def tensors(value, name="output"):
    """(name, tensor) of everything floating in a model's output."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, Mapping):
        for key, v in value.items():
            yield from tensors(v, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for i, v in enumerate(value):
            yield from tensors(v, f"{name}[{i}]")


def run(model, inputs):
    """Outputs by name and every parameter's gradient by name."""
    model.zero_grad()
    torch.manual_seed(1)
    more = {}
    if "input_ids" in inputs:
        more["output_router_logits"] = True
    out = dict(tensors(model(**inputs, **more)))
    loss = out.get("output.loss")
    if loss is None:
        loss = sum(
            (t.float() * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in out.values() if t.requires_grad
        )
    loss.backward()
    return {n: t.detach() for n, t in out.items()}, {n: p.grad for n, p in model.named_parameters()}


def compare_gradients(got, want, assert_close):
    """Parameter by parameter. Recurrent layers amplify rounding (scale); what is all rounding is no gradient (floor)."""
    floor = 1e-6 * max(g.abs().max() for g in want.values() if g is not None)
    for name, g in want.items():
        assert (g is None) == (got[name] is None), name
        if g is not None and max(g.abs().max(), got[name].abs().max()) > floor:
            assert_close(got[name], g, scale=10, name=f"d {name}")


def test_swapped_model_equals_the_original(family, assert_close):
    ours = family.clone()
    want, want_grads = run(family.model, family.inputs)
    state = {k: v.clone() for k, v in ours.state_dict().items()}
    report = headgate.replace(ours)
    assert report.replaced
    assert not report.skipped
    got, got_grads = run(ours, family.inputs)
    print(report)
    idle = [n for n, calls in report.calls.items() if not calls and "vision_moe" not in n]
    assert not idle
    assert got.keys() == want.keys()
    for name, t in want.items():
        assert_close(got[name], t, name=name)
    compare_gradients(got_grads, want_grads, assert_close)
    assert ours.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in ours.state_dict().items())
    headgate.restore(ours)
    again, _ = run(ours, family.inputs)
    assert all(torch.equal(again[name], t) for name, t in want.items())
