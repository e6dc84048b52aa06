"""Routers of transformers' families: equality with their own, and the bias that balances."""

import copy
import warnings
from importlib import import_module

import pytest
import torch

from headgate.moe.routers import BilevelRouter, Router, SigmoidRouter, SoftmaxRouter


@pytest.mark.parametrize("router", [SoftmaxRouter, SigmoidRouter])
def test_groups_that_do_not_fit_are_refused(router):
    with pytest.raises(ValueError, match=rf"{router.__name__}: groups must divide the number of experts \(8\), got 3"):
        router(20, 8, 2, groups=3)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="order must be one of softmax_topk, topk_softmax, got 'x'"):
        SoftmaxRouter(20, 8, 2, order="x")
    with pytest.raises(ValueError, match="score must be 'sigmoid' or 'sqrtsoftplus', got 'softmax'"):
        SigmoidRouter(20, 8, 2, score="softmax")
    with pytest.raises(NotImplementedError, match="abstract"):
        Router(20, 8, 2)(torch.randn(1, 20))


def _theirs(family, router_class, **config):
    transformers = pytest.importorskip("transformers")
    settings = getattr(transformers, router_class.split("TopK")[0].split("Topk")[0] + "Config")(
        hidden_size=20, **config
    )
    return getattr(import_module(f"transformers.models.{family}.modeling_{family}"), router_class)(settings)


