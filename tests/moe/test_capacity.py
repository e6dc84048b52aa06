"""Capacity against a plain loop: which pairs stay, their gradients, exact counts, and the layer around it."""

import copy
import math

import pytest
import torch

import headgate
from headgate.kernels.routing import Routing
from headgate.kernels.topk import topk
from headgate.moe import Capacity
from headgate.moe.capacity import DROPS, limit
from headgate.moe.losses import load_balancing_loss, z_loss


def plain(ids, weights, experts, bound, drop):
    """Which pairs stay, bool [T, K]: expert by expert, in a loop."""
    keep = (ids < 0) | (ids >= experts)
    for e in range(experts):
        pairs = [(t, k) for t, row in enumerate(ids.tolist()) for k, i in enumerate(row) if i == e]
        if drop == "weight":
            pairs.sort(key=lambda pair: -weights[pair].item())  # stable
        if drop == "choice":
            pairs.sort(key=lambda pair: pair[1])
        for pair in pairs[:bound]:
            keep[pair] = True
    return keep


def draw(tokens, experts, k, dtype=torch.float32):
    """A lopsided router's choice with many equal weights, and some pairs without an expert."""
    ids = (torch.rand(tokens, experts) * torch.arange(1, experts + 1)).argsort(1, descending=True)[:, :k]
    weights = (torch.rand(tokens, k) * 8).round().to(dtype) / 8
    ids[::7, 0], ids[3::11] = -1, experts
    return ids, weights


