"""headgate.load of GGUF files: the weights are those that gguf says, experts stay in their blocks, errors are clear."""

from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

import gguf_files  # noqa: E402
from gguf_files import FAMILIES, small, write  # noqa: E402

import headgate  # noqa: E402
from headgate.cli import doctor  # noqa: E402
from headgate.kernels.gguf_blocks import BLOCKS, dequantize_blocks  # noqa: E402
from headgate.moe.offload import gguf_experts  # noqa: E402
from headgate.moe.offload.gguf_file import TYPES, Gguf  # noqa: E402

transformers.logging.set_verbosity_error()
IDS = torch.arange(3, 13).reshape(1, 10)


def answer(model):
    with torch.no_grad():
        tokens = model.generate(IDS, max_new_tokens=6, do_sample=False)
        return model(tokens).logits.float(), tokens


def types(gate: str, up: str, down: str, rest: str = "F32"):
    """The type of a tensor by its name."""
    of = {"gate": gate, "up": up, "down": down}
    return lambda name: of.get(name.split("_")[1].split(".")[0], rest) if "exps" in name or ".ffn_" in name else rest


def per_layer(name: str) -> str:
    """As llama.cpp mixes them: the down projection of some layers in more bits."""
    return types("Q4_K", "Q4_K", "Q6_K" if name.startswith("blk.1.") else "Q4_K", "Q8_0")(name)


CASES = {  # family, types, options: all that llama.cpp's converter writes of experts
    "qwen3 mixed": ("qwen3moe", per_layer, {}),
    "qwen3 merged": ("qwen3moe", types("Q5_K", "Q5_K", "Q4_0"), {"merged": True}),
    "qwen2 exactly": ("qwen2moe", types("Q5_0", "Q5_0", "IQ4_NL", "Q5_1"), {}),
    "mixtral each": ("llama", types("Q8_0", "Q8_0", "Q8_0", "Q8_0"), {"each": True}),
    "mixtral apart": ("llama", types("Q4_K", "Q5_K", "Q6_K", "Q4_0"), {}),
    "olmoe numbers": ("olmoe", types("F32", "F32", "F32"), {}),
    "olmoe widened": ("olmoe", types("Q4_1", "Q4_1", "Q8_0", "F16"), {}),
    "gpt-oss": ("gpt-oss", types("MXFP4", "MXFP4", "MXFP4", "Q8_0"), {}),
    "gpt-oss apart": ("gpt-oss", types("Q4_0", "Q8_0", "Q8_0"), {}),
    "deepseek": ("deepseek2", types("Q8_0", "Q8_0", "Q8_0"), {"split_kv": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_model_of_the_weights_that_gguf_says(case, tmp_path):
    family, type_of, options = CASES[case]
    path, want = tmp_path / "m.gguf", small(family, tie_word_embeddings=case == "qwen3 merged")
    write(path, family, want, type_of, **options)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model, offloaded = headgate.load(path, "50%", config=want.config)
    widened = [str(w.message) for w in said if "have no product of their own" in str(w.message)]
    assert bool(widened) == (case in ("olmoe widened", "gpt-oss apart")), widened
    logits, tokens = answer(model)
    offloaded.close(restore=True)
    assert offloaded.stats().loads > 0
    got = model.state_dict()
    for name, t in want.state_dict().items():
        assert torch.equal(got[name], t), name
    other = answer(want)
    assert torch.equal(tokens, other[1])
    assert (logits - other[0]).norm() < 1e-5 * other[0].norm()


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    """A file whose experts are blocks, and its model in memory."""
    model = small("qwen3moe")
    path = tmp_path_factory.mktemp("qwen3") / "m.gguf"
    write(path, "qwen3moe", model, per_layer)
    return path, model


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "deepseek2"])
def test_the_files_own_metadata_make_the_config(family, tmp_path):
    want = small(family)
    write(tmp_path / "m.gguf", family, want)
    model, offloaded = headgate.load(tmp_path, "50%")
    with offloaded:
        logits, tokens = answer(model)
    other = answer(want)
    assert model.dtype == torch.float32
    assert torch.equal(tokens, other[1])
    assert (logits - other[0]).norm() < 1e-5 * other[0].norm()
    for key in ("eos_token_id", "pad_token_id", "tie_word_embeddings", "num_experts_per_tok"):
        assert getattr(model.config, key) == getattr(want.config, key), key
    rope = model.config.rope_parameters
    assert rope == {key: value for key, value in want.config.rope_parameters.items() if key in rope}
    assert {"rope_type", "rope_theta"} <= set(rope)


def test_it_equals_what_transformers_reads_of_the_same_file(qwen3):
    path, want = qwen3
    options = {"gguf_file": path.name, "config": want.config, "dtype": torch.float32}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, **options)
    model, offloaded = headgate.load(path, "50%", config=want.config)
    offloaded.close(restore=True)
    got = model.state_dict()
    assert all(torch.equal(got[name], t) for name, t in theirs.state_dict().items())


