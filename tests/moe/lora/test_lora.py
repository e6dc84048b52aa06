"""headgate.lora: beside PEFT in both directions, merged, offloaded, in few bits, on part of the experts; bad input."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from torch import nn

import headgate
from headgate.moe.lora.attached import ExpertLora
from headgate.moe.offload.paged import Paged

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
SIZES = dict(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, head_dim=8, num_experts_per_tok=2, max_position_embeddings=32,
)  # fmt: skip
IDS = torch.arange(12).view(2, 6)
TARGETS = (("gate_up", "down"), ("down",), ("gate_up",))


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _qwen() -> nn.Module:
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(num_experts=8, moe_intermediate_size=12, **SIZES)
    )


def _gpt_oss() -> nn.Module:
    """Transposed weights, gate and up interleaved, biases."""
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(num_local_experts=8, **SIZES))


@pytest.fixture(scope="module")
def originals():
    found = {}
    for name, make in (("qwen3", _qwen), ("gpt-oss", _gpt_oss)):
        torch.manual_seed(0)
        found[name] = make()
    return found


@pytest.fixture(params=["qwen3", "gpt-oss"])
def original(originals, request):
    return originals[request.param]


def swapped(model: nn.Module) -> nn.Module:
    mine = copy.deepcopy(model)
    headgate.replace(mine)
    return mine


def filled(lora):
    torch.manual_seed(1)
    with torch.no_grad():
        for p in lora.parameters():
            p.normal_(std=0.3)
    return lora


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def learned(model, lora):
    model.zero_grad()
    out = model(IDS, labels=IDS)
    out.loss.backward()
    return out.logits.detach(), [p.grad.clone() for p in lora.parameters()]


@pytest.mark.parametrize("targets", TARGETS, ids="+".join)
def test_peft_reads_what_is_saved_and_the_other_way_round(original, targets, tmp_path, assert_close):
    peft = pytest.importorskip("peft")
    mine = swapped(original)
    base = logits(mine)
    lora = headgate.lora(mine, 3, alpha=6, targets=targets)
    assert_close(logits(mine), base, name="before the first step")
    y = logits(filled(lora).model)
    assert not torch.allclose(y, base, atol=1e-3)
    lora.save(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(original), tmp_path / "ours")
    assert_close(logits(theirs), y, name="PEFT's of ours")
    theirs.save_pretrained(tmp_path / "theirs")
    other = swapped(original)
    read = headgate.load_lora(other, tmp_path / "theirs")
    assert_close(logits(other), y, name="ours of PEFT's")
    with read.disabled():
        assert_close(logits(other), base, name="disabled")
    merged = read.merge()
    assert_close(logits(merged), y, name="merged")
    want = theirs.merge_and_unload().state_dict()
    assert {*merged.state_dict()} == {*want}, "a merged model is built as it was"
    for name, value in merged.state_dict().items():
        assert_close(value, want[name], name=name)
    assert all(p.requires_grad for p in merged.parameters())


def test_gradients_are_pefts(originals, tmp_path, assert_close):
    peft = pytest.importorskip("peft")
    mine = swapped(originals["qwen3"])
    lora = filled(headgate.lora(mine, 3, alpha=6, rslora=True))
    lora.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(originals["qwen3"]), tmp_path, is_trainable=True)
    _, got = learned(mine, lora)
    theirs(IDS, labels=IDS).loss.backward()
    want = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    for name, one in lora.layers.items():
        for depth, target in (("", "down"), (".base_layer", "gate_up")):
            a, b = (getattr(one, f"{m}_{target}").grad for m in "ab")
            key = f"base_model.model.{name}{depth}.lora_"
            assert_close(a.flatten(0, 1), want[f"{key}A.default.weight"], name=f"{name} A {target}")
            assert_close(b.permute(1, 2, 0).flatten(1), want[f"{key}B.default.weight"], name=f"{name} B {target}")
    assert len(got) == len(want)
    assert all(p.grad is None for n, p in mine.named_parameters() if ".lora." not in n), "all else is frozen"


@pytest.mark.parametrize("when", ["before", "after"])
def test_around_offloaded_experts_to_the_bit(original, when, tmp_path):
    mine = swapped(original)
    lora = filled(headgate.lora(mine, 3))
    want = learned(mine, lora)
    if when == "after":
        lora.remove()
    with headgate.offload(mine, budget="40%", disk=tmp_path) as offloaded:
        if when == "after":
            lora = filled(headgate.lora(mine, 3))
        got = learned(mine, lora)
        assert offloaded.stats().loads > 0
        with pytest.raises(ValueError, match=r"merge: experts must be in place, got .* offloaded"):
            lora.merge()
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(a, b) for a, b in zip(got[1], want[1], strict=True))
    again = learned(mine, lora)
    assert torch.equal(again[0], want[0]), "and when they are back"


@pytest.mark.parametrize("page_cache", [True, False])
def test_around_experts_computed_where_they_lie_in_files(page_cache, tmp_path):
    torch.manual_seed(2)
    mine, x = headgate.MoE(256, 512, 4, 2), torch.randn(9, 256)
    lora = filled(headgate.lora(mine, 3))

    def step():
        mine.zero_grad()
        y = mine(x)
        y.square().sum().backward()
        return [y.detach(), *(p.grad.clone() for p in lora.parameters())]

    want = step()
    with headgate.offload(mine, budget="75%", disk=tmp_path, page_cache=page_cache) as offloaded:
        assert isinstance(offloaded.engine.arena, Paged), "nothing of it is tested"
        assert all(torch.equal(a, b) for a, b in zip(step(), want, strict=True))


def test_around_offloaded_experts_under_autocast(tmp_path, assert_close):
    mine, x = headgate.MoE(16, 8, 4, 2).bfloat16(), torch.randn(9, 16).bfloat16()
    filled(headgate.lora(mine, 3))
    with torch.autocast("cpu", torch.bfloat16):
        want = mine(x).detach()
        with headgate.offload(mine, budget=1.0, disk=tmp_path):
            y = mine(x)
            y.float().sum().backward()
    assert_close(y, want)


@pytest.mark.parametrize("formats", [None, "int8"])
@pytest.mark.parametrize("first", ["lora", "offload"])
def test_taken_off_offloaded_experts_which_learn_again_when_they_are_back(first, formats, tmp_path):
    mine = headgate.MoE(32, 64, 4, 2)
    lora = headgate.lora(mine, 2) if first == "lora" else None
    with headgate.offload(mine, budget=1.0, disk=tmp_path, formats=formats):
        lora = headgate.lora(mine, 2) if lora is None else lora
        lora.remove()
        assert not any(p.requires_grad for n, p in mine.named_parameters() if n.startswith("experts"))
        mine(torch.randn(3, 32))
    assert all(p.requires_grad for p in mine.parameters())


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_qlora_of_experts(format, tmp_path, assert_close):
    """Gradients through experts in few bits are those through the same experts widened."""
    torch.manual_seed(2)
    mine = headgate.MoE(32, 64, 4, 2)
    lora = filled(headgate.lora(mine, 3))
    x = torch.randn(9, 32)

    def step():
        mine.zero_grad()
        y = mine(x)
        y.square().sum().backward()
        return y.detach(), [p.grad.clone() for p in lora.parameters()]

    full, _ = step()
    with headgate.offload(mine, budget=1.0, disk=tmp_path, formats=format):
        y, got = step()
    assert not torch.equal(y, full)
    rounded, want = step()  # experts come back rounded
    assert_close(y, rounded, name="y")
    for g, w in zip(got, want, strict=True):
        assert_close(g, w)


def test_on_some_experts_and_with_dropout(assert_close):
    torch.manual_seed(3)
    mine, x = headgate.MoE(16, 8, 6, 2), torch.randn(40, 16)
    base = mine(x).detach()
    lora = filled(headgate.lora(mine, 2, experts=[1, 4]))
    assert [p.shape[0] for p in lora.parameters()] == [2] * 4
    routing = mine.router(x)[0] if isinstance(mine.router(x), tuple) else mine.router(x)
    touched = ((routing.expert_ids == 1) | (routing.expert_ids == 4)).any(1)
    apart = (mine(x) - base).abs().amax(1)
    assert (apart[touched] > 1e-4).all()
    assert_close(mine(x)[~touched], base[~touched])
    y = mine(x).detach()
    assert_close(lora.merge()(x), y)
    lora = filled(headgate.lora(mine.train(), 2, dropout=0.5))
    assert not torch.equal(mine(x), mine(x))
    mine.eval()
    assert torch.equal(mine(x), mine(x))


def test_a_step_changes_nothing_but_a_and_b():
    torch.manual_seed(4)
    mine, x = headgate.MoE(16, 8, 4, 2), torch.randn(20, 16)
    before = {n: p.clone() for n, p in mine.named_parameters()}
    lora = headgate.lora(mine, 2)
    optimizer = torch.optim.AdamW(lora.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (mine(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, before[n]) for n, p in mine.named_parameters() if n in before)
    assert lora.remove() is mine
    assert {n for n, p in mine.named_parameters() if p.requires_grad} == before.keys()


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "lora: rank must be a whole number of at least 1, got 0"),
        ({"rank": True}, "lora: rank must be a whole number"),
        ({"alpha": -1}, "lora: alpha must be a positive number or None, got -1"),
        ({"dropout": 1.0}, r"lora: dropout must be in \[0, 1\), got 1.0"),
        ({"targets": ("up",)}, r"lora: targets must be of gate_up, down, got \('up',\)"),
        ({"targets": "down"}, "lora: targets must be of gate_up, down, got 'down'"),
        ({"experts": [7]}, r"lora: experts of experts must be distinct numbers in 0 .. 3, got \[7\]"),
        ({"experts": "some"}, "lora: experts must be \"all\", numbers or layer -> numbers, got 'some'"),
        ({"experts": {}}, "lora: experts must be some of one layer at least, got {}"),
        ({"experts": {"experts": []}}, "lora: experts must be some of one layer at least"),
        ({"experts": {"experts": 3}}, 'lora: experts must be "all", numbers or layer -> numbers, got .*3'),
        ({"experts": 5}, 'lora: experts must be "all", numbers or layer -> numbers, got 5'),
        ({"targets": 5}, "lora: targets must be of gate_up, down, got 5"),
        ({"dtype": "bf16"}, "lora: dtype must be None or of .*, got 'bf16'"),
        ({"dtype": torch.float8_e4m3fn}, "lora: dtype must be None or of .*, got torch.float8_e4m3fn"),
        ({"experts": {"no": [1]}}, "lora: experts must name layers of the model, such as experts, got 'no'"),
    ],
)
def test_options_out_of_range_are_named_before_anything_changes(options, said):
    mine = headgate.MoE(8, 4, 4, 2)
    names = [*mine.state_dict()]
    with pytest.raises((ValueError, TypeError), match=said):
        headgate.lora(mine, **options)
    assert [*mine.state_dict()] == names
    assert all(p.requires_grad for p in mine.parameters())


def test_models_that_cannot_are_named(originals):
    with pytest.raises(ValueError, match="lora: model must have experts that run through Headgate, got none"):
        headgate.lora(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"run headgate\.replace on a transformers model first"):
        headgate.lora(originals["qwen3"])
    with pytest.raises(TypeError, match=r"lora: model must be a torch\.nn\.Module, got str"):
        headgate.lora("model")
    mine = headgate.MoE(8, 4, 4, 2)
    lora = headgate.lora(mine, 2)
    with pytest.raises(ValueError, match="lora: model must carry no LoRA yet, got one on experts"):
        headgate.lora(mine, 2)
    lora.remove()
    with pytest.raises(ValueError, match=r"Lora\.merge: model must carry the changes"):
        lora.merge()
    other = swapped(originals["qwen3"])
    headgate.lora(other, 2)
    headgate.restore(other)
    with pytest.raises(RuntimeError, match="experts must run through Headgate while they carry LoRA"):
        other(IDS)


def test_merged_where_headgate_computes_no_more(originals, assert_close):
    """Weights [E, in, out] among them: what turns them is known from the start."""
    mine = swapped(originals["gpt-oss"])
    lora = filled(headgate.lora(mine, 2))
    y = logits(mine)
    headgate.restore(mine)
    assert_close(logits(lora.merge()), y)


def test_pefts_order_is_told_by_both_matrices(tmp_path):
    """D = F, as gpt-oss-20b has it: A of both projections are of one shape."""
    from safetensors.torch import load_file, save_file

    mine = nn.ModuleDict({"moe": headgate.MoE(8, 8, 4, 2)})
    want = filled(headgate.lora(mine, 2))
    want.save(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    turned = {}
    for key, t in tensors.items():
        deep = ".base_layer" in key
        turned[key.replace(".base_layer", "") if deep else key.replace(".experts", ".experts.base_layer")] = t
    save_file(turned, tmp_path / "adapter_model.safetensors")
    values = [p.detach().clone() for p in want.parameters()]
    want.remove()
    got = headgate.load_lora(mine, tmp_path)
    assert all(torch.equal(p, v) for p, v in zip(got.parameters(), values, strict=True))


def test_peft_beside_ours_is_refused(originals):
    peft = pytest.importorskip("peft")
    mine = swapped(originals["qwen3"])
    wrapped = peft.get_peft_model(mine, peft.LoraConfig(r=2, target_parameters=["experts.down_proj"]))
    with pytest.raises(ValueError, match="must have no adapter of PEFT's, got one on its down_proj"):
        headgate.lora(wrapped, 2)


def test_files_that_do_not_fit_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    def model(hidden=16):
        return nn.ModuleDict({"moe": headgate.MoE(hidden, 6, 4, 2)})

    headgate.lora(model(), 2).save(tmp_path)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    said, tensors = json.loads(config.read_text()), load_file(weights)
    key = "base_model.model.moe.experts.lora_A.weight"

    def fails(match, **changed):
        mine = model()
        names = [*mine.state_dict()]
        config.write_text(json.dumps(said | changed))
        with pytest.raises(ValueError, match=match):
            headgate.load_lora(mine, tmp_path)
        assert [*mine.state_dict()] == names

    with pytest.raises(ValueError, match=r"load_lora: base_model.*lora_B.* must be \[32, 8\]"):
        headgate.load_lora(model(32), tmp_path)
    fails('peft_type of .* must be "LORA", got', peft_type="IA3")
    fails("target_modules of .* must be empty: LoRA on experts only", target_modules=["q_proj"])
    fails("use_dora of .* must be False, or absent, got True", use_dora=True)
    fails("rank_pattern of .* must be", rank_pattern={"down_proj": 4})
    fails("r of .* must be a whole number of at least 1, got 0", r=0)
    fails(r"load_lora: r of .*adapter_config\.json must be 2, as .* in adapter_model\.safetensors, got 3", r=3)
    fails(
        "target_parameters of .* must be of the model's experts, as moe.experts.w_gate_up, got", target_parameters=["x"]
    )
    fails(r"lora_A.* must be \[8, 16\].* of w_gate_up, got \[8, 6\]", target_parameters=["experts.w_gate_up"])
    save_file(tensors | {"base_model.model.head.lora_A.weight": torch.zeros(2, 16)}, weights)
    fails("tensors of .* must be those of the experts")
    save_file({n: t for n, t in tensors.items() if n != key}, weights)
    fails(f"{key} of .* must be there, as target_parameters says")
    turned = tensors | {key: torch.zeros(4 * 2, 16)}  # down: takes 6, gives 16
    save_file(turned, weights)
    fails(r"must be \[8, 6\], .* got .*in and out have changed places")
    config.unlink()
    with pytest.raises(OSError, match=r"adapter_config\.json"):
        headgate.load_lora(model(), tmp_path)


def test_a_copy_carries_its_own():
    mine = headgate.MoE(8, 4, 4, 2)
    filled(headgate.lora(mine, 2))
    other, x = copy.deepcopy(mine), torch.randn(5, 8)
    assert torch.equal(other(x), mine(x))
    assert isinstance(other.experts.lora, ExpertLora)
    with torch.no_grad():
        mine.experts.lora.b_down.zero_()
    assert not torch.equal(other(x), mine(x))
