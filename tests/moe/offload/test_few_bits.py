"""headgate.load on checkpoints in few bits: experts are what their layouts say, to the bit, and stay packed."""

from __future__ import annotations

import shutil

import pytest
import torch

transformers = pytest.importorskip("transformers")

from few_bits_files import SCHEMES, dense_in, mxfp4, rewritten, written  # noqa: E402

import headgate  # noqa: E402
from headgate.cli import doctor  # noqa: E402
from headgate.moe.offload.seen import seen  # noqa: E402

transformers.logging.set_verbosity_error()
SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
    "head_dim": 16, "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IDS = torch.arange(3, 13).reshape(1, 10)
CT = "compressed-tensors int4"
MLP = "model.layers.1.mlp.experts"
TURNED = "model.language_model.layers.1.mlp.experts"
FORMATS = {
    "compressed-tensors int4": "int4", "compressed-tensors int4, rows": "int4",
    "compressed-tensors int4 with zeros": "uint4", "compressed-tensors int4 with zeros, rows": "uint4",
    "compressed-tensors int8": "int8", "compressed-tensors int8 as it lies": "int8",
    "compressed-tensors fp8, rows": "fp8", "compressed-tensors fp8, one scale": "fp8",
    "compressed-tensors mxfp4": "mxfp4", "gptq": "uint4",
    "gptq_v2, rows": "uint4", "awq": "uint4", "fp8": "fp8", "fp8, blocks cut short": "fp8", "fp8, exponents": "fp8",
}  # fmt: skip


