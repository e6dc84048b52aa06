"""The offload engine when something goes wrong: the right answer or a clear error, never a hang."""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import pickle
import random
import signal
import threading
import time
import weakref
from contextlib import closing

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
    offload_threads,
    resident,
    run,
    soon,
    weights,
)

from headgate.kernels.routing import Routing
from headgate.moe.offload import Engine, HostCache

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


def test_a_read_that_fails_once_is_tried_again():
    made = weights()

    def once(layer, expert, nth):
        if nth == 1:
            raise OSError(5, "the disk has coughed")

    store = Watched(host_store(made), once)
    with Engine(store, "40%", top_k=K) as engine:
        run(engine, made)


def test_an_expert_that_cannot_be_read_is_named_and_the_others_go_on():
    made, ill = weights(), threading.Event()

    def sick(layer, expert, nth):
        if ill.is_set() and (layer, expert) == (1, 3):
            raise OSError(5, "bad sector")

    store = Watched(host_store(made), sick)
    x, good = torch.randn(2, D), Routing.from_topk(torch.tensor([[0, 1], [2, 0]]), torch.ones(2, 2), E)
    bad = Routing.from_topk(torch.tensor([[0, 3], [2, 3]]), torch.ones(2, 2), E)
    ill.set()
    with Engine(store, "60%", top_k=K) as engine:
        for _ in range(3):
            with pytest.raises(OSError, match=r"expert 3 of model\.1\.experts \(layer 1\) could not be read: .*bad"):
                engine.compute(1, x, bad)
            assert torch.equal(engine.compute(1, x, good), resident(x, good, made[1]))
        engine.prefetch(1, [3])
        assert soon(lambda: engine.prefetch(1, [3]) == 1), "a failed fetch leaves its slot empty"
        ill.clear()
        assert torch.equal(engine.compute(1, x, bad), resident(x, bad, made[1]))
        assert not engine.cache.table.busy.any()


def test_every_thread_that_waits_for_it_hears_of_a_failure():
    made, gate = weights(), threading.Event()

    def late(layer, expert, nth):
        gate.wait(30)
        raise ValueError("not an OSError")

    with Engine(Watched(host_store(made), late), 1.0, top_k=K) as engine:
        x, routing = batch(3)
        heard: list[BaseException] = []

        def ask() -> None:
            try:
                engine.compute(0, x, routing)
            except RuntimeError as error:
                heard.append(error)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for t in threads:
            t.start()
        assert soon(lambda: engine.stats().accesses == 3 * len(np.unique(routing.expert_ids)))
        gate.set()
        for t in threads:
            t.join(30)
    assert len(heard) == 3
    assert all("could not be read: not an OSError" in str(error) for error in heard)


@pytest.mark.parametrize("when", ["while it reads", "while it waits"])
def test_a_killed_reader_is_replaced(when):
    made = weights()
    killed = []

    def kill(layer, expert, nth):
        if when == "while it reads" and len(killed) < 2:
            killed.append(threading.current_thread())
            raise SystemExit

    with Engine(Watched(host_store(made), kill), "40%", top_k=K) as engine:
        if when == "while it waits":
            killed += offload_threads()
            for thread in killed:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
            assert soon(lambda: not any(t.is_alive() for t in killed))
        run(engine, made)
        assert engine.stats().restarts == 2


def test_a_reader_that_dies_with_its_expert_does_not_hang_the_step(monkeypatch):
    """It is gone without a word: nobody catches what kills it."""
    made = weights()
    with Engine(host_store(made), "40%", top_k=K) as engine:
        take, dead = engine._loader._take, []

        def vanish(me):
            load = take(me)
            if load is not None and len(dead) < 2 and load not in dead:  # a second time would be its last try
                dead.append(load)
                raise SystemExit
            return load

        monkeypatch.setattr(engine._loader, "_take", vanish)
        run(engine, made)
        assert len(dead) == engine.stats().restarts == 2


def test_patience_ends():
    made, gate = weights(), threading.Event()
    with Engine(Watched(host_store(made), lambda *_: gate.wait(30)), "40%", top_k=K, patience_s=0.5) as engine:
        x, routing = batch(1)
        with pytest.raises(TimeoutError, match=r"waited 0\.5 s for experts \d, \d of model\.0\.experts"):
            engine.compute(0, x, routing)
        gate.set()
        assert torch.equal(engine.compute(0, x, routing), resident(x, routing, made[0]))


@pytest.mark.parametrize("left", [0, 1, 2])
def test_a_step_that_is_left_early(left):
    """In the first wave or later: slots are free again, and what the cache counts on is right."""
    made = weights()
    with Engine(host_store(made), K * L * sum(t[0].nbytes for t in made[0].values()), top_k=K) as engine:
        for i in range(6):
            with closing(engine.step(i % L, np.arange(E))) as step:
                for _ in range(left + 1):
                    next(step)
            assert not engine.cache.table.busy.any()
            run(engine, made, steps=L, tokens=(1,))


