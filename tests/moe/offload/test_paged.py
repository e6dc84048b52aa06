"""Experts computed as they lie in files: in maps of the page cache's own pages, or read past it; the same bits."""

from __future__ import annotations

import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import torch
from offload_cases import batch, file_store, layers_of, resident, weights

from headgate.kernels.routing import Routing
from headgate.moe.offload import Engine, paged
from headgate.moe.offload.arena import Arena
from headgate.moe.offload.checksums import Stamp
from headgate.moe.offload.kinds import Kind
from headgate.moe.offload.paged import Extent, Matrix, Paged, extents, matrices
from headgate.moe.offload.reads import Run
from headgate.moe.offload.shards import Laid, ShardStore

D, F, E, L = 512, 512, 6, 2  # 3 MB an expert in fp32
KIND = Kind.of({"w_gate_up": torch.empty(1, 8, 4, device="meta"), "w_down": torch.empty(1, 4, 4, device="meta")})


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(5)
    return weights(layers=L, experts=E, d=D, f=F)


def strewn(made, folder, **options) -> ShardStore:
    """The same weights in two files as a checkpoint has them: a tensor each for gate, up and down, in any order, from
    multiples of 8 bytes on."""
    rng, parts = random.Random(1), []
    for l, w in enumerate(made):
        for e in range(E):
            gate, up = w["w_gate_up"][e].chunk(2)
            parts += [(l, e, n, t.contiguous()) for n, t in (("gate", gate), ("up", up), ("down", w["w_down"][e]))]
    rng.shuffle(parts)
    runs, files = {}, []
    for number in range(2):
        with open(folder / f"{number}.bin", "w+b") as file:
            for l, e, name, t in parts[number::2]:
                file.write(b"\xff" * 8 * rng.randint(1, 700))  # NaN
                runs[l, e, name] = Run(number, file.tell(), t.nbytes)
                file.write(t.numpy().tobytes())
        files.append((os.open(folder / f"{number}.bin", os.O_RDONLY), folder / f"{number}.bin"))
    laid = [
        {
            "w_gate_up": Laid((E, 2 * F, D), "F32", tuple(runs[l, e, n] for e in range(E) for n in ("gate", "up"))),
            "w_down": Laid((E, D, F), "F32", tuple(runs[l, e, "down"] for e in range(E))),
        }
        for l in range(L)
    ]
    stamps = [Stamp.of(handle) for handle, _ in files]
    return ShardStore(layers_of(made), laid, files, stamps=stamps, **options)


STORES = {
    "file": lambda made, folder, **options: file_store(made, folder / "x", **options),
    "shards": strewn,
}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("page_cache", [True, False], ids=["mapped", "direct"])
@pytest.mark.parametrize("kind", STORES)
def test_any_step_is_grouped_ffn_to_the_bit(kind, page_cache, count, made, tmp_path, threads):
    """Few slots, so that experts of one step take turns and make detours; few rows and many; forward and backward."""
    threads(count)
    store = STORES[kind](made, tmp_path, page_cache=page_cache)
    with Engine(store, "60%", policy="adaptive") as engine:
        assert isinstance(engine.arena, Paged)
        assert engine.arena.mapped == page_cache
        slots = engine.arena.first[-1]
        assert slots == int(0.6 * L * E)
        assert slots * 3 * D * F * 4 <= engine.arena.nbytes <= 1.01 * slots * 3 * D * F * 4
        for tokens, k in ((1, 2), (1, E), (3, 2), (20, 3), (0, 2), (1, 1)) * 3:
            for layer, w in enumerate(made):
                x, routing = batch(tokens, experts=E, k=k, d=D)
                assert torch.equal(engine.compute(layer, x, routing), resident(x, routing, w)), (tokens, k)
        x, routing = batch(5, experts=E, k=2, d=D)
        rows = [x.clone().requires_grad_() for _ in range(2)]
        engine.compute(1, rows[0], routing).square().sum().backward()
        resident(rows[1], routing, made[1]).square().sum().backward()
        assert torch.equal(rows[0].grad, rows[1].grad)
        stats = engine.stats()
        assert 0 < stats.hits < stats.accesses
        assert stats.bytes == stats.loads * 3 * D * F * 4


@pytest.mark.parametrize("page_cache", [True, False], ids=["mapped", "direct"])
def test_what_is_mapped_is_what_the_budget_says(page_cache, made, tmp_path, threads):
    threads(1)
    store = file_store(made, tmp_path / "x", page_cache=page_cache)
    with Engine(store, "60%") as engine:
        for _ in range(3):
            for layer in range(L):
                engine.compute(layer, *batch(8, experts=E, k=2, d=D))
        begin = engine.arena._address
        mapped = [
            (int(a, 16), int(b, 16), words[5:])
            for words in map(str.split, Path("/proc/self/maps").read_text().splitlines())
            for a, b in [words[0].split("-")]
            if words[5:] == [str(tmp_path / "x")]
        ]
        if page_cache:
            assert mapped
            assert sum(b - a for a, b, _ in mapped) <= engine.arena.nbytes
            assert all(begin <= a and b <= begin + engine.arena.nbytes for a, b, _ in mapped)
        else:
            assert not mapped