FAMILIES = {
    "mixtral": (
        ("mixtral", "MixtralTopKRouter", {"num_local_experts": 8, "num_experts_per_tok": 2}),
        lambda: SoftmaxRouter(20, 8, 2, renormalize=True),
    ),
    "qwen3_moe": (
        ("qwen3_moe", "Qwen3MoeTopKRouter", {"num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": False}),
        lambda: SoftmaxRouter(20, 8, 3),
    ),
    "qwen3_moe, normalised": (
        ("qwen3_moe", "Qwen3MoeTopKRouter", {"num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True}),
        lambda: SoftmaxRouter(20, 8, 3, renormalize=True),
    ),
    "granitemoe": (
        ("granitemoe", "GraniteMoeTopKRouter", {"num_local_experts": 8, "num_experts_per_tok": 3}),
        lambda: SoftmaxRouter(20, 8, 3, order="topk_softmax"),
    ),
    "gpt_oss": (
        ("gpt_oss", "GptOssTopKRouter", {"num_local_experts": 8, "num_experts_per_tok": 3}),
        lambda: SoftmaxRouter(20, 8, 3, order="topk_softmax", gate_bias=True),
    ),
    "deepseek_v3": (
        (
            "deepseek_v3",
            "DeepseekV3TopkRouter",
            {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2},
        ),
        lambda: SigmoidRouter(20, 16, 4, groups=4, topk_groups=2, scale=2.5),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers_own_router(family, assert_close):
    theirs, ours = FAMILIES[family]
    theirs, ours = _theirs(theirs[0], theirs[1], **theirs[2]), ours()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_()
        ours.weight.copy_(theirs.weight)
        if ours.gate_bias is not None:
            ours.gate_bias.copy_(theirs.bias)
        if isinstance(ours, SigmoidRouter):
            theirs.e_score_correction_bias.normal_(std=0.3)
            ours.expert_bias.copy_(theirs.e_score_correction_bias)
    x, x2 = (torch.randn(33, 20, generator=torch.Generator().manual_seed(3)).requires_grad_() for _ in range(2))
    logits, weights, ids = theirs(x)
    routing = ours(x2)
    order, order2 = ids.sort(1)[1], routing.expert_ids.long().sort(1)[1]  # they don't all sort by score
    assert torch.equal(ids.gather(1, order), routing.expert_ids.long().gather(1, order2))
    assert_close(routing.weights.gather(1, order2), weights.gather(1, order))
    assert_close(routing.logits, logits)
    grad = torch.randn(33, ids.shape[1])
    (weights.gather(1, order) * grad).sum().backward()
    (routing.weights.gather(1, order2) * grad).sum().backward()
    assert_close(x2.grad, x.grad)
    assert_close(ours.weight.grad, theirs.weight.grad)


class TestOneChoice:
    """One weight divided by itself is 1, and the router learns nothing from the output."""

    def test_the_sigmoid_routers_weight_is_its_score(self, assert_close):
        """As Megatron-Core and DeepSeek's own code have it: normalised only where K > 1."""
        router, x = SigmoidRouter(20, 8, 1, scale=2.5), torch.randn(9, 20)
        routing = router(x)
        assert_close(routing.weights[:, 0], 2.5 * (x @ router.weight.T).sigmoid().amax(1))
        routing.weights.sum().backward()
        assert router.weight.grad.abs().sum() > 0
        assert SigmoidRouter(20, 8, 2)(x).weights.sum(1).allclose(torch.ones(9))

    @pytest.mark.parametrize(
        "make",
        [
            lambda: SigmoidRouter(20, 8, 1, renormalize=True),
            lambda: SoftmaxRouter(20, 8, 1, renormalize=True),
            lambda: SoftmaxRouter(20, 8, 1, order="topk_softmax"),
            lambda: BilevelRouter(20, 8, 1, nodes=2, renormalize=True),
        ],
    )
    def test_who_asks_for_it_is_told(self, make):
        with pytest.warns(UserWarning, match=r"top_k=1 .* makes every weight .*: the router learns from its losses"):
            router = make()
        assert router(torch.randn(9, 20)).weights.allclose(torch.ones(9, 1))

    def test_others_hear_nothing(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for make in (lambda: SigmoidRouter(20, 8, 1), lambda: SoftmaxRouter(20, 8, 1),
                         lambda: SoftmaxRouter(20, 8, 2, renormalize=True)):  # fmt: skip
                make()


class TestBias:
    def test_levels_a_skewed_load(self):
        router = SigmoidRouter(16, 8, 2)
        with torch.no_grad():
            router.weight[:2] += 0.5
        x = torch.randn(512, 16) + 0.5  # two experts are everybody's favourites
        before = router(x).counts.float()
        for router.bias_rate in [0.02] * 100 + [0.002] * 100 + [0.0002] * 50:
            router(x)
            router.update_bias()
        after = router(x).counts.float()
        assert before.max() > 2.5 * before.mean()
        assert after.max() < 1.1 * after.mean()
        assert after.min() > 0.9 * after.mean()

    def test_steps_by_the_sign_of_the_load_error(self):
        router = SigmoidRouter(16, 4, 2, bias_rate=0.5)
        router.update_bias(torch.tensor([5, 3, 0, 4]))  # mean 3
        assert router.expert_bias.tolist() == [-0.5, 0.0, 0.5, -0.5]
        assert not router.expert_bias.requires_grad

    def test_adds_up_micro_steps(self):
        router = SigmoidRouter(16, 8, 2)
        twin = copy.deepcopy(router)
        xs = [torch.randn(n, 16) for n in (3, 50, 7)]
        counts = torch.stack([router(x).counts for x in xs])
        router.eval()(torch.randn(100, 16))  # not a training step
        assert torch.equal(router.load, counts.sum(0))
        router.update_bias()
        twin.update_bias(counts)
        assert torch.equal(router.expert_bias, twin.expert_bias)
        assert router.expert_bias.abs().max() > 0
        assert router.load is None

    def test_stays_fp32_and_exact_when_the_model_is_cast(self):
        router = SigmoidRouter(16, 4, 2, bias_rate=0.001)
        router.expert_bias.fill_(1.0)
        router.update_bias(torch.tensor([5, 3, 0, 4]))
        exact = router.expert_bias.clone()
        router.to(torch.bfloat16)
        assert router.weight.dtype == torch.bfloat16
        assert torch.equal(router.expert_bias, exact)
        router.update_bias(torch.tensor([5, 3, 0, 4]))
        assert torch.equal(router.expert_bias, exact + 0.001 * torch.tensor([-1.0, 0.0, 1.0, -1.0]))

    def test_bad_counts_are_named(self):
        router = SigmoidRouter(16, 4, 2)
        with pytest.raises(ValueError, match="counts must be given before any training forward, got None"):
            router.update_bias()
        with pytest.raises(ValueError, match=r"counts must be \[\.\.\., 4\], got \(3,\)"):
            router.update_bias(torch.zeros(3))
        assert router.expert_bias.eq(0).all()
