"""update_biases: a whole model's routers, by hand or after each optimizer step, each token counted once."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import headgate

D, E, K = 16, 8, 2


def model():
    options = {"router": "sigmoid", "router_options": {"bias_rate": 0.1}}
    return nn.Sequential(
        headgate.MoE(D, 4, E, K, **options), headgate.MoE(D, 4, E, K), headgate.MoE(D, 4, 6, K, **options)
    )


def biases(m):
    return [layer.router.expert_bias for layer in m if hasattr(layer.router, "expert_bias")]


def by_hand(m):
    for layer in m:
        if hasattr(layer.router, "expert_bias"):
            layer.router.update_bias()


def same(m, other):
    return all(torch.equal(a, b) for a, b in zip(biases(m), biases(other), strict=True))


def test_all_routers_of_a_model_step_once():
    m = model()
    twin = copy.deepcopy(m)
    x = torch.randn(33, D)
    m(x)
    twin(x)
    assert headgate.update_biases(m) is None
    by_hand(twin)
    assert same(m, twin)
    assert all(b.abs().max() > 0 for b in biases(m))
    before = copy.deepcopy(m)
    headgate.update_biases(m)  # nothing was seen since
    m.eval()(x)
    headgate.update_biases(m)  # nor is evaluation training
    assert same(m, before)


def test_after_each_optimizer_step_whatever_came_before_it():
    m = model()
    twin = copy.deepcopy(m)
    optimizers = [torch.optim.SGD(p.parameters(), lr=0.1) for p in (m, twin)]
    handle = headgate.update_biases(m, optimizers[0])
    for micro_steps in (1, 3):
        for _ in range(micro_steps):
            x = torch.randn(9, D)
            m(x).square().mean().backward()
            twin(x).square().mean().backward()
        m.eval()(torch.randn(50, D))
        m.train()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        by_hand(twin)
        assert same(m, twin)
    handle.remove()
    m(x).square().mean().backward()
    optimizers[0].step()
    assert same(m, twin)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_forward_that_is_run_again_counts_once(reentrant):
    layer = headgate.MoE(D, 4, E, K, router="sigmoid")
    x = torch.randn(33, D, requires_grad=True)
    layer(x).sum().backward()  # counted once
    checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    assert layer.router.load.sum() == 2 * 33 * K


def test_compiled_and_checkpointed_steps_are_the_same(own_compilations):
    m = model()
    twin = copy.deepcopy(m)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    optimizers = [torch.optim.SGD(p.parameters(), lr=0.1) for p in (m, twin)]
    for p, optimizer in zip((m, twin), optimizers, strict=True):
        headgate.update_biases(p, optimizer)
    for _step in range(2):
        x = torch.randn(9, D, requires_grad=True)
        m(x).square().mean().backward()
        checkpoint(compiled, x, use_reentrant=False).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert same(m, twin)


def test_bad_arguments_are_named():
    with pytest.raises(
        ValueError, match=r"update_biases: module must hold routers with a bias .*, got a Linear without"
    ):
        headgate.update_biases(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"update_biases: optimizer must be a torch\.optim\.Optimizer or None, got 'x'"):
        headgate.update_biases(model(), "x")
