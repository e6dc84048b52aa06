"""The offload engine: to the bit what all weights at hand give, whatever stands in slots; see test_offload_trouble."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import fields

import numpy as np
import pytest
import torch
from offload_cases import (
    D,
    E,
    K,
    L,
    Watched,
    batch,
    file_store,
    host_store,
    resident,
    run,
    run_at_once,
    soon,
    weights,
)

from headgate.kernels import quantize
from headgate.kernels.grouped_ffn import grouped_ffn
from headgate.kernels.routing import Routing
from headgate.moe.offload import Engine, HostCache, HostStore, Layer
from headgate.moe.offload.stats import Stats, Timing
from headgate.placement.caching.cache import Cache
from headgate.placement.caching.policies import POLICIES, Setting, policy

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


def needs_no_trace(name: str) -> bool:
    try:
        policy(name, Setting(L, E, 6))
    except ValueError:
        return False
    return True


FREE = [name for name in POLICIES if needs_no_trace(name)]
COMPILED = ("lru", "adaptive")  # with the compiled CPU form in `make test`: what a policy decides does not depend on it


# --- right, to the bit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpu_form", "name"),
    [
        *(("plain", name) for name in FREE),
        *(pytest.param("native", name, marks=() if name in COMPILED else pytest.mark.slow) for name in FREE),
    ],
    indirect=["cpu_form"],
)
@pytest.mark.parametrize("scope", ["layer", "shared"])
def test_equals_all_weights_at_hand(name, scope, cpu_form, tmp_path):
    made = weights()
    for budget in ("30%", 0.9):
        with Engine(file_store(made, tmp_path / "x"), budget, policy=name, scope=scope, top_k=K) as engine:
            run(engine, made)


@pytest.mark.parametrize("form", [None, "plain", "transposed", "pair", "interleaved", "bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_form_of_weights(form, dtype, cpu_form):
    made = weights(dtype, form=form, bias=form in ("bias", "interleaved"))
    said = {"gated": form != "plain", "transposed": form == "transposed", "interleaved": form == "interleaved"}
    with Engine(host_store(made), "30%", top_k=K) as engine:
        run(engine, made, steps=12, dtype=dtype, activation="gelu_tanh" if form == "plain" else "silu", **said)


def test_the_least_budget_and_none_less():
    """Slots for one layer's top-k experts, shared by all layers: prefills take many waves."""
    made = weights()
    least = K * sum(t[0].nbytes for t in made[0].values())
    with Engine(host_store(made), least, top_k=K, scope="shared") as engine:
        assert engine.arena.nbytes == least
        run(engine, made, tokens=(1, 33))
    with pytest.raises(ValueError, match=rf"budget must be at least {least} bytes, for 2 experts of one layer, got"):
        Engine(host_store(made), least - 1, top_k=K, scope="shared")
    with pytest.raises(ValueError, match=rf"budget must be at least {L * least} bytes, for 2 experts of each layer"):
        Engine(host_store(made), least, top_k=K)


def test_no_tokens_no_experts_and_repeated_ones(cpu_form):
    made = weights()
    with Engine(host_store(made), "30%", top_k=K) as engine:
        for ids in (torch.zeros(0, 2), torch.full((3, 2), -1), torch.full((3, 2), 4), torch.tensor([[1, -1], [E, 1]])):
            x, routing = torch.randn(len(ids), D), Routing.from_topk(ids.long(), torch.rand(ids.shape), E)
            assert torch.equal(engine.compute(0, x, routing), resident(x, routing, made[0]))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_made_and_used_without_gradients(mode, tmp_path):
    """Readers are other threads, in which the mode does not hold."""
    made = weights()
    with mode():
        for store in (host_store(made), file_store(made, tmp_path / "x")):
            with Engine(store, "30%", top_k=K) as engine:
                run(engine, made, steps=9)
    with Engine(host_store(made), "30%", top_k=K) as engine, mode():
        run(engine, made, steps=9)


def test_junk_fetched_ahead_changes_nothing():
    made = weights()
    with Engine(host_store(made), "40%", top_k=K) as engine:
        for i in range(40):
            x, routing = batch((1, 7)[i % 2])
            for layer in random.sample(range(L), 2):
                engine.prefetch(layer, np.random.permutation(E)[:4])
            assert torch.equal(engine.compute(i % L, x, routing), resident(x, routing, made[i % L]))
        stats = engine.stats()
    assert stats.ahead > stats.used > 0


