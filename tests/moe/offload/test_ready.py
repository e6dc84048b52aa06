"""What is made ready while a model is loaded: no compiling in a step, and threads that sleep while they wait."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import torch
from offload_cases import L, batch, file_store, weights

import headgate
from headgate.kernels import native
from headgate.moe.offload import Engine, ready
from headgate.placement.caching import cache, prefetch
from headgate.placement.caching.policies import POLICIES, step
from headgate.placement.traces.trace import Trace


def test_steps_of_every_policy_are_compiled_before_the_first(tmp_path):
    """Of each compiled function that a step calls from Python there is one form, for all policies and both scopes."""
    called = [cache.serve, cache.fetch_ahead, prefetch.admit, step.evicted, step.new_sequence]
    ready.compile_steps()
    before = [len(f.signatures) for f in called]
    assert all(before)
    made = weights()
    ids = np.random.default_rng(0).random((L, 50, 8)).argsort(2)[:, :, :2]
    trace = Trace(ids.astype(np.uint8), num_experts=8, sequence=np.arange(50, dtype=np.int32) // 10)
    for i, policy in enumerate(POLICIES):
        scope = ("layer", "shared")[i % 2]
        with Engine(file_store(made, tmp_path / "x"), "50%", policy=policy, scope=scope, trace=trace) as engine:
            for layer in (0, 1, 2, 0):
                x, routing = batch(3)
                engine.compute(layer, x, routing)
                engine.prefetch_likely((layer + 1) % L, np.full(8, 0.5, np.float32), 0.1, 4.0)
                engine.prefetch((layer + 1) % L, [1, 2])
            with engine._loader.lock:
                engine.cache.lose(0, int(np.flatnonzero(engine.cache.table.slot_of[0] >= 0)[0]))
            engine.new_sequence()
    assert [len(f.signatures) for f in called] == before


def test_it_is_compiled_beside_and_waited_for(stack, tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(ready, "compile_steps", lambda: (threading.Event().wait(0.3), done.append(1), 1 / 0))
    headgate.offload(stack, "40%", "lru", None, tmp_path).close()
    assert done, "a fault there is for whoever needs what was not compiled"


@pytest.mark.parametrize(
    ("processors", "computing", "said", "team"),
    [(2, 2, None, 2), (2, 1, None, 0), (4, 3, None, 3), (16, 16, None, 2), (16, 8, None, 0), (64, 64, None, 0),
     (2, 8, None, 2), (2, 2, "OMP_WAIT_POLICY", 0), (2, 2, "GOMP_SPINCOUNT", 0)],
)  # fmt: skip
def test_how_many_threads_openmp_is_given(monkeypatch, processors, computing, said, team):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    if said:
        monkeypatch.setenv(said, "1")
    monkeypatch.setattr(torch, "get_num_threads", lambda: computing)
    assert ready.team_size(processors) == team


def sleepers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "headgate-openmp"]


def test_they_end_with_the_engine(tmp_path, monkeypatch):
    if native.library() is None:
        pytest.skip("there is no compiled form here")
    monkeypatch.setattr(ready, "team_size", lambda processors: 2)
    engine = Engine(file_store(weights(), tmp_path / "x"), "50%")
    assert len(sleepers()) == 1
    engine.close()
    engine.close()
    assert not sleepers()


@pytest.mark.slow
def test_threads_that_wait_beside_readers_take_no_time(tmp_path):
    """Processor time of all threads while nothing is to be done after each of 30 products by two threads."""
    if native.library() is None or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("it takes the compiled form and two processors")
    script = textwrap.dedent(
        """
        import os, time, torch
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # where libgomp is not loaded yet, it counts two
        from headgate.moe.offload import ready
        torch.set_num_threads(2)
        a = torch.ones(400, 400)

        def spent():
            total = 0.0
            for _ in range(30):
                a @ a
                begun = time.process_time()
                time.sleep(0.01)
                total += time.process_time() - begun
            return total

        spent()
        spins = spent()
        sleepers = ready.Sleepers()
        spent()
        sleeps = spent()
        sleepers.close()
        spent()
        print(spins, sleeps, spent())
        """
    )
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    spins, sleeps, again = map(float, done.stdout.split())
    assert sleeps < spins / 3, done.stdout
    assert sleeps < again / 3, done.stdout
