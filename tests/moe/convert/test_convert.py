"""MoE models out of dense ones: what from_pretrained loads is the dense model at first, and nothing half written."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import weakref
from pathlib import Path

import pytest
import torch
from signalled import STATUS, Process
from torch import nn

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

import headgate  # noqa: E402
from headgate import cli  # noqa: E402
from headgate.moe.convert import Granular, convert, dense, train_routers, write  # noqa: E402
from headgate.placement import files  # noqa: E402

SHAPE = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip
IDS = torch.arange(2, 35).view(3, 11)
FAMILIES = {  # dense class -> (more of its config, class of the MoE model, tied)
    "Llama": ({"tie_word_embeddings": True, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8}}, "Mixtral"),
    "Mistral": ({"sliding_window": 5, "head_dim": 8}, "Mixtral"),
    "Qwen2": ({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, "Qwen2Moe"),
    "Qwen3": ({"head_dim": 8, "attention_bias": True}, "Qwen3Moe"),
    "Olmo2": ({}, "FlexOlmo"),
}  # fmt: skip


def a_model(family: str, seed: int = 0, **more):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **FAMILIES[family][0], **more})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            nn.init.uniform_(p, 0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of each family, in several files."""
    made = tmp_path_factory.mktemp("dense")
    for family in FAMILIES:
        a_model(family).save_pretrained(made / family, max_shard_size="8KB")
    (made / "Llama" / "tokenizer.json").write_text("{}")
    return {family: made / family for family in FAMILIES}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-6) -> None:
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def loaded(folder: Path):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


CASES = {
    "copy": {"experts": 4, "top_k": 2},
    "copy of one": {"experts": 3, "top_k": 1},
    "granular": {"experts": 8, "top_k": 4, "method": "granular", "shards": 4},
    "all neurons": {"experts": 2, "top_k": 2, "method": "activations", "calibration": IDS, "keep": 32, "steps": 5},
}


@pytest.mark.parametrize(
    ("family", "case"),
    [
        *((family, "copy") for family in FAMILIES),
        ("Mistral", "copy of one"),
        *((family, case) for family in ("Qwen2", "Olmo2") for case in ("granular", "all neurons")),
    ],
)
def test_the_first_forward_is_the_dense_model(folders, tmp_path, family, case):
    """Loaded by transformers alone, from several files; and the same model when it is made in memory."""
    out = tmp_path / "moe"
    assert convert(folders[family], out, shard="10KB", seed=3, **CASES[case]) is None
    assert len([*out.glob("model-*-of-*.safetensors")]) > 2
    found = loaded(out)
    assert type(found).__name__ == f"{FAMILIES[family][1]}ForCausalLM"
    original = a_model(family)
    close(logits(found), logits(original))
    assert torch.equal(logits(found), logits(convert(original, seed=3, **CASES[case])))
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]
    if family == "Llama":
        assert (out / "tokenizer.json").read_text() == "{}"


def test_in_bf16_it_is_the_dense_model_up_to_bf16(folders):
    original = a_model("Llama").bfloat16()
    found = convert(original, experts=4, top_k=2)
    assert found.dtype == torch.bfloat16
    close(logits(found).float(), logits(original).float(), 5e-2)


@pytest.mark.parametrize(("family", "to"), [("Qwen2", None), ("Qwen3", None), ("Llama", "qwen2_moe"), ("Llama", None)])
def test_single_layers_stay_dense(folders, tmp_path, family, to):
    convert(folders[family], tmp_path / "moe", experts=2, layers=[1], to=to)
    found = loaded(tmp_path / "moe")
    assert [hasattr(layer.mlp, "experts") for layer in found.model.layers] == [False, True]
    close(logits(found), logits(a_model(family)))


