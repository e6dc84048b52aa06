"""What stays true of a model after a swap: its files, its tools, its ways of being copied, and its way back."""

from __future__ import annotations

import copy
import io
import warnings
from types import MethodType

import pytest
import torch
from torch import nn

import headgate
import headgate.hf


def experts_of(model):
    return [m for m in model.modules() if hasattr(m, "gate_up_proj") and hasattr(m, "down_proj")]


def step(model, inputs):
    """Loss and gradients by name."""
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    return out.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


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
        with pytest.raises(ValueError, match="replace: model must hold MoE experts, got a Linear without any"):
            headgate.replace(nn.Linear(2, 2))

    def test_something_that_is_no_model(self):
        with pytest.raises(TypeError, match=r"replace: model must be a torch\.nn\.Module, got str"):
            headgate.replace("mixtral")

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

        first, second = experts_of(olmoe.model)
        second.act_fn = Broken()
        before = [dict(vars(m)) for m in (first, second)]
        with pytest.raises(RuntimeError, match="cannot be asked"):
            headgate.replace(olmoe.model)
        assert [dict(vars(m)) for m in (first, second)] == before

    def test_quantised_experts_are_skipped_by_name(self, build):
        olmoe = build("olmoe")
        odd = experts_of(olmoe.model)[1]
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
        odd = experts_of(olmoe.model)[0]
        odd.down_proj = nn.Parameter(TwoTensor(odd.down_proj.data, odd.down_proj.data.clone()))
        skipped = headgate.replace(olmoe.model).skipped
        assert skipped == {"model.layers.0.mlp.experts": "down_proj must be a plain tensor, got a TwoTensor"}

    def test_a_forward_set_by_somebody_else_is_left_alone(self, build):
        """Such as the exchange of tokens that transformers' expert parallelism puts around the experts."""
        olmoe = build("olmoe")
        module = experts_of(olmoe.model)[0]
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
        assert headgate.replace(block.experts).skipped == {"": "its Llama4TextMoe could not be swapped with it"}
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

        report = headgate.replace(nn.Sequential(nn.Linear(2, 2), OddExperts()))
        assert report.replaced == []
        assert report.skipped == {"1": "OddExperts is not called at transformers' experts boundary"}

    def test_a_forward_put_over_ours_must_go_first(self, build):
        olmoe = build("olmoe")
        headgate.replace(olmoe.model)
        module = experts_of(olmoe.model)[1]
        module.forward = MethodType(lambda self, *args: args[0], module)
        with pytest.raises(ValueError, match=r"restore: the forward of model\.layers\.1\.mlp\.experts must be"):
            headgate.restore(olmoe.model)
        assert "_headgate_swap" in vars(experts_of(olmoe.model)[0])  # nothing was changed


