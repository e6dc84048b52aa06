"""Generation with experts in host memory as it is measured beside a GPU: here small, with the CPU in its place."""

from __future__ import annotations

import numpy as np
import pytest

from headgate import cli
from headgate.bench.offload import generation
from headgate.bench.offload.command import EXPERTS
from headgate.bench.offload.model import ON_GPU, Size
from headgate.moe.offload.stats import common, length, merged
from headgate.placement.caching.simulate import simulate
from headgate.placement.traces.generate import generate


def test_tokens_and_hits_are_right(monkeypatch, capsys):
    monkeypatch.setattr(generation, "TOKENS", 16)
    monkeypatch.setattr(generation, "WARM", 4)
    trace = generate(layers=2, experts=8, top_k=2, tokens=400, repeat=0.3, length=50)
    fit, judge = trace.select(range(200)), trace.select(range(200, 400))
    settings = {n: generation.SETTINGS[n] for n in ("lru", "adaptive + path", "adaptive + path, int8")}
    said: list[str] = []
    found = generation.measure_on_gpu(fit, judge, Size(64, 16, 2), settings=settings, device="cpu", say=said.append)
    assert list(found) == ["resident", "on demand", "lru", "adaptive + path"]
    assert len(said) == 5
    assert found["lru"].same
    assert found["adaptive + path"].same
    # the last of three rounds, each with the tokens that generate() asks the model for
    tokens = slice(4 + 2 * 16, 4 + 3 * 16)
    whole = simulate(judge.select(range(tokens.stop)), "lru", 2)
    before = simulate(judge.select(range(tokens.start)), "lru", 2)
    hits = np.sum(whole.hits - before.hits) / np.sum(whole.accesses - before.accesses)
    assert found["lru"].hit_rate == found["on demand"].hit_rate == pytest.approx(hits)


def test_a_device_that_is_not_there(capsys):
    assert cli.main(["bench", "offload", "--rows", "generation", "--device", "tpu"]) == 2
    assert "--device must be cpu, or cuda on a machine with a GPU that torch sees, got tpu" in capsys.readouterr().err


def test_the_sizes_have_names():
    assert tuple(ON_GPU) == EXPERTS


def test_time_in_common():
    a, b = merged([(4, 6), (0, 2), (1, 3), (3, 3.5)]), merged([(2, 5), (5.5, 9)])
    assert a == [(0, 3.5), (4, 6)]
    assert length(a) == 5.5
    assert common(a, b) == common(b, a) == 1.5 + 1 + 0.5
    assert common(a, []) == 0
