"""Every dispatcher in DISPATCHERS, on one rank: a linear operator with its adjoint, differentiable."""

import pytest
import torch

from headgate.dispatch import DISPATCHERS, Dispatcher
from headgate.kernels.routing import Routing


@pytest.fixture(params=DISPATCHERS)
def dispatcher(request):
    return DISPATCHERS[request.param]()


def _routing(tokens, dtype=torch.float64):
    ids = torch.randint(-1, 4, (tokens, 2))
    return Routing.from_topk(ids, torch.rand(tokens, 2, dtype=dtype, requires_grad=True), 4)


def test_follows_the_protocol(dispatcher):
    assert isinstance(dispatcher, Dispatcher)


@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_combine_is_the_adjoint_of_dispatch(dispatcher, tokens, assert_close):
    x = torch.randn(tokens, 5, dtype=torch.float64)
    rows, local, ticket = dispatcher.dispatch(x, _routing(tokens))
    assert local.expert_ids.shape[0] == local.weights.shape[0] == rows.shape[0]
    r = torch.randn_like(rows)
    assert_close((rows * r).sum(), (x * dispatcher.combine(r, ticket)).sum())


def test_each_is_the_backward_pass_of_the_other(dispatcher, assert_close):
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    rows, _, ticket = dispatcher.dispatch(x, _routing(7))
    r = torch.randn_like(rows).requires_grad_()
    (dx,) = torch.autograd.grad((rows * r.detach()).sum(), x)
    y = dispatcher.combine(r, ticket)
    assert_close(dx, y)
    g = torch.randn_like(y)
    assert_close(torch.autograd.grad((y * g).sum(), r)[0], dispatcher.dispatch(g, _routing(7))[0])


def test_router_weights_keep_their_gradient(dispatcher):
    routing = _routing(7)
    _, local, _ = dispatcher.dispatch(torch.randn(7, 5, dtype=torch.float64), routing)
    local.weights.sum().backward()
    assert routing.weights.grad.abs().sum() > 0