def test_windows_that_no_layer_has_are_in_none_afterwards_and_a_cast_is_in_the_config(tmp_path):
    model = a_model("Qwen3", use_sliding_window=True, sliding_window=3, max_window_layers=2)
    close(logits(convert(model, experts=2)), logits(model))
    model.config.dtype = torch.float32
    convert(model.bfloat16(), tmp_path / "moe", experts=2)
    assert loaded(tmp_path / "moe").dtype == torch.bfloat16


def test_granular_scaling_as_published_is_off_where_the_down_projection_alone_is_not():
    original = a_model("Qwen3")
    options = {"experts": 8, "top_k": 4}
    exact = convert(original, method=Granular(4), **options)
    close(logits(exact), logits(original))
    published = convert(original, method="granular", shards=4, scaling="nvidia", **options)
    error = (logits(published) - logits(original)).norm() / logits(original).norm()
    assert error > 0.02
    ratio = published.model.layers[0].mlp.experts.gate_up_proj / exact.model.layers[0].mlp.experts.gate_up_proj
    torch.testing.assert_close(ratio, torch.full_like(ratio, 4 ** (1 / 3)))
    one = convert(original, method="granular", shards=4, experts=8, top_k=8)  # every copy of every shard
    close(logits(one), logits(original))


def test_noise_is_what_was_asked_for_and_differs_by_expert():
    original = a_model("Llama", intermediate_size=200)
    found = convert(original, experts=2, noise=0.1, seed=5)
    for part, w in (("gate_up_proj", original.model.layers[0].mlp.gate_proj.weight), ("down_proj", None)):
        experts = getattr(found.model.layers[0].mlp.experts, part)
        if w is not None:
            off = ((experts[:, : len(w)] - w).std((1, 2)) / w.std()).detach()
            assert ((off - 0.1).abs() < 0.01).all()
        assert not torch.equal(experts[0], experts[1])
    again = convert(original, experts=2, noise=0.1, seed=5)
    assert torch.equal(logits(found), logits(again))
    plain = convert(original, experts=2, router_std=0.0)
    assert not plain.model.layers[0].mlp.gate.weight.any()
    assert convert(original, experts=2).model.layers[0].mlp.gate.weight.std().item() == pytest.approx(0.3, rel=0.3)


def test_training_goes_below_the_dense_loss():
    """Upcycled after the same steps as the dense model on top: not worse at step 0, below after."""
    torch.manual_seed(0)
    ids = (torch.arange(16)[None] * torch.tensor([[1], [3], [5], [7]]) + torch.arange(4)[:, None]) % 40 + 2
    model = a_model("Llama", tie_word_embeddings=False)
    before = model(ids, labels=ids).loss.item()
    moe = convert(model, experts=4, top_k=2)
    assert moe(ids, labels=ids).loss.item() == pytest.approx(before, rel=1e-5)
    adam = torch.optim.Adam(moe.parameters(), lr=3e-3)
    for _ in range(10):
        adam.zero_grad()
        moe(ids, labels=ids, output_router_logits=True).loss.backward()
        assert moe.model.layers[0].mlp.gate.weight.grad.abs().max() > 0
        adam.step()
    assert moe(ids, labels=ids).loss.item() < before - 0.1
    assert headgate.replace(moe).replaced


# --- several models --------------------------------------------------------------------------------------------------


def test_merged_models_average_and_one_expert_is_its_branch(tmp_path):
    """Branches that differ in FFNs only: a router that always takes expert e gives branch e."""
    branches = [a_model("Qwen3"), a_model("Qwen3"), a_model("Qwen3")]
    for seed, branch in enumerate(branches):
        torch.manual_seed(seed)
        for name, p in branch.named_parameters():
            if ".mlp." in name:
                nn.init.normal_(p, std=0.3)
        branch.save_pretrained(tmp_path / str(seed))
    convert([tmp_path / str(e) for e in range(3)], tmp_path / "moe", method="merge", top_k=1)
    found = loaded(tmp_path / "moe")
    for e, branch in enumerate(branches):

        def always(module, args, output, e=e):
            return output[0], torch.ones_like(output[1]), torch.full_like(output[2], e)

        hooks = [layer.mlp.gate.register_forward_hook(always) for layer in found.model.layers]
        close(logits(found), logits(branch))
        for hook in hooks:
            hook.remove()
    apart = [a_model("Qwen3", seed) for seed in (1, 2)]
    merged = convert(apart, method="merge")
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.bias", "model.norm.weight"):
        mean = sum(model.get_parameter(name) for model in apart) / 2
        torch.testing.assert_close(merged.get_parameter(name), mean)


