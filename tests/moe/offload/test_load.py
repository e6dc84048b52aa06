"""headgate.load: a checkpoint's experts, read from its own files, answer as those of from_pretrained and offload."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import textwrap
from contextlib import closing

import pytest
import torch

transformers = pytest.importorskip("transformers")

import headgate  # noqa: E402
from headgate.moe.hf.conversion import Source, conversion_of  # noqa: E402
from headgate.moe.hf.pretrained import blank_model  # noqa: E402
from headgate.moe.offload import FileStore  # noqa: E402
from headgate.moe.offload.checkpoint import INDEX, Checkpoint  # noqa: E402
from headgate.moe.offload.few_bits import Translated  # noqa: E402
from headgate.moe.offload.shards import laid_out  # noqa: E402
from headgate.moe.offload.shards_load import experts_in, model_of  # noqa: E402

transformers.logging.set_verbosity_error()
SIZES = {
    "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "qwen3": ("Qwen3Moe", {"moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 8,
                          "tie_word_embeddings": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 2}),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
}  # fmt: skip
IDS = torch.arange(3, 13).reshape(1, 10)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Family -> a folder with a small random model in several files."""
    made = {}

    def save(family: str):
        if family not in made:
            name, sizes = FAMILIES[family]
            torch.manual_seed(1)
            config = getattr(transformers, f"{name}Config")(**SIZES, **sizes)
            model = getattr(transformers, f"{name}ForCausalLM")(config).to(torch.bfloat16)
            with torch.no_grad():
                for p in model.parameters():
                    p.normal_(std=max(0.02, p.shape[-1] ** -0.5))
            made[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family], max_shard_size="24KB")
        return made[family]

    return save


def resident(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    headgate.replace(model)
    return model.eval()


def answer(model):
    with torch.no_grad():
        tokens = model.generate(IDS, max_new_tokens=6, do_sample=False)
        return model(tokens).logits, tokens


@pytest.mark.parametrize("page_cache", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_answers_as_from_pretrained_and_offload(saved, family, page_cache, tmp_path):
    folder = saved(family)
    assert len(list(folder.glob("*.safetensors"))) >= 2
    other = resident(folder)
    with headgate.offload(other, "50%", disk=tmp_path):
        want = answer(other)
    model, offloaded = headgate.load(folder, "50%", page_cache=page_cache)
    with offloaded:
        got = answer(model)
        assert offloaded.stats().loads > 0
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[0], want[0])
    assert model.dtype == torch.bfloat16
    assert not model.training
    for name, b in model.named_buffers():
        assert torch.equal(b, other.get_buffer(name)), name


def experts_of(model):
    return {name: p for name, p in model.named_parameters() if ".experts." in name}


def test_what_was_never_in_memory_is_not_brought_there(saved, monkeypatch):
    model, offloaded = headgate.load(saved("qwen3"), "50%")
    answer(model)
    monkeypatch.setattr(offloaded._store, "read", lambda *_: 1 / 0)
    offloaded.close()
    assert all(p.is_meta for p in experts_of(model).values())
    assert not any(p.is_meta for name, p in model.named_parameters() if ".experts." not in name)
    with pytest.raises(RuntimeError, match=r"the experts of model.layers.0.mlp.experts must be in memory or served by"):
        model(IDS)
    headgate.restore(model)


def test_they_are_brought_there_when_that_is_asked_for(saved):
    other = resident(saved("qwen3"))
    model, offloaded = headgate.load(saved("qwen3"), 1.0)
    offloaded.close(restore=True)
    want = experts_of(other)
    assert all(torch.equal(p, want[name]) for name, p in experts_of(model).items())
    assert torch.equal(answer(model)[0], answer(other)[0])
    with pytest.raises(ValueError, match="restore must be True, False or \"auto\", got 'no'"):
        offloaded.close(restore="no")


def test_settings_of_offload_hold_here_too(saved):
    folder = saved("olmoe")
    want = answer(resident(folder))
    for options in ({"policy": "lru", "scope": "shared"}, {"prefetch": None, "readers": 1}, {"log": True}):
        model, offloaded = headgate.load(folder, "40%", **options)
        with offloaded:
            assert torch.equal(answer(model)[1], want[1])
            assert (offloaded.log is None) is not bool(options.get("log"))


@pytest.mark.parametrize("formats", [None, "int8", {"model.layers.1.mlp.experts": ["int4", None] * 4}])
def test_packed_once_and_used_again(saved, tmp_path, monkeypatch, formats):
    """The same file and the same answers as those of from_pretrained and offload."""
    other = resident(saved("olmoe"))
    with headgate.offload(other, "50%", disk=tmp_path / "theirs", formats=formats):
        want = answer(other)
    model, offloaded = headgate.load(saved("olmoe"), "50%", disk=tmp_path / "ours", formats=formats)
    with offloaded:
        assert torch.equal(answer(model)[0], want[0])
    monkeypatch.setattr(FileStore, "write", lambda *_, **__: 1 / 0)
    model, offloaded = headgate.load(saved("olmoe"), "50%", disk=tmp_path / "ours", formats=formats)
    with offloaded:
        assert torch.equal(answer(model)[0], want[0])


def test_a_file_of_another_checkpoint_is_refused(saved, tmp_path, monkeypatch):
    shutil.copytree(saved("olmoe"), tmp_path / "m")
    options = {"disk": tmp_path / "ours", "formats": "int8"}
    headgate.load(tmp_path / "m", "50%", **options)[1].close()
    last = max((tmp_path / "m").glob("*.safetensors"))
    whole = last.read_bytes()
    last.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])  # another revision of the same shapes
    monkeypatch.setattr(Checkpoint, "read", lambda *_: 1 / 0)  # it is said before a weight is read
    with pytest.raises(ValueError, match="must hold the experts of this very checkpoint and formats, got another's"):
        headgate.load(tmp_path / "m", "50%", **options)
    last.write_bytes(whole)
    (tmp_path / "ours/experts.safetensors").unlink()
    with headgate.offload(resident(tmp_path / "m"), "50%", **options), pytest.raises(ValueError, match="got another's"):
        headgate.load(tmp_path / "m", "50%", **options)
    with pytest.raises(ValueError, match="disk must be a folder for experts in few bits, got None"):
        headgate.load(tmp_path / "m", formats="int8")
    with pytest.raises(ValueError, match="format must be one of"):
        headgate.load(tmp_path / "m", disk=tmp_path / "new", formats="")


