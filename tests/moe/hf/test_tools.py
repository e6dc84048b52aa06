"""The tools that people use on a model, on a swapped one: generate, checkpointing, hooks, LoRA, and the other way
in, as an experts implementation."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import headgate
import headgate.hf


class TestTools:
    @pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "llama4", "switch_transformers", "dbrx"])
    def test_generate(self, build, name):
        family = build(name)
        family.model.eval()
        ids = family.inputs["input_ids"]
        want = family.model.generate(ids, max_new_tokens=6, do_sample=False)
        report = headgate.replace(family.model)
        assert torch.equal(family.model.generate(ids, max_new_tokens=6, do_sample=False), want)
        assert max(report.calls.values()) >= 6 or name == "switch_transformers"

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing(self, build, reentrant, assert_same_step):
        olmoe = build("olmoe")
        want = olmoe.step()
        olmoe.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            olmoe.model.enable_input_require_grads()
        report = headgate.replace(olmoe.model)
        assert_same_step(olmoe.step(), want)
        assert set(report.calls.values()) == {2}  # once more in backward

    def test_autocast(self, build, assert_close):
        olmoe = build("olmoe")
        with torch.autocast("cpu", torch.bfloat16):
            want = olmoe.model(**olmoe.inputs).logits
            headgate.replace(olmoe.model)
            got = olmoe.model(**olmoe.inputs).logits
        assert got.dtype == want.dtype
        assert_close(got, want, torch.bfloat16, scale=2)

    def test_rows_wider_than_the_weights(self, build, assert_close):
        """As transformers' grouped_mm: the rows take the weights' dtype, the result the rows'."""
        module = build("olmoe").experts()[0].bfloat16()
        args = torch.randn(5, 32), torch.randint(0, 8, (5, 2)), torch.rand(5, 2)
        module.config._experts_implementation = "grouped_mm"
        want = module(*args)
        headgate.replace(module)
        got = module(*args)
        assert got.dtype == want.dtype == torch.float32
        assert_close(got, want, torch.bfloat16)

    def test_accelerate_hooks_before_and_after(self, build, assert_close):
        hooks = pytest.importorskip("accelerate.hooks")
        heard = []

        class Hook(hooks.ModelHook):
            def pre_forward(self, module, *args, **kwargs):
                heard.append(module)
                return args, kwargs

        olmoe = build("olmoe")
        want = olmoe.model(**olmoe.inputs).logits
        first, second = olmoe.experts()
        hooks.add_hook_to_module(first, Hook())
        report = headgate.replace(olmoe.model)
        hooks.add_hook_to_module(second, Hook())
        assert_close(olmoe.model(**olmoe.inputs).logits, want)
        assert heard == [first, second]
        assert set(report.calls.values()) == {1}
        headgate.restore(olmoe.model)
        assert_close(olmoe.model(**olmoe.inputs).logits, want)
        assert heard == [first, second] * 2
        assert set(report.calls.values()) == {1}
        hooks.remove_hook_from_module(first)
        hooks.remove_hook_from_module(second)
        assert_close(olmoe.model(**olmoe.inputs).logits, want)

    def test_parametrised_weights_are_read_at_each_call(self, build, assert_same_step):
        class Double(nn.Module):
            def forward(self, w):
                return 2 * w

        olmoe = build("olmoe")
        headgate.replace(olmoe.model)
        module = olmoe.experts()[0]
        nn.utils.parametrize.register_parametrization(module, "down_proj", Double())
        got = olmoe.step()
        headgate.restore(olmoe.model)
        assert_same_step(got, olmoe.step())

    @pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "llama4"])
    def test_weights_from_outside_and_no_weights_at_all(self, build, name, assert_close):
        """functional_call hands in other tensors; on meta there is nothing but shapes."""
        family = build(name)
        inputs = {"input_ids": family.inputs["input_ids"]}
        other = {n: 1.1 * p.detach() for n, p in family.model.named_parameters()}
        want = torch.func.functional_call(family.model, other, (), inputs).logits
        headgate.replace(family.model)
        assert_close(torch.func.functional_call(family.model, other, (), inputs).logits, want)
        there = family.model.to("meta")(input_ids=inputs["input_ids"].to("meta")).logits
        assert (there.device.type, there.shape) == ("meta", want.shape)

    @pytest.mark.filterwarnings("ignore")
    def test_export(self, build, assert_close):
        olmoe = build("olmoe")
        olmoe.model.eval()
        inputs = {"input_ids": olmoe.inputs["input_ids"], "use_cache": False}
        want = olmoe.model(**inputs).logits
        headgate.replace(olmoe.model)
        exported = torch.export.export(olmoe.model, (), inputs, strict=False)
        assert_close(exported.module()(**inputs).logits, want)

    @pytest.mark.slow  # C++ is compiled
    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("name", ["olmoe", "gpt_oss"])
    def test_ahead_of_time_package(self, build, name, tmp_path):
        """The package of a block is loaded as a server would, and gives the same numbers."""
        block = build(name).model.eval().model.layers[0].mlp
        headgate.replace(block)
        x = torch.randn(2, 5, 32)
        exported = torch.export.export(block, (x,), strict=False)
        path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "block.pt2"))
        with torch.no_grad():
            got, want = torch._inductor.aoti_load_package(path)(x), block(x)
        for a, b in zip(*(t if isinstance(t, tuple) else (t,) for t in (got, want)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)

    def test_threads_share_a_model(self, build):
        olmoe = build("olmoe")
        olmoe.model.eval()
        ids = olmoe.inputs["input_ids"]
        headgate.replace(olmoe.model)
        want = olmoe.model.generate(ids, max_new_tokens=4, do_sample=False)
        with ThreadPoolExecutor(3) as pool:
            every = pool.map(lambda _: olmoe.model.generate(ids, max_new_tokens=4, do_sample=False), range(6))
            assert all(torch.equal(got, want) for got in every)

    def test_the_swap_wins_over_the_experts_implementation(self, build):
        olmoe = build("olmoe")
        report = headgate.replace(olmoe.model)
        olmoe.model.set_experts_implementation("batched_mm")
        olmoe.model(**olmoe.inputs)
        assert set(report.calls.values()) == {1}


class TestPeft:
    """LoRA on the experts' parameters and modules, put on before or after the swap: the same loss and gradients."""

    TARGETS = {  # noqa: RUF012
        "olmoe": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        "gpt_oss": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        "llama4": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        "longcat_flash": {"target_parameters": ["experts.down_proj"]},
        "jetmoe": {"target_parameters": ["mlp.input_linear.weight"]},
        "switch_transformers": {"target_modules": ["wi", "wo"]},
        "doge": {"target_modules": ["down_embed", "up_embed", "q_proj"]},
    }

    @pytest.mark.parametrize("order", ["swap, then LoRA", "LoRA, then swap"])
    @pytest.mark.parametrize("name", TARGETS)
    @pytest.mark.filterwarnings("ignore")
    def test_lora(self, build, name, order, assert_same_step):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, **self.TARGETS[name])

        def adapted(model):
            torch.manual_seed(3)
            return peft.get_peft_model(model, config)

        family = build(name)
        ours = family.clone()
        plain, _ = family.step()
        want = family.step(adapted(family.model))
        assert not torch.allclose(plain, want[0])
        if order == "swap, then LoRA":
            report = headgate.replace(ours)
            model = adapted(ours)
        else:
            model = adapted(ours)
            report = headgate.replace(model)
        assert_same_step(family.step(model), want)
        assert all(report.calls.values()) or name == "doge"  # whose wrapped embeddings keep the original block
        assert "headgate" not in "".join(model.state_dict())