@pytest.mark.parametrize("drop", DROPS)
@pytest.mark.parametrize("factor", [0.1, 0.75, 1, 1.25, 100.0])
@pytest.mark.parametrize(("tokens", "experts", "k"), [(0, 4, 2), (1, 1, 1), (1, 5, 3), (33, 5, 2), (70, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_equals_a_plain_loop(drop, factor, tokens, experts, k, dtype):
    ids, weights = draw(tokens, experts, k, dtype)
    weights.requires_grad_()
    routing = Routing.from_topk(ids, weights, experts)
    limited, overflow = limit(routing, Capacity(factor, drop))
    bound = math.ceil(round(factor * 100) * tokens * k / (100 * experts))
    keep = plain(ids, weights, experts, bound, drop)
    assert overflow.capacity == bound
    assert torch.equal(limited.expert_ids, ids.int().masked_fill(~keep, -1))
    assert torch.equal(limited.weights, weights.masked_fill(~keep, 0))
    there = ids[keep & (ids >= 0) & (ids < experts)]
    assert torch.equal(limited.counts, torch.bincount(there, minlength=experts).int())
    assert limited.counts.dtype == limited.expert_ids.dtype == torch.int32
    assert overflow.dropped == (~keep).sum()
    assert overflow.overflowed == (~keep).any()
    assert overflow.dropped.dtype == overflow.dropped_total.dtype == torch.int64
    assert overflow.overflowed.dtype == torch.bool
    (limited.weights * 3).sum().backward()
    assert torch.equal(weights.grad, 3 * keep.to(dtype))


@pytest.mark.parametrize("drop", DROPS)
def test_one_favourite_of_all_keeps_its_best_or_its_first(drop):
    weights = torch.tensor([[0.2], [0.9], [0.5], [0.9], [0.1], [0.9]])
    limited, overflow = limit(Routing.from_topk(torch.zeros(6, 1).long(), weights, 3), Capacity(1.0, drop))
    assert overflow.capacity == 2
    kept = [1, 3] if drop == "weight" else [0, 1]  # of three equal ones the first two
    assert (limited.expert_ids[:, 0] == 0).nonzero()[:, 0].tolist() == kept
    assert limited.counts.tolist() == [2, 0, 0]


def test_first_choices_stay_before_second_ones():
    """As GShard's and Tutel's loops over k: locations of second choices start behind all first ones."""
    ids = torch.tensor([[1, 0], [0, 1], [0, 1], [0, 2]])
    limited, overflow = limit(Routing.from_topk(ids, torch.ones(4, 2), 3), Capacity(1.0, "choice"))
    assert overflow.capacity == 3
    assert limited.expert_ids.tolist() == [[1, -1], [0, 1], [0, 1], [0, 2]]
    by_position, _ = limit(Routing.from_topk(ids, torch.ones(4, 2), 3), Capacity(1.0, "position"))
    assert by_position.expert_ids.tolist() == [[1, 0], [0, 1], [0, 1], [-1, 2]]


def test_the_factor_counts_as_written():
    """1.1 * 10 is 11.000000000000002 in binary."""
    assert Capacity(1.1).of(tokens=10, top_k=1, num_experts=1) == 11
    assert Capacity(1.1).of(tokens=11, top_k=1, num_experts=1) == 13
    assert Capacity(1.25).of(tokens=1, top_k=1, num_experts=64) == 1
    assert Capacity(2).of(tokens=0, top_k=1, num_experts=64) == 0


def test_pad_promises_a_bound_and_nothing_else_does():
    routing = topk(torch.randn(33, 8), 2)
    assert routing.capacity is None
    assert limit(routing, Capacity(0.5))[0].capacity is None
    limited, overflow = limit(routing, Capacity(0.5, pad=True))
    assert limited.capacity == limited.detach().capacity == overflow.capacity == 5
    assert limited.counts.max() == 5


@pytest.mark.parametrize("drop", DROPS)
def test_reads_no_value(drop):
    """On tensors without values: nothing waits for a device."""
    routing = Routing.from_topk(torch.zeros(9, 2, dtype=torch.int32, device="meta"), torch.ones(9, 2, device="meta"), 4)
    limited, overflow = limit(routing, Capacity(1.0, drop, pad=True))
    assert overflow.capacity == limited.capacity == 5
    assert {t.device.type for t in (limited.weights, limited.counts, overflow.dropped)} == {"meta"}


def test_scores_and_logits_stay():
    routing = topk(torch.randn(33, 8), 2)
    limited, _ = limit(routing, Capacity(0.5))
    assert limited.scores is routing.scores
    assert limited.logits is routing.logits


class TestLayer:
    @pytest.mark.parametrize("drop", DROPS)
    @pytest.mark.parametrize("tokens", [0, 1, 33])
    def test_equals_its_experts_on_what_stays(self, drop, tokens, assert_close):
        layer = headgate.MoE(
            20, 9, 5, 2, shared_intermediate_size=4, capacity=Capacity(0.75, drop), dtype=torch.float64
        )
        twin = copy.deepcopy(layer)
        x = torch.randn(tokens, 20, dtype=torch.float64, requires_grad=True)
        x2 = x.detach().clone().requires_grad_()
        y = layer(x)
        routing = twin.router(x2)
        keep = plain(routing.expert_ids, routing.weights, 5, math.ceil(0.75 * tokens * 2 / 5), drop)
        # an expert that is left out by weight 0 instead of by id
        chosen = Routing(routing.expert_ids, routing.weights * keep, 5)
        y2 = twin.experts(x2, chosen) + twin.shared(x2)
        assert_close(y, y2)
        g = torch.randn_like(y)
        y.backward(g)
        y2.backward(g)
        assert_close(x.grad, x2.grad)
        for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
            assert_close(p.grad, torch.zeros_like(q) if q.grad is None else q.grad)
        assert layer.last_overflow.dropped == (~keep).sum()
        assert layer.last_routing.counts.sum() == keep.sum()

    def test_a_number_is_a_factor(self):
        layer = headgate.MoE(20, 9, 5, 2, capacity=1)
        assert layer.capacity == Capacity(1)
        assert layer.last_overflow is None
        layer(torch.randn(33, 20))
        assert layer.last_overflow.capacity == 14
        assert layer.last_overflow.dropped_total is layer.last_overflow.dropped

    @pytest.mark.parametrize("router", ["softmax", "sigmoid"])
    def test_losses_and_bias_see_the_choice_before(self, router, assert_close):
        coefs = {"load_balancing_coef": 0.3, "z_loss_coef": 0.2}
        layer = headgate.MoE(20, 9, 5, 2, router=router, capacity=0.5, dtype=torch.float64, **coefs)
        twin = copy.deepcopy(layer)
        x = torch.randn(33, 20, dtype=torch.float64)
        (layer(x) * 0).sum().backward()
        routing = twin.router(x)
        assert layer.last_overflow.dropped > 10
        balance = load_balancing_loss(routing)
        assert_close(layer.aux_losses["load_balancing"], balance)
        (0.3 * balance + 0.2 * z_loss(routing)).backward()
        assert_close(layer.router.weight.grad, twin.router.weight.grad)
        if router == "sigmoid":
            assert layer.router.load.sum() == 66

    @pytest.mark.parametrize("capacity", [Capacity(0.75), Capacity(1.1, "position", pad=True)], ids=str)
    def test_compiles_whole(self, capacity, own_compilations, assert_close):
        layer = headgate.MoE(20, 9, 5, 2, capacity=capacity, load_balancing_coef=0.1)
        twin = copy.deepcopy(layer)
        compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
        for tokens in (9, 33, 1, 0):
            x = torch.randn(tokens, 20, requires_grad=True)
            x2 = x.detach().clone().requires_grad_()
            y, y2 = layer(x), compiled(x2)
            assert_close(y2, y)
            y.sum().backward()
            y2.sum().backward()
            assert_close(x2.grad, x.grad)
            assert twin.last_overflow == layer.last_overflow
            assert twin.last_routing.capacity == layer.last_routing.capacity


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"factor": "1"}, TypeError, "factor must be a number, got '1'"),
        ({"factor": True}, TypeError, "factor must be a number, got True"),
        ({"factor": -1.0}, ValueError, r"factor must be positive and finite, got -1\.0"),
        ({"factor": float("inf")}, ValueError, "factor must be positive and finite, got inf"),
        ({"factor": float("nan")}, ValueError, "factor must be positive and finite, got nan"),
        ({"drop": "probs"}, ValueError, "drop must be one of weight, position, choice, got 'probs'"),
        ({"scope": "global"}, ValueError, "scope must be one of rank, batch, got 'global'"),
        ({"scope": "batch", "pad": True}, ValueError, "pad must come with scope 'rank', got 'batch'"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=f"Capacity: {message}"):
        Capacity(**change)
