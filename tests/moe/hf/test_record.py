"""headgate.record hears every family that headgate.replace takes, before and after the swap."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import headgate

# Layers that say the choice beside the experts, or more than once: JetMoE routes its attention too.
HEARD = {"jetmoe": ("self_attention.experts.router", "mlp.router"), "llama4": ("feed_forward.router",)}


@pytest.mark.filterwarnings("ignore:headgate")
def test_every_family_is_recorded(family):
    batch = {name: value for name, value in family.inputs.items() if name != "labels"}
    if family.name == "vitpose_backbone":
        with pytest.raises(ValueError, match="must have MoE layers, got a VitPoseBackbone without any"):
            headgate.record(family.model, [batch])
        return
    batch.pop("moe_mm_token_type_ids", None)  # Ernie's vision experts see the image's tokens only
    if "decoder_input_ids" in batch:  # one trace has one T: the decoder's tokens must be as many
        batch["decoder_input_ids"] = batch["input_ids"].flip(1)
    family.model.eval()
    before = headgate.record(family.model, batch, weights=True)
    report = headgate.replace(family.model)
    after = headgate.record(family.model, batch, weights=True)
    heard = HEARD.get(family.name)
    if heard is None:
        assert set(before.layer_names) == {name for name in report.replaced if "vision_moe" not in name}
    else:
        assert {name.split(".", 3)[-1] for name in before.layer_names} == set(heard)
    assert before.layer_names == after.layer_names
    assert before.expert_ids.shape[:2] == (len(before.layer_names), batch["input_ids"].numel())
    np.testing.assert_array_equal(after.expert_ids, before.expert_ids)
    np.testing.assert_allclose(after.weights, before.weights, atol=1e-2)
    chosen = before.live.sum(2)
    assert chosen.max() <= before.expert_ids.shape[2]
    assert chosen.any()


def test_llama4_is_recorded_as_its_router_says(build):
    family = build("llama4")
    family.model.eval()
    router = family.model.get_submodule("model.layers.1.feed_forward.router")
    logits = []
    router.register_forward_hook(lambda _m, _args, out: logits.append(out[1]))
    trace = headgate.record(family.model, family.inputs["input_ids"], weights=True)
    weight, ids = logits[0].topk(2, dim=1)
    np.testing.assert_array_equal(trace.expert_ids[1], ids.numpy())
    np.testing.assert_allclose(trace.weights[1], weight.sigmoid().detach().numpy(), atol=1e-3)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("zero", [0, 3])
def test_identity_experts_are_no_experts(build, zero):
    family = build("longcat_flash", n_routed_experts=5, zero_expert_num=zero)
    trace = headgate.record(family.model, family.inputs["input_ids"])
    assert trace.num_experts == 5
    assert trace.live.all() == (zero == 0)
