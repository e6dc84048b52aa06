"""A checkpoint's files, from strangers or damaged: the same content or one ordinary error, and nothing is run."""

import hashlib
import json
import os
import pickle
import random
import shutil
import struct
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import headgate

EXTRA = {
    "step": 3, "best": float("inf"), "names": ["a", None, True], "shape": (1, (2, "x")), "seed": 2**80, 7: "seven",
    "$tensor": 0, "raw": b"\x00\xff", "order": OrderedDict(b=1), "size": torch.Size([2]),
    "mean": torch.arange(3.0), "empty": torch.empty(0, 2), "one": torch.tensor(2, dtype=torch.int16),
    "fp8": torch.ones(3).to(torch.float8_e4m3fn), "complex": torch.ones(2, dtype=torch.complex64),
    "turned": torch.arange(6.0).reshape(2, 3).T, "bools": torch.tensor([True, False]), "half": torch.ones(2).bfloat16(),
    "array": np.arange(6, dtype=np.uint32).reshape(2, 3), "number": np.float64(0.5),
}  # fmt: skip


def build(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(headgate.MoE(hidden_size=8, intermediate_size=4, num_experts=4, top_k=2), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, number + 1.0)
    optimizer.step()
    return model, optimizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "a"
    headgate.save_checkpoint(path, *build(), extra=EXTRA)
    return path


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "a"))


def content(model, optimizer, extra):
    state = [v for p in model.parameters() for v in optimizer.state[p].values()]
    return [t.clone() for t in [*model.state_dict().values(), *state]], optimizer.param_groups[0]["lr"], plain(extra)


def plain(x):
    """Comparable with ==."""
    if isinstance(x, torch.Tensor | np.ndarray):
        return str(x.dtype), tuple(x.shape), x.tolist()
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    return type(x)(map(plain, x)) if type(x) in (list, tuple) else x


def same(a, b):
    return a[1:] == b[1:] and all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))


def test_extra_comes_back_as_it_was_and_no_file_holds_a_pickle_of_ours(saved):
    model, optimizer = build(1)
    got = headgate.load_checkpoint(saved, model, optimizer)
    assert plain(got) == plain(EXTRA)
    assert {k: type(v) for k, v in got.items() if k != "order"} == {
        k: tuple if isinstance(v, torch.Size) else type(v) for k, v in EXTRA.items() if k != "order"
    }
    kinds = torch.distributed.checkpoint.FileSystemReader(saved).read_metadata().state_dict_metadata
    assert {type(kind).__name__ for kind in kinds.values()} == {"TensorStorageMetadata"}


def test_state_of_schedulers_and_arrays_in_another_order_of_bytes(tmp_path):
    model, optimizer = build()
    state = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4, 4]).state_dict()
    headgate.save_checkpoint(tmp_path / "a", model, extra=[state, np.arange(3, dtype=">f4")])
    got, numbers = headgate.load_checkpoint(tmp_path / "a", model)
    assert got == state
    assert type(got["milestones"]) is Counter
    assert numbers.tolist() == [0, 1, 2]


