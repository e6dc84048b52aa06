"""Losses: equality with transformers' and with their formulas, scopes, and the ride on y's backward pass."""

import pytest
import torch

from headgate.kernels.routing import Routing
from headgate.kernels.topk import topk
from headgate.moe.losses import attach_loss, load_balancing_loss, z_loss


@pytest.mark.parametrize("score", ["softmax", "topk_softmax"])
@pytest.mark.parametrize(("tokens", "experts", "k"), [(1, 4, 2), (33, 8, 3), (50, 4, 3)])
def test_equals_transformers(tokens, experts, k, score, assert_close):
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = torch.randn(tokens, experts, requires_grad=True)
    twin = logits.detach().clone().requires_grad_()
    ours = load_balancing_loss(topk(logits, k, score=score))
    theirs = mixtral.load_balancing_loss_func((twin,), experts, k)
    assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    assert_close(logits.grad, twin.grad, scale=4)  # a difference of two sums as large as the gradient itself


def test_is_k_where_load_is_even_and_more_where_not():
    even = Routing(torch.tensor([[0, 1], [2, 3]]), torch.ones(2, 2), 4, None, torch.full((2, 4), 0.25))
    assert load_balancing_loss(even).item() == pytest.approx(2.0)
    skewed = topk(torch.tensor([[5.0, 4.0, 0.0, 0.0]] * 6), 2)
    assert load_balancing_loss(skewed) > 3.9


def test_counts_are_taken_from_ids_where_missing(assert_close):
    routing = topk(torch.randn(33, 8), 2)
    bare = Routing(routing.expert_ids, routing.weights, 8, None, routing.scores)
    assert_close(load_balancing_loss(bare), load_balancing_loss(routing))
    none = Routing(torch.tensor([[-1, 8]]), torch.ones(1, 2), 8, None, torch.full((1, 8), 0.125))
    assert load_balancing_loss(none) == 0


def test_per_sequence_is_the_mean_of_each_ones_loss(assert_close):
    logits = torch.randn(4 * 9, 8, dtype=torch.float64)
    each = torch.stack([load_balancing_loss(topk(one, 2, score="sigmoid")) for one in logits.chunk(4)])
    assert_close(load_balancing_loss(topk(logits, 2, score="sigmoid"), sequences=4), each.mean())


def test_scores_that_do_not_sum_to_one_are_normalised(assert_close):
    routing = topk(torch.randn(33, 8), 2, score="sigmoid")
    share = routing.scores / routing.scores.sum(1, keepdim=True)
    assert_close(load_balancing_loss(routing), 8 * (routing.counts / 33 * share.mean(0)).sum())


def test_z_loss_is_its_formula(assert_close):
    logits = torch.randn(33, 8, dtype=torch.float64, requires_grad=True)
    loss = z_loss(topk(logits, 2))
    assert_close(loss, logits.exp().sum(1).log().square().mean())
    assert torch.autograd.gradcheck(lambda x: z_loss(topk(x, 2)), logits)


def test_nothing_of_nothing_is_zero():
    routing = topk(torch.zeros(0, 8, requires_grad=True), 2)
    balance = [load_balancing_loss(routing, sequences=n) for n in (None, 0, 1, 3)]
    for loss in (*balance, z_loss(routing)):
        assert loss == 0
        loss.backward(retain_graph=True)


def test_bad_arguments_are_named():
    routing = topk(torch.randn(9, 8), 2)
    bare = Routing(routing.expert_ids, routing.weights, 8)
    with pytest.raises(ValueError, match="load_balancing_loss: routing must have scores, got None"):
        load_balancing_loss(bare)
    with pytest.raises(ValueError, match="z_loss: routing must have logits, got None"):
        z_loss(bare)
    for wrong in (2, 0, -3):
        with pytest.raises(ValueError, match=rf"sequences must divide the tokens \(9\), got {wrong}"):
            load_balancing_loss(routing, sequences=wrong)


def test_attached_loss_runs_backward_with_y_whatever_ys_gradient():
    w, x = torch.tensor(3.0, requires_grad=True), torch.randn(4, requires_grad=True)
    y = attach_loss(x * 2, 5 * w)
    assert torch.equal(y, x * 2)
    (y * 0).sum().backward()
    assert w.grad == 5
    assert x.grad.eq(0).all()
    y = attach_loss(x.to(torch.bfloat16), 5 * w)
    y.float().sum().backward()
    assert w.grad == 10
    assert x.grad.eq(1).all()