def test_a_closed_engine_says_so():
    made, gate = weights(), threading.Event()
    engine = Engine(Watched(host_store(made), lambda *_: gate.wait(30)), "40%", top_k=K)
    x, routing = batch(2)
    heard = []

    def ask() -> None:
        with pytest.raises(RuntimeError, match="must be open") as caught:
            engine.compute(0, x, routing)
        heard.append(caught)

    thread = threading.Thread(target=ask)
    thread.start()
    assert soon(lambda: engine.stats().accesses > 0)
    threading.Timer(0.3, gate.set).start()
    engine.close()
    thread.join(30)
    assert heard
    engine.close()
    for call in (lambda: engine.compute(0, x, routing), lambda: engine.prefetch(0, [1])):
        with pytest.raises(RuntimeError, match="the engine must be open, got one that is closed"):
            call()


def test_a_forgotten_engine_ends_its_threads_and_lets_memory_go():
    made = weights()
    engine = Engine(host_store(made), "40%", top_k=K)
    run(engine, made, steps=3)
    threads, memory = offload_threads(), weakref.ref(engine.arena)
    assert len(threads) == 2
    del engine
    gc.collect()
    assert soon(lambda: not any(t.is_alive() for t in threads))
    assert memory() is None


def test_cannot_be_copied_and_does_not_survive_a_fork():
    with Engine(host_store(weights()), "40%", top_k=K) as engine:
        for way in (copy.deepcopy, copy.copy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot be copied or pickled"):
                way(engine)
        engine._loader.lock.acquire()  # as a reader might hold it just then
        pid = os.fork()
        if pid:
            engine._loader.lock.release()
        else:
            signal.alarm(20)
            try:
                engine.prefetch(0, [1])
            except RuntimeError as error:
                engine.close()  # nothing to end here, and nothing to wait for
                os._exit(17 if "process that made it" in str(error) else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 17


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"budget": "lots"}, 'budget must be bytes .*"8GiB"'),
        ({"budget": "0%"}, "budget must be .* above 0"),
        ({"scope": "rack"}, "scope must be one of layer, shared, got 'rack'"),
        ({"policy": "oracle"}, "name must be one of .*, got 'oracle'"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"readers": -1}, r"readers must be at least 1, or 0 for a HostStore \(page-locked, before a GPU\), got -1"),
    ],
)
def test_bad_settings(change, match):
    with pytest.raises(ValueError, match=match):
        Engine(host_store(weights()), **({"budget": "40%", "top_k": K} | change))


def test_bad_calls():
    made = weights()
    with Engine(host_store(made), "40%", top_k=K) as engine:
        x, routing = batch(2)
        with pytest.raises(ValueError, match=r"layer must be 0 \.\. 2, got 3"):
            engine.compute(3, x, routing)
        with pytest.raises(ValueError, match=r"routing must be over the 8 experts of model\.0\.experts, got 9"):
            engine.compute(0, x, Routing(routing.expert_ids, routing.weights, 9))
        with pytest.raises(IndexError, match="must be at least -1"):
            engine.compute(0, x, Routing(routing.expert_ids - 9, routing.weights, E))
        with pytest.raises(ValueError, match="ids must be distinct, rising and below 8"):
            next(engine.step(0, np.array([1, 1])))
        with pytest.raises(TypeError, match="dtype of rows"):
            engine.compute(0, x.double(), routing)
        run(engine, made, steps=6)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_everything_at_once(seed, tmp_path):
    """Reads that fail, readers that die, junk ahead, steps left early, in threads: right, or a failure with a name."""
    own = random.Random(seed)
    fails, dies, nap = own.choice([0, 0.02, 0.2]), own.choice([0, 0.03]), own.choice([0, 0.001, 0.003])
    made, wrong = weights(), []

    def trouble(layer, expert, nth):
        time.sleep(random.random() * nap)
        luck = random.random()
        if luck < fails:
            raise OSError(5, "bad sector")
        if luck < fails + dies:
            raise SystemExit

    def decide(number: int) -> None:
        mine, draw = random.Random(number), torch.Generator().manual_seed(number)
        for i in range(25):
            layer = mine.randrange(L)
            x, routing = batch(mine.choice([1, 1, 3, 20]), generator=draw)
            try:
                engine.prefetch(mine.randrange(L), mine.sample(range(E), 3))
                if i % 6 == 5:
                    with closing(engine.step(layer, np.unique(routing.expert_ids.numpy()))) as step:
                        next(step)
                elif not torch.equal(engine.compute(layer, x, routing), resident(x, routing, made[layer])):
                    wrong.append(f"thread {number}, step {i}")
            except Exception as error:
                if "could not be read" not in str(error):
                    wrong.append(f"thread {number}, step {i}: {error!r}")

    store = Watched(file_store(made, tmp_path / "x"), trouble)
    store = HostCache(store, own.choice([0.3, 0.8])) if own.random() < 0.3 else store
    budget, scope = own.choice([0.3, 0.4, 0.8]), own.choice(["layer", "shared"])
    with Engine(store, budget, scope=scope, top_k=K, readers=own.choice([1, 2, 3]), patience_s=60) as engine:
        threads = [threading.Thread(target=decide, args=(10 * seed + n,)) for n in range(own.choice([1, 2, 4]))]
        for t in threads:
            t.start()
        for t in threads:
            t.join(120)
        assert not any(t.is_alive() for t in threads)
        assert not wrong
        assert not engine.cache.table.busy.any()
