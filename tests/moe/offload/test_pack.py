"""headgate.pack: the bytes that offload writes, one expert at a time, whole or not at all."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

transformers = pytest.importorskip("transformers")

import headgate  # noqa: E402
from headgate.kernels.quantized import BLOCKS, FORMATS  # noqa: E402
from headgate.moe.offload import FileStore, lower  # noqa: E402

transformers.logging.set_verbosity_error()
IDS = torch.arange(3, 13).reshape(1, 10)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a small random model in several files."""
    torch.manual_seed(1)
    config = transformers.OlmoeConfig(
        hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("olmoe")
    transformers.OlmoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="24KB")
    return folder


def data_of(path) -> bytes:
    """What follows the header, which holds the fingerprint."""
    whole = path.read_bytes()
    return whole[8 + int.from_bytes(whole[:8], "little") :]


MIXED = {"model.layers.1.mlp.experts": ["int4", None, "int8", "int4", None, None, "int8", "int4"]}


@pytest.mark.parametrize("formats", [None, "int8", "mxfp4", MIXED], ids=str)
def test_the_bytes_are_those_of_offload_and_load_takes_them(saved, tmp_path, monkeypatch, formats):
    model = transformers.AutoModelForCausalLM.from_pretrained(saved)
    headgate.replace(model)
    with headgate.offload(model.eval(), "50%", disk=tmp_path / "theirs", formats=formats), torch.no_grad():
        want = model(IDS).logits
    packed, told = tmp_path / "q.experts", []
    headgate.pack(saved, packed, formats=formats, max_memory="1MiB", tell=lambda *done: told.append(done))
    assert told == [(n, 16) for n in range(1, 17)]
    assert data_of(packed) == data_of(tmp_path / "theirs/experts.safetensors")
    headgate.load(saved, "50%", disk=tmp_path / "ours", formats=formats)[1].close()
    assert packed.read_bytes() == (tmp_path / "ours/experts.safetensors").read_bytes()
    monkeypatch.setattr(FileStore, "write_each", lambda *_, **__: 1 / 0)
    model, offloaded = headgate.load(saved, "50%", disk=packed, formats=formats)
    with offloaded, torch.no_grad():
        assert torch.equal(model(IDS).logits, want)
    with pytest.raises(ValueError, match=r"must hold expert 0 of model\.layers\.0\.mlp\.experts as"):
        headgate.load(saved, "50%", disk=packed, formats="fp8")


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and the most of them at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and not t.is_meta and id(t.untyped_storage()) not in self.known:
                storage = t.untyped_storage()
                self.known.add(id(storage))
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, id(storage), storage.nbytes())
        return out

    def _gone(self, which: int, nbytes: int) -> None:
        self.known.remove(which)
        self.now -= nbytes


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """dtype -> a folder with a model whose experts are most of it."""
    made = {}

    def save(dtype: torch.dtype):
        if dtype not in made:
            config = transformers.OlmoeConfig(
                hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=2, vocab_size=64, num_experts=6, num_experts_per_tok=2, pad_token_id=0,
            )  # fmt: skip
            made[dtype] = tmp_path_factory.mktemp("wide")
            transformers.OlmoeForCausalLM(config).to(dtype).save_pretrained(made[dtype])
        return made[dtype]

    return save


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("formats", [None, *FORMATS])
def test_no_more_memory_than_said(wide, tmp_path, formats, dtype):
    folder, output = wide(dtype), tmp_path / "q.experts"
    with pytest.raises(ValueError, match=r"pack: max_memory must be at least [\d,]+ bytes for an expert of") as caught:
        headgate.pack(folder, output, formats=formats, max_memory=1)
    need = int(str(caught.value).split("at least ")[1].split(" bytes")[0].replace(",", ""))
    expert = 3 * 256 * 512 * dtype.itemsize
    assert need == expert if formats is None else expert < need < 40 * expert
    with pytest.raises(ValueError, match="pack: max_memory must be at least"):
        headgate.pack(folder, output, formats=formats, max_memory=need - 1)
    assert not list(tmp_path.iterdir())
    with Live() as live:
        headgate.pack(folder, output, formats=formats, max_memory=need)
    assert expert <= live.most <= need + 4096  # buffers of the model
    if formats is not None:
        assert live.most > need / 4, "the bound is loose"