def test_many_threads_at_once():
    """Slots for hardly more than one step: some wait for others' slots, share loads, and reuse what is on its way."""
    made = weights()
    nap = Watched(host_store(made), lambda *_: time.sleep(random.random() / 500))
    for scope in ("shared", "layer"):
        with Engine(nap, 0.3, top_k=K, scope=scope) as engine:
            run_at_once(engine, made)
        nap = Watched(host_store(made))


def test_several_kinds_in_one_layer(assert_close):
    """Some experts in four bits, the others whole: pairs are computed kind by kind, and summed together."""
    torch.manual_seed(1)
    whole = weights(d=128, f=64)
    few = [0, 3, 4, 7]
    rest = [e for e in range(E) if e not in few]
    groups = [
        [
            {name: quantize(t[few], "int4", block=(1, 32)) for name, t in w.items()},
            {name: t[rest] for name, t in w.items()},
        ]
        for w in whole
    ]
    layers = [Layer.of(f"m{i}", (few, g[0]), (rest, g[1])) for i, g in enumerate(groups)]
    for w, g in zip(whole, groups, strict=True):
        for name, t in w.items():
            t[few] = g[0][name].dequantize(torch.float32)
    with Engine(HostStore(layers, groups.__getitem__), "50%", top_k=K) as engine:
        assert len(engine.arena.kinds) == 2
        for i in range(9):
            x, routing = batch((1, 9)[i % 2], d=128)
            assert_close(engine.compute(i % L, x, routing), resident(x, routing, whole[i % L]))


# --- the same decisions as the simulator's ---------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["layer", "shared"])
@pytest.mark.parametrize("name", FREE)
def test_decides_as_the_cache_alone_access_by_access(name, scope):
    """However fast reads are: the log is what a fresh Cache says to the same steps and fetches."""
    made = weights()
    store = Watched(host_store(made), lambda *_: time.sleep(random.random() / 1000))
    with Engine(store, "40%", policy=name, scope=scope, top_k=K, log=True) as engine:
        cache = Cache(engine.places, policy(name, Setting(L, E, engine.places.slots)))
        want = []
        for i in range(30):
            x, routing = batch((1, 1, 12)[i % 3])
            ids = np.unique(routing.expert_ids.numpy())
            if i == 15:
                engine.new_sequence()
                cache.new_sequence()
            engine.compute(i % L, x, routing)
            step = cache.step(i % L, ids)
            rows = zip(step.experts.tolist(), step.gone.tolist(), strict=True)
            want += [(i % L, e, "hit" if g == -2 else "miss", max(g, -1)) for e, g in rows]
            guess = np.random.permutation(E)[:3]
            engine.prefetch((i + 1) % L, guess)
            ahead = cache.prefetch((i + 1) % L, guess)
            rows = zip(ahead.experts.tolist(), ahead.gone.tolist(), strict=True)
            want += [((i + 1) % L, e, "ahead", g) for e, g in rows]
        assert [tuple(a)[1:] for a in engine.log if a.how != "kept"] == want
        stats = engine.stats()
    assert stats.hits == sum(how == "hit" for _, _, how, _ in want)
    assert stats.ahead == sum(how == "ahead" for _, _, how, _ in want)


def test_nothing_is_read_twice():
    made = weights()
    store = Watched(host_store(made))
    with Engine(store, 1.0, top_k=K) as engine:
        for i in range(3 * L):
            engine.prefetch(i % L, range(0, E, 2))  # some still on their way when the step comes
            x, routing = batch(40)
            assert torch.equal(engine.compute(i % L, x, routing), resident(x, routing, made[i % L]))
        assert set(store.reads.values()) == {1}
        assert len(store.reads) == L * E
        assert engine.stats().loads == L * E
        assert engine.stats().bytes == sum(t.nbytes for w in made for t in w.values())


