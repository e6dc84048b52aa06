"""What is read is what was written: checksums of experts, files that change in use, digests of downloads."""

from __future__ import annotations

import hashlib
import os
import shutil

import pytest
import torch
from offload_cases import L, file_store, offload_threads, weights

transformers = pytest.importorskip("transformers")

import headgate  # noqa: E402
from headgate.moe.offload import FileStore  # noqa: E402
from headgate.moe.offload import offload as offload_module  # noqa: E402
from headgate.moe.offload.moved import Moved  # noqa: E402

IDS = torch.arange(3, 13).reshape(1, 10)


def flip(path, at: int) -> None:
    """One bit of a file, at a byte counted from its end; its time of change stays."""
    about = os.stat(path)
    with open(path, "r+b") as file:
        file.seek(-at, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-at, os.SEEK_END)
        file.write(bytes([byte ^ 4]))
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(1)
    config = transformers.OlmoeConfig(
        hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, num_experts=8,
        num_experts_per_tok=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    made = tmp_path_factory.mktemp("olmoe")
    transformers.OlmoeForCausalLM(config).to(torch.bfloat16).save_pretrained(made, max_shard_size="40KB")
    return made


@pytest.mark.parametrize("verify", ["first", True, False])
def test_when_an_experts_checksum_is_compared(tmp_path, verify):
    made = weights()
    file_store(made, tmp_path / "x").close()
    into = {name: t[0].clone() for name, t in made[0].items()}
    store = FileStore(tmp_path / "x", verify=verify)
    last = L - 1, len(made[0]["w_down"]) - 1
    store.read(*last, into)  # as it was written
    flip(tmp_path / "x", 3)
    for _ in range(2):
        if verify is True:
            with pytest.raises(OSError, match="must have the checksum"):
                store.read(*last, into)
        else:
            store.read(*last, into)
    store.close()
    store = FileStore(tmp_path / "x", verify=verify)
    for _ in range(2):  # what was found once is found again
        if verify:
            with pytest.raises(OSError, match="must have the checksum"):
                store.read(*last, into)
        else:
            store.read(*last, into)
    store.close()
    for bad in ("always", 1, None):
        with pytest.raises(ValueError, match='FileStore: verify must be "first", True or False, got'):
            FileStore(tmp_path / "x", verify=bad)
        with pytest.raises(ValueError, match='load: verify must be "first", True or False, got'):
            headgate.load(tmp_path, verify=bad)


def of_a_layer(folder) -> list:
    return [path for path in folder.glob("*.safetensors") if b".1.mlp.experts" in path.read_bytes()]


@pytest.mark.parametrize("verify", ["first", True, False])
@pytest.mark.filterwarnings("ignore:load. verify")
def test_a_checkpoint_that_is_written_to_while_it_is_used(folder, tmp_path, verify):
    shutil.copytree(folder, tmp_path / "m")
    model, offloaded = headgate.load(tmp_path / "m", "13%", prefetch=None, verify=verify)
    with torch.no_grad():
        model(IDS)
        for path in of_a_layer(tmp_path / "m"):
            os.utime(path)
        if verify:
            with pytest.raises(OSError, match=r"expert \d of model.layers.1.mlp.experts .* must stay as it is while"):
                model(IDS)
        else:
            model(IDS)
    offloaded.close()


@pytest.mark.filterwarnings("ignore:load. verify")
def test_a_checkpoint_that_is_written_to_while_it_is_loaded(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "m")

    def tell(what, done, total):
        if what == "tensors" and done == total:
            os.utime(min(copy.glob("*.safetensors")), ns=(1, 1))

    with pytest.raises(OSError, match="must stay as it is while it is used, got one that was changed"):
        headgate.load(copy, "50%", tell=tell)


def test_what_is_in_a_checkpoint_is_compared_from_the_second_read_on(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    for verify in ("first", True):
        model, offloaded = headgate.load(tmp_path / "m", "13%", prefetch=None, verify=verify)
        with torch.no_grad():
            model(IDS)
            for path in of_a_layer(tmp_path / "m"):
                for at in range(1, path.stat().st_size - 4000, 90):  # somewhere in every expert
                    flip(path, at)
            if verify is True:
                with pytest.raises(OSError, match="must have the checksum"):
                    model(IDS)
            else:
                model(IDS)
        offloaded.close()


def in_the_hubs_cache(folder, path) -> None:
    (folder / "blobs").mkdir(exist_ok=True)
    blob = folder / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
    shutil.move(path, blob)
    path.symlink_to(blob)


def in_a_folder_of_its_own(folder, path) -> None:
    notes = folder / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (notes / f"{path.name}.metadata").write_text(f"{'0' * 40}\n{digest}\n1700000000.0\n")


@pytest.mark.parametrize("note", [in_the_hubs_cache, in_a_folder_of_its_own])
def test_files_are_compared_with_what_was_noted_at_their_download(folder, tmp_path, note, recwarn):
    shutil.copytree(folder, tmp_path / "m")
    files = sorted((tmp_path / "m").glob("*.safetensors"))
    for path in files:
        note(tmp_path / "m", path)
    headgate.load(tmp_path / "m", 1.0, verify=True)[1].close()
    assert not [w for w in recwarn if "verify" in str(w.message)]
    flip(files[-1], 5)
    headgate.load(tmp_path / "m", 1.0)[1].close()
    with pytest.raises(ValueError, match=r"load: SHA-256 of \S+ must be [0-9a-f]{64}, as it was noted at the download"):
        headgate.load(tmp_path / "m", 1.0, verify=True)


def test_files_without_a_note_are_said(folder):
    n = len(list(folder.glob("*.safetensors")))
    with pytest.warns(UserWarning, match=rf"verify: {n} of {n} files have no SHA-256 that was noted at a download"):
        headgate.load(folder, 1.0, verify=True)[1].close()


def test_an_experts_file_that_was_damaged_can_be_closed(stack, tmp_path):
    offloaded = headgate.offload(stack, "40%", "lru", None, tmp_path)
    flip(tmp_path / "experts.safetensors", 3)
    with torch.no_grad(), pytest.raises(OSError, match=r"expert 7 of blocks.2.experts .* must have the checksum"):
        stack(x=torch.randn(200, 32))
    said = r"blocks.2.experts could not be brought back: .*expert 7 must have the checksum.*restore=False\) gives it up"
    for _ in range(2):
        with pytest.raises(OSError, match=said):
            offloaded.close()
    offloaded.close(restore=False)
    assert not offload_threads()


def test_a_beginning_that_fails_says_its_own_cause(stack, tmp_path, monkeypatch):
    """Whatever else goes wrong when it is undone."""
    real, calls = offload_module.send_elsewhere, []

    def send(module, elsewhere):
        calls.append(module)
        if len(calls) == 2:
            raise KeyError("the cause")
        real(module, elsewhere)

    monkeypatch.setattr(offload_module, "send_elsewhere", send)
    monkeypatch.setattr(Moved, "restore", lambda *_: 1 / 0)
    with pytest.raises(KeyError, match="the cause") as caught:
        headgate.offload(stack, "40%", "lru", None, tmp_path)
    assert "could not be brought back: division by zero" in caught.value.__notes__[0]
    assert not offload_threads()
    assert not stack._forward_pre_hooks