def test_blocks_stay_as_they_lie_in_slots_and_files(qwen3, tmp_path):
    path, _ = qwen3
    file = {t.name: t for t in gguf.GGUFReader(path).tensors}
    model, offloaded = headgate.load(path, "50%", config=small("qwen3moe").config)
    layers = offloaded._store.layers
    assert [f for _, f, _ in layers[0].kind(0).coded] == ["Q4_K", "Q4_K"]
    assert [f for _, f, _ in layers[1].kind(0).coded] == ["Q4_K", "Q6_K"]
    assert sum(layer.nbytes for layer in layers) == sum(t.n_bytes for name, t in file.items() if "exps" in name)
    want = answer(model)
    offloaded.close()
    headgate.pack(path, tmp_path / "q.experts")
    model, offloaded = headgate.load(path, "50%", disk=tmp_path / "q.experts", config=small("qwen3moe").config)
    with offloaded:
        assert offloaded._store.layers == layers
        assert torch.equal(answer(model)[0], want[0])
    parts = {p.name: torch.empty(p.shape, dtype=p.dtype) for p in layers[1].kind(2).parts}
    model, offloaded = headgate.load(path, "50%", page_cache=False, config=small("qwen3moe").config)
    offloaded._store.read(1, 2, parts)
    offloaded.close()
    assert (parts["w_down.data"].numpy() == file["blk.1.ffn_down_exps.weight"].data[2]).all()
    assert (parts["w_gate_up.data"][256:].numpy() == file["blk.1.ffn_up_exps.weight"].data[2]).all()


def test_experts_of_a_gguf_file_are_brought_into_other_formats(qwen3, tmp_path):
    """As offload brings those of the model in memory."""
    path, want = qwen3
    formats = {"model.layers.1.mlp.experts": ["int8", None, "Q8_0", "int4"]}
    model, offloaded = headgate.load(path, 1.0, disk=tmp_path / "ours", formats=formats, config=want.config)
    offloaded.close(restore=True)
    other = gguf_files.small("qwen3moe")
    other.load_state_dict(want.state_dict())
    headgate.replace(other)
    theirs = headgate.offload(other, 1.0, disk=tmp_path / "theirs", formats=formats)
    theirs.close(restore=True)
    got = model.state_dict()
    assert all(torch.equal(got[name], t) for name, t in other.state_dict().items())


def test_doctor_tells_the_sizes_as_stored(qwen3, tmp_path):
    path, model = qwen3
    model.config.save_pretrained(tmp_path)
    shutil.copy(path, tmp_path)
    for where in (path, path.parent, tmp_path):
        found = doctor.examine_model(where)
        want = sum(t.n_bytes for t in gguf.GGUFReader(path).tensors if "exps" in t.name)
        assert found["memory"]["experts_bytes"] == found["memory"]["auto_bytes"] == want
        assert found["checkpoint"]["kind"] == "GGUF"
        assert found["complete"]
        assert "1 GGUF files of" in "\n".join(doctor._model_lines(found))
    with open(tmp_path / path.name, "r+b") as file:
        file.truncate(5000)
    with pytest.raises(ValueError, match=r"doctor: MODEL must be a GGUF file that headgate.load takes, got .*size of"):
        doctor.examine_model(tmp_path)