@pytest.mark.filterwarnings("ignore:headgate")
@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "nemotron_h", "step3p7", "muse_spark", "inkling2"])
class TestBoundary:
    """Odd calls of one experts module: three fused forms, an undecorated one, and two with matmuls around their own."""

    def modules(self, build, name):
        family = build(name)
        swapped = family.clone()
        path = headgate.replace(swapped).replaced[0]
        return family.model.get_submodule(path), swapped.get_submodule(path)

    def args(self, module, tokens=5):
        width = module.down_proj.shape[2 if getattr(module, "is_transposed", False) else 1]
        return torch.randn(tokens, width), torch.randint(0, 8, (tokens, 3)), torch.rand(tokens, 3)

    def test_off_rank_experts_count_as_none(self, build, name, assert_close):
        original, ours = self.modules(build, name)
        x, ids, w = self.args(ours)
        ids[0, 1] = ids[3, 0] = ids[3, 1] = ids[3, 2] = (
            8  # what expert-parallel transformers write for other ranks' experts
        )
        x.requires_grad_()
        w.requires_grad_()
        want = original(x, ids.clamp(max=7), w.masked_fill(ids == 8, 0))
        got = ours(x, ids, w)
        assert_close(got, want)
        assert got[3].eq(0).all()
        for a, b in zip(*(torch.autograd.grad(y.square().sum(), (x, w)) for y in (got, want)), strict=True):
            assert_close(a, b, scale=2)

    def test_no_token_one_token_and_one_expert_twice(self, build, name, assert_close):
        original, ours = self.modules(build, name)
        x, ids, w = self.args(ours)
        assert ours(x[:0], ids[:0], w[:0]).shape == (0, x.shape[1])
        ids[:, 1] = ids[:, 0]
        for part in (slice(1), slice(5)):
            assert_close(ours(x[part], ids[part], w[part]), original(x[part], ids[part], w[part]))

    def test_rows_of_any_strides_and_names_of_arguments(self, build, name, assert_close):
        original, ours = self.modules(build, name)
        x, ids, w = self.args(ours)
        x = x.T.contiguous().T
        ids = ids.T.contiguous().T.int()
        assert_close(ours(x, top_k_weights=w, top_k_index=ids), original(x, ids.long(), w))
        with pytest.raises(TypeError, match="experts: top_k_index and top_k_weights must both be given"):
            ours(x, ids)


class TestDictionaries:
    """Switch and NLLB draw dropout inside their experts: the same numbers must fall on the same rows."""

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize(
        ("name", "drops"),
        [
            ("switch_transformers", {"dropout_rate": 0.3, "router_jitter_noise": 0.1}),
            ("nllb_moe", {"moe_token_dropout": 0.2, "activation_dropout": 0.3, "dropout": 0.1}),
            ("nllb_moe", {"moe_token_dropout": 0.2, "second_expert_policy": "random"}),
        ],
    )
    def test_dropout(self, build, name, drops, training, assert_same_step):
        family = build(name, **drops)
        family.model.train(training)
        torch.manual_seed(5)
        want = step(family.model, family.inputs)
        headgate.replace(family.model)
        torch.manual_seed(5)
        assert_same_step(step(family.model, family.inputs), want)

    def test_switch_drops_over_capacity(self, build, assert_close):
        module = build("switch_transformers").model.encoder.block[1].layer[-1].mlp.experts
        chosen = torch.nn.functional.one_hot(torch.tensor([0, 3, 3, 1, 7]), 8)
        chosen[2] = 0
        args = torch.randn(5, 32), chosen[:, None], torch.rand(5, 1)
        want = module(*args)
        headgate.replace(module)
        got = module(*args)
        assert_close(got, want)
        assert got[2].eq(0).all()


@pytest.mark.parametrize(("routed", "zero"), [(5, 0), (5, 3), (2, 6), (0, 4)])
def test_longcat_zero_experts(build, zero, routed, assert_close):
    family = build("longcat_flash", n_routed_experts=routed, zero_expert_num=zero)
    want = step(family.model, family.inputs)[0]
    headgate.replace(family.model)
    assert_close(step(family.model, family.inputs)[0], want)


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
        want = step(olmoe.model, olmoe.inputs)
        olmoe.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            olmoe.model.enable_input_require_grads()
        report = headgate.replace(olmoe.model)
        assert_same_step(step(olmoe.model, olmoe.inputs), want)
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
        module = experts_of(build("olmoe").model)[0].bfloat16()
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
        first, second = experts_of(olmoe.model)
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
        module = experts_of(olmoe.model)[0]
        nn.utils.parametrize.register_parametrization(module, "down_proj", Double())
        got = step(olmoe.model, olmoe.inputs)
        headgate.restore(olmoe.model)
        assert_same_step(got, step(olmoe.model, olmoe.inputs))

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
        plain, _ = step(family.model, family.inputs)
        want = step(adapted(family.model), family.inputs)
        assert not torch.allclose(plain, want[0])
        if order == "swap, then LoRA":
            report = headgate.replace(ours)
            model = adapted(ours)
        else:
            model = adapted(ours)
            report = headgate.replace(model)
        assert_same_step(step(model, family.inputs), want)
        assert all(report.calls.values()) or name == "doge"  # whose wrapped embeddings keep the original block
        assert "headgate" not in "".join(model.state_dict())