def test_maps_of_what_is_in_memory_are_made_by_who_needs_them(made, tmp_path, threads, monkeypatch):
    """And nothing is foretold; before that is known, readers are asked."""
    threads(1)
    with Engine(file_store(made, tmp_path / "x"), "60%") as engine:
        assert engine.pace() is not None
        for _ in range(12):
            for layer in range(L):
                engine.compute(layer, *batch(9, experts=E, k=3, d=D))
        if engine._loader._from_disk > 0.1:
            pytest.skip("the file did not stay in the page cache")
        assert engine.pace() is None
        who, load = [], engine.arena.load
        monkeypatch.setattr(engine.arena, "load", lambda *a: (who.append(threading.current_thread()), load(*a)))
        x, routing = batch(9, experts=E, k=3, d=D)
        for layer, w in enumerate(made):
            assert torch.equal(engine.compute(layer, x, routing), resident(x, routing, w))
        assert set(who) == {threading.current_thread()}


@pytest.mark.parametrize("page_cache", [True, False], ids=["mapped", "direct"])
def test_steps_that_are_left_early_and_threads_at_once(page_cache, made, tmp_path, threads):
    threads(1)
    with Engine(strewn(made, tmp_path, page_cache=page_cache), "60%", policy="adaptive") as engine:

        def work(seed):
            generator = torch.Generator().manual_seed(seed)
            for turn in range(8):
                x, routing = batch(4, experts=E, k=3, d=D, generator=generator)
                layer = (seed + turn) % L
                if turn % 3 == seed % 3:
                    with closing(engine.step(layer, sorted(set(routing.expert_ids.flatten().tolist())))) as groups:
                        next(groups)
                assert torch.equal(engine.compute(layer, x, routing), resident(x, routing, made[layer]))

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(work, range(3)))
        assert sorted(engine._spares) == list(range(engine.places.slots, engine.arena.first[-1]))
        assert not engine.cache.table.busy.any()


@pytest.fixture(scope="module")
def many():
    torch.manual_seed(6)
    return weights(torch.bfloat16, layers=1, experts=20, d=D, f=F)


@pytest.mark.parametrize("form", ["mapped", "direct", "copied"])
def test_a_step_left_early_while_an_expert_is_under_way(form, many, tmp_path, threads, monkeypatch):
    """Who came by a spare slot stays what it is, though who was to be in its own slot before it comes late."""
    threads(1)
    if form == "copied":
        monkeypatch.setattr(paged, "_laid_out", lambda *_: None)
    with Engine(file_store(many, tmp_path / "x", page_cache=form == "mapped"), "85%") as engine:
        assert isinstance(engine.arena, Arena if form == "copied" else Paged)
        assert len(engine._spares) == 1
        load, detour, late = engine.arena.load, engine._detour, []
        go, came, over = (threading.Event() for _ in range(3))

        def ordered(layer, expert, slot, chains):
            late[:] = [chains[slot][0].expert, expert]
            return detour(layer, expert, slot, chains)

        def slow(store, layer, expert, slot):
            if late and expert == late[0]:
                go.wait(30)
            load(store, layer, expert, slot)
            if late and expert in late:
                (over if expert == late[0] else came).set()

        monkeypatch.setattr(engine, "_detour", ordered)
        monkeypatch.setattr(engine.arena, "load", slow)
        with closing(engine.step(0, range(20))) as groups:
            next(groups)
            assert came.wait(30)
            threading.Timer(0.1, go.set).start()
        assert over.wait(30)
        for e in late[::-1]:
            x, ids = torch.randn(2, D).bfloat16(), torch.full((2, 1), e, dtype=torch.int32)
            routing = Routing(ids, torch.ones(2, 1), 20)
            assert torch.equal(engine.compute(0, x, routing), resident(x, routing, many[0])), e
        assert not engine.cache.table.busy.any()


def test_closing_waits_for_a_thread_that_maps_for_itself(made, tmp_path, threads, monkeypatch):
    """Else it would map into memory, and from a file number, that are somebody else's by then."""
    threads(1)
    engine = Engine(file_store(made, tmp_path / "x"), "60%")
    engine._loader._from_disk = 0.0
    reads, load, began, go = engine.store.reads, engine.arena.load, threading.Event(), threading.Event()
    handles: list[int] = []

    def slow(*args):
        began.set()
        go.wait(30)
        handles.append(reads.handles[0])
        load(*args)

    monkeypatch.setattr(engine.arena, "load", slow)
    with ThreadPoolExecutor(2) as pool:
        step = pool.submit(lambda: (torch.set_num_threads(1), engine.compute(0, *batch(1, experts=E, k=1, d=D))))
        assert began.wait(30)
        closed = pool.submit(engine.close)
        threading.Timer(0.1, go.set).start()
        with pytest.raises(RuntimeError, match="got one that is closed"):
            step.result(30)
        closed.result(30)
    assert handles[0] >= 0 > reads.handles[0]


