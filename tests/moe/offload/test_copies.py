"""The engine without readers: experts are copied as they are ordered, by the device itself where it is a GPU."""

from __future__ import annotations

import contextlib
import random
from contextlib import closing
from functools import partial

import numpy as np
import pytest
import torch
from offload_cases import (
    E,
    K,
    L,
    batch,
    file_store,
    host_store,
    offload_threads,
    resident,
    run,
    run_at_once,
    weights,
)

from headgate.kernels import Routing, grouped_ffn, quantize
from headgate.moe.offload import Engine, HostStore, Layer
from headgate.moe.offload.copies import Copies
from headgate.moe.offload.groups import Group, whole_step
from headgate.moe.offload.stats import DeviceTiming
from headgate.placement.caching.cache import Cache
from headgate.placement.caching.policies import POLICIES, Setting, policy
from headgate.placement.traces.trace import Trace

MANY = dict(layers=2, experts=40, d=16, f=8)  # slots enough for some of them to be spare
COMPILED = ("lru", "adaptive")  # with the compiled CPU form in `make test`: what a policy decides does not depend on it


def a_trace(layers: int, experts: int) -> Trace:
    rng = np.random.default_rng(3)
    ids = np.argsort(rng.random((layers, 60, experts)), axis=2)[:, :, :K].astype(np.uint8)
    return Trace(ids, experts, sequence=np.repeat(np.arange(3, dtype=np.int32), 20))


