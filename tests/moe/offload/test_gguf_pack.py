"""headgate.pack into GGUF files: what gguf reads of them, and what headgate.load makes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

from gguf_files import FAMILIES, small, write  # noqa: E402

import headgate  # noqa: E402
from headgate.kernels.quantized import quantize  # noqa: E402

transformers.logging.set_verbosity_error()
IDS = torch.arange(3, 13).reshape(1, 10)
CASES = {
    "qwen3moe": "Q8_0", "qwen2moe": "Q4_0", "llama": "Q6_K", "olmoe": None,
    "gpt-oss": {"model.layers.0.mlp.experts": ["gguf_mxfp4"] * 4},
}  # fmt: skip


def read(path) -> dict[str, np.ndarray]:
    """Every tensor in numbers, as the gguf package reads it."""
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("family", CASES)
def test_a_folder_becomes_a_file_that_gguf_and_load_read(family, tmp_path):
    """The same tensors as the tests' own writer has them, which follows llama.cpp's converter, and the model of these
    numbers."""
    model, formats = small(family, torch.bfloat16), CASES[family]
    model.save_pretrained(tmp_path / "m", max_shard_size="2MB")
    headgate.pack(tmp_path / "m", tmp_path / "m.gguf", formats=formats)
    by_name = formats or {}
    types = {0: (formats if isinstance(formats, str) else by_name and "MXFP4") or "BF16"}
    types[1] = types[0] if isinstance(formats, str) else "BF16"
    write(tmp_path / "w.gguf", family, model, lambda name: types[int(name[4])] if "_exps" in name else "BF16")
    got, want = read(tmp_path / "m.gguf"), read(tmp_path / "w.gguf")
    assert got.keys() == want.keys()
    assert all(np.array_equal(t, got[name].reshape(t.shape)) for name, t in want.items())
    files = [gguf.GGUFReader(tmp_path / name) for name in ("m.gguf", "w.gguf")]
    kinds, theirs = ({t.name: (t.tensor_type, tuple(t.shape)) for t in file.tensors} for file in files)
    assert kinds == theirs
    fields, others = (file.fields for file in files)
    for key in others.keys() - {"GGUF.kv_count", "general.name", "tokenizer.ggml.tokens"}:
        assert fields[key].contents() == others[key].contents(), key
    loaded, offloaded = headgate.load(tmp_path / "m.gguf", "50%")
    with offloaded, torch.no_grad():
        assert loaded.dtype == torch.bfloat16
        tokens = loaded.generate(IDS, max_new_tokens=6, do_sample=False)
    headgate.replace(model)
    with torch.no_grad():
        assert torch.equal(tokens, model.generate(IDS, max_new_tokens=6, do_sample=False))


def test_a_gguf_file_becomes_another_with_its_own_metadata(tmp_path):
    model, told = small("qwen3moe"), []
    write(tmp_path / "m.gguf", "qwen3moe", model, lambda name: "Q8_0", split_files=9)
    formats = {"model.layers.1.mlp.experts": ["Q4_K"] * 4}
    headgate.pack(tmp_path, tmp_path / "q.gguf", formats=formats, tell=lambda *done: told.append(done))
    assert told == [(n, 4) for n in range(1, 5)]
    parts = [gguf.GGUFReader(path) for path in sorted(tmp_path.glob("m-*.gguf"))]
    made = gguf.GGUFReader(tmp_path / "q.gguf")
    kept = [key for key in parts[0].fields if not key.startswith(("GGUF", "split"))]
    assert [key for key in made.fields if not key.startswith("GGUF")] == kept
    assert all(made.fields[key].contents() == parts[0].fields[key].contents() for key in kept)
    got = {t.name: t for t in made.tensors}
    for t in (t for part in parts for t in part.tensors):
        if t.name.startswith("blk.1.") and "_exps" in t.name:
            wide = torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type))
            assert (got[t.name].data == quantize(wide, "Q4_K").data.numpy()).all()
        else:
            assert (got[t.name].data == t.data).all()
    with pytest.raises(ValueError, match=r"must have one model in GGUF files, got m-0.*q.gguf"):
        headgate.load(tmp_path, "50%")
    headgate.load(tmp_path / "q.gguf", "50%")[1].close()


def test_what_no_gguf_file_can_hold_is_refused_and_nothing_is_left(tmp_path):
    model = small("deepseek2", torch.bfloat16)
    model.save_pretrained(tmp_path / "d")
    small("olmoe", torch.bfloat16, intermediate_size=96).save_pretrained(tmp_path / "o")
    out = tmp_path / "out" / "x.gguf"
    out.parent.mkdir()
    mixed = {"model.layers.0.mlp.experts": ["Q8_0", None, "Q8_0", "Q8_0"]}
    for source, formats, why in (
        ("d", "Q8_0", "model_type must be one of qwen2_moe, .* for a GGUF file, got deepseek_v3"),
        ("o", "int8", "formats must be one of Q8_0, .* for all experts of a layer in a GGUF file, got int8"),
        ("o", mixed, "formats must be .* for all experts of a layer in a GGUF file, got Q8_0, None"),
        ("o", "Q4_K", "I must be a multiple of 256 for 'Q4_K', got 96"),
    ):
        with pytest.raises(ValueError, match=why):
            headgate.pack(tmp_path / source, out, formats=formats)
    out.write_bytes(b"a letter")
    with pytest.raises(ValueError, match=r"output must be a new file or a GGUF file, got .*x.gguf"):
        headgate.pack(tmp_path / "o", out)
    assert out.read_bytes() == b"a letter"
    assert [p.name for p in out.parent.iterdir()] == ["x.gguf"]


def test_the_file_that_is_read_is_not_written_over(tmp_path):
    write(tmp_path / "m.gguf", "olmoe", small("olmoe"), lambda name: "Q8_0", split_files=9)
    first, second, *_ = sorted(tmp_path.glob("m-*.gguf"))
    (tmp_path / "same").symlink_to(tmp_path)
    before = [path.read_bytes() for path in (first, second)]
    for output in (first, second, tmp_path / "same" / first.name):
        with pytest.raises(ValueError, match=r"pack: output must be another file than those of the checkpoint, got "):
            headgate.pack(first, output, formats="Q4_0")
    assert [path.read_bytes() for path in (first, second)] == before


def test_a_disk_that_is_full_leaves_nothing(tmp_path, monkeypatch):
    small("olmoe", torch.bfloat16).save_pretrained(tmp_path / "o")
    usage = __import__("shutil")._ntuple_diskusage
    monkeypatch.setattr("headgate.moe.offload.gguf_pack.shutil.disk_usage", lambda _: usage(9, 9, 1000))
    with pytest.raises(OSError, match=r"output must have [\d,]+ bytes for the file, got 1,000 free"):
        headgate.pack(tmp_path / "o", tmp_path / "x.gguf", formats="Q8_0")
    assert [p.name for p in tmp_path.iterdir()] == ["o"]


def test_every_family_is_covered():
    assert FAMILIES.keys() == {*CASES, "deepseek2"}
