"""MoE under the transforms of torch.func and under forward-mode AD, against the plain sum over experts."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from func_transforms import EACH, ONE, batched, looped
from torch.func import functional_call, stack_module_state
from torch.testing import assert_close

import headgate

T, D = 4, 6
FORMS = {
    "softmax": {"router_options": {"renormalize": True}},
    "sigmoid, shared, biases": {"router": "sigmoid", "shared_intermediate_size": 3, "bias": True, "shared_gate": True},
    "bilevel": {"router": "bilevel", "router_options": {"nodes": 2}},
    "capacity, losses": {"capacity": 0.75, "load_balancing_coef": 0.1, "z_loss_coef": 0.01},
}


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def made(form):
    torch.manual_seed(1)
    layer = headgate.MoE(D, 4, 4, 2, dtype=torch.float64, **FORMS[form])
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def plain(layer):
    """The same layer, whose experts take turns on all tokens, in plain torch."""

    class Plain(torch.nn.Module):
        def __init__(self, experts):
            super().__init__()
            self.experts = experts

        def forward(self, x, routing):
            e = self.experts
            y = torch.zeros_like(x)
            for i in range(e.num_experts):
                h = x @ e.w_gate_up[i].T + (0 if e.b_gate_up is None else e.b_gate_up[i])
                gate, up = h.chunk(2, 1)
                out = (gate * gate.sigmoid() * up) @ e.w_down[i].T
                out = out if e.b_down is None else out + e.b_down[i]
                y = y + out * (routing.weights * (routing.expert_ids == i)).sum(1, keepdim=True)
            return y

    layer = copy.deepcopy(layer)
    layer.experts = Plain(layer.experts)
    if layer.shared is not None:
        layer.shared.ffn = Plain(layer.shared.ffn)
    return layer


def of_weights(layer):
    """(the layer as a function of x, router and experts; these), under the names that both kinds of layer know."""
    names = [n for n, _ in layer.named_parameters() if n.split(".")[-1] in ("weight", "w_gate_up", "w_down")]

    def function(x, *values):
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    return function, [p.detach() for n, p in layer.named_parameters() if n in names]


def both(form):
    """(layer, plain loop) as functions of x and weights, and these."""
    layer = made(form)
    function, weights = of_weights(layer)
    reference, _ = of_weights(plain(layer))
    return function, reference, (torch.randn(T, D, dtype=torch.float64), *weights)


def close(got, want):
    assert_close(got, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ONE)
def test_as_the_plain_loop(name, form):
    function, reference, args = both(form)
    close(ONE[name](function, args), ONE[name](reference, args))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("each", EACH)
def test_many_at_once(each, form):
    """Stacked tokens and stacked weights: ensembles, their gradients, and those of each sample."""
    function, reference, args = both(form)
    close(batched(each, function, args), looped(each, reference, args))


@pytest.mark.parametrize("form", FORMS)
def test_an_ensemble_of_modules(form):
    """As torch's tutorial has it: the state of three modules, stacked; the gradient goes through the vmap."""
    layers = [made(form) for _ in range(3)]
    for i, layer in enumerate(layers):
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.mul_(1 + 0.2 * i)
    parameters, buffers = stack_module_state(layers)
    x, shape = torch.randn(T, D, dtype=torch.float64), copy.deepcopy(layers[0]).to("meta")

    def loss(parameters):
        one = lambda p, b: functional_call(shape, (p, b), (x,))  # noqa: E731
        return torch.func.vmap(one)(parameters, buffers).square().sum()

    got = torch.func.grad(loss)({n: p.detach() for n, p in parameters.items()})
    alone = [plain(layer) for layer in layers]
    for layer in alone:
        layer(x).square().sum().backward()
    for name, grad in got.items():
        there = name.replace("experts.", "experts.experts.").replace("shared.ffn.", "shared.ffn.experts.")
        close(grad, torch.stack([dict(layer.named_parameters())[there].grad for layer in alone]))


def test_a_transform_leaves_no_trace_in_the_layer():
    """What is noted of a call would be tensors of a transform that is over."""
    layer = made("capacity, losses")
    layer(torch.randn(T, D, dtype=torch.float64))
    before = layer.last_routing, layer.last_overflow, layer.aux_losses
    for name in ("grad", "jvp", "forward_ad"):
        ONE[name](layer, (torch.randn(T, D, dtype=torch.float64),))
    batched("value", layer, (torch.randn(T, D, dtype=torch.float64),))
    assert all(a is b for a, b in zip((layer.last_routing, layer.last_overflow, layer.aux_losses), before, strict=True))
    router = made("sigmoid, shared, biases").router
    ONE["grad"](lambda x: router(x).weights, (torch.randn(T, D, dtype=torch.float64),))
    assert router.load is None


@pytest.mark.parametrize("name", ["grad", "jvp", "reverse over reverse"])
def test_compiled_whole(name):
    function, _, args = both("capacity, losses")
    compiled = torch.compile(lambda *args: ONE[name](function, args), fullgraph=True, backend="aot_eager")
    close(compiled(*args), ONE[name](function, args))