def many_steps(engine: Engine, made: list[dict], steps: int = 60, k: int = 6) -> None:
    for i in range(steps):
        layer, tokens = i % len(made), (1, 1, 3, 9)[i // len(made) % 4]
        x, routing = batch(tokens, experts=MANY["experts"], k=k, d=MANY["d"])
        ahead = np.random.permutation(MANY["experts"])[:3]
        y = engine.compute(layer, x, routing, then=lambda _, at=layer, a=ahead: engine.prefetch((at + 1) % 2, a))
        assert torch.equal(y, resident(x, routing, made[layer])), f"step {i}"
    assert not engine.cache.table.busy.any()


@pytest.mark.parametrize(
    ("cpu_form", "name"),
    [
        *(("plain", name) for name in POLICIES),
        *(pytest.param("native", name, marks=() if name in COMPILED else pytest.mark.slow) for name in POLICIES),
    ],
    indirect=["cpu_form"],
)
@pytest.mark.parametrize("scope", ["layer", "shared"])
def test_equals_all_weights_at_hand(name, scope, cpu_form):
    made = weights(**MANY)
    with Engine(
        host_store(made), "60%", policy=name, scope=scope, top_k=6, readers=0, trace=a_trace(2, MANY["experts"])
    ) as engine:
        assert len(engine._spares) == 3
        assert engine.arena.nbytes <= 0.6 * sum(layer.nbytes for layer in engine.layers)
        many_steps(engine, made)
        assert sorted(engine._spares) == [engine.places.slots + i for i in range(3)]
        assert not offload_threads()


@pytest.mark.parametrize("form", [None, "plain", "transposed", "pair", "bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_form_of_weights(form, dtype, cpu_form):
    made = weights(dtype, form=form, bias=form == "bias")
    said = {"gated": form != "plain", "transposed": form == "transposed"}
    with Engine(host_store(made), "30%", top_k=K, readers=0) as engine:
        run(engine, made, steps=12, dtype=dtype, activation="gelu_tanh" if form == "plain" else "silu", **said)


def test_several_kinds_and_few_bits(assert_close):
    """Experts of two formats: no spare slots, and two groups for each step."""
    whole = weights(d=32, f=32)
    few = [{name: quantize(t[4:], "int8") for name, t in w.items()} for w in whole]
    layers = [
        Layer.of(f"m{i}", (range(4), {n: t[:4] for n, t in w.items()}), (range(4, E), q))
        for i, (w, q) in enumerate(zip(whole, few, strict=True))
    ]
    store = HostStore(layers, lambda i: [{n: t[:4] for n, t in whole[i].items()}, few[i]])
    with Engine(store, "70%", top_k=K, readers=0) as engine:
        assert not engine._spares
        for i in range(12):
            x, routing = batch(3, d=32)
            w = {n: torch.cat([t[:4], few[i % L][n].dequantize(torch.float32)]) for n, t in whole[i % L].items()}
            assert_close(engine.compute(i % L, x, routing), resident(x, routing, w), scale=50)


def test_decides_as_the_cache_alone_and_makes_detours():
    """A frank policy lets what a step has just used go: what takes its place comes by a spare slot, and at once."""
    made = weights(**MANY)
    with Engine(host_store(made), "60%", policy="adaptive", top_k=6, readers=0, log=True) as engine:
        cache = Cache(engine.places, policy("adaptive", Setting(2, MANY["experts"], engine.places.slots)))
        detours, groups = 0, 0
        for i in range(80):
            ids = np.sort(np.random.permutation(MANY["experts"])[:6]).astype(np.int32)
            want = cache.step(i % 2, ids)
            engine.log.clear()
            with closing(engine.step(i % 2, ids, together=True)) as found:
                here = [(group.experts, group.slots, len(group.weights["w_down"])) for group in found]
            assert [a.expert for a in engine.log] == want.experts.tolist()
            assert [a.how == "hit" for a in engine.log] == (want.gone == -2).tolist()
            groups += len(here)
            detours += sum(slots[-1] >= engine.places.slots for _, slots, of in here if of > engine.places.slots)
        assert detours > 10
        assert 80 < groups < 80 + 80  # all at once, but for what finds the spare slots taken
        np.testing.assert_array_equal(engine.cache.table.holder, cache.table.holder)
        for layer in range(2):  # everybody has come home
            for e in np.flatnonzero(engine.cache.table.slot_of[layer] >= 0):
                slot = engine.arena.slot(int(engine.cache.table.slot_of[layer, e]))
                assert all(torch.equal(slot[name], made[layer][name][e]) for name in slot)


def test_many_threads_at_once():
    made = weights()
    for scope in ("shared", "layer"):
        with Engine(host_store(made), 0.3, top_k=K, scope=scope, readers=0) as engine:
            run_at_once(engine, made)


def test_a_step_left_early_brings_everybody_home():
    made = weights(**MANY)
    with Engine(host_store(made), "60%", policy="adaptive", top_k=6, readers=0) as engine:
        for i in range(60):
            ids = np.sort(np.random.permutation(MANY["experts"])[:6]).astype(np.int32)
            with closing(engine.step(i % 2, ids)) as groups:
                if i % 3:
                    next(groups)
            assert len(engine._spares) == 3
        many_steps(engine, made, steps=12)


def test_a_store_that_is_gone_is_an_error_with_a_name():
    made = weights()
    with Engine(host_store(made), "30%", top_k=K, readers=0) as engine:
        run(engine, made, steps=3)
        parts, engine.store._parts = engine.store._parts, []
        x, routing = batch(6)
        with pytest.raises(OSError, match=r"expert \d of model\.0\.experts .* could not be read: .* is closed"):
            engine.compute(0, *batch(40))
        engine.store._parts = parts
        run(engine, made)  # what was lost is fetched again
    with pytest.raises(RuntimeError, match="must be open"):
        engine.compute(0, x, routing)


@pytest.mark.parametrize("form", [None, "plain", "transposed", "pair", "bias"])
def test_a_step_in_one_piece(form, assert_close):
    """Slots in any order, tokens without an expert, and ids that are nobody's."""
    (made,) = weights(layers=1, form=form, bias=form == "bias")
    slots = torch.randperm(E)
    w = {name: t[slots.argsort()] for name, t in made.items()}  # expert e stands in slots[e]
    x, routing = batch(4)
    routing.expert_ids[1, 0], routing.expert_ids[2] = -1, E
    said = {"activation": "silu", "gated": form != "plain", "transposed": form == "transposed", "interleaved": False}
    group = Group(list(range(E)), slots.tolist(), w)
    got = whole_step(group, x, routing, routing.expert_ids, said)
    assert_close(got, resident(x, routing, made, **said))


def test_ctrl_c_while_copies_are_ordered_leaves_nothing_wrong(monkeypatch):
    made = weights(**MANY)
    with Engine(host_store(made), "60%", policy="adaptive", top_k=6, readers=0) as engine:
        many_steps(engine, made, steps=12)
        parts, asked = engine.store.parts, []

        def interrupted(layer, expert):
            asked.append(expert)
            if len(asked) % 7 == 3:
                raise KeyboardInterrupt
            return parts(layer, expert)

        def noted(layer, expert, how, gone):
            if random.random() < 0.1:
                raise KeyboardInterrupt

        for i in range(30):
            monkeypatch.setattr(engine.store, "parts", interrupted)
            if i % 2:
                monkeypatch.setattr(engine, "_note", noted)
            x, routing = batch(2, experts=MANY["experts"], k=6, d=MANY["d"])
            with contextlib.suppress(KeyboardInterrupt):
                engine.compute(i % 2, x, routing, then=lambda _: engine.prefetch(0, np.arange(5)))
            monkeypatch.undo()
            assert not engine.cache.table.busy.any()
            assert len(engine._spares) == 3
            many_steps(engine, made, steps=4)
        assert len(asked) > 60


def test_a_gpus_clock(monkeypatch):
    """Whenever it is asked, spans that have ended count once, and what two kinds have in common counts."""

    class Mark:
        now = 0.0  # as far as the GPU has come

        def __init__(self, at):
            self.at = at

        def query(self):
            return self.at <= Mark.now

        def elapsed_time(self, other):
            return 1e3 * (other.at - self.at)

    times = iter([0.0])
    monkeypatch.setattr(DeviceTiming, "_mark", lambda self: Mark(next(times)))
    for asked in ([], [9.0], [1.0, 2.5, 4.0, 9.0, 9.5, 11.0]):
        times = iter([0.0])
        timing = DeviceTiming(torch.device("cuda"))
        spans = [(0, 0.0, 8.0), (1, 0.0, 3.0), (1, 3.0, 10.0), (0, 12.0, 14.0), (1, 13.0, 15.0)]
        for kind, begin, end in spans:
            times = iter([begin, end] if kind == 0 else [end])
            if kind == 0:
                with timing.copying():
                    pass
            else:
                timing.end_computing(Mark(begin))
        for Mark.now in asked:
            copy_s, compute_s, both_s = timing.seconds()
            assert both_s <= min(copy_s, compute_s)
        Mark.now = 20.0
        assert timing.seconds() == pytest.approx((10.0, 12.0, 9.0))
        for i in range(2000):  # nobody asks
            times = iter([30.0 + 2 * i, 31.0 + 2 * i])
            Mark.now = 29.0 + 2 * i
            with timing.copying():
                pass
        assert len(timing._running[0]) < 300
        Mark.now = 1e9
        assert timing.seconds()[0] == pytest.approx(2010.0)
        Mark.now = 0.0


def test_who_may_do_without_readers(tmp_path):
    made = weights()
    with Engine(host_store(made), "30%", top_k=K) as engine:
        assert not isinstance(engine._loader, Copies)  # a CPU has nobody else to copy meanwhile
    store = file_store(made, tmp_path / "x")
    with pytest.raises(
        ValueError, match=r"readers must be at least 1, or 0 for a HostStore \(page-locked, before a GPU\), got 0"
    ):
        Engine(store, "30%", top_k=K, readers=0)
    store.close()


def test_gradients_come_by_detours_too():
    made = weights()
    with Engine(host_store(made), "30%", top_k=K, readers=0) as engine:
        for tokens in (1, 33):
            x, routing = batch(tokens)
            found = []
            for call in (partial(engine.compute, 0), partial(resident, w=made[0])):
                rows = x.clone().requires_grad_()
                found += torch.autograd.grad(call(rows, routing).square().sum(), rows)
            assert torch.equal(*found)
        assert not engine.cache.table.busy.any()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["lru", "adaptive"])
@pytest.mark.parametrize("scope", ["layer", "shared"])
def test_on_a_gpu(name, scope):
    """To the bit at any number of rows, with detours, fetches ahead, no wait in between; copies by its own clock."""
    experts, k = 128, 4
    made = weights(torch.bfloat16, layers=2, experts=experts, d=512, f=256)
    store = HostStore([Layer.of(f"m{i}", (range(experts), w)) for i, w in enumerate(made)], lambda i: [made[i]], "cuda")
    there = [{n: t.cuda() for n, t in w.items()} for w in made]
    with Engine(store, "60%", policy=name, scope=scope, top_k=k, device="cuda") as engine:
        assert isinstance(engine._loader, Copies)
        assert len(engine._spares) == 9  # more than a step of one token can ask for
        for tokens in (1, 9, 200):
            got, want = [], []
            for i in range(30):
                x, routing = batch(tokens, torch.bfloat16, experts=experts, k=k, d=512)
                x, routing = x.cuda(), Routing.from_topk(routing.expert_ids.cuda(), routing.weights.cuda(), experts)
                engine.prefetch((i + 1) % 2, np.random.permutation(experts)[:2])
                got.append(engine.compute(i % 2, x, routing))
                w = there[i % 2]
                want.append(grouped_ffn(x, routing, w["w_gate_up"], w["w_down"]))
            for y, z in zip(got, want, strict=True):
                assert torch.equal(y, z)
        torch.cuda.synchronize()
        stats = engine.stats()
        assert stats.loads * engine.layers[0].kind(0).nbytes == stats.bytes
        assert 0 <= stats.both_s <= min(stats.copy_s, stats.compute_s)
        assert 1e9 < stats.bytes / stats.copy_s < 200e9
