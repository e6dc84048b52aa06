"""Which balancing loss a layer adds: its norm, the choice it counts, its scopes; each against its source's formula."""

import copy

import pytest
import torch
from torch import nn

import headgate
from headgate.kernels.topk import topk
from headgate.moe.balance import counted
from headgate.moe.losses import load_balancing_loss

D, E, K = 10, 8, 3


def megatron(scores, chosen, k):
    """Megatron-Core's switch_load_balancing_loss_func without its coefficient: scores [T, E], chosen bool [T, E]."""
    tokens, experts = scores.shape
    return (scores.sum(0) * chosen.sum(0)).sum() * experts / (k * tokens**2)


def gshard(scores, first):
    """Tutel's gshard_loss, DeepSpeed's and GShard's l_aux: E * sum of mean score times share of first choices."""
    chosen = nn.functional.one_hot(first, scores.shape[1]).double()
    return scores.shape[1] * (scores.mean(0) * chosen.mean(0)).sum()


def make(router="softmax", **options):
    return headgate.MoE(D, 4, E, K, router=router, dtype=torch.float64, **options)


def router_gradient(layer, x):
    layer.zero_grad()
    (layer(x) * 0).sum().backward()
    return layer.router.weight.grad


def same_as(loss_of, layer, x, assert_close, coef=0.3, name="load_balancing"):
    """The layer adds coef * loss_of(router, tokens) and shows the loss."""
    twin = copy.deepcopy(layer)
    grad = router_gradient(layer, x)
    loss = loss_of(twin.router, x.reshape(-1, D))
    (coef * loss).backward()
    assert_close(layer.aux_losses[name], loss.detach())
    assert_close(grad, twin.router.weight.grad)


def test_norm_topk_is_megatrons_and_one_where_load_is_even(assert_close):
    def loss(router, x):
        scores = (x @ router.weight.T).softmax(1)
        chosen = torch.zeros_like(scores).scatter(1, scores.topk(K)[1], 1.0)
        return megatron(scores, chosen, K)

    layer = make(load_balancing_coef=0.3, load_balancing_norm="topk")
    same_as(loss, layer, torch.randn(33, D, dtype=torch.float64), assert_close)
    layer(torch.zeros(33, D, dtype=torch.float64))
    assert_close(layer.aux_losses["load_balancing"], torch.ones((), dtype=torch.float64))


def test_first_choices_are_gshards(assert_close):
    def loss(router, x):
        scores = (x @ router.weight.T).softmax(1)
        return gshard(scores, scores.argmax(1))

    x = torch.randn(33, D, dtype=torch.float64)
    for norm in ("none", "topk"):  # one choice is counted
        same_as(loss, make(load_balancing_coef=0.3, load_balancing_choice="first", load_balancing_norm=norm), x,
                assert_close)  # fmt: skip


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_scores_count_anew_without_bias_and_groups(scope, assert_close):
    """DeepSeek-V3, equations 17 to 20: f counts the K best raw scores, whatever bias and groups chose."""

    def loss(router, x):
        scores = (x @ router.weight.T).sigmoid()
        chosen = torch.zeros_like(scores).scatter(1, scores.topk(K)[1], 1.0)
        share = scores / scores.sum(1, keepdim=True)
        parts = 3 if scope == "sequence" else 1
        return sum(megatron(s, c, K) for s, c in zip(share.chunk(parts), chosen.chunk(parts), strict=True)) / parts

    options = {"groups": 4, "topk_groups": 2}
    how = {"load_balancing_choice": "scores", "load_balancing_norm": "topk", "load_balancing_scope": scope}
    layer = make("sigmoid", router_options=options, load_balancing_coef=0.3, **how)
    layer.router.expert_bias.normal_()
    x = torch.randn(3, 11, D, dtype=torch.float64)
    routed = load_balancing_loss(layer.router(x.reshape(-1, D))) / K
    same_as(loss, layer, x, assert_close)
    assert abs(layer.aux_losses["load_balancing"] - routed) > 1e-3


def test_several_losses_add_up(assert_close):
    x = torch.randn(3, 11, D, dtype=torch.float64)
    both = make(load_balancing_coef={"batch": 0.3, "sequence": 0.07}, load_balancing_norm="topk")
    one, other = (
        make(load_balancing_coef=c, load_balancing_scope=s, load_balancing_norm="topk")
        for c, s in ((0.3, "batch"), (0.07, "sequence"))
    )
    for layer in (one, other):
        layer.load_state_dict(both.state_dict())
    assert_close(router_gradient(both, x), router_gradient(one, x) + router_gradient(other, x))
    assert list(both.aux_losses) == ["load_balancing_batch", "load_balancing_sequence"]
    assert_close(both.aux_losses["load_balancing_batch"], one.aux_losses["load_balancing"])
    assert_close(both.aux_losses["load_balancing_sequence"], other.aux_losses["load_balancing"])


def test_scope_rank_is_the_batch_in_one_process(assert_close):
    x = torch.randn(3, 11, D, dtype=torch.float64)
    rank, batch = make(load_balancing_coef=0.3, load_balancing_scope="rank"), make(load_balancing_coef=0.3)
    batch.load_state_dict(rank.state_dict())
    assert_close(router_gradient(rank, x), router_gradient(batch, x))


@pytest.mark.parametrize("choice", ["routed", "scores", "first"])
def test_compiles_whole(choice, own_compilations, assert_close):
    options = {"load_balancing_coef": {"batch": 0.3, "sequence": 0.1}, "load_balancing_norm": "topk"}
    layer = make(**options, load_balancing_choice=choice)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 9, D, dtype=torch.float64)
    (compiled(x) * 0).sum().backward()
    assert_close(twin.router.weight.grad, router_gradient(layer, x))


def test_the_loss_function_takes_a_choice_as_it_is_given(assert_close):
    routing = topk(torch.randn(33, E, dtype=torch.float64), K)
    assert counted(routing, "routed") is routing
    assert torch.equal(counted(routing, "first").expert_ids, routing.expert_ids[:, :1])
    assert counted(routing, "first").scores is routing.scores


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"load_balancing_norm": "mean"}, "load_balancing_norm must be one of none, topk, got 'mean'"),
        ({"load_balancing_choice": "x"}, "load_balancing_choice must be one of routed, scores, first, got 'x'"),
        ({"load_balancing_coef": {}}, "load_balancing_coef must name a scope or be a number, got {}"),
        ({"load_balancing_coef": {"step": 0.1}}, "load_balancing_scope must be one of batch, .*, got 'step'"),
        ({"load_balancing_coef": {"batch": -0.1}}, "load_balancing_coef must be finite and not negative, got -0.1"),
        ({"load_balancing_coef": {"global": 0.1}}, "load_balancing_group must be given with"),
        (
            {"load_balancing_coef": {"batch": 0.1}, "load_balancing_scope": "sequence"},
            "load_balancing_scope must be left out where load_balancing_coef names scopes, got 'sequence'",
        ),
        (
            {"router": "bilevel", "router_options": {"nodes": 2}, "load_balancing_choice": "first"},
            "load_balancing_choice must be 'routed' for a router with a balancing loss of its own, got 'first'",
        ),
        (
            {"router": "bilevel", "router_options": {"nodes": 2}, "load_balancing_norm": "topk"},
            "load_balancing_norm must be 'none' for a router with a balancing loss of its own, got 'topk'",
        ),
    ],
    ids=str,
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=f"MoE: {message}"):
        make(**change)
