"""LoRA on models whose experts are offloaded: what computes stays, what is merged is there, and nothing is lost."""

from __future__ import annotations

import pytest
import torch

import headgate

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
ATTENTION = {"target_modules": ["q_proj", "v_proj"]}


def adapted(model, **targets):
    torch.manual_seed(3)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, **targets)).eval()


def logits(model, family):
    with torch.no_grad():
        return model(input_ids=family.inputs["input_ids"]).logits


@pytest.fixture
def olmoe(build):
    family = build("olmoe")
    family.model.eval()
    return family


@pytest.mark.parametrize("order", ["LoRA, then offload", "offload, then LoRA"])
def test_lora_on_attention_and_its_merge_take_effect(olmoe, tmp_path, assert_close, order):
    model = olmoe.clone()
    want = logits(adapted(olmoe.model, **ATTENTION), olmoe)
    headgate.replace(model)
    if order == "LoRA, then offload":
        model = adapted(model, **ATTENTION)
    offloaded = headgate.offload(model, "50%", disk=tmp_path)
    if order == "offload, then LoRA":
        model = adapted(model, **ATTENTION)
    assert_close(logits(model, olmoe), want)
    model.merge_adapter()
    assert_close(logits(model, olmoe), want)
    model = model.merge_and_unload()
    assert_close(logits(model, olmoe), want)
    offloaded.close()
    assert_close(logits(model, olmoe), want)


def test_lora_on_experts_that_is_offloaded_is_refused_by_name(olmoe, tmp_path):
    model = adapted(olmoe.model, **EXPERTS)
    headgate.replace(model)
    want = logits(model, olmoe)
    with pytest.raises(ValueError, match=r"none to move: a LoRA adapter computes its (gate_up|down)_proj: merge"):
        headgate.offload(model, "50%", disk=tmp_path)
    assert torch.equal(logits(model, olmoe), want)


def test_layers_without_an_adapter_are_moved_and_those_with_one_stay(olmoe, tmp_path, assert_close):
    model = adapted(olmoe.model, target_parameters=["layers.1.mlp.experts.down_proj"])
    headgate.replace(model)
    want = logits(model, olmoe)
    with headgate.offload(model, "50%", disk=tmp_path) as offloaded:
        assert len(offloaded.layers) == 1
        assert [*offloaded.skipped.values()] == [
            "a LoRA adapter computes its down_proj: merge the adapter into it first (PEFT's merge_and_unload or "
            "merge_adapter), or disable it"
        ]
        assert_close(logits(model, olmoe), want)


@pytest.mark.parametrize("how", ["merged", "merged and unloaded", "disabled"])
def test_lora_on_experts_that_computes_nothing_is_no_obstacle(olmoe, tmp_path, assert_close, how):
    model = adapted(olmoe.model, **EXPERTS)
    headgate.replace(model)
    if how == "disabled":
        model.disable_adapter_layers()
    want = logits(model, olmoe)
    if how == "merged":
        model.merge_adapter()
    elif how == "merged and unloaded":
        model = model.merge_and_unload()
    with headgate.offload(model, "50%", disk=tmp_path):
        assert_close(logits(model, olmoe), want)
        if how == "disabled":
            model.enable_adapter_layers()
            with pytest.raises(RuntimeError, match="must stay a parameter, got one that is computed"):
                logits(model, olmoe)
            model.disable_adapter_layers()
            assert_close(logits(model, olmoe), want)
    assert_close(logits(model, olmoe), want)


def test_an_adapter_that_is_merged_stays_so_until_the_close(olmoe, tmp_path):
    model = adapted(olmoe.model, **EXPERTS)
    headgate.replace(model)
    model.merge_adapter()
    with (
        headgate.offload(model, "50%", disk=tmp_path),
        pytest.raises(RuntimeError, match="must stay as it was when it was offloaded"),
    ):
        model.unmerge_adapter()


def test_lora_on_experts_put_on_later_is_named_in_the_call_and_in_the_merge(olmoe, tmp_path, assert_close):
    model = olmoe.model
    headgate.replace(model)
    want = logits(model, olmoe)
    offloaded = headgate.offload(model, "50%", disk=tmp_path)
    model = adapted(model, **EXPERTS)
    with pytest.raises(RuntimeError, match="must stay a parameter, got one that is computed"):
        logits(model, olmoe)
    with pytest.raises(RuntimeError, match="close the Offload before weights change"):
        model.merge_adapter()
    for safe in (False, True):
        with pytest.raises(RuntimeError, match="close the Offload before weights change"):
            model.merge_adapter(safe_merge=safe)
    with model.disable_adapter():
        assert_close(logits(model, olmoe), want)
    offloaded.close()
    assert not torch.allclose(logits(model, olmoe), want, atol=1e-3)
    model.merge_adapter()
    assert not torch.allclose(logits(model, olmoe), want, atol=1e-3)