def test_a_disk_without_room_is_said_first(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OSError, match=r"disk must have [\d,]+ bytes for the experts, got 1 free"):
        headgate.load(saved("olmoe"), "50%", disk=tmp_path)
    assert not list(tmp_path.iterdir())


# --- a checkpoint that is not what it should be ----------------------------------------------------------------------


def respell(folder, change) -> None:
    """The same tensors in one file, after a change."""
    from safetensors.torch import load_file, save_file

    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    (folder / INDEX).unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit(path, change) -> None:
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said))


EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"


def fewer_rows(tensors):
    for name in [n for n in tensors if "mlp.experts" in n and "up_proj" in n]:
        tensors[name] = tensors[name][:-1].contiguous()


def in_fp32(tensors):
    for name in [n for n in tensors if "down_proj" in n]:
        tensors[name] = tensors[name].float()


def first_shard(folder):
    return min(folder.glob("*.safetensors"))


def lie_in_the_header(folder) -> None:
    with open(first_shard(folder), "r+b") as file:
        file.write((2**50).to_bytes(8, "little"))


SPOILT = {
    "a shard is missing": (
        lambda f: first_shard(f).unlink(), OSError,
        r"load: all \d+ files of the index must be there, 1 are missing: model-00001"),
    "a shard is cut": (
        lambda f: first_shard(f).write_bytes(first_shard(f).read_bytes()[:-7]), ValueError,
        r"size of \S+ must be [\d,]+ bytes, with one tensor after the other, got"),
    "a header longer than its file": (
        lie_in_the_header, ValueError, r"header of \S+ must be of at most [\d,]+ bytes, got 1,125,899,906,842,624"),
    "a shard that is no such file": (
        lambda f: first_shard(f).write_bytes(b"\x08" + bytes(7) + b"[1,2,3] "), ValueError, "header of .* an object"),
    "a dtype that torch has not": (
        lambda f: first_shard(f).write_bytes(first_shard(f).read_bytes().replace(b"BF16", b"BF61")), ValueError,
        "dtype of .* must be one of F64"),
    "the index names a tensor that is nowhere": (
        lambda f: edit(f / INDEX, lambda i: i["weight_map"].update({"model.x": first_shard(f).name})), ValueError,
        "must be model.x among others"),
    "the index leads out of the folder": (
        lambda f: edit(f / INDEX, lambda i: i["weight_map"].update({"model.x": "../y.safetensors"})), ValueError,
        "weight_map model.x of .* the name of a safetensors file in this folder"),
    "an expert's matrix is missing": (
        lambda f: respell(f, lambda t: t.pop(EXPERT)), ValueError,
        r"as many tensors of each kind for model.layers.1.mlp.experts.gate_up_proj, got 8 of .*, 7 of .*up_proj"),
    "an expert is missing": (
        lambda f: respell(f, lambda t: [t.pop(n) for n in list(t) if ".1.mlp.experts.7." in n]), ValueError,
        r"must make model.layers.1.mlp.experts.gate_up_proj \[8, 32, 32\], got \[7, 32, 32\] from 7 of "),
    "a layer's experts are missing": (
        lambda f: respell(f, lambda t: [t.pop(n) for n in list(t) if ".1.mlp.experts." in n]), ValueError,
        "got none for model.layers.1.mlp.experts.gate_up_proj and 1 more"),
    "a norm is missing": (
        lambda f: respell(f, lambda t: t.pop("model.norm.weight")), ValueError, "got none for model.norm.weight"),
    "a norm stored twice": (
        lambda f: respell(f, lambda t: t.update({"norm.weight": torch.ones(32)})), ValueError,
        "must have one tensor for model.norm.weight, got model.norm.weight and norm.weight"),
    "a norm of another shape": (
        lambda f: respell(f, lambda t: t.update({"model.norm.weight": torch.ones(31)})), ValueError,
        r"must have model.norm.weight of shape \[32\], got \[31\]"),
    "experts of another shape": (lambda f: respell(f, fewer_rows), ValueError, r"must make .*, got \[8, 31, 32\]"),
    "experts of another dtype": (
        lambda f: respell(f, in_fp32), ValueError, "down_proj must be stored in the model's torch.bfloat16, got F32"),
    "quantized": (
        lambda f: edit(f / "config.json", lambda c: c.update(quantization_config={"quant_method": "hqq"})), ValueError,
        "quantization_config of .* must be of one of the methods compressed-tensors, gptq, awq, .*, got hqq"),
    "another kind of model": (
        lambda f: edit(f / "config.json", lambda c: c.update(model_type="vit")), ValueError,
        "model must hold MoE experts, got a ViTModel"),
    "a model that transformers has not": (
        lambda f: edit(f / "config.json", lambda c: c.update(model_type="a_new_one")), ValueError, "a_new_one"),
    "no configuration": (lambda f: (f / "config.json").unlink(), OSError, "config.json"),
    "no folder": (lambda f: shutil.rmtree(f), ValueError, "must be a folder with config.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_wrong_is_said_before_a_weight_is_read(saved, tmp_path, monkeypatch, name):
    spoil, kind, message = SPOILT[name]
    shutil.copytree(saved("qwen3"), folder := tmp_path / "m")
    spoil(folder)
    monkeypatch.setattr(Checkpoint, "read", lambda *_: 1 / 0)
    before = os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd") else []
    with pytest.raises(kind, match=message):
        headgate.load(folder, "50%")
    assert not before or len(os.listdir("/proc/self/fd")) <= len(before), "files are left open"


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"budget": "a lot"}, ValueError, "budget must be"),
        ({"policy": "fifo"}, ValueError, "name must be one of"),
        ({"prefetch": "crystal"}, ValueError, "prefetch must be one of gate, path"),
        ({"readers": 0}, ValueError, "readers must be at least 1"),
        ({"scope": "rank"}, ValueError, "scope must be one of"),
    ],
)
def test_bad_settings_are_said_before_a_weight_is_read(saved, monkeypatch, change, kind, message):
    monkeypatch.setattr(Checkpoint, "read", lambda *_: 1 / 0)
    with pytest.raises(kind, match=message):
        headgate.load(saved("qwen3"), **change)


