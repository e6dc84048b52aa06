"""Experts against a double loop over tokens and choices: output and every gradient."""

import copy

import pytest
import torch

from headgate.dispatch import Local
from headgate.kernels.activation import GPT_OSS, Activation
from headgate.kernels.routing import Routing
from headgate.moe.experts import Experts


def naive(experts, x, ids, weights):
    out = []
    for t in range(x.shape[0]):
        y = torch.zeros_like(x[t])
        for k, e in enumerate(ids[t].tolist()):
            if not 0 <= e < experts.num_experts:
                continue
            h = experts.w_gate_up[e] @ x[t]
            if experts.b_gate_up is not None:
                h = h + experts.b_gate_up[e]
            a = experts.activation(*h.chunk(2)) if experts.activation.gated else experts.activation(h)
            z = experts.w_down[e] @ a
            if experts.b_down is not None:
                z = z + experts.b_down[e]
            y = y + weights[t, k] * z
        out.append(y)
    return torch.stack(out) if out else x * 1.0


def _random(experts):
    with torch.no_grad():
        for p in experts.parameters():
            p.uniform_(-0.3, 0.3)
    return experts


ROUTES = {
    "random": lambda t, k, e: torch.rand(t, e).argsort(1)[:, :k],
    "all to one": lambda t, k, e: torch.full((t, k), e - 1),
    "one without tokens": lambda t, k, e: torch.rand(t, e - 1).argsort(1)[:, :k] + 1,
    "some to none": lambda t, k, e: torch.randint(-1, e, (t, k)),
    "every expert": lambda t, k, e: torch.rand(t, e).argsort(1),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_equals_a_double_loop(tokens, route, dtype, assert_close):
    experts = _random(Experts(5, 70, 9, dtype=dtype))
    twin = copy.deepcopy(experts)
    x = torch.randn(tokens, 70, dtype=dtype, requires_grad=True)
    ids = ROUTES[route](tokens, 2, 5)
    weights = torch.rand(ids.shape, dtype=dtype, requires_grad=True)
    x2, weights2 = (t.detach().clone().requires_grad_() for t in (x, weights))
    y, y2 = experts(x, Routing.from_topk(ids, weights, 5)), naive(twin, x2, ids, weights2)
    assert_close(y, y2)
    grad = torch.randn_like(y)
    y.backward(grad)
    y2.backward(grad)
    assert_close(x.grad, x2.grad)
    if tokens:
        assert_close(weights.grad, weights2.grad)
        for (name, p), q in zip(experts.named_parameters(), twin.parameters(), strict=True):
            assert_close(p.grad, q.grad if q.grad is not None else torch.zeros_like(q), name=name)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("activation", "gated"),
    [("gelu", True), ("relu2", False), ("silu", False), (GPT_OSS, True), (Activation("identity", gated=False), True)],
    ids=str,
)
def test_every_form_equals_a_double_loop(activation, gated, bias, assert_close):
    experts = _random(Experts(4, 6, 5, activation=activation, gated=gated, bias=bias, dtype=torch.float64))
    twin = copy.deepcopy(experts)
    x, ids, weights = torch.randn(8, 6).double(), torch.randint(0, 4, (8, 2)), torch.rand(8, 2).double()
    y, y2 = experts(x, Routing.from_topk(ids, weights, 4)), naive(twin, x, ids, weights)
    assert_close(y, y2)
    y.square().sum().backward()
    y2.square().sum().backward()
    for (name, p), q in zip(experts.named_parameters(), twin.named_parameters(), strict=True):
        assert_close(p.grad, q[1].grad if q[1].grad is not None else torch.zeros_like(p), name=name)


def test_holds_the_weights_it_promises():
    shapes = {n: tuple(p.shape) for n, p in Experts(4, 6, 5, bias=True).named_parameters()}
    assert shapes == {"w_gate_up": (4, 10, 6), "w_down": (4, 6, 5), "b_gate_up": (4, 10), "b_down": (4, 6)}
    shapes = {n: tuple(p.shape) for n, p in Experts(4, 6, 5, gated=False).named_parameters()}
    assert shapes == {"w_gate_up": (4, 5, 6), "w_down": (4, 6, 5)}


def test_goes_through_its_dispatcher(assert_close):
    class Halves(Local):
        """Sends half of each row: linear, so that the result of an identity expert shows both trips."""

        def dispatch(self, x, routing):
            return x * 0.5, routing, "ticket"

        def combine(self, rows, ticket):
            assert ticket == "ticket"
            return rows * 0.5

    experts = Experts(1, 6, 6, activation=Activation("identity", gated=False), dispatcher=Halves(), dtype=torch.float64)
    with torch.no_grad():
        experts.w_gate_up.copy_(torch.eye(6)[None])
        experts.w_down.copy_(torch.eye(6)[None])
    x = torch.randn(3, 6).double()
    y = experts(x, Routing.from_topk(torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1).double(), 1))
    assert_close(y, x / 4)


@pytest.mark.parametrize("size", ["num_experts", "hidden_size", "intermediate_size"])
def test_sizes_must_be_positive(size):
    with pytest.raises(ValueError, match=f"Experts: {size} must be at least 1, got 0"):
        Experts(**{"num_experts": 4, "hidden_size": 6, "intermediate_size": 5} | {size: 0})


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match=r"activation must be one of silu, .* got 'swoosh'"):
        Experts(4, 6, 5, activation="swoosh")


def test_a_dispatcher_must_be_one():
    with pytest.raises(TypeError, match=r"dispatcher must be an object such as .*, got 'local'"):
        Experts(4, 6, 5, dispatcher="local")
    with pytest.raises(TypeError, match=r"must be an object such as .*, got <class"):
        Experts(4, 6, 5, dispatcher=type(Experts(4, 6, 5).dispatcher))