class Odd:
    pass


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"a": [1, {"b": Odd()}]}, r"extra\['a'\]\[1\]\['b'\] must be .*, got Odd"),
        ((lambda: 0,), r"extra\[0\] must be .*, got function"),
        ({(1, Odd()): 2}, r"extra: keys of dicts must be .*, got tuple"),
        ({"t": torch.zeros(2).to_sparse()}, r"extra\['t'\] must be .* strided .*, got torch.sparse_coo"),
        ({"t": np.array(["x"])}, r"extra\['t'\] must be .*, got an array of <U1"),
        ([np.zeros(2, "M8[s]")], r"extra\[0\] must be .*, got an array of datetime64"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_anything_is_written(tmp_path, extra, words):
    with pytest.raises(ValueError, match=f"save_checkpoint: {words}"):
        headgate.save_checkpoint(tmp_path / "a", *build(), extra=extra)
    assert not list(tmp_path.iterdir())


def test_a_deep_or_endless_extra_is_refused(tmp_path):
    endless = []
    endless.append(endless)
    with pytest.raises(ValueError, match="save_checkpoint: extra must be nested at most 100 deep"):
        headgate.save_checkpoint(tmp_path / "a", nn.Linear(2, 2), extra=endless)


def test_an_optimizers_plain_state_comes_back(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    x = torch.randn(5, 3)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    headgate.save_checkpoint(tmp_path / "a", model, optimizer)
    other = nn.Linear(3, 2)
    fresh = torch.optim.LBFGS(other.parameters(), max_iter=3)
    headgate.load_checkpoint(tmp_path / "a", other, fresh)
    mine, theirs = (o.state[o.param_groups[0]["params"][0]] for o in (optimizer, fresh))
    assert plain(dict(mine)) == plain(dict(theirs))
    assert mine["old_dirs"]


# --- pickles are not run ---------------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def refused(folder, what=(ValueError, FileNotFoundError)):
    """The words of the error; the module is as it was."""
    model, optimizer = build(1)
    before = [p.clone() for p in model.parameters()]
    state = plain(optimizer.state_dict())
    with pytest.raises(what) as error:
        headgate.load_checkpoint(folder, model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert plain(optimizer.state_dict()) == state
    assert len(str(error.value)) <= 300
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_pickle_in_place_of_the_metadata_is_not_run(folder, tmp_path):
    (folder / "headgate.json").unlink()
    (folder / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "run")))
    assert ".metadata must be undamaged: names must be on the list, got posix system" in refused(folder)
    assert not (tmp_path / "run").exists()


def items_of(folder):
    """(key, file, offset, length) of each entry."""
    found = torch.distributed.checkpoint.FileSystemReader(folder).read_metadata().storage_data
    return [(key.fqn, info.relative_path, info.offset, info.length) for key, info in found.items()]


def test_a_pickle_in_place_of_any_entry_is_not_run(folder, tmp_path):
    """Pickles as `torch.save` and `pickle.dumps` write them, over each entry in turn."""
    torch.save(Bomb(tmp_path / "run"), tmp_path / "bomb")
    for key, name, offset, length in items_of(folder):
        if key == "extra#1":  # of no elements: nobody reads it
            continue
        whole = (folder / name).read_bytes()
        for bomb in ((tmp_path / "bomb").read_bytes(), pickle.dumps(Bomb(tmp_path / "run"))):
            put = bomb[:length].ljust(length, b"\0")
            (folder / name).write_bytes(whole[:offset] + put + whole[offset + length :])
            assert str(folder) in refused(folder)
        (folder / name).write_bytes(whole)
    assert not (tmp_path / "run").exists()


def old_checkpoint(folder, extra):
    """As save_checkpoint wrote it when extras were pickles."""
    model, optimizer = build()
    names = [name for name, _ in model.named_parameters()]
    state = {f"model/{name}": t for name, t in model.state_dict().items()}
    for name in [n for n in state if n.endswith("w_gate_up")]:
        whole = state.pop(name)
        state |= {f"{name}.0": whole[:, :4], f"{name}.1": whole[:, 4:]}
    groups = [{k: v for k, v in g.items() if k != "params"} | {"names": sorted(names)} for g in optimizer.param_groups]
    state |= {"model_other": pickle.dumps({}), "extra": pickle.dumps(extra), "optimizer_groups": pickle.dumps(groups)}
    torch.distributed.checkpoint.save(state, checkpoint_id=folder, no_dist=True)
    return model


def test_a_checkpoint_with_pickles_is_read_only_if_trusted(tmp_path):
    whole = old_checkpoint(tmp_path / "old", Bomb(tmp_path / "run"))
    assert "trusted=True" in refused(tmp_path / "old", ValueError)
    assert not (tmp_path / "run").exists()
    model, optimizer = build(1)
    assert headgate.load_checkpoint(tmp_path / "old", model, optimizer, trusted=True) == 0
    assert (tmp_path / "run").exists()  # what trusting means
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))


def test_a_new_checkpoint_can_be_read_as_trusted(saved):
    model, optimizer = build(1)
    assert plain(headgate.load_checkpoint(saved, model, optimizer, trusted=True)) == plain(EXTRA)


# --- damage ----------------------------------------------------------------------------------------------------------


def mutated(data, rng):
    """One small damage: bytes changed, cut out, put in or repeated; or the end cut off."""
    at, n = rng.randrange(len(data)), rng.choice([1, 1, 1, 2, 8, 100])
    kind = rng.randrange(5)
    if kind == 0:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + rng.randbytes(n) + data[at + n :]
    if kind == 2:
        return data[:at] + data[at + n :]
    if kind == 3:
        return data[:at] + data[at : at + n] + data[at:]
    return data[:at]