def test_what_comes_out_of_one_tensor_with_others_cannot_be_read_in_place(saved):
    """Of parameters that transformers makes together, its mapping names the first."""
    with closing(Checkpoint(saved("qwen3"))) as checkpoint:
        found, there = model_of(checkpoint).found[0], Translated(checkpoint, None)
        conversion = conversion_of(blank_model(checkpoint.folder, None), checkpoint.tensors)
        name = found[0]
        sources = {n: s for n, s in conversion.sources.items() if n != f"{name}.down_proj"}
        partly = dataclasses.replace(conversion, sources=sources)
        with pytest.raises(
            ValueError, match=f"{name}.down_proj must lie in .* for itself, transformers makes it together with"
        ):
            experts_in(found, partly, there)


def test_what_is_computed_cannot_be_read_in_place(saved):
    from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose

    checkpoint = Checkpoint(saved("qwen3"))
    keys = {"up": [f"model.layers.0.mlp.experts.{e}.up_proj.weight" for e in range(8)]}
    for operations, shape in (([MergeModulelist(0)], (8, 16, 32)), ([MergeModulelist(0), Concatenate(1)], (8, 16, 32))):
        laid = laid_out(Source(["up"], operations, keys), checkpoint)
        assert laid.shape == shape
        assert sum(run.nbytes for run in laid.runs) == 8 * 16 * 32 * 2
    for operations in (
        [MergeModulelist(0), Transpose(1, 2)],
        [MergeModulelist(1)],
        [MergeModulelist(0), Concatenate(2)],
    ):
        assert "transformers makes it by" in laid_out(Source(["up"], operations, keys), checkpoint)
    checkpoint.close()