def test_a_fetch_that_is_displaced_before_it_begins_is_not_read():
    made = weights()
    gate = threading.Event()
    store = Watched(host_store(made), lambda layer, expert, nth: gate.wait(30) if expert == 7 else None)
    with Engine(store, K * L * sum(t[0].nbytes for t in made[0].values()), top_k=K, readers=1) as engine:
        engine.prefetch(1, [7])  # keeps the one reader
        engine.prefetch(0, [5, 6])
        chosen = Routing.from_topk(torch.tensor([[0, 1]]), torch.ones(1, 2), E)
        x, out = torch.randn(1, D), []
        thread = threading.Thread(target=lambda: out.append(engine.compute(0, x, chosen)))
        thread.start()
        assert soon(lambda: engine.cache.table.slot_of[0, 1] >= 0)
        gate.set()
        thread.join(30)
        assert torch.equal(out[0], resident(x, chosen, made[0]))
    assert set(store.reads) == {(1, 7), (0, 0), (0, 1)}


@pytest.mark.parametrize("between", [[], [0, 1], [0, 1, 2, 3]])
def test_a_load_into_a_slot_waits_for_one_that_is_running_there(between):
    """A fetch ahead is being read as a step takes its slot: the step's own load comes after it, never before; nor where
    another step, `between`, has ordered loads for this slot and was left before they began."""
    made, gate = weights(), threading.Event()
    store = Watched(host_store(made), lambda layer, expert, nth: gate.wait(30) if expert == 7 else None)
    with Engine(store, K * L * sum(t[0].nbytes for t in made[0].values()), top_k=K, readers=3) as engine:
        engine.prefetch(0, [7])
        assert soon(lambda: store.reads[0, 7] == 1)
        if between:
            with pytest.raises(ZeroDivisionError), closing(engine.step(0, between, lambda ids: 1 / 0)) as step:
                next(step)
        chosen = Routing.from_topk(torch.tensor([[2, 3]]), torch.ones(1, 2), E)
        x, out = torch.randn(1, D), []
        thread = threading.Thread(target=lambda: out.append(engine.compute(0, x, chosen)))
        thread.start()
        assert soon(lambda: engine.cache.table.slot_of[0, 3] >= 0)
        time.sleep(0.1)
        assert not out
        assert store.reads[0, 2] + store.reads[0, 3] == 1
        gate.set()
        thread.join(30)
        for y in (out[0], engine.compute(0, x, chosen)):
            assert torch.equal(y, resident(x, chosen, made[0]))


def test_computes_what_is_there_while_the_rest_is_on_its_way():
    made = weights()
    gate = threading.Event()
    store = Watched(host_store(made), lambda layer, expert, nth: gate.wait(30) if expert == 3 else None)
    with Engine(store, "60%", top_k=K) as engine:
        with closing(engine.step(0, np.array([1]))) as step:
            assert [g.experts for g in step] == [[1]]
        with closing(engine.step(0, np.array([1, 2, 3]))) as step:
            first = next(step).experts
            if first == [1]:
                first += next(step).experts
            assert first == [1, 2]
            gate.set()
            assert [g.experts for g in step] == [[3]]


def test_times_alone_and_at_once(monkeypatch):
    """Two copies, one behind the other, from 1 to 5 and from 4 to 8; computation from 3 to 10."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    timing = Timing()
    first, second = timing.copying(), timing.copying()
    turns = {1: first.__enter__, 3: timing.begin_computing, 4: second.__enter__, 5: lambda: first.__exit__(*[None] * 3),
             8: lambda: second.__exit__(*[None] * 3), 10: timing.end_computing}  # fmt: skip
    for now[0], turn in turns.items():
        turn()
    now[0] = 20
    assert timing.seconds() == (7, 7, 5)
    stats = Stats(**dict.fromkeys((f.name for f in fields(Stats)), 0) | {"copy_s": 7, "compute_s": 9, "both_s": 5})
    assert stats.overlap == 5 / 7


# --- tiers -----------------------------------------------------------------------------------------------------------


def test_a_cache_in_host_memory_between(tmp_path):
    made = weights()
    disk = Watched(file_store(made, tmp_path / "x", verify=True))
    middle = HostCache(disk, "60%")
    with Engine(middle, "30%", top_k=K) as engine:
        run(engine, made, steps=48)
        asked = engine.stats().loads
    assert middle.hits + middle.loads == asked
    assert sum(disk.reads.values()) == middle.loads < asked


def test_a_failure_below_a_host_cache_is_not_kept(tmp_path):
    made = weights()

    def first_two(layer, expert, nth):
        if nth <= 2:
            raise OSError(5, "bad sector")

    middle = HostCache(Watched(host_store(made), first_two), "60%")
    with Engine(middle, "60%", top_k=K) as engine:
        x, routing = batch(1)
        with pytest.raises(OSError, match="bad sector"):
            engine.compute(0, x, routing)
        for _ in range(3):
            try:
                y = engine.compute(0, x, routing)
            except OSError:
                continue
        assert torch.equal(y, resident(x, routing, made[0]))
        assert not middle.cache.table.busy.any()


RESIDENT = """
import os, re, sys, torch
from headgate.kernels.routing import Routing
from headgate.moe.offload import Engine, FileStore, Layer
L, E, D, F, K, BUDGET = 4, 32, 512, 256, 4, 48 << 20