def test_split_files_and_folders(qwen3, tmp_path):
    path, want = qwen3
    again = small("qwen3moe")
    again.load_state_dict(want.state_dict())
    write(tmp_path / "s.gguf", "qwen3moe", again, per_layer, split_files=8)
    parts = sorted(tmp_path.glob("s-*-of-*.gguf"))
    assert len(parts) >= 3
    for what in (tmp_path, parts[0], parts[-1]):
        model, offloaded = headgate.load(what, "50%", config=want.config)
        offloaded.close(restore=True)
        assert all(torch.equal(model.state_dict()[n], t) for n, t in again.state_dict().items())
    (tmp_path / "mmproj-f16.gguf").write_bytes(b"an image encoder, no model")
    headgate.load(tmp_path, "50%", config=want.config)[1].close()
    parts[1].rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match=rf"all 0000\d parts must be there, 1 are missing: {parts[1].name}"):
        headgate.load(parts[0], "50%")
    shutil.copy(parts[0], parts[1])
    with pytest.raises(ValueError, match=r"split.no and split.count of .* must be 1 and \d, as its name says, got 0"):
        headgate.load(parts[0], "50%")
    shutil.copy(path, tmp_path / "other.gguf")
    with pytest.raises(ValueError, match=r"must have one model in GGUF files, got other.gguf, s-0000"):
        headgate.load(tmp_path, "50%")


def test_configs(qwen3, tmp_path):
    path, want = qwen3
    want.config.save_pretrained(tmp_path)
    model, offloaded = headgate.load(path, "50%", config=tmp_path)
    offloaded.close()
    assert model.config.name_or_path == str(tmp_path)
    with pytest.raises(ValueError, match=r"config must be a folder with config.json.*got .*nowhere"):
        headgate.load(path, "50%", config=tmp_path / "nowhere")
    with pytest.raises(TypeError, match=r"config must be a folder with config.json.*got a dict"):
        headgate.load(path, "50%", config={"hidden_size": 256})
    with pytest.raises(ValueError, match=r"config must be None for a folder with config.json"):
        headgate.load(tmp_path, "50%", config=want.config)


def changed(config, **more):
    made = copy.deepcopy(config)
    for name, value in more.items():
        setattr(made, name, value)
    return made


def test_a_config_of_another_model_is_refused(qwen3):
    path, want = qwen3
    for more, why in (
        ({"num_hidden_layers": 3}, r"tensors of .* must be there for each weight, blk.2.ffn_gate_exps.weight too"),
        ({"num_hidden_layers": 1}, None),  # what foretells more tokens stands behind a model's layers
        ({"num_experts": 8}, r"shape of blk.0.ffn_gate_exps.weight of .* must be \[8, 256, 256\], got \[4, 256, 256\]"),
        ({"vocab_size": 65}, r"shape of token_embd.weight of .* must be \[65, 256\]"),
        ({"attention_bias": True}, r"tensors of .* must be there for each weight, got none for model.layers.0"),
        ({"tie_word_embeddings": True}, r"config of .* must be without tied embeddings"),
    ):
        config = changed(want.config, **more)
        if why is None:
            headgate.load(path, "50%", config=config)[1].close()
            continue
        with pytest.raises(ValueError, match=why):
            headgate.load(path, "50%", config=config)


def test_architectures_and_metadata_that_say_too_little_are_refused(tmp_path):
    model = small("deepseek2")
    write(tmp_path / "d.gguf", "deepseek2", model)
    with pytest.raises(ValueError, match=r"metadata of .* must be a whole config, which those of deepseek2 are not"):
        headgate.load(tmp_path / "d.gguf", "50%")
    data = (tmp_path / "d.gguf").read_bytes().replace(b"deepseek2", b"deepseek9")
    (tmp_path / "d.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=r"general.architecture of .* must be one of qwen2moe.*got deepseek9"):
        headgate.load(tmp_path / "d.gguf", "50%", config=model.config)


def test_the_table_of_types_is_ggmls():
    known = {t.value: (t.name, *gguf.GGML_QUANT_SIZES[t]) for t in gguf.GGMLQuantizationType}
    assert all(known[number] == about for number, about in TYPES.items())
    for type, format in gguf_experts.FORMAT_OF.items():
        assert BLOCKS[format] == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]]


@pytest.mark.parametrize("type", gguf_experts._EXACTLY)
def test_blocks_that_are_others_exactly(type):
    """Of random bytes, as gguf reads them."""
    kind = gguf.GGMLQuantizationType[type]
    raw = torch.randint(0, 256, (40, gguf.GGML_QUANT_SIZES[kind][1]), dtype=torch.uint8)
    raw[:, 1] &= 0xBF  # finite scales
    format, turn = gguf_experts._EXACTLY[type]
    got = dequantize_blocks(turn(raw.flatten()).view(40, -1), format)
    assert torch.equal(got, torch.from_numpy(gguf.quants.dequantize(raw.numpy(), kind)))