def save(model, folder, dtype=torch.float32):
    model = model.to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=max(0.05, p.shape[-1] ** -0.5))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(1)
    config = transformers.Qwen3MoeConfig(**SIZES, moe_intermediate_size=64, num_experts=4, intermediate_size=64)
    return save(transformers.Qwen3MoeForCausalLM(config), tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def both(saved, tmp_path_factory):
    """Scheme -> (the packed checkpoint, the dense one that it stands for)."""
    made = {}

    def make(scheme):
        if scheme not in made:
            made[scheme] = rewritten(saved, tmp_path_factory.mktemp("few") / "m", scheme)
        return made[scheme]

    return make


def answer(model):
    with torch.no_grad():
        return model(IDS).logits


def assert_same_weights(model, want):
    got = model.state_dict()
    for name, w in want.state_dict().items():
        assert torch.equal(got[name], w), name


def formats_of(layer):
    return {format for e in range(layer.experts) for _, format, _ in layer.kind(e).coded}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_those_of_the_layout(both, scheme):
    packed, dense = both(scheme)
    want = transformers.AutoModelForCausalLM.from_pretrained(dense).eval()
    headgate.replace(want)
    model, offloaded = headgate.load(packed, "50%")
    assert getattr(model.config, "quantization_config", None) is None
    layers = offloaded.engine.layers
    assert all(formats_of(layer) == {FORMATS[scheme]} for layer in layers)
    bytes_of_experts = sum(p.nbytes for name, p in want.named_parameters() if ".experts." in name)
    assert sum(layer.nbytes for layer in layers) < bytes_of_experts * (0.3 if "4" not in FORMATS[scheme] else 0.2)
    torch.testing.assert_close(answer(model), answer(want), rtol=1e-3, atol=1e-3)
    assert offloaded.stats().loads > 0
    offloaded.close(restore=True)
    assert_same_weights(model, want)
    assert torch.equal(answer(model), answer(want))


def test_packed_again_and_recoded(both, tmp_path):
    """An experts file holds what was read, made once; with `formats` it is rounded once more."""
    packed, dense = both("gptq")
    want = transformers.AutoModelForCausalLM.from_pretrained(dense).eval()
    headgate.replace(want)
    headgate.pack(packed, tmp_path / "q.experts", max_memory="1MiB")
    model, offloaded = headgate.load(packed, "50%", disk=tmp_path / "q.experts")
    with offloaded:
        assert formats_of(offloaded.engine.layers[0]) == {"uint4"}
        torch.testing.assert_close(answer(model), answer(want), rtol=1e-3, atol=1e-3)
    shutil.copytree(packed, tmp_path / "m")
    said = (tmp_path / "m/config.json").read_text()
    (tmp_path / "m/config.json").write_text(
        said.replace('"checkpoint_format": "gptq"', '"checkpoint_format": "gptq_v2"')
    )
    with pytest.raises(ValueError, match="must hold the experts of this very checkpoint and formats, got another's"):
        headgate.load(tmp_path / "m", "50%", disk=tmp_path / "q.experts")
    with headgate.offload(want, "50%", disk=tmp_path / "theirs", formats="int8"):
        recoded = answer(want)
    model, offloaded = headgate.load(packed, "50%", disk=tmp_path / "int8", formats="int8")
    with offloaded:
        assert torch.equal(answer(model), recoded)


def test_doctor_tells_the_sizes_as_stored(both, gpt_oss):
    for folder in (both(CT)[0], both("gptq")[0], gpt_oss[0]):
        found = doctor.examine_model(folder)
        with seen(folder) as what:
            assert found["memory"]["experts_bytes"] == sum(layer.nbytes for layer in what.layers)
            rest = {n: p for n, p in what.model.named_parameters() if ".experts." not in n}
        assert f"{found['memory']['experts_bytes'] / 1e6:,.0f} MB for experts" in found["memory"]["auto"]
        assert found["memory"]["auto_bytes"] == found["memory"]["experts_bytes"]
        assert found["memory"]["rest_bytes"] == sum(p.nbytes for p in rest.values())
        assert found["checkpoint"]["trouble"] is None
        assert found["complete"]


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    """(the checkpoint in MXFP4, the dense one that it stands for)."""
    torch.manual_seed(1)
    config = transformers.GptOssConfig(**SIZES, num_local_experts=4, intermediate_size=96)
    folder = save(transformers.GptOssForCausalLM(config), tmp_path_factory.mktemp("oss"), torch.bfloat16)
    tensors, packed, dense = dense_in(folder), {}, {}
    for name, w in tensors.items():
        packed[name] = dense[name] = w
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            del packed[name]
            packed[f"{name}_blocks"], packed[f"{name}_scales"], meant = mxfp4(w.transpose(1, 2))
            dense[name] = meant.transpose(1, 2).to(w.dtype)
    to = tmp_path_factory.mktemp("few")
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return written(folder, to / "packed", packed, config), written(folder, to / "dense", dense, None)


def test_gpt_oss_in_place(gpt_oss, tmp_path):
    """Turned outside of the module, gate and up rows interleaved, with biases."""
    packed, dense = gpt_oss
    want = transformers.AutoModelForCausalLM.from_pretrained(dense).eval()
    headgate.replace(want)
    with seen(packed) as what:
        assert not any(what.made)  # byte by byte as in the files
    for options in ({}, {"disk": tmp_path}):
        model, offloaded = headgate.load(packed, "50%", **options)
        assert formats_of(offloaded.engine.layers[0]) == {"mxfp4"}
        torch.testing.assert_close(answer(model), answer(want), rtol=2e-2, atol=2e-2)
        offloaded.close(restore=True)
        assert_same_weights(model, want)
    assert torch.equal(answer(model), answer(want))


@pytest.mark.parametrize("scales", [(4, 1, 1), (1,), ()], ids=str)
def test_float8_experts_in_one_tensor(saved, tmp_path, scales):
    """With a scale of each expert's, or one for all."""
    tensors = dense_in(saved)
    packed, dense = {n: w for n, w in tensors.items() if ".experts." not in n}, dict(tensors)
    for at in (f"model.layers.{i}.mlp.experts" for i in range(2)):
        of = {k: torch.stack([tensors[f"{at}.{e}.{k}_proj.weight"] for e in range(4)]) for k in ("gate", "up", "down")}
        for name, kinds in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
            w = torch.cat([of[kind] for kind in kinds], 1)
            scale = (w.abs().amax((1, 2), keepdim=True) if len(scales) > 1 else w.abs().max().reshape(scales)) / 448
            data = (w / scale).to(torch.float8_e4m3fn)
            packed |= {f"{at}.{name}": data, f"{at}.{name}_scale_inv": scale}
            for kind, meant in zip(kinds, (data.float() * scale).chunk(len(kinds), 1), strict=True):
                dense |= {f"{at}.{e}.{kind}_proj.weight": meant[e] for e in range(4)}
    folder = written(saved, tmp_path / "packed", packed, {"quant_method": "fp8"})
    want = transformers.AutoModelForCausalLM.from_pretrained(written(saved, tmp_path / "dense", dense, None))
    model, offloaded = headgate.load(folder, "50%")
    offloaded.close(restore=True)
    assert_same_weights(model, want)


def test_memory_for_a_gguf_file_counts_what_is_widened(gpt_oss, tmp_path):
    """Though experts keep no format: those in few bits are written as numbers."""
    packed, dense = gpt_oss
    with pytest.raises(ValueError, match=r"pack: max_memory must be at least [\d,]+ bytes") as caught:
        headgate.pack(packed, tmp_path / "m.gguf", max_memory=1)
    need = int(str(caught.value).split("at least ")[1].split(" bytes")[0].replace(",", ""))
    assert need > 4 * 3 * 64 * 96, "an expert in fp32, and more"
    headgate.pack(packed, tmp_path / "m.gguf", max_memory=need)
    want = transformers.AutoModelForCausalLM.from_pretrained(dense).eval()
    model, offloaded = headgate.load(tmp_path / "m.gguf", "50%")
    offloaded.close(restore=True)
    got = model.state_dict()
    for name, w in want.state_dict().items():
        if ".experts." in name:
            assert torch.equal(got[name], w), name


# ---- what is refused -------------------------------------------------------------------------------------------------


def drop(*names):
    return lambda t: [t.pop(f"{MLP}.2.up_proj.{name}") for name in names]


def put(name, value):
    return lambda t: t.update({f"{MLP}.2.up_proj.{name}": value})


def narrower(t):
    put("weight_packed", torch.zeros(32, 8).int())(t)
    put("weight_scale", torch.ones(32, 2).bfloat16())(t)


def dense(t):
    drop("weight_scale_inv")(t)
    put("weight", torch.zeros(64, 64))(t)


def nothing(_):
    return None


SPOILT = {  # scheme, what becomes of its tensors and of its config, the error
    "a scale is missing": ("gptq", drop("scales"), {}, r"experts.2.up_proj.scales of \S+ must be"),
    "zeros are missing": ("awq", drop("qzeros"), {}, r"up_proj.qzeros of \S+ must be beside its weight"),
    "another order of columns": (
        "gptq", put("g_idx", torch.arange(64).int() % 2), {"desc_act": True},
        r"up_proj.g_idx of \S+ must be rising \(desc_act: false\)"),
    "three bits": ("gptq", nothing, {"bits": 3}, "bits of .* must be 4, got 3"),
    "gemv": ("awq", nothing, {"version": "gemv"}, "version of .* must be gemm, got gemv"),
    "nvfp4": (
        CT, put("weight_packed", torch.zeros(64, 32).byte()), {},
        r"up_proj.weight_scale of \S+ must be U8 \[64, 2\], got BF16"),
    "groups of 16": (
        CT, put("weight_scale", torch.ones(64, 4).bfloat16()), {},
        r"up_proj.weight_scale of \S+ must be of groups of 32, 64 or a multiple of 128 columns.*got groups of 16"),
    "an order of its own": (
        CT, put("weight_g_idx", torch.zeros(64).int()), {}, "weights with a weight_g_idx are not taken"),
    "two bits": (
        CT, nothing, {"config_groups": {"a": {"weights": {"num_bits": 2}}}}, "num_bits of .* must be 4 or 8, got 2"),
    "a group that says nothing of its weights": (
        CT, nothing, {"config_groups": {"a": {"weights": 3}}}, "num_bits of .* must be 4 or 8, got None"),
    "scales of another shape": (
        "fp8", put("weight_scale_inv", torch.ones(3, 2)), {},
        r"up_proj.weight_scale_inv of \S+ must be one of each block of 32 x 32, got \[3, 2\]"),
    "float8 without a scale": (
        "fp8", drop("weight_scale_inv"), {},
        r"dtype of \S+up_proj.weight of \S+ must be a float's, or one of fp8 with its scale, got F8_E4M3"),
    "some experts in bf16": ("fp8", dense, {}, f"must have all matrices of {MLP} in few bits or none, got some"),
    "an expert of another size": (CT, narrower, {}, f"must have one format and shape for all of {MLP}.gate_up_proj"),
    "a method that is no name": ("gptq", nothing, {"quant_method": ["gptq"]}, "of one of the methods"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_not_taken_is_said_before_a_weight_is_read(both, tmp_path, monkeypatch, name):
    scheme, edit, config, message = SPOILT[name]
    packed, _ = both(scheme)
    tensors = dense_in(packed)
    edit(tensors)
    folder = written(packed, tmp_path / "m", tensors, {**SCHEMES[scheme][1], **config})
    monkeypatch.setattr(headgate.moe.offload.shards.ShardStore, "read", lambda *_: 1 / 0)
    with pytest.raises(ValueError, match=message) as said:
        headgate.load(folder, "50%")
    assert len(str(said.value)) <= 400


def test_few_bits_without_a_config_are_no_weights(both, tmp_path):
    packed, _ = both("fp8")
    folder = written(both("fp8")[1], tmp_path / "m", dense_in(packed), None)
    with pytest.raises(
        ValueError, match=r"must have \S+weight in bf16, fp16 or fp32, or with a quantization_config, got F8"
    ):
        headgate.load(folder, "50%")


def test_weight_shape_tells_the_bits_where_groups_differ(both, tmp_path):
    packed, _ = both(CT)
    groups = {"a": {"weights": {"num_bits": 4}}, "b": {"weights": {"num_bits": 8}}}
    config = {**SCHEMES[CT][1], "config_groups": groups}
    folder = written(packed, tmp_path / "m", dense_in(packed), config)
    model, offloaded = headgate.load(folder, "50%")
    with offloaded:
        got = answer(model)
    model, offloaded = headgate.load(packed, "50%")
    with offloaded:
        assert torch.equal(answer(model), got)


# ---- turned while read -----------------------------------------------------------------------------------------------


def test_experts_that_are_stored_turned(tmp_path):
    """Qwen3-VL-MoE's checkpoints have [E, in, out]; those that transformers saves have [E, out, in]."""
    text = {**SIZES, "num_experts": 4, "moe_intermediate_size": 32, "intermediate_size": 64}
    text["rope_scaling"] = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    eyes = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}
    config = transformers.Qwen3VLMoeConfig(
        text_config=text, vision_config={**eyes, "deepstack_visual_indexes": [0]}, tie_word_embeddings=False
    )
    folder = save(transformers.Qwen3VLMoeForConditionalGeneration(config), tmp_path / "straight")
    tensors = dense_in(folder)
    turned = {n: w.transpose(1, 2) if n.endswith("down_proj") and w.dim() == 3 else w for n, w in tensors.items()}
    other = written(folder, tmp_path / "turned", turned, None)
    with seen(folder) as what:
        assert not any(what.made)  # as they lie
    for path in (folder, other):
        want = transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained(path).eval()
        assert torch.equal(want.state_dict()[f"{TURNED}.down_proj"], tensors[f"{TURNED}.down_proj"])
        headgate.replace(want)
        model, offloaded = headgate.load(path, "50%")
        with offloaded:
            assert torch.equal(answer(model), answer(want))
