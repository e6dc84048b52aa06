"""The lower tiers: what is written is read, and what is spoiled is refused."""

from __future__ import annotations

import errno
import os
import resource
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from offload_cases import D, E, F, L, file_store, layers_of, mixed, weights

from headgate.bench.offload.checkpoint import files
from headgate.moe.offload import FileStore, HostCache, HostStore, Kind, Layer, reads
from headgate.moe.offload.arena import Arena, plan_slots
from headgate.moe.offload.kinds import split


def check_all(store, layers: list[Layer], made: list[list[dict]]) -> None:
    for l, layer in enumerate(layers):
        for e in range(layer.experts):
            group, row = layer.places[e]
            into = {p.name: torch.full(p.shape, 7, dtype=p.dtype) for p in layer.kind(e).parts}
            store.read(l, e, into)
            for name, t in split(made[l][group]).items():
                assert torch.equal(into[name], t[row]), (l, e, name)


STORES = {
    "host": lambda layers, made, path: HostStore(layers, made.__getitem__),
    "file": lambda layers, made, path: FileStore(path, layers),
    "file, verified": lambda layers, made, path: FileStore(path, layers, verify=True),
    "file, no page cache": lambda layers, made, path: FileStore(path, layers, page_cache=False),
    "host cache": lambda layers, made, path: HostCache(FileStore(path), "60%"),
}


@pytest.mark.parametrize("kind", STORES)
def test_every_expert_comes_back(kind, tmp_path):
    layers, made = mixed()
    FileStore.write(tmp_path / "x", layers, made.__getitem__).close()
    store = STORES[kind](layers, made, tmp_path / "x")
    assert tuple(store.layers) == tuple(layers)
    check_all(store, layers, made)
    check_all(store, layers, made)
    store.close()
    with pytest.raises(OSError, match="closed"):
        store.read(0, 0, {p.name: torch.empty(p.shape, dtype=p.dtype) for p in layers[0].kind(0).parts})
    store.close()


def test_slots_that_are_not_contiguous_are_filled_too(tmp_path):
    made = weights()
    store = file_store(made, tmp_path / "x")
    into = {"w_gate_up": torch.empty(D, 2 * F).T, "w_down": torch.empty(F, D).T}
    store.read(1, 2, into)
    assert all(torch.equal(into[name], made[1][name][2]) for name in into)
    store.close()


def test_weights_of_any_strides_are_written(tmp_path):
    made = weights()
    turned = [{name: t.transpose(1, 2).contiguous().transpose(1, 2) for name, t in w.items()} for w in made]
    store = file_store(turned, tmp_path / "x", verify=True)
    check_all(store, layers_of(made), [[w] for w in made])
    store.close()


def test_others_read_the_file(tmp_path):
    load_file = pytest.importorskip("safetensors.torch").load_file
    layers, made = mixed()
    FileStore.write(tmp_path / "x", layers, made.__getitem__).close()
    found = load_file(tmp_path / "x")
    assert set(found) == {"a.b.w_gate_up", "a.b.b_down", "c.w_down.data", "c.w_down.scale", "c.w_gate_up",
                          "c.w_down#1", "c.w_gate_up#1"}  # fmt: skip
    assert torch.equal(found["a.b.w_gate_up"], made[0][0]["w_gate_up"])
    assert torch.equal(found["c.w_down#1"], made[1][1]["w_down"])


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc")
def test_maps_of_the_file_are_not_the_processs_own_memory(tmp_path):
    """`ulimit -d` counts what a process could write into: of a file, nothing, unless it shall be `writable`."""
    made = [{"w_down": torch.zeros(8, 2048, 2048)}]  # 128 MiB
    store = file_store(made, tmp_path / "x")
    said = Path("/proc/self/status").read_text().splitlines()
    taken = int(next(line for line in said if line.startswith("VmData")).split()[1]) << 10
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (taken + (64 << 20), hard))
    try:
        found = store.whole(0)
        assert torch.equal(found["w_down"][7], made[0]["w_down"][7])
        with pytest.warns(UserWarning, match=r"experts' parameters have no numbers: a limit .* for a map of \S+/x"):
            assert not store.whole(0, writable=True)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    store.close()


def test_layers_are_asked_for_once_in_order_and_may_be_let_go(tmp_path):
    made, asked = weights(), []

    def give(i):
        asked.append(i)
        return [made[i]]

    FileStore.write(tmp_path / "x", layers_of(made), give)
    HostStore(layers_of(made), give)
    assert asked == [*range(L), *range(L)]


def test_a_store_that_is_lent_is_there_until_both_are_closed():
    layers, made = mixed()
    store = HostStore(layers, made.__getitem__)
    for first, last in ((store.lend(), store.lend()), (store.lend(), store)):
        check_all(first, layers, made)
        first.close()
        with pytest.raises(OSError, match="closed"):
            first.parts(0, 0)
        check_all(last, layers, made)
    lent = store.lend()
    assert lent.whole(0)["w_gate_up"].data_ptr() == made[0][0]["w_gate_up"].data_ptr(), "no copy"
    store.close()
    check_all(lent, layers, made)