class TestCompile:
    INTERFACE = ("olmoe", "gpt_oss", "muse_spark", "inkling2", "nemotron_h")
    OTHERS = ("llama4", "longcat_flash", "dbrx", "doge", "step3p7")

    @pytest.mark.parametrize(
        ("name", "way"),
        [*((n, "swap") for n in INTERFACE + OTHERS), *((n, "experts implementation") for n in INTERFACE)],
    )
    @pytest.mark.filterwarnings("ignore")
    def test_one_graph(self, build, name, way, assert_close):
        """The experts alone, called for the first time inside the graph: nothing may break it, gradients included."""
        torch._dynamo.reset()
        family = build(name)
        twin = family.clone()
        report = headgate.replace(twin)
        path = report.replaced[0].rpartition(".")[0] if name == "llama4" else report.replaced[0]
        heard = []
        hook = family.model.get_submodule(path).register_forward_pre_hook(
            lambda _m, args, kwargs: heard.append((*args, *kwargs.values())), with_kwargs=True
        )
        family.model(**family.inputs)
        hook.remove()
        original = family.model.get_submodule(path)
        args = [a.detach().requires_grad_() if a.is_floating_point() else a for a in heard[0]]
        ours = twin.get_submodule(path)
        if way == "experts implementation":
            headgate.restore(twin)
            headgate.hf.register()
            twin.set_experts_implementation("headgate")
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")

        def tensor(out):
            return out[0] if isinstance(out, tuple) else out

        want, got = tensor(original(*args)), tensor(compiled(*args))
        assert_close(got, want)
        one, two = (torch.autograd.grad(y.square().sum(), args[0]) for y in (got, want))
        assert_close(one[0], two[0], scale=2)
        if way == "swap":
            assert report.compiled == [report.replaced[0]]
            assert "compiled graphs" in str(report)

    @pytest.mark.filterwarnings("ignore")
    def test_a_swap_after_compiling_is_seen_by_the_graph(self, build, assert_close):
        torch._dynamo.reset()
        olmoe = build("olmoe")
        olmoe.model.set_experts_implementation("grouped_mm")
        compiled = torch.compile(olmoe.model, fullgraph=True, backend="aot_eager")
        want = compiled(**olmoe.inputs).loss
        report = headgate.replace(olmoe.model)
        assert report.compiled == []
        assert_close(compiled(**olmoe.inputs).loss, want)
        assert report.compiled == report.replaced
        headgate.restore(olmoe.model)
        assert_close(compiled(**olmoe.inputs).loss, want)

    def test_whole_model(self, build, assert_same_step):
        torch._dynamo.reset()
        olmoe = build("olmoe")
        want = step(olmoe.model, olmoe.inputs)
        headgate.replace(olmoe.model)
        compiled = torch.compile(olmoe.model, fullgraph=True, backend="aot_eager")
        for _ in range(3):  # counting must not recompile: the limit would end the graph
            olmoe.model.zero_grad()
            loss = compiled(**olmoe.inputs).loss
            loss.backward()
        assert_same_step((loss.detach(), {n: p.grad for n, p in olmoe.model.named_parameters()}), want)


class TestRegister:
    @pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "nemotron_h", "deepseek_v4"])
    def test_as_experts_implementation(self, build, name, tmp_path, assert_close, assert_same_step):
        headgate.hf.register()
        headgate.hf.register()
        family = build(name)
        want = step(family.model, family.inputs)
        family.model.save_pretrained(tmp_path)
        family.model.set_experts_implementation("headgate")
        assert_same_step(step(family.model, family.inputs), want)
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