# --- a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("disk", [None, "int8"])
@pytest.mark.parametrize("page_cache", [True, False])
def test_experts_go_from_the_files_to_a_gpu(saved, tmp_path, disk, page_cache):
    """Through page-locked buffers of the readers, on a stream of their own; the rest of the model goes there, too."""
    options = {} if disk is None else {"disk": tmp_path, "formats": disk}
    on_cpu, offloaded = headgate.load(saved("qwen3"), "50%", **options)
    with offloaded:
        want = answer(on_cpu)[0]
    model, offloaded = headgate.load(
        saved("qwen3"), "40%", device="cuda", page_cache=page_cache, verify=True, **options
    )
    with offloaded, torch.no_grad():
        assert {t.device.type for t in (*model.parameters(), *model.buffers()) if not t.is_meta} == {"cuda"}
        assert offloaded.engine.arena.weights(0, 1)["w_down"].device.type == "cuda"
        for _ in range(3):
            got = model(IDS.cuda()).logits
            torch.testing.assert_close(got.cpu(), want, rtol=5e-2, atol=5e-2)
        model.generate(IDS.cuda(), max_new_tokens=6, do_sample=False)
        assert offloaded.stats().loads > 0
        assert offloaded._store.reads._pool is not None


@pytest.mark.gpu
def test_auto_on_a_gpu_takes_what_it_has_free(saved, monkeypatch):
    free, _ = torch.cuda.mem_get_info()
    model, offloaded = headgate.load(saved("qwen3"), "auto", device="cuda", context=64)
    with offloaded:
        split = offloaded.split
        assert "free on cuda:" in split.limit
        assert abs(split.free - free) < free // 4
        assert split.budget == split.experts
        with torch.no_grad():
            model(IDS.cuda())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (100 << 20, 1 << 40))
    with pytest.raises(ValueError, match=r'"auto" leaves none, got .* free on cuda:0'):
        headgate.load(saved("qwen3"), "auto", device="cuda")


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_is_never_in_memory(tmp_path):
    """From start to the first token a process grows by the rest of the model, the slots and little more."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("memory is read from /proc")
    for name, width, experts in (("small", 32, 4), ("large", 1024, 32)):
        config = transformers.OlmoeConfig(
            **{**SIZES, "hidden_size": width, "intermediate_size": width, "vocab_size": 512, "num_hidden_layers": 2},
            num_experts=experts, num_experts_per_tok=2,
        )  # fmt: skip
        model = transformers.OlmoeForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(tmp_path / name, max_shard_size="50MB")
    whole = sum(p.nbytes for p in model.parameters())
    experts = sum(p.nbytes for p in experts_of(model).values())
    script = textwrap.dedent(
        """
        import sys, torch, transformers, headgate
        def peak():
            return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) << 10
        small, large = sys.argv[1:]
        for path, budget in ((small, 1.0), (large, "25%")):  # the small one brings what is imported on the way
            before = peak()
            model, offloaded = headgate.load(path, budget)
            with offloaded, torch.no_grad():
                model.generate(torch.arange(8)[None], max_new_tokens=1)
        print(peak() - before)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "small", tmp_path / "large"], cwd=tmp_path, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    grown = int(done.stdout.split()[-1])
    room = whole - experts + experts // 4
    assert grown < room + 64 * 2**20, f"{grown:,} bytes for a model of {whole:,} with room for {room:,}"
