"""What stays true of a model after a swap: its files, its tools, its ways of being copied, and its way back."""

from __future__ import annotations

import copy
import io
from types import MethodType

import pytest
import torch
from torch import nn

import headgate
import headgate.hf


def test_report_names_counts_and_reads_well(build):
    olmoe = build("olmoe")
    report = headgate.replace(olmoe.model)
    names = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert report.replaced == names
    assert report.skipped == {}
    assert report.calls == dict.fromkeys(names, 0)
    olmoe.model(**olmoe.inputs)
    olmoe.model(**olmoe.inputs)
    assert report.calls == headgate.hf.calls(olmoe.model) == dict.fromkeys(names, 2)
    assert str(report).splitlines() == [
        "Headgate runs 2 of 2 MoE blocks of OlmoeForCausalLM, none skipped, 4 calls so far",
        "  2 x OlmoeExperts: gated silu, fused",
    ]
    assert headgate.restore(olmoe.model) == names
    assert headgate.hf.calls(olmoe.model) == {}


@pytest.mark.filterwarnings("ignore:headgate")
def test_no_family_is_left_out(families_on_meta, capsys):
    """Counted where a reader of the test's output sees it; every experts class of the package is met in some model."""
    taken, skipped, missed = [], {}, set()
    for name, classes, model in families_on_meta():
        report = headgate.replace(model)
        missed |= classes - {type(m).__name__ for n, m in model.named_modules() if n in report.how}
        if report.skipped:
            skipped[name] = report.skipped
        else:
            taken.append(name)
    with capsys.disabled():
        print(f"\nMoE families of the installed transformers: {len(taken)} replaced / {len(skipped)} skipped")
    assert not skipped
    assert len(taken) >= 70
    assert missed == {"Qwen3OmniMoeTalkerTextExperts"}  # the next test's


@pytest.mark.filterwarnings("ignore:headgate")
def test_talker_of_qwen3_omni(build, assert_close):
    """The one experts class that its family's first model does not hold."""
    from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as omni

    config = build("qwen3_moe").model.config
    config._experts_implementation = "eager"
    experts = omni.Qwen3OmniMoeTalkerTextExperts(config)
    for p in experts.parameters():
        nn.init.normal_(p, std=0.2)
    args = torch.randn(5, 32), torch.randint(0, 8, (5, 2)), torch.rand(5, 2)
    want = experts(*args)
    assert headgate.replace(experts).replaced == [""]
    assert_close(experts(*args), want)