@pytest.mark.parametrize("page_cache", [True, False])
def test_reads_that_are_short_go_on(page_cache, monkeypatch, tmp_path):
    made = weights()
    store = file_store(made, tmp_path / "x", page_cache=page_cache)
    whole, calls = os.preadv, []

    def short(file, buffers, offset):
        calls.append(offset)
        return min(whole(file, buffers, offset), 1 + len(buffers[0]) // 3)

    monkeypatch.setattr(os, "preadv", short)
    check_all(store, store.layers, [[w] for w in made])
    assert len(calls) > 4 * L * E
    store.close()


def test_a_flipped_bit_is_seen_where_it_is_looked_for(tmp_path):
    made = weights()
    file_store(made, tmp_path / "x").close()
    with open(tmp_path / "x", "r+b") as file:
        file.seek(-3, os.SEEK_END)
        byte = file.read(1)
        file.seek(-3, os.SEEK_END)
        file.write(bytes([byte[0] ^ 4]))
    store = FileStore(tmp_path / "x", verify=True)
    into = {name: t[0].clone() for name, t in made[0].items()}
    store.read(L - 1, E - 2, into)
    with pytest.raises(OSError, match=rf"layer {L - 1}, expert {E - 1} must have the checksum [0-9a-f]{{8}}, got"):
        store.read(L - 1, E - 1, into)
    store.close()


def test_large_aligned_parts_pass_by_the_page_cache(tmp_path, monkeypatch):
    """Parts of whole pages go through O_DIRECT, where the file system has it, into slots that begin on pages."""
    made = weights(layers=1, experts=4, d=64, f=64)
    store = file_store(made, tmp_path / "x", page_cache=False)
    if store.reads.direct[0] < 0:
        pytest.skip("this file system has no O_DIRECT")
    files, read = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, *rest: files.append(file) or read(file, *rest))
    kinds, slots, *_ = plan_slots(store.layers, 1.0, 1, "layer")
    arena = Arena(kinds, slots, "cpu")
    for e in range(4):
        store.read(0, e, arena.slot(e))
        assert all(torch.equal(t, made[0][name][e]) for name, t in arena.slot(e).items())
    assert set(files) == set(store.reads.direct)
    store.close()


@pytest.mark.parametrize("page_cache", [True, False])
def test_pieces_that_begin_and_end_anywhere(page_cache, tmp_path, monkeypatch):
    """Past the page cache, too, which then holds nothing of the file."""
    monkeypatch.setattr(reads, "_BUFFER", 3 * 4096)
    data = np.random.default_rng(0).integers(0, 256, 70_001, np.uint8)
    path = tmp_path / "x"
    path.write_bytes(data.tobytes())
    cold = files.drop([path]) == 0  # not in memory alone, as on tmpfs
    some = reads.Reads([(os.open(path, os.O_RDONLY), path)], page_cache=page_cache)
    for offset, size in ((0, 1), (8, 4096), (4095, 2), (4096, 8192), (5000, 20_000), (70_000, 1), (3, 69_998), (9, 0)):
        into = np.full(size, 255, np.uint8)
        some.fill([reads.Piece(memoryview(into), 0, offset)])
        assert np.array_equal(into, data[offset : offset + size])
    if cold and some.direct[0] >= 0:
        assert files.cached_share([path]) == 0
    with pytest.raises(OSError, match="10000 bytes wanted at offset 65537, got 4464"):
        some.fill([reads.Piece(memoryview(np.empty(10_000, np.uint8)), 0, 65_537)])
    some.close()


# --- whole or not at all ---------------------------------------------------------------------------------------------


@contextmanager
def files_of_at_most(nbytes: int):
    """The system lets this process write no file past so many bytes, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_older_file(tmp_path):
    made = weights()
    file_store(made, tmp_path / "x").close()
    before = (tmp_path / "x").read_bytes()
    with pytest.raises(OSError, match="File too large") as found, files_of_at_most(10_000):
        file_store(weights(), tmp_path / "x")
    assert (found.value.errno, found.value.filename) == (errno.EFBIG, str(tmp_path / "x"))
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == before


@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_error_while_writing_leaves_nothing(at, tmp_path):
    made = weights()

    def give(i):
        if i == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return [made[i]]

    with pytest.raises(OSError, match=r"No space left on device: '.*/x'"):
        FileStore.write(tmp_path / "x", layers_of(made), give)
    assert not os.listdir(tmp_path)


def test_what_cannot_be_written_is_refused(tmp_path):
    made = weights()
    layers = layers_of(made)
    for name, write, match in [
        (
            "other shapes",
            lambda: FileStore.write(tmp_path / "x", layers, lambda i: weights(f=17)[:1]),
            "must be 8 of",
        ),
        (
            "twice",
            lambda: FileStore.write(tmp_path / "x", layers[:1] * 2, lambda i: [made[0]]),
            "must differ",
        ),
        ("host", lambda: HostStore(layers, lambda i: weights(f=17)[:1]), "of model.0.experts must be 8 of"),
    ]:
        with pytest.raises(ValueError, match=match):
            write()
        assert not os.listdir(tmp_path), name


def test_bad_layers():
    w = weights()[0]
    with pytest.raises(ValueError, match=r"one n of at least 1, got \{'w_gate_up': 8, 'w_down': 7\}"):
        Kind.of({"w_gate_up": w["w_gate_up"], "w_down": w["w_down"][:7]})
    for experts, match in [
        ((0, 1, 2, 3, 4, 5, 6), "must have weights for 7 experts, got 8"),
        ((0, 1, 2, 3, 4, 5, 7, 8), "must have experts 0, 1"),
        ((1, 0, 2, 3, 4, 5, 6, 7), "rising in each"),
    ]:
        with pytest.raises(ValueError, match=match):
            Layer.of("x", (experts, w))