def test_routers_of_a_merged_model_learn_and_nothing_else_does():
    torch.manual_seed(0)
    merged = convert([a_model("Llama", seed) for seed in (1, 2)], method="merge", top_k=2)
    before = {name: p.detach().clone() for name, p in merged.named_parameters()}
    losses = train_routers(merged, [IDS] * 25, lr=0.1)
    assert losses[-1] < losses[0] - 0.01
    changed = {name for name, p in merged.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {f"model.layers.{i}.mlp.gate.weight" for i in range(2)}
    assert all(p.requires_grad and p.grad is None for p in merged.parameters())
    train_routers(merged, [IDS], everything=True)
    assert not torch.equal(merged.lm_head.weight, before["model.embed_tokens.weight"])
    with pytest.raises(ValueError, match="train_routers: model must be a transformers MoE model with routers"):
        train_routers(a_model("Llama"), [IDS])


# --- what is not to happen -------------------------------------------------------------------------------------------


def moe_model():
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SHAPE, num_local_experts=2))


ODD = {
    "a MoE already": (moe_model, {}, "must be a dense model, got one of type mixtral with 2 experts already"),
    "no decoder": (lambda: transformers.BertForMaskedLM(transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)), {},
        "must be of a type in llama, mistral, qwen2, qwen3, olmo2, got 'bert'"),
    "biases": (lambda: a_model("Llama", mlp_bias=True), {}, "got mlp_bias=True"),
    "no head": (lambda: a_model("Llama").model, {}, "must be a model for causal language, got a LlamaModel"),
    "another head": (lambda: transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SHAPE)), {},
                     "must be a model for causal language, got a LlamaForSequenceClassification"),
    "no weights": (lambda: a_model("Llama").to("meta"), {}, "must have its weights"),
    "a class with norms": (None, {"to": "olmoe"}, "it normalises queries and keys over all heads at once"),
    "another class": (None, {"to": "gpt"}, "to must be one of mixtral, qwen2_moe for a llama model, got 'gpt'"),
    "layers and Mixtral": (None, {"layers": [0], "to": "mixtral"}, "layers must be all for mixtral"),
    "a layer": (None, {"layers": [2]}, r"layers must be different numbers in 0 .. 1, at least one, got \[2\]"),
    "K": (None, {"experts": 2, "top_k": 3}, r"top_k must be at most experts \(2\), got 3"),
    "E": (None, {"experts": 0}, "experts must be a whole number of at least 1, got 0"),
    "G": (None, {"method": "granular", "shards": 5}, "shards must divide the intermediate size 32, got 5"),
    "G and E": (None, {"method": "granular", "shards": 16}, r"experts must be a multiple of shards \(16\), got 8"),
    "G and K": (None, {"method": "granular", "shards": 4}, r"top_k must be a multiple of shards \(4\), .* got 2"),
    "scaling": (None, {"method": "granular", "shards": 2, "scaling": "up"}, "scaling must be 'down' or 'nvidia'"),
    "noise": (None, {"noise": float("nan")}, "noise must be at least 0 and finite, got nan"),
    "two for copy": (lambda: [a_model("Llama")] * 2, {}, "dense must be one model for method 'copy', got 2"),
    "one for merge": (None, {"method": "merge", "experts": 1, "top_k": 1}, "must be at least two models for method"),
    "two shapes": (lambda: [a_model("Llama"), a_model("Llama", intermediate_size=8)], {"method": "merge"},
                   r"the same shapes, got \[16, 32\] and \[16, 8\] of .* in model 1"),
    "two eps": (lambda: [a_model("Llama"), a_model("Llama", rms_norm_eps=0.1)], {"method": "merge"},
                "dense must agree in rms_norm_eps, got 1e-06 and 0.1 in model 1"),
    "two dtypes": (lambda: [a_model("Llama"), a_model("Llama").bfloat16()], {"method": "merge"},
                   "the same dtypes, got torch.float32 and torch.bfloat16 of .* in model 1"),
    "E and models": (lambda: [a_model("Llama")] * 2, {"method": "merge", "experts": 3}, "the number of models"),
    "no calibration": (None, {"method": "activations"}, "calibration must be at least 8 sequences of tokens, got 0"),
    "foreign ids": (None, {"method": "activations", "experts": 2, "calibration": IDS + 20}, "token ids below 48"),
    "keep": (None, {"method": "activations", "keep": 33}, "keep must be a share or a number of 32 neurons, got 33"),
    "domains": (None, {"method": "activations", "experts": 2, "calibration": IDS, "domains": [0, 0, 0]},
                r"domains must be one number in 0 .. 1 for each of 3 sequences, each of them used"),
    "shard": (None, {"shard": "0"}, "shard must be bytes of at least 1"),
    "seed": (None, {"seed": -1}, "seed must be a whole number in 0"),
    "router_std": (None, {"router_std": -1}, "router_std must be at least 0 and finite, got -1"),
}  # fmt: skip