class TestRefusals:
    def test_a_model_without_experts(self):
        with pytest.raises(ValueError, match="replace: model must hold MoE experts, got a Linear without any of tr"):
            headgate.replace(nn.Linear(2, 2))
        with pytest.raises(ValueError, match="must hold MoE experts, got a MoE without any of tr"):
            headgate.replace(headgate.MoE(8, 4, 4, 2))

    def test_something_that_is_no_model(self):
        with pytest.raises(TypeError, match=r"replace: model must be a torch\.nn\.Module, got str"):
            headgate.replace("mixtral")

    @pytest.mark.parametrize("version", ["4.57.1", "5.2rc1", "5.17.0.dev0"])
    def test_a_transformers_too_old(self, build, version, monkeypatch):
        olmoe = build("olmoe")
        monkeypatch.setattr("transformers.__version__", version)
        for call in (lambda: headgate.replace(olmoe.model), headgate.hf.register):
            with pytest.raises(ImportError, match=rf"transformers must be 5\.18 or newer, got {version}"):
                call()
        assert not headgate.hf.calls(olmoe.model)

    def test_a_model_already_swapped_stays_swapped(self, build):
        olmoe = build("olmoe")
        report = headgate.replace(olmoe.model)
        with pytest.raises(ValueError, match=r"already, got one whose model\.layers\.0\.mlp\.experts is"):
            headgate.replace(olmoe.model)
        olmoe.model(**olmoe.inputs)
        assert all(report.calls.values())

    def test_restore_of_a_model_not_swapped(self, build):
        with pytest.raises(ValueError, match=r"restore: model must be swapped by headgate\.replace"):
            headgate.restore(build("olmoe").model)

    def test_a_swap_that_fails_half_way_restores_all(self, build):
        olmoe = build("olmoe")

        class Broken(nn.SiLU):
            def parameters(self, recurse=True):
                raise RuntimeError("cannot be asked")

        first, second = olmoe.experts()
        second.act_fn = Broken()
        before = [dict(vars(m)) for m in (first, second)]
        with pytest.raises(RuntimeError, match="cannot be asked"):
            headgate.replace(olmoe.model)
        assert [dict(vars(m)) for m in (first, second)] == before

    def test_quantised_experts_are_skipped_by_name(self, build):
        olmoe = build("olmoe")
        odd = olmoe.experts()[1]
        odd.down_proj = nn.Parameter(torch.zeros(8, 32, 16, dtype=torch.int8), requires_grad=False)
        report = headgate.replace(olmoe.model)
        assert report.replaced == ["model.layers.0.mlp.experts"]
        assert report.skipped == {
            "model.layers.1.mlp.experts": "down_proj must be floating point [E, ., .], got (8, 32, 16) torch.int8"
        }
        assert "1 of 2" in str(report)
        assert "skipped model.layers.1.mlp.experts" in str(report)

    def test_packed_weights_that_call_themselves_floating_point(self, build):
        from torch.testing._internal.two_tensor import TwoTensor

        olmoe = build("olmoe")
        odd = olmoe.experts()[0]
        odd.down_proj = nn.Parameter(TwoTensor(odd.down_proj.data, odd.down_proj.data.clone()))
        skipped = headgate.replace(olmoe.model).skipped
        assert skipped == {"model.layers.0.mlp.experts": "down_proj must be a plain tensor, got a TwoTensor"}

    def test_a_forward_set_by_somebody_else_is_left_alone(self, build):
        """Such as the exchange of tokens that transformers' expert parallelism puts around the experts."""
        olmoe = build("olmoe")
        module = olmoe.experts()[0]
        original = module.forward

        def ep_forward(*args):
            return original(*args)

        module.forward = ep_forward
        report = headgate.replace(olmoe.model)
        assert "ep_forward" in report.skipped["model.layers.0.mlp.experts"]
        assert module.forward is ep_forward

    def test_experts_without_their_block_are_skipped(self, build):
        """Llama 4's block must hand over the choice; alone, its experts would be swapped and never asked."""
        llama4 = build("llama4")
        block = llama4.model.model.layers[0].feed_forward
        with pytest.warns(UserWarning, match="replace took no MoE block of Llama4TextExperts; the model: its Llama4Te"):
            report = headgate.replace(block.experts)
        assert report.skipped == {"": "its Llama4TextMoe could not be swapped with it"}
        block.experts.down_proj = nn.Parameter(torch.zeros(8, 16, 32).to(torch.int8), requires_grad=False)
        report = headgate.replace(llama4.model)
        assert report.replaced == ["model.layers.1.feed_forward.experts"]
        assert list(report.skipped) == ["model.layers.0.feed_forward.experts"]
        assert "forward" not in vars(block)

    def test_unknown_experts_are_named(self):
        class OddExperts(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.zeros(2, 2))

        with pytest.warns(UserWarning, match="replace took no MoE block of Sequential; 1: OddExperts is not called"):
            report = headgate.replace(nn.Sequential(nn.Linear(2, 2), OddExperts()))
        assert report.replaced == []
        assert report.skipped == {"1": "OddExperts is not called at transformers' experts boundary"}

    def test_a_forward_put_over_ours_must_go_first(self, build):
        olmoe = build("olmoe")
        headgate.replace(olmoe.model)
        module = olmoe.experts()[1]
        module.forward = MethodType(lambda self, *args: args[0], module)
        with pytest.raises(ValueError, match=r"restore: the forward of model\.layers\.1\.mlp\.experts must be"):
            headgate.restore(olmoe.model)
        assert "_headgate_swap" in vars(olmoe.experts()[0])  # nothing was changed


class TestCopies:
    def test_deepcopy_runs_on_its_own_weights(self, build, assert_close):
        olmoe = build("olmoe")
        headgate.replace(olmoe.model)
        twin = copy.deepcopy(olmoe.model)
        want = olmoe.model(**olmoe.inputs).logits
        with torch.no_grad():
            for p in olmoe.model.parameters():
                p.zero_()
        assert_close(twin(**olmoe.inputs).logits, want)
        headgate.restore(twin)
        assert_close(twin(**olmoe.inputs).logits, want)

    def test_pickle(self, build, assert_close):
        olmoe = build("olmoe")
        headgate.replace(olmoe.model)
        file = io.BytesIO()
        torch.save(olmoe.model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
        assert_close(twin(**olmoe.inputs).logits, olmoe.model(**olmoe.inputs).logits)
        assert headgate.hf.calls(twin)["model.layers.0.mlp.experts"] == 1
        headgate.restore(twin)

    @pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "nemotron_h", "llama4"])
    def test_save_and_load(self, build, name, tmp_path, assert_close):
        family = build(name)
        family.model.save_pretrained(tmp_path / "before")
        headgate.replace(family.model)
        family.model.save_pretrained(tmp_path / "after")
        one, two = ((tmp_path / d / "model.safetensors").read_bytes() for d in ("before", "after"))
        assert one == two
        assert (tmp_path / "before/config.json").read_text() == (tmp_path / "after/config.json").read_text()
        loaded = type(family.model).from_pretrained(tmp_path / "after")
        headgate.replace(loaded)
        family.model.eval()
        assert_close(loaded(**family.inputs).logits, family.model(**family.inputs).logits)
