"""A headgate.MoE with a transformers block's weights is that block: outputs and all gradients, fp32."""

from importlib import import_module

import pytest
import torch

from headgate import MoE

transformers = pytest.importorskip("transformers")

D, F, E, K = 24, 10, 8, 3


def theirs(family, block, config, **settings):
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    block = getattr(module, block)(getattr(transformers, config)(hidden_size=D, **settings)).float()
    with torch.no_grad():
        for p in block.parameters():
            p.uniform_(-0.3, 0.3)
    return block


def mixtral():
    block = theirs(
        "mixtral",
        "MixtralSparseMoeBlock",
        "MixtralConfig",
        intermediate_size=F,
        num_local_experts=E,
        num_experts_per_tok=K,
    )
    return block, MoE(D, F, E, K, router_options={"renormalize": True})


def qwen2_moe():
    settings = {"moe_intermediate_size": F, "num_experts": E, "num_experts_per_tok": K, "norm_topk_prob": False}
    block = theirs(
        "qwen2_moe", "Qwen2MoeSparseMoeBlock", "Qwen2MoeConfig", shared_expert_intermediate_size=12, **settings
    )
    return block, MoE(D, F, E, K, shared_intermediate_size=12, shared_gate=True)


def olmoe():
    block = theirs(
        "olmoe", "OlmoeSparseMoeBlock", "OlmoeConfig", intermediate_size=F, num_experts=E, num_experts_per_tok=K
    )
    return block, MoE(D, F, E, K, router_options={"renormalize": block.gate.norm_topk_prob})


def gpt_oss():
    block = theirs(
        "gpt_oss", "GptOssMLP", "GptOssConfig", intermediate_size=F, num_local_experts=E, num_experts_per_tok=K
    )
    options = {"order": "topk_softmax", "gate_bias": True}
    return block, MoE(D, F, E, K, router_options=options, activation="gpt_oss", bias=True)


def deepseek_v3():
    block = theirs(
        "deepseek_v3",
        "DeepseekV3MoE",
        "DeepseekV3Config",
        moe_intermediate_size=F,
        n_routed_experts=E,
        num_experts_per_tok=K,
        n_group=4,
        topk_group=2,
        n_shared_experts=2,
    )
    block.gate.e_score_correction_bias.normal_(std=0.2)
    options = {"groups": 4, "topk_groups": 2, "scale": block.gate.routed_scaling_factor}
    return block, MoE(D, F, E, K, router="sigmoid", router_options=options, shared_intermediate_size=2 * F)


def pairs(block, layer):
    """(theirs as ours is laid out, ours) for each parameter: one way for values, the same way for gradients."""
    gate = getattr(block, "gate", None) or block.router
    yield lambda of: of(gate.weight), layer.router.weight
    up, down = block.experts.gate_up_proj, block.experts.down_proj
    if hasattr(block.experts, "gate_up_proj_bias"):  # gpt-oss: transposed, gate and up interleaved
        split = lambda t: torch.cat([t[:, 0::2], t[:, 1::2]], 1)  # noqa: E731
        yield lambda of: of(gate.bias), layer.router.gate_bias
        yield lambda of: split(of(up).transpose(1, 2)), layer.experts.w_gate_up
        yield lambda of: of(down).transpose(1, 2), layer.experts.w_down
        yield lambda of: split(of(block.experts.gate_up_proj_bias)), layer.experts.b_gate_up
        yield lambda of: of(block.experts.down_proj_bias), layer.experts.b_down
    else:
        yield lambda of: of(up), layer.experts.w_gate_up
        yield lambda of: of(down), layer.experts.w_down
    shared = getattr(block, "shared_expert", None) or getattr(block, "shared_experts", None)
    if shared is not None:
        both = lambda of: torch.cat([of(shared.gate_proj.weight), of(shared.up_proj.weight)])[None]  # noqa: E731
        yield both, layer.shared.ffn.w_gate_up
        yield lambda of: of(shared.down_proj.weight)[None], layer.shared.ffn.w_down
        if layer.shared.gate is not None:
            yield lambda of: of(block.shared_expert_gate.weight), layer.shared.gate.weight


@pytest.mark.parametrize("family", [mixtral, qwen2_moe, olmoe, gpt_oss, deepseek_v3], ids=lambda f: f.__name__)
def test_equals_the_block_of_its_family(family, assert_close):
    block, layer = family()
    with torch.no_grad():
        for theirs_, ours in pairs(block, layer):
            ours.copy_(theirs_(lambda p: p))
        if hasattr(layer.router, "expert_bias"):
            layer.router.expert_bias.copy_(block.gate.e_score_correction_bias)
    x = torch.randn(2, 17, D, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    y2 = block(x2)
    y, y2 = layer(x), y2[0] if isinstance(y2, tuple) else y2
    grad = torch.randn(2, 17, D)
    y.backward(grad)
    y2.backward(grad)
    assert_close(y, y2)
    assert_close(x.grad, x2.grad)
    assert len(list(pairs(block, layer))) == len(list(layer.parameters()))
    for theirs_, ours in pairs(block, layer):
        assert_close(ours.grad, theirs_(lambda p: p.grad))
