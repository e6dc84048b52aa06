"""The figures of eviction: what they are shares of, and that teaching by another's trace is really another's."""

from __future__ import annotations

import numpy as np
import pytest

from headgate.bench.offload.evict import closed, measure, renamed
from headgate.placement.caching.simulate import simulate
from headgate.placement.traces.generate import generate
from headgate.placement.traces.trace import Trace


def test_figures_of_a_trace_in_two_domains():
    trace = generate(layers=2, experts=16, top_k=2, tokens=800, domains=2, carry=0.9, repeat=0.2, length=50)
    domain = np.arange(800) * 2 // 800
    first = np.arange(800) % 400 < 200
    train, test = trace.select(first), trace.select(~first)
    figures = measure(train, test, (domain[first], domain[~first]), slots=(4,))[4]
    assert figures["lru"] == simulate(test, "lru", 4).hit_rate
    assert figures["learned"] == simulate(test, "learned", 4, fit=train).hit_rate
    gap = figures["belady"] - figures["lru"]
    assert figures["learned_gap"] * gap == pytest.approx(figures["learned"] - figures["lru"])
    assert {"home", "crossed", "crossed_bare", "crossed_adaptive", "renamed", "renamed_bare"} < figures.keys()
    assert abs(figures["shuffled"] - figures["adaptive_gap"]) > 0.05
    assert closed(0.5, {"lru": 0.7, "belady": 0.7}) == 0


def test_renamed_keeps_everything_but_the_names():
    ids = generate(layers=3, experts=16, top_k=2, tokens=100, skew=1.0).expert_ids.copy()
    ids[1, 3, 0] = 255
    trace = Trace(ids, 16)
    other = renamed(trace, seed=1)
    assert (other.live == trace.live).all()
    assert (other.expert_ids != ids).any(axis=(1, 2)).all()
    for layer in range(3):
        before, after = ids[layer].ravel(), other.expert_ids[layer].ravel()
        pairs = set(zip(before.tolist(), after.tolist(), strict=True))
        assert len(pairs) == len(set(before.tolist())) == len(set(after.tolist()))