@pytest.mark.parametrize(
    ("name", "with_digest", "tries"),
    [(".metadata", True, 20), (".metadata", False, 100), ("__0_0.distcp", True, 100), ("headgate.json", True, 20)],
)
def test_damaged_files_give_the_same_or_one_error(folder, saved, name, with_digest, tries):
    """Without its digest a changed .metadata may tell another story, but never more than an error."""
    model, optimizer = build(1)
    want = content(model, optimizer, headgate.load_checkpoint(saved, model, optimizer))
    whole, rng = (folder / name).read_bytes(), random.Random(7)
    errors = []
    for _ in range(tries):
        model, optimizer = build(1)
        before = [p.clone() for p in model.parameters()]
        (folder / name).write_bytes(mutated(whole, rng))
        if not with_digest:
            resign(folder)
        try:
            got = content(model, optimizer, headgate.load_checkpoint(folder, model, optimizer))
        except (ValueError, FileNotFoundError) as error:
            errors.append(str(error))
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        else:
            assert not with_digest or same(got, want)
    assert errors
    assert all(len(words) <= 300 and str(folder) in words for words in errors)


def resign(folder):
    """As if the stranger had made the .metadata so."""
    data = (folder / ".metadata").read_bytes()
    said = {"format": 2, "metadata_bytes": len(data), "metadata_sha256": hashlib.sha256(data).hexdigest()}
    (folder / "headgate.json").write_text(json.dumps(said))


def test_a_small_metadata_takes_no_memory_and_no_time(folder):
    """A place in the memo of 2^28 takes 2 GB in Python's unpickler; nested tuples kill it when they are hashed."""
    deep = b"\x80\x04}" + b")" + b"\x85" * 200_000 + b"K\x01s."
    wide = b"\x80\x04]\x94" + b"(" + b"h\x00" * 30_000 + b"e."
    for data in (b"\x80\x04Nr" + struct.pack("<I", 2**28) + b".", deep, wide, b"\x80\x04X\xff\xff\xff\x7f", b""):
        (folder / ".metadata").write_bytes(data)
        resign(folder)
        assert ".metadata" in refused(folder, ValueError)


def rewritten(folder, change):
    metadata = torch.distributed.checkpoint.FileSystemReader(folder).read_metadata()
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    resign(folder)


def put(field, value, where="storage_data", key="model/1.weight"):
    def change(metadata):
        table = getattr(metadata, where)
        entry = next(v for k, v in table.items() if getattr(k, "fqn", k) == key)
        object.__setattr__(entry, field, value)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("relative_path", "../a/__0_0.distcp"), "file in the folder, got '../a"),
        (put("relative_path", "/etc/passwd"), "file in the folder, got '/etc/passwd'"),
        (put("relative_path", 7), "relative_path must be the name of a file"),
        (put("offset", 10**9), "must have entries inside the file"),
        (put("offset", -5), "offset must be a whole number of at least 0, got -5"),
        (put("length", True), "length must be a whole number of at least 0, got True"),
        (put("length", 2**70), "length must be a whole number"),
        (put("size", torch.Size([2, 2**40]), "state_dict_metadata"), "1.weight must have chunks"),
        (put("chunks", [], "state_dict_metadata"), "1.weight must have chunks"),
        (put("transform_descriptors", ["zstd"]), "transform_descriptors"),
    ],
)  # fmt: skip
def test_sizes_and_paths_of_the_metadata_are_checked(folder, change, words):
    rewritten(folder, change)
    assert words in refused(folder, ValueError)


def test_chunks_cannot_lie_on_one_another(folder):
    """As many numbers as there should be, but half of them twice and half never."""

    def change(metadata):
        entry = metadata.state_dict_metadata["model/1.weight"]
        (chunk,) = entry.chunks
        half = torch.distributed.checkpoint.metadata.ChunkStorageMetadata(chunk.offsets, torch.Size([1, 8]))
        entry.chunks[:] = [half, half]

    rewritten(folder, change)
    assert "1.weight must have chunks that make up" in refused(folder, ValueError)


def test_chunks_cannot_share_bytes(folder):
    """3,000 entries of one part of a file would be 3,000 copies of it."""

    def change(metadata):
        infos = list(metadata.storage_data.values())
        for info in infos:
            info.offset, info.length = infos[0].offset, max(i.length for i in infos)

    rewritten(folder, change)
    assert "must have entries that do not overlap" in refused(folder, ValueError)


def test_a_pipe_in_place_of_a_file_is_refused_at_once(folder):
    for name in (".metadata", "headgate.json", "__0_0.distcp"):
        (folder / name).rename(folder / "kept")
        os.mkfifo(folder / name)
        assert "must be a regular file" in refused(folder, ValueError)
        (folder / name).unlink()
        (folder / "kept").rename(folder / name)


def test_a_missing_file_is_named(folder):
    (folder / "__0_0.distcp").unlink()
    assert "__0_0.distcp" in refused(folder, FileNotFoundError)
