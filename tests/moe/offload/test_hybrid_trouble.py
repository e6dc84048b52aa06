"""Hybrid execution when something goes wrong: errors reach the step that they belong to, and threads end."""

from __future__ import annotations

import ctypes
import gc
import threading

import pytest
import torch
from hybrid_cases import ALL, MIXED, NONE, Slow, host_threads
from offload_cases import D, E, K, batch, resident, run, soon, weights

from headgate.kernels.routing import Routing
from headgate.moe.offload import Engine, passes

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


def test_what_the_host_cannot_do_its_step_says():
    made = weights()
    x, routing = batch(3)
    with Engine(Slow(made), "40%", top_k=K, costs=ALL) as engine:
        for _ in range(3):
            with pytest.raises(TypeError, match="dtype of rows"):
                engine.compute(0, x.double(), routing)
            assert torch.equal(engine.compute(0, x, routing), resident(x, routing, made[0]))
        assert len(host_threads()) == 1


@pytest.mark.parametrize("how", [MemoryError("no room"), SystemExit(3)], ids=["error", "exit"])
def test_an_error_goes_to_its_own_step_alone(how, monkeypatch):
    made, gate, write = weights(), threading.Event(), passes.write_outputs

    def cough(group, rows, *rest, **named):
        gate.wait(30)
        if len(rows) == 7:
            raise how
        write(group, rows, *rest, **named)

    monkeypatch.setattr(passes, "write_outputs", cough)
    heard: dict[int, object] = {}
    with Engine(Slow(made), "40%", top_k=K, costs=ALL) as engine:

        def ask(tokens: int) -> None:
            x, routing = batch(tokens)
            try:
                heard[tokens] = torch.equal(engine.compute(0, x, routing), resident(x, routing, made[0]))
            except (MemoryError, RuntimeError) as error:
                heard[tokens] = str(error)

        threads = [threading.Thread(target=ask, args=(n,)) for n in (3, 7, 5)]
        for t in threads:
            t.start()
        assert soon(lambda: len(engine._host._jobs) == 3)
        gate.set()
        for t in threads:
            t.join(30)
    assert heard.pop(7) in ("no room", "offload: experts could not be computed by the host: SystemExit(3)")
    assert heard == {3: True, 5: True}


@pytest.mark.parametrize("when", ["while it waits", "while it computes"])
def test_a_killed_thread_is_replaced(when, monkeypatch):
    made, write, killed = weights(), passes.write_outputs, []
    x, routing = batch(3)
    with Engine(Slow(made), "40%", top_k=K, costs=ALL) as engine:
        assert torch.equal(engine.compute(0, x, routing), resident(x, routing, made[0]))
        (thread,) = host_threads()
        if when == "while it waits":
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
            assert soon(lambda: not thread.is_alive())
        else:
            end = engine._timing.end_computing

            def vanish() -> None:
                end()
                if not killed:
                    killed.append(threading.current_thread())
                    raise SystemExit

            monkeypatch.setattr(engine._timing, "end_computing", vanish)
            with pytest.raises(RuntimeError, match="the thread that computes on the host has died"):
                engine.compute(0, x, routing)
            assert killed == [thread]
        assert torch.equal(engine.compute(0, x, routing), resident(x, routing, made[0]))
        assert host_threads() != [thread]
    assert passes.write_outputs is write


def test_an_expert_that_cannot_be_read_beside_the_host():
    made = weights()

    def sick(layer, expert):
        raise OSError(5, "bad sector")

    x, chosen = torch.randn(1, D), Routing.from_topk(torch.tensor([[2, 3]]), torch.ones(1, 2), E)
    with Engine(Slow(made, sick), "40%", top_k=K, costs=MIXED) as engine:
        for _ in range(3):
            with pytest.raises(OSError, match=r"expert \d of model\.0\.experts .* could not be read: .*bad sector"):
                engine.compute(0, x, chosen)
        assert engine.stats().host == 3
        assert not engine.cache.table.busy.any()


def test_patience_ends(monkeypatch):
    made, gate, write = weights(), threading.Event(), passes.write_outputs
    monkeypatch.setattr(passes, "write_outputs", lambda *a, **k: (gate.wait(30), write(*a, **k)))
    x, routing = batch(1)
    with Engine(Slow(made), "40%", top_k=K, costs=ALL, patience_s=0.3) as engine:
        with pytest.raises(TimeoutError, match=r"waited 0\.3 s for experts that the host computes"):
            engine.compute(0, x, routing)
        gate.set()
        assert torch.equal(engine.compute(0, x, routing), resident(x, routing, made[0]))


def test_close_while_the_host_computes(monkeypatch):
    """What is at work ends, what waits is told, and nothing can be asked any more."""
    made, gate, write, heard = weights(), threading.Event(), passes.write_outputs, []
    monkeypatch.setattr(passes, "write_outputs", lambda *a, **k: (gate.wait(30), write(*a, **k)))
    engine = Engine(Slow(made), "40%", top_k=K, costs=ALL)
    x, routing = batch(2)

    def ask() -> None:
        with pytest.raises(RuntimeError, match="must be open, got one that is closed"):
            engine.compute(0, x, routing)
        heard.append(1)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for t in threads:
        t.start()
    assert soon(lambda: len(engine._host._jobs) == 3)
    threading.Timer(0.3, gate.set).start()
    engine.close()
    for t in threads:
        t.join(30)
    assert len(heard) == 3
    assert not host_threads()
    assert not engine._host._jobs, "they keep rows and outputs"
    engine.close()
    with pytest.raises(RuntimeError, match="must be open"):
        engine.compute(0, x, routing)


def test_a_thread_only_where_there_is_work_for_it():
    made = weights()
    with Engine(Slow(made), "40%", top_k=K, costs=NONE) as engine:
        run(engine, made, steps=3)
        assert not host_threads()
    engine = Engine(Slow(made), "40%", top_k=K, costs=ALL)
    run(engine, made, steps=3)
    (thread,) = host_threads()
    del engine
    gc.collect()
    assert soon(lambda: not thread.is_alive())