@pytest.mark.parametrize(
    "shape", [(129, 130), (1030, 64), (33, 2050), (129, 512)], ids=str
)  # blocks that end beyond the weights
def test_what_is_said_holds_for_odd_shapes(shape):
    for dtype in (torch.bfloat16, torch.float32):
        for format in FORMATS:
            rows, columns = shape
            block = BLOCKS.get(format, (1, 1))[0]  # GGUF's blocks must be whole
            weights = {"w_down": torch.randn(1, rows, -(-columns // block) * block).to(dtype)}
            with Live() as live:
                lower.coded(weights, format)
            assert live.most <= lower.room_for(weights, format) - weights["w_down"].nbytes, (dtype, format)


GROWS = """
import sys, headgate
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) << 10
small, large, formats, need = sys.argv[1:]
headgate.pack(small, "small.experts", formats="int8")  # brings what is imported on the way
before = peak()
headgate.pack(large, "large.experts", formats=formats, max_memory=int(need))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("formats", FORMATS)
def test_the_process_grows_no_further(saved, tmp_path, formats):
    """By all that the allocator keeps, too."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("memory is read from /proc")
    config = transformers.OlmoeConfig(
        hidden_size=1024, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64, num_experts=12, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    transformers.OlmoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "large")
    shapes = {"w_gate_up": (1, 2048, 1024), "w_down": (1, 1024, 1024)}
    need = lower.room_for({n: torch.empty(s, dtype=torch.bfloat16, device="meta") for n, s in shapes.items()}, formats)
    command = [sys.executable, "-c", GROWS, saved, tmp_path / "large", formats, str(need)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < need + 16 * 2**20  # the model without weights


KILLED = """
import os, signal, sys, headgate
def tell(done, total):
    if done == 5:
        os.kill(os.getpid(), signal.SIGKILL)
headgate.pack(*sys.argv[1:], formats="int8", tell=tell)
"""


def test_what_a_killed_run_left_goes_with_the_next(saved, tmp_path):
    output = tmp_path / "q.experts"
    done = subprocess.run([sys.executable, "-c", KILLED, saved, output], cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".q.experts-")
    with pytest.raises(ValueError, match="max_memory"):
        headgate.pack(saved, output, max_memory=1)
    headgate.pack(saved, output)
    assert [p.name for p in tmp_path.iterdir()] == ["q.experts"]


def test_an_interrupted_run_leaves_what_was_there(saved, tmp_path):
    output = tmp_path / "q.experts"

    def interrupt(done: int, total: int) -> None:
        if done == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        headgate.pack(saved, output, tell=interrupt)
    assert not list(tmp_path.iterdir())
    headgate.pack(saved, output, formats="int4")
    before = output.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        headgate.pack(saved, output, tell=interrupt)
    assert [p.name for p in tmp_path.iterdir()] == ["q.experts"]
    assert output.read_bytes() == before
    headgate.pack(saved, output)
    assert len(output.read_bytes()) > len(before)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"formats": "int3"}, ValueError, "format must be one of fp8, int8, .*, got 'int3'"),
        ({"formats": ""}, ValueError, "format must be one of"),
        ({"formats": 4}, TypeError, "formats must be a format, or a mapping of modules' names, got 4"),
        ({"formats": {"x": ["int4"]}}, ValueError, "formats must be for modules of experts that are moved, got x"),
        ({"max_memory": "25%"}, ValueError, "pack: max_memory must be bytes of at least 1 .*, got '25%'"),
        ({"max_memory": "0.5"}, ValueError, "max_memory must be bytes"),
        ({"max_memory": 0}, ValueError, "max_memory must be bytes"),
        ({"max_memory": "9" * 400}, ValueError, "max_memory must be bytes"),
        ({"max_memory": True}, TypeError, "max_memory must be bytes"),
        ({"output": "none/q.experts"}, ValueError, "pack: output must be in a folder that is there, got"),
        ({"output": "."}, ValueError, "pack: output must be a new file or an experts file, got"),
        ({"output": "/dev/null"}, ValueError, "pack: output must be a new file or an experts file, got /dev/null"),
        ({"path": "none"}, ValueError, "must be a folder with config.json"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_before_anything_is_written(saved, tmp_path, monkeypatch, change, kind, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FileStore, "write_each", lambda *_, **__: 1 / 0)
    with pytest.raises(kind, match=message):
        headgate.pack(**{"path": saved, "output": "q.experts", **change})
    assert not list(tmp_path.iterdir())


def test_no_file_of_another_kind_is_written_over(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "m")
    shard = min((tmp_path / "m").glob("*.safetensors"))
    for output in (shard, tmp_path / "m/config.json"):
        before = output.read_bytes()
        with pytest.raises(ValueError, match="pack: output must be a new file or an experts file, got"):
            headgate.pack(tmp_path / "m", output)
        assert output.read_bytes() == before


def test_a_disk_without_room_is_said_first(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OSError, match=r"pack: output must have [\d,]+ bytes for the experts, got 1 free"):
        headgate.pack(saved, tmp_path / "q.experts")
    assert not list(tmp_path.iterdir())