class TestRegister:
    @pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "nemotron_h", "deepseek_v4"])
    def test_as_experts_implementation(self, build, name, tmp_path, assert_close, assert_same_step):
        headgate.hf.register()
        headgate.hf.register()
        family = build(name)
        want = family.step()
        family.model.save_pretrained(tmp_path)
        family.model.set_experts_implementation("headgate")
        assert_same_step(family.step(), want)
        assert set(headgate.hf.calls(family.model).values()) == {1}
        loaded = type(family.model).from_pretrained(tmp_path, experts_implementation="headgate").train()
        assert_close(loaded(**family.inputs).loss, want[0])
        assert set(headgate.hf.calls(loaded).values()) == {1}

    def test_counts_show_a_family_that_stayed_eager(self, build):
        headgate.hf.register()
        llama4 = build("llama4")
        llama4.model.set_experts_implementation("headgate")
        llama4.model(**llama4.inputs)
        assert headgate.hf.calls(llama4.model) == {}

    def test_one_warning_for_a_gate_of_its_own(self, build):
        headgate.hf.register()
        inkling = build("inkling2")
        inkling.model.set_experts_implementation("headgate")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            inkling.model(**inkling.inputs)
            inkling.model(**inkling.inputs)
        ours = [w for w in said if "headgate" in str(w.message)]
        assert len(ours) == len(headgate.hf.calls(inkling.model))  # once a module; Python shows equal ones once
        assert len({str(w.message) for w in ours}) == 1