# --- files that are not what they should be --------------------------------------------------------------------------


def text(words: str) -> bytes:
    return len(words).to_bytes(8, "little") + words.encode()


def whole(n: int, size: int = 8) -> bytes:
    return n.to_bytes(size, "little")


def header(*entries: bytes, tensors: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + whole(version, 4) + whole(tensors) + whole(len(entries) - tensors) + b"".join(entries)


def tensor(name: str, shape=(4,), kind: int = 0, offset: int = 0) -> bytes:
    dims = b"".join(map(whole, shape))
    return text(name) + whole(len(shape), 4) + dims + whole(kind, 4) + whole(offset)


ARRAY = text("a") + whole(9, 4)
BAD = {
    "no magic": (b"GGML" + whole(3, 4) + bytes(16), "magic of .* must be GGUF"),
    "empty": (b"", "magic of .* must be of at most 0 bytes"),
    "cut": (header(text("a") + whole(4, 4))[:-2], r"a of .* must be of at most 2 bytes, which are left"),
    "version": (header(version=1), "version of .* must be 2 or 3, little-endian, got 1"),
    "big-endian": (b"GGUF" + (3).to_bytes(4, "big") + bytes(16), "version of .* must be 2 or 3, little-endian"),
    "text beyond the end": (header(whole(1 << 40) + b"key"), r"a key of .* must be 1 to 256 bytes long"),
    "no text": (header(whole(2) + b"\xff\xfe" + whole(0, 4)), "must be a GGUF file, got .*utf-8"),
    "twice": (header(*2 * (text("a") + whole(0, 4) + b"\0",)), "a of .* must be there once, got a second one"),
    "a kind of value": (header(text("a") + whole(13, 4) + bytes(8)), r"type of a of .* must be one of 0 .. 12, got 13"),
    "nested": (header(ARRAY + whole(9, 4) + whole(1)), "type of the array a of .* must be that of numbers or text"),
    "a long array": (header(ARRAY + whole(10, 4) + whole(1 << 60)), "a of .* must be of at most"),
    "many texts": (header(ARRAY + whole(8, 4) + whole(1 << 60)), r"a of .* must be at most 2,097,152 texts"),
    "many tensors": (header(tensors=0)[:8] + whole(1 << 60) + whole(0), "a tensor's name of .* must be of at most"),
    "shape": (header(tensor("t", (4, 0)), tensors=1), r"shape of t of .* must be of sizes of at least 1"),
    "overflow": (header(tensor("t", (1 << 33, 1 << 33)), tensors=1), r"shape of t of .* must be of sizes"),
    "dimensions": (header(tensor("t", (1,) * 5), tensors=1), "dimensions of t of .* must be 1 to 4, got 5"),
    "type": (header(tensor("t", (4,), 99), tensors=1), "type of t of .* must be one of ggml's .* got 99"),
    "half a block": (header(tensor("t", (48,), 8), tensors=1), "columns of t of .* must be a multiple of 32, for Q8_0"),
    "beyond the end": (header(tensor("t"), tensors=1), "size of .* must be at least .* bytes, for t"),
    "unaligned": (header(tensor("t", offset=4), tensors=1) + bytes(96), "offset of t of .* must be a multiple of 32"),
    "overlapping": (
        header(tensor("t", (16,)), tensor("u", (16,), offset=32), tensors=2) + bytes(192),
        "offset of u of .* must be at least 64, where another ends, got 32",
    ),
    "alignment": (header(text("general.alignment") + whole(4, 4) + whole(24, 4)), "alignment of .* a power of two"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_is_not_what_it_should_be_is_refused_by_name(case, tmp_path):
    data, why = BAD[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=why) as error:
        Gguf(path)
    assert len(str(error.value)) <= 300


def test_a_file_that_is_cut_is_refused_before_a_weight_is_read(qwen3, tmp_path):
    path, _ = qwen3
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"size of .* must be at least .* bytes, for blk.1.ffn_"):
        headgate.load(cut, "50%")
    with pytest.raises(OSError, match=r"No such file"):
        headgate.load(Path("nowhere.gguf"), "50%")
