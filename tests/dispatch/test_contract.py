"""Every dispatcher in DISPATCHERS, on one rank: a linear operator with its adjoint, differentiable."""

import pytest
import torch
import torch.distributed as dist

from headgate.dispatch import DISPATCHERS, Dispatcher
from headgate.kernels.routing import Routing


@pytest.fixture(scope="module")
def group():
    """A group of this process alone."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    assert not dist.is_initialized()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(params=DISPATCHERS)
def dispatcher(request, group):
    return DISPATCHERS[request.param]()


def _routing(tokens, dtype=torch.float64):
    ids = torch.randint(-1, 4, (tokens, 2))
    return Routing.from_topk(ids, torch.rand(tokens, 2, dtype=dtype, requires_grad=True), 4)


def test_follows_the_protocol(dispatcher):
    assert isinstance(dispatcher, Dispatcher)
    assert dispatcher.local_experts(4) == range(4)


@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_combine_is_the_adjoint_of_dispatch(dispatcher, tokens, assert_close):
    x = torch.randn(tokens, 5, dtype=torch.float64)
    rows, local, ticket = dispatcher.dispatch(x, _routing(tokens))
    assert local.expert_ids.shape[0] == local.weights.shape[0] == rows.shape[0]
    r = torch.randn_like(rows)
    assert_close((rows * r).sum(), (x * dispatcher.combine(r, ticket)).sum())


def test_each_is_the_backward_pass_of_the_other(dispatcher, assert_close):
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    routing = _routing(7)
    rows, _, ticket = dispatcher.dispatch(x, routing)
    r = torch.randn_like(rows).requires_grad_()
    (dx,) = torch.autograd.grad((rows * r.detach()).sum(), x)
    y = dispatcher.combine(r, ticket)
    assert_close(dx, y)
    g = torch.randn_like(y)
    assert_close(torch.autograd.grad((y * g).sum(), r)[0], dispatcher.dispatch(g, routing)[0])


def test_router_weights_keep_their_gradient(dispatcher):
    routing = _routing(7)
    _, local, _ = dispatcher.dispatch(torch.randn(7, 5, dtype=torch.float64), routing)
    local.weights.sum().backward()
    assert routing.weights.grad.abs().sum() > 0


def test_bad_arguments(group):
    with pytest.raises(ValueError, match=r"AllToAll: wire must be one of exact, bf16, .* got 'fp4'"):
        DISPATCHERS["all_to_all"](wire="fp4")
    with pytest.raises(ValueError, match="AllGather: backward_wire must be one of"):
        DISPATCHERS["all_gather"](backward_wire=("bf16",))
    with pytest.raises(ValueError, match="Hierarchical: ranks_per_node must divide the group's 1 ranks, got 2"):
        DISPATCHERS["hierarchical"](ranks_per_node=2)
    with pytest.raises(ValueError, match="SliceAllReduce: check must be 'always' or 'first', got 'never'"):
        DISPATCHERS["slice_all_reduce"](check="never")
    with pytest.raises(ValueError, match=r"AllToAll: x must be \[T, D\] with a row for each of the routing's 7 tokens"):
        DISPATCHERS["all_to_all"]().dispatch(torch.zeros(6, 5), _routing(7))