@pytest.mark.parametrize("what", ODD)
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path, what):
    make, options, says = ODD[what]
    with pytest.raises(ValueError, match=f"convert: .*{says}"):
        convert(make() if make else a_model("Llama"), tmp_path / "moe", **options)
    assert not list(tmp_path.iterdir())


def test_options_of_another_method_and_no_model():
    with pytest.raises(TypeError, match=r"options must be those of 'copy' \(noise\), got shards"):
        convert(a_model("Llama"), shards=2)
    with pytest.raises(TypeError, match="dense must be a folder or a transformers model, got a Linear"):
        convert(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="method must be one of copy, granular, activations, merge, got 'x'"):
        convert(a_model("Llama"), method="x")


def spoil(folder: Path, how: str) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    if how == "a file is missing":
        (folder / sorted(set(index["weight_map"].values()))[1]).unlink()
    elif how == "a tensor is missing":
        del index["weight_map"]["model.layers.1.mlp.up_proj.weight"]
        name = index["weight_map"]["model.layers.1.mlp.down_proj.weight"]
        index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != name}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "another shape":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 12}))
    elif how == "few bits":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ("a file is missing", OSError, "are missing: model-00002"),
        ("a tensor is missing", ValueError, "dense must hold all weights of its config's model"),
        ("another shape", ValueError, r"must be \[12, 16\], as its config says, got \[32, 16\]"),
        ("few bits", ValueError, "must have its weights as they were trained"),
    ],
)
def test_a_spoilt_checkpoint_is_named_before_anything_is_written(folders, tmp_path, how, error, says):
    shutil.copytree(folders["Llama"], tmp_path / "dense")
    spoil(tmp_path / "dense", how)
    with pytest.raises(error, match=says):
        convert(tmp_path / "dense", tmp_path / "moe")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_the_disk_and_the_place_are_looked_at_first(folders, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for odd in (tmp_path / "full", tmp_path / "full" / "x", tmp_path / "none" / "moe"):
        with pytest.raises(ValueError, match="convert: output must be"):
            convert(folders["Llama"], odd)
    (tmp_path / "empty").mkdir()
    convert(folders["Llama"], tmp_path / "empty")
    loaded(tmp_path / "empty")
    monkeypatch.setattr(write.shutil, "disk_usage", lambda path: type("", (), {"free": 70_000_000}))
    with pytest.raises(OSError, match=r"output must have [\d,]+ bytes for the model, got 70,000,000 free"):
        convert(folders["Llama"], tmp_path / "moe", experts=2000)
    assert not (tmp_path / "moe").exists()


def test_what_fails_on_the_way_leaves_nothing(folders, tmp_path):
    def tell(done, total):
        if done == 20:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        convert(folders["Llama"], tmp_path / "moe", tell=tell)
    assert not list(tmp_path.iterdir())
    for name in (".moe-0123abcd.headgate", ".moe-20261201"):  # of a killed process; somebody's own
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    convert(folders["Llama"], tmp_path / "moe")
    assert {path.name for path in tmp_path.iterdir()} == {"moe", ".moe-20261201"}
    assert (tmp_path / ".moe-20261201" / "config.json").exists()


def test_a_folder_that_is_taken_for_stale_at_once_is_made_again_and_a_full_disk_says_which(tmp_path, monkeypatch):
    lock, calls = files.fcntl.flock, []

    def late(handle, how):
        calls.append(how)
        if len(calls) == 1:  # another process comes in between
            shutil.rmtree(next(tmp_path.iterdir()))
        lock(handle, how)

    monkeypatch.setattr(files.fcntl, "flock", late)
    with files.whole_folder(tmp_path / "moe") as folder:
        (folder / "x").touch()
    assert [path.name for path in (tmp_path / "moe").iterdir()] == ["x"]
    with pytest.raises(OSError, match=r"No space left on device: '.*/full'"), files.whole_folder(tmp_path / "full"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_never_more_than_a_layers_ffn_and_a_matrix_is_in_memory(folders, tmp_path, monkeypatch):
    """Bytes of tensors that were read from the checkpoint and are still there, at each read."""
    there, most = weakref.WeakSet(), []
    read = dense.InFiles.read

    def counted(self, name):
        found = read(self, name)
        there.add(found)
        most.append(sum(t.nbytes for t in there))
        return found

    monkeypatch.setattr(dense.InFiles, "read", counted)
    convert(folders["Qwen3"], tmp_path / "moe", experts=8)
    assert max(most) <= (3 * 32 + 48) * 16 * 4  # and the head is read
    assert len(most) < 60  # an FFN is read once, not for each expert


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command(folders, tmp_path, capsys):
    words = [str(folders["Qwen2"]), str(tmp_path / "moe"), "--experts", "4", "--layers", "0-1", "--noise", "0"]
    assert cli.main(["convert", *words]) == 0
    size = sum(file.stat().st_size for file in tmp_path.glob("moe/*.safetensors"))
    assert capsys.readouterr().out == f"wrote {tmp_path / 'moe'}, {size / 1e9:.3g} GB\n"
    close(logits(loaded(tmp_path / "moe")), logits(a_model("Qwen2")))
    two = [str(folders["Llama"])] * 2
    assert cli.main(["convert", *two, str(tmp_path / "merged")]) == 0
    close(logits(loaded(tmp_path / "merged")), logits(a_model("Llama")))


@pytest.mark.slow
def test_a_signal_leaves_nothing_behind(tmp_path):
    a_model("Llama", hidden_size=256, intermediate_size=1024).save_pretrained(tmp_path / "dense")
    process = Process(["convert", "dense", "moe", "--experts", "256", "--noise", "0.1"], tmp_path)
    process.wait_until(lambda: bool([*tmp_path.glob(".moe-*/*.safetensors")]))
    process.process.send_signal(signal.SIGTERM)
    ended = process.ended()
    assert ended.status == STATUS[signal.SIGTERM], ended
    assert ended.said.splitlines()[-1] == "headgate: terminated"
    assert not [*tmp_path.glob("*moe*")]
