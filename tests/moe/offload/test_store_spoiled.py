"""A file of experts that is not what it should be: spoiled, odd, of another model, cut short."""

from __future__ import annotations

import json
import os
import random
import resource

import pytest
import torch
from offload_cases import E, L, file_store, layers_of, mixed, weights

from headgate.moe.offload import FileStore, Layer


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
