"""The lower tiers: what is written is read, and what is spoiled is refused."""

from __future__ import annotations

import errno
import json
import os
import random
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


# --- a file that is not what it should be ----------------------------------------------------------------------------


def header(path) -> tuple[int, dict]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return 8 + length, json.loads(raw[8 : 8 + length])


def respell(path, change) -> None:
    """Changes the header, at its length."""
    end, said = header(path)
    change(said)
    text = json.dumps(said, separators=(",", ":")).encode()
    with open(path, "r+b") as file:
        file.seek(8)
        file.write(text.ljust(end - 8))


def drop(said: dict, name: str) -> None:
    del said[name]


SPOILED = {
    "empty": (lambda p: p.write_bytes(b""), "got a header of 0 bytes in a file of 0"),
    "text": (lambda p: p.write_bytes(b"not safetensors at all"), "got a header of"),
    "cut in its header": (lambda p: os.truncate(p, 100), "got a header of"),
    "cut by a byte": (lambda p: os.truncate(p, p.stat().st_size - 1), "whole, with"),
    "longer by a byte": (lambda p: p.write_bytes(p.read_bytes() + b"x"), "whole, with"),
    "no json": (lambda p: p.write_bytes((2).to_bytes(8, "little") + b"{x"), "a header that does not say so"),
    "somebody else's": (lambda p: respell(p, lambda s: drop(s, "__metadata__")), "does not say so .KeyError"),
    "a tensor is missing": (lambda p: respell(p, lambda s: drop(s, "c.w_gate_up")), "does not say so"),
    "a tensor too many": (lambda p: respell(p, lambda s: s.update(more=s["c.w_gate_up"])), "are not where"),
    "another dtype": (lambda p: respell(p, lambda s: s["c.w_gate_up"].update(dtype="F16")), "are not where"),
    "an unknown dtype": (lambda p: respell(p, lambda s: s["c.w_gate_up"].update(dtype="F7")), "does not say so"),
    "fewer experts": (lambda p: respell(p, lambda s: s["c.w_gate_up"].update(shape=[1, 3, 7])), "are not where"),
    "moved": (lambda p: respell(p, lambda s: s["c.w_gate_up"].update(data_offsets=[1, 2])), "are not where"),
    "no checksums": (lambda p: respell(p, lambda s: drop(s["__metadata__"], "headgate.crc32")), "does not say so"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_file_is_refused(how, tmp_path):
    layers, made = mixed()
    path = tmp_path / "x"
    FileStore.write(path, layers, made.__getitem__).close()
    spoil, match = SPOILED[how]
    spoil(path)
    with pytest.raises(ValueError, match=rf"FileStore: \S+/x must be a file that FileStore.write wrote.*({match})"):
        FileStore(path)
    assert not [f for f in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{f}") == str(path)]


def about(change):
    """Changes what `headgate.experts` says."""

    def respelled(said):
        inner = json.loads(said["__metadata__"]["headgate.experts"])
        change(inner)
        said["__metadata__"]["headgate.experts"] = json.dumps(inner)

    return lambda path: respell(path, respelled)


def shaped(shape, **more):
    return lambda path: respell(path, lambda said: said["c.w_gate_up"].update(shape=shape, **more))


ODD = {
    "a size that is a float": shaped([2, 3.0, 7]),
    "a size that is a bool": shaped([True, 3, 7]),
    "two negative sizes": shaped([2, -3, -7]),
    "a huge size": shaped([2, 2**63, 2**63]),
    "huge digits": shaped([2, 10**4000]),
    "many sizes": shaped([2] + [1] * 100),
    "no sizes": shaped([]),
    "an offset that is a float": lambda p: respell(
        p, lambda s: s["c.w_gate_up"].update(data_offsets=[float(n) for n in s["c.w_gate_up"]["data_offsets"]])
    ),
    "experts that are floats": about(lambda a: a[0]["groups"][0].__setitem__(0, [0.0, *a[0]["groups"][0][0][1:]])),
    "experts that are bools": about(lambda a: a[0]["groups"][0].__setitem__(0, [False, *a[0]["groups"][0][0][1:]])),
    "experts in text": about(lambda a: a[0]["groups"][0].__setitem__(0, "0123")),
    "a coded weight that is not there": about(lambda a: a[1]["groups"][0][2][0].__setitem__(0, "nothing")),
    "an unknown format": about(lambda a: a[1]["groups"][0][2][0].__setitem__(1, "fp9")),
    "another block": about(lambda a: a[1]["groups"][0][2][0].__setitem__(2, [1, 96])),
    "a block of floats": about(lambda a: a[1]["groups"][0][2][0].__setitem__(2, [1.0, 32.0])),
    "layers that are a number": about(lambda a: a.__setitem__(0, 7)),
    "a long name": about(lambda a: a[0].update(name="x" * 2000)),
    "text that is not UTF-8": lambda p: os.pwrite(os.open(p, os.O_RDWR), b'{"\xff', 8),
    "deep": lambda p: os.pwrite(os.open(p, os.O_RDWR), b"[" * 3000, 8),
}  # fmt: skip


@pytest.mark.parametrize("how", ODD)
def test_an_odd_header_is_one_short_error(how, tmp_path):
    layers, made = mixed()
    path = tmp_path / "x"
    FileStore.write(path, layers, made.__getitem__).close()
    ODD[how](path)
    with pytest.raises(ValueError, match=r"FileStore: \S+/x must be a file that FileStore.write wrote") as error:
        FileStore(path)
    assert len(str(error.value)) <= 300


def test_mutated_headers_give_the_same_or_one_error(tmp_path):
    layers, made = mixed()
    path, rng = tmp_path / "x", random.Random(3)
    FileStore.write(path, layers, made.__getitem__).close()
    whole, end = path.read_bytes(), header(path)[0]
    text = len(whole[:end].rstrip())
    refused = []
    for _ in range(400):
        spoiled = bytearray(whole)
        for _ in range(rng.choice([1, 1, 1, 3])):
            spoiled[rng.randrange(text)] = rng.choice([rng.randrange(256), *b"0129-.[]{},:tf"])
        path.write_bytes(spoiled)
        try:
            store = FileStore(path)
        except ValueError as error:
            refused.append(str(error))
        else:
            assert [[k for _, k in x.groups] for x in store.layers] == [[k for _, k in x.groups] for x in layers]
            store.close()
    assert len(refused) > 200
    assert all(len(words) <= 300 and str(path) in words for words in refused)


def test_a_large_header_of_a_small_file_is_refused_before_it_is_read(tmp_path):
    """99 MB of header took 2.3 GB."""
    length = 99_000_000
    with open(tmp_path / "x", "wb") as file:
        file.write(length.to_bytes(8, "little") + b"[")
        file.truncate(8 + length)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"got a header of 99000000 bytes in a file of 99000008"):
        FileStore(tmp_path / "x")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(ValueError, match=rf"FileStore: {path} must be a regular file"):
            FileStore(path)


def test_the_words_about_another_models_file_are_short(tmp_path):
    made = weights()
    file_store(made, tmp_path / "x").close()
    other = [Layer.of(f"model.layers.{i}.mlp.experts", (range(E), made[0])) for i in range(100)]
    with pytest.raises(ValueError, match="must hold the layers") as error:
        FileStore(tmp_path / "x", other)
    assert len(str(error.value)) <= 300


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        FileStore(tmp_path / "nowhere")


def test_another_models_file_is_refused(tmp_path):
    made = weights()
    file_store(made, tmp_path / "x").close()
    for other, match in [
        (layers_of(made)[:2], r"must hold the layers \['model.0.experts', 'model.1.experts'\], got"),
        (layers_of(weights(experts=9)), "must hold 9 experts of model.0.experts, got 8"),
        (layers_of(weights(f=17)), r"must hold expert 0 of model.0.experts as w_gate_up \[34, 24\] float32, .*got"),
        (layers_of(weights(torch.float16)), r"as w_gate_up \[32, 24\] float16, .* got w_gate_up \[32, 24\] float32"),
    ]:
        with pytest.raises(ValueError, match=match):
            FileStore(tmp_path / "x", other)


def test_a_file_cut_while_it_is_open(tmp_path):
    made = weights()
    store = file_store(made, tmp_path / "x")
    size = (tmp_path / "x").stat().st_size
    os.truncate(tmp_path / "x", size - 10)
    into = {name: t[0].clone() for name, t in made[0].items()}
    n = into["w_down"].nbytes
    store.read(L - 1, E - 2, into)
    with pytest.raises(OSError, match=rf"the file ends: {n} bytes wanted at offset {size - n}, got {n - 10}.*/x'"):
        store.read(L - 1, E - 1, into)
    store.close()


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