def test_places_that_kernels_cannot_count_are_said(made, tmp_path, monkeypatch):
    store = file_store(made, tmp_path / "x")
    monkeypatch.setattr(store, "_offsets", [[[n + 2 for n in group] for group in layer] for layer in store._offsets])
    with pytest.warns(UserWarning, match="weights of 4 bytes begin in their files at multiples of 2 bytes"):
        engine = Engine(store, "60%")
    with engine:
        assert isinstance(engine.arena, Arena)


@pytest.mark.parametrize("page_cache", [True, False], ids=["mapped", "direct"])
def test_a_file_without_a_time_that_was_cut_gives_no_rest_of_another_expert(page_cache, made, tmp_path):
    """In the middle of a page too, and where nothing is compared."""
    store = file_store(made, tmp_path / "x", page_cache=page_cache, verify=False)
    with Engine(store, "60%") as engine:
        assert isinstance(engine.arena, Paged)
        x, routing = batch(1, experts=E, k=2, d=D)
        engine.compute(0, x, routing)
        begin, *_, last = (run.offset for (run,) in store.runs(1, 5).values())
        for size in (last + 2 * D * F + 100, begin + 1000, 10_000):
            os.truncate(tmp_path / "x", size)
            only = Routing(torch.tensor([[5]], dtype=torch.int32), torch.ones(1, 1), E)
            with pytest.raises(OSError, match=r"expert 5 of model\.1\.experts .* the file ends"):
                engine.compute(1, x, only)


@pytest.mark.parametrize("page_cache", [True, False], ids=["mapped", "direct"])
def test_files_that_are_cut_changed_or_damaged_are_heard_of(page_cache, made, tmp_path):
    store = file_store(made, tmp_path / "x", page_cache=page_cache)
    with open(tmp_path / "x", "r+b") as file:
        file.seek(store._offsets[1][0][1] + 2 * D * F * 4 + 77)
        file.write(b"\x5a\xa5")
    with Engine(store, "60%") as engine:
        x, routing = batch(20, experts=E, k=3, d=D)
        assert torch.equal(engine.compute(0, x, routing), resident(x, routing, made[0]))
        with pytest.raises(OSError, match=r"expert 2 of model\.1\.experts .* must have the checksum"):
            engine.compute(1, x, routing)
    for change in ("cut", "written"):
        with Engine(strewn(made, tmp_path, page_cache=page_cache), "60%") as engine:
            if change == "cut":
                os.truncate(tmp_path / "1.bin", 9000)
            else:
                os.utime(tmp_path / "0.bin", ns=(1, 1))
            with pytest.raises(OSError, match=r"of model\.0\.experts .* could not be read"):
                engine.compute(0, x, routing)


def test_when_experts_are_copied(made, tmp_path):
    """Where what is computed must be what was compared, where parts are made, and where pages would cost memory."""
    for store in (
        file_store(made, tmp_path / "x", verify=True),
        file_store(weights(d=64, f=64, experts=E), tmp_path / "y"),
        file_store(weights(layers=1, experts=E, d=D, f=F, bias=True), tmp_path / "z"),
    ):
        with Engine(store, "60%", top_k=1) as engine:
            assert isinstance(engine.arena, Arena)


def test_a_matrix_where_it_lies():
    down, half = Run(0, 640, 64), [Run(1, 8, 64), Run(0, 8192, 64)]
    assert [m.name for m in matrices(KIND, {"w_gate_up": half, "w_down": [down]})] == ["w_gate", "w_up", "w_down"]
    whole = {"w_gate_up": [Run(1, 8, 128)], "w_down": [down]}
    assert matrices(KIND, whole) == [Matrix("w_gate_up", 1, 8, 128), Matrix("w_down", 0, 640, 64)]
    for bad in ([Run(1, 8, 64), Run(1, 72, 32)], [Run(1, 8 * n, 32) for n in range(4)], []):
        assert matrices(KIND, whole | {"w_gate_up": bad}) is None
    assert matrices(KIND, None) is None


def test_pages_are_taken_once():
    of = [Matrix("a", 0, 5000, 100), Matrix("b", 0, 4100, 900), Matrix("c", 0, 12288, 4096), Matrix("d", 1, 5100, 4096)]
    assert extents(of) == [Extent(0, 4096, 1, (1, 0)), Extent(0, 12288, 1, (2,)), Extent(1, 4096, 2, (3,))]