def rss(what):
    return int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10

def made(i, **how):
    return [{"w_gate_up": torch.full((E, 2 * F, D), i + 0.5, **how), "w_down": torch.full((E, D, F), i - 0.5, **how)}]

layers = [Layer.of(f"m{i}", (range(E), made(i, device="meta")[0])) for i in range(L)]
if not os.path.exists(sys.argv[1]):
    FileStore.write(sys.argv[1], layers, made)
store = FileStore(sys.argv[1], layers, page_cache=sys.argv[2] == "cached")
whole = sum(x.nbytes for x in layers)

def run(steps, engine):
    for i in range(steps):
        ids = torch.rand(2, E).argsort(1)[:, :K]
        engine.compute(i % L, torch.randn(2, D), Routing.from_topk(ids, torch.rand(2, K), E))

with Engine(FileStore(sys.argv[1]), 4 * K * layers[0].kind(0).nbytes, top_k=K) as small:
    run(8, small)  # what the first calls take is not the experts'
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark begins here
before = rss("VmRSS")
with Engine(store, BUDGET, top_k=K) as engine:
    run(120, engine)
    print(whole, engine.arena.nbytes, rss("VmHWM") - before, engine.stats().bytes)
print(rss("VmRSS") - before)
"""


@pytest.fixture(scope="module")
def large_file(tmp_path_factory):
    return tmp_path_factory.mktemp("large") / "experts"


@pytest.mark.slow
@pytest.mark.parametrize("pages", ["cached", "direct"])
def test_the_resident_set_keeps_to_the_budget(pages, large_file, tmp_path):
    """201 MB of experts on disk, 48 MiB of slots: as the kernel counts it."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RESIDENT, str(large_file), pages]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    whole, slots, grown, read, left = map(int, done.stdout.split())
    budget, other = 48 << 20, 6 << 20
    assert whole >= 4 * budget
    assert read > 2 * budget
    print(f"slots {slots}, resident set grew by {grown}, left {left}, read {read}")
    assert budget - 2 * (whole // 128) < slots <= budget
    assert slots / 2 < grown <= budget + other, f"grew by {grown} bytes"
    assert left < other, f"{left} bytes are left after close()"


@pytest.mark.gpu
@pytest.mark.parametrize("tier", ["host", "host, readers", "file", "host cache"])
def test_on_a_gpu(tier, tmp_path, assert_close):
    """Many steps without a wait in between: a slot must not be filled while kernels read it."""
    made = weights(layers=2, d=256, f=128)
    store = HostStore([Layer.of(f"m{i}", (range(E), w)) for i, w in enumerate(made)], lambda i: [made[i]], "cuda")
    if not tier.startswith("host,") and tier != "host":
        store = file_store(made, tmp_path / "x")
    if tier == "host cache":
        store = HostCache(store, "60%")
    there = [{name: t.cuda() for name, t in w.items()} for w in made]
    readers = 2 if tier == "host, readers" else None
    with Engine(store, "30%", top_k=K, device="cuda", readers=readers) as engine:
        for tokens in (1, 8, 64):
            got, want = [], []
            for i in range(20):
                x, routing = batch(tokens, d=256)
                x, routing = x.cuda(), Routing.from_topk(routing.expert_ids.cuda(), routing.weights.cuda(), E)
                engine.prefetch((i + 1) % 2, np.random.permutation(E)[:2])
                got.append(engine.compute(i % 2, x, routing))
                w = there[i % 2]
                want.append(grouped_ffn(x, routing, w["w_gate_up"], w["w_down"]))
            for y, z in zip(got, want, strict=True):
                assert torch.equal(y, z) if tokens >= 5 else True
                assert_close(y, z)
